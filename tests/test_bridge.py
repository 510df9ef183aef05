"""bridge.py: the recipe's accounts, the commands it runs, its report, and what a kill leaves."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import redirect_stdout, suppress
from pathlib import Path
from subprocess import DEVNULL

import pytest
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

import bridge
import eval_math
import fkl_warmup
import grpo
import opd

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "grpo.py": grpo,
    "fkl_warmup.py": fkl_warmup,
    "opd.py": opd,
    "eval_math.py": eval_math,
}
STEPS = "--teacher-rl-steps --fkl-steps --opd-steps --student-rl-steps".split()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def problems_of(path):
    return [row["problem"] for row in lines_of(path)]


def own_data(folder, train=24):
    """The flags of a small world: two updates a step."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in ("train", train), ("val", 4), ("test", 8), ("prompts", 12):
        source = (ROOT / f"tiny/{'pool' if name == 'prompts' else name}.jsonl").read_text()
        (folder / f"{name}.jsonl").write_text("".join(source.splitlines(True)[:count]))
    data = ["--data", "train", "--val-data", "val", "--test-data", "test", "--prompts", "prompts"]
    flags = [part if part[0] == "-" else str(folder / f"{part}.jsonl") for part in data]
    return flags + [part for flag in STEPS for part in (flag, "2")]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts catches it."""


LAUNCH = bridge.launch


def in_process(launched, deadly=None):
    """A launch() without processes, on two problems a step; it dies in the deadly-th one."""

    def launch(command):
        small = ["--n", "2"] if "eval_math" in command[1] else ["--prompts-per-step", "2"]
        small += ["--max-new-tokens", "40", "--device", "cpu"]
        if "eval_math" not in command[1]:
            small += ["--samples-per-prompt", "2", "--save-every", "1"]
        launched.append(command[command.index("--out") + 1])
        with pytest.MonkeyPatch.context() as patch:
            if len(launched) - 1 == deadly:  # at its second checkpoint; an evaluation, at once
                script, saves = SCRIPTS[command[1]], []
                save = getattr(script, "save", None)
                if save is None:
                    raise Killed

                def dies(path, *args):
                    saves.append(path.name)
                    if saves.count("checkpoint") == 2:
                        raise Killed
                    save(path, *args)

                patch.setattr(script, "save", dies)
            try:
                SCRIPTS[command[1]].main(command[2:] + small)
            except SystemExit as stop:
                return stop.code
        return 0

    return launch


# --- the commands ---------------------------------------------------------------------------------


def commands_of(printed):
    """[(script, its arguments)] of a dry run."""
    found = []
    for line in printed.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:])
            at = next(i for i, word in enumerate(words) if word in SCRIPTS)
            found.append((words[at], words[at + 1 :]))
    return found


def always(loaded):
    return types.SimpleNamespace(from_pretrained=lambda _: loaded)


def parsed(commands, monkeypatch, config):
    """{name of the step: its settings}, read by the scripts themselves; no model is there yet."""
    found = {}
    for script, arguments in commands:
        monkeypatch.setattr(SCRIPTS[script], "AutoConfig", always(config))
        monkeypatch.setattr(SCRIPTS[script], "model_path", str)
        args = SCRIPTS[script].parse_arguments(arguments)[0]
        args.script = script
        args.updates = getattr(args, "steps", 0) * getattr(args, "updates_per_step", 1)
        found[str(Path(args.out).relative_to("x"))] = args
    return found


@pytest.fixture(scope="module", params=["tiny", "paper"])
def plan(request):
    """Every step of every arm, of the tiny recipe and of the paper's, as the scripts read it."""
    more = []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(ROOT)
        config = AutoConfig.from_pretrained("tiny/student")
        if request.param == "paper":
            config = Qwen3Config(num_hidden_layers=4)  # more than 10 M parameters
            tokenizer = AutoTokenizer.from_pretrained("tiny/student")
            patch.setattr(bridge, "AutoTokenizer", always(tokenizer))
            rows = [{"prompt": [{"content": f"{i}+1"}], "answer": f"{i + 1}"} for i in range(2000)]
            patch.setitem(sys.modules, "datasets", fake_datasets(rows))
            more = ["--teacher", "Qwen/Qwen3-8B", "--student", "Qwen/Qwen3-1.7B"]
        patch.setattr(grpo, "AutoConfig", always(config))
        bridge.main(["--dry-run", "--arms", "all", "--out", "x", "--seed", "7", *more])
        assert not Path("x").exists()
        commands = commands_of(printed.getvalue())
        assert len(commands) == 12 + 14 * (1 if request.param == "tiny" else 3)
        return parsed(commands, patch, config)


def fake_datasets(rows):
    class Rows(list):
        def train_test_split(self, test_size, seed):
            assert (test_size, seed) == (0.2, 42)
            cut = int(0.8 * len(self))
            return {"train": Rows(self[:cut]), "test": Rows(self[cut:])}

    return types.SimpleNamespace(load_dataset=lambda name, split: Rows(rows))


def training(plan):
    return {name: args for name, args in plan.items() if args.script != "eval_math.py"}


def test_every_command_is_understood_by_its_script(plan):
    assert set(training(plan)) == {step for steps in bridge.ARMS.values() for step in steps}
    assert {args.seed for args in plan.values()} == {7}
    assert len({args.preset for args in plan.values()}) == 1
    steps = training(plan)
    assert all(steps[name].script == "grpo.py" for name in ("1-teacher-rl", "direct"))
    # What goes from step to step.
    assert steps["2a-fkl"].teacher == "x/1-teacher-rl/best"
    assert steps["2b-opd"].teacher == "x/1-teacher-rl/best"
    assert steps["2b-opd"].student == "x/2a-fkl/final"
    assert steps["3-student-rl"].model == "x/2b-opd/final"
    for name in ("direct", "cold-student-rl"):
        assert steps[name].model == steps["2a-fkl"].student
    assert steps["raw-fkl"].teacher == steps["raw-opd"].teacher == steps["1-teacher-rl"].model
    assert steps["raw-opd"].student == "x/raw-fkl/final"
    for name in ("only-opd", "only-fkl"):
        assert steps[name].student == steps["2a-fkl"].student
        assert steps[name].teacher == steps["2a-fkl"].teacher
    for name in ("replay", "more-opd"):
        assert steps[name].student == "x/2b-opd/final"
    assert steps["replay"].rollouts == "x/2a-fkl/rollouts.jsonl"


def test_arms_are_matched_in_updates_and_rollouts(plan):
    steps = training(plan)
    one, two, three = steps["1-teacher-rl"], steps["2a-fkl"], steps["3-student-rl"]
    assert steps["direct"].updates == one.updates + three.updates
    for name in ("only-opd", "only-fkl"):
        assert steps[name].updates == two.updates + steps["2b-opd"].updates
    assert (steps["raw-fkl"].updates, steps["raw-opd"].updates) == (
        two.updates,
        steps["2b-opd"].updates,
    )
    assert steps["cold-student-rl"].updates == three.updates

    def rollouts(args):
        return args.prompts_per_step * args.samples_per_prompt * args.steps

    for name in ("replay", "more-opd"):
        assert steps[name].updates == three.updates
        assert rollouts(steps[name]) == rollouts(three)


def test_no_label_goes_where_it_must_not(plan):
    steps = training(plan)
    labels = {name: Path(args.data).name for name, args in steps.items() if hasattr(args, "model")}
    assert labels == {
        "1-teacher-rl": "a.jsonl",
        "3-student-rl": "b.jsonl",
        "direct": "a+b.jsonl",
        "cold-student-rl": "b.jsonl",
    }
    order = list(steps)
    assert order.index("3-student-rl") > max(map(order.index, bridge.BRIDGE))
    for name, args in steps.items():
        assert args.val_data == f"x/data/{'val' if name in labels else 'val-prompts'}.jsonl"
        if name not in labels:
            assert args.data == "x/data/prompts.jsonl"


def test_the_test_file_reaches_the_evaluation_and_nothing_else(plan):
    evaluations = [args for args in plan.values() if args.script == "eval_math.py"]
    tests = {args.data for args in evaluations}
    assert tests in ({"tiny/test.jsonl"}, {"math500", "aime24", "aime25"})
    for args in training(plan).values():
        assert not tests & set(map(str, vars(args).values()))
    # Every model is evaluated on every test: the two that are there before, and each step's.
    assert len(evaluations) == len(tests) * (2 + len(training(plan)))
    for name, args in training(plan).items():
        kept = "best" if args.script == "grpo.py" else "final"
        assert sum(e.model == f"x/{name}/{kept}" for e in evaluations) == len(tests)


def test_flags_pass_through(capsys):
    more = "--teacher-rl-steps 8 --student-rl-steps 4 --nproc 2".split()
    more += "--fkl-steps 3 --fkl-lr 0.5 --opd-lr 0.25".split()
    bridge.main(["--dry-run", "--out", "x", *more])
    printed = capsys.readouterr().out
    commands = {arguments[-1]: arguments for _, arguments in commands_of(printed)}
    assert "--steps 3 --lr 0.5" in " ".join(commands["x/2a-fkl"])
    assert "--lr 0.25" in " ".join(commands["x/2b-opd"])
    assert "--steps 12" in " ".join(commands["x/direct"])  # 8 of step 1, 4 of step 3


def test_torchrun_stands_before_every_step(capsys, monkeypatch):
    """One process needs none; and what follows is the same command."""
    alone, both = [], []
    for nproc, commands in ("0", alone), ("1", []), ("2", both):
        bridge.main(["--dry-run", "--out", "x", "--arms", "all", "--nproc", nproc])
        printed = capsys.readouterr().out
        lines = [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("$ ")]
        commands += commands_of(printed)
        for words in lines:
            before = words[: next(i for i, word in enumerate(words) if word in SCRIPTS)]
            if nproc == "2":
                assert Path(before[0]).name == "torchrun"
                assert before[1:] == ["--standalone", "--nproc-per-node", "2", "--"]
            else:
                assert before == [sys.executable]
    assert both == alone and len(both) == 26
    parsed(both, monkeypatch, AutoConfig.from_pretrained("tiny/student"))


@pytest.mark.parametrize(
    ("more", "gone"),
    [
        (["--skip-teacher-rl"], {"1-teacher-rl"}),
        (["--skip-student-rl"], {"3-student-rl"}),
    ],
)
def test_one_can_bring_ones_own(more, gone, capsys):
    arms = [arm for arm in bridge.ARMS if arm != "raw-teacher"]  # who would be the one before RL?
    bridge.main(["--dry-run", "--out", "x", "--arms", *arms])
    whole = commands_of(capsys.readouterr().out)
    bridge.main(["--dry-run", "--out", "x", "--arms", *arms, *more])
    commands = {arguments[-1]: arguments for _, arguments in commands_of(capsys.readouterr().out)}
    missing = {arguments[-1] for _, arguments in whole} - set(commands)
    assert {name for name in missing if "eval" not in name} == {f"x/{name}" for name in gone}
    teacher = commands["x/2a-fkl"][commands["x/2a-fkl"].index("--teacher") + 1]
    assert teacher == ("tiny/teacher" if "1-teacher-rl" in gone else "x/1-teacher-rl/best")


# --- the labels -----------------------------------------------------------------------------------


def splits_of(flags):
    tokenizer = AutoTokenizer.from_pretrained("tiny/student")
    return bridge.split_problems(bridge.parse_arguments(flags), tokenizer)


def split(folder, *more):
    return splits_of([*own_data(folder), *more])


def test_the_split(tmp_path):
    splits = split(tmp_path)
    rows = [json.dumps(row) for row in splits["A"] + splits["B"]]
    assert sorted(rows) == sorted(map(json.dumps, lines_of(tmp_path / "train.jsonl")))
    assert splits["A+B"] == splits["A"] + splits["B"] and len(splits["A"]) == len(splits["B"])
    assert splits["VAL"] == lines_of(tmp_path / "val.jsonl")
    for name, source in ("PROMPTS", "prompts"), ("VAL-PROMPTS", "val"):
        assert [row["problem"] for row in splits[name]] == problems_of(tmp_path / f"{source}.jsonl")
        assert all(set(row) == {"problem"} for row in splits[name])
    assert split(tmp_path) == splits
    assert split(tmp_path, "--seed", "1")["A"] != splits["A"]


def test_a_label_counts_once(tmp_path):
    """Twins would put a label of B into A; a problem of --val-data is no label of training."""
    flags = own_data(tmp_path)
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text(2 * train.read_text() + val.read_text())
    splits = splits_of(flags)
    problems = [row["problem"] for row in splits["A+B"]]
    assert len(problems) == len(set(problems)) == 24
    assert not set(problems) & set(problems_of(val))


def test_problems_of_the_test_file_among_the_labels_are_told(tmp_path, capsys):
    flags = own_data(tmp_path)
    splits_of(flags)
    assert "warning" not in capsys.readouterr().out
    train, val, test = (tmp_path / f"{name}.jsonl" for name in ("train", "val", "test"))
    lines = [path.read_text().splitlines(keepends=True)[:2] for path in (train, val)]
    too_long = json.dumps({"problem": "1+" * 200 + "1", "answer": "201"}) + "\n"
    test.write_text(test.read_text() + "".join(lines[0] + lines[1]) + too_long)
    (tmp_path / "math500").mkdir()  # is a benchmark's name all the same
    flags.insert(flags.index("--test-data") + 1, str(tmp_path / "math500"))
    splits_of(flags)
    printed = capsys.readouterr().out
    assert f"warning: 4 problems of {test} are in --data or --val-data" in printed
    assert "skipped" not in printed  # what the evaluation does with it is its own business


def test_without_prompts_the_problems_of_the_data_are_taken(tmp_path):
    flags = own_data(tmp_path)
    flags = flags[: flags.index("--prompts")] + flags[flags.index("--prompts") + 2 :]
    splits = splits_of(flags)
    assert splits["PROMPTS"] == [{"problem": row["problem"]} for row in splits["A+B"]]


def test_the_papers_data(monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}"}], "reward_model": {"ground_truth": f"{i}"}}
        for i in range(2000)
    ]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows))
    args = types.SimpleNamespace(data=None, prompts=None, seed=0)
    splits = bridge.split_problems(args, None)
    assert splits["A"] == rows[:1600]
    assert splits["VAL"] == rows[1600:1856] and splits["B"] == rows[1856:]
    assert splits["PROMPTS"] == [{"prompt": row["prompt"]} for row in rows[:1600] + rows[1856:]]


# --- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All arms, two updates a step: (directory, flags, what was launched, what was printed)."""
    folder = tmp_path_factory.mktemp("whole")
    flags, launched = own_data(folder), []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(ROOT)
        patch.setattr(bridge, "launch", in_process(launched))
        bridge.main([*flags, "--arms", "all", "--out", str(folder / "run")])
    return folder / "run", flags, launched, printed.getvalue()


def test_all_arms_run_and_each_step_once(whole):
    run, _, launched, printed = whole
    assert len(launched) == len(set(launched)) == 12 + 2 + 12
    assert printed.count("minutes to go") == 12 and "about 0.0 minutes to go" in printed
    table = (run / "table.md").read_text()
    said = [float(minutes) for minutes in re.findall(r"about ([\d.]+) minutes", printed)]
    assert said[0] > said[-1] == 0
    assert table in printed
    for arm in bridge.ARMS:
        assert f"| **{arm}** |" in table
    assert "avg@2, test" in table and "greedy, test" in table
    assert (run / "curves.png").read_bytes()[1:4] == b"PNG"
    results = json.loads((run / "results.json").read_text())
    for arm, row in results["arms"].items():
        (numbers,) = row["test"].values()
        assert set(numbers) == {"avg@2", "greedy"}
        last = bridge.ARMS[arm][-1]
        measured = json.loads((run / f"eval/{last}-test/results.json").read_text())["metrics"]
        assert numbers["greedy"] == measured["greedy"]
        cell = "{mean:.3f} ({low:.3f} to {high:.3f})"
        both = (cell.format(**measured[key]) for key in ("avg@2", "greedy"))
        assert f"| **{arm}** | {' | '.join(both)} |" in table
        assert row["cost"]["minutes"] > 0 and row["cost"]["rollout tokens"] > 0
    tokens = {arm: row["cost"]["rollout tokens"] for arm, row in results["arms"].items()}
    assert tokens["replay"] == tokens["bridge"] < tokens["more-opd"]


def test_the_time_to_go(tmp_path, monkeypatch, capsys):
    """With a minute for each step of training and two for each evaluation."""
    monkeypatch.chdir(ROOT)
    clock, flags = [0.0], own_data(tmp_path)
    counts = {"--teacher-rl-steps": 2, "--fkl-steps": 3, "--opd-steps": 5, "--student-rl-steps": 7}
    flags += [str(part) for pair in counts.items() for part in pair]

    def launch(command):
        training = "--steps" in command
        clock[0] += 60 * int(command[command.index("--steps") + 1]) if training else 120
        (Path(command[command.index("--out") + 1]) / "final").mkdir(parents=True)
        return 0

    monkeypatch.setattr(bridge, "launch", launch)
    monkeypatch.setattr(bridge, "report", lambda *_: None)
    monkeypatch.setattr(bridge.time, "time", lambda: clock[0])
    bridge.main([*flags, "--arms", "recipe", "--out", str(tmp_path / "run")])
    said = re.findall(r"about ([\d.]+) minutes to go", capsys.readouterr().out)
    assert said == ["23.0", "18.0", "11.0", "2.0"]  # behind each step its evaluation and the rest


def test_the_curves_are_those_of_the_metrics(whole, again, monkeypatch):
    figures = []
    monkeypatch.setattr(
        bridge, "Figure", lambda **more: figures.append(Figure(**more)) or figures[0]
    )
    bridge.main(again[0])
    accuracy, reward, kl = figures[0].axes
    results, drawn = json.loads((whole[0] / "results.json").read_text()), []
    for axis, key in (reward, "reward"), (kl, "kl"):
        for line in axis.lines:
            rows = lines_of(whole[0] / line.get_label() / "metrics.jsonl")
            assert list(line.get_xdata()) == [row["step"] for row in rows]  # an update each
            assert list(line.get_ydata()) == [row[key] for row in rows]
            drawn.append(line.get_label())
    assert len(drawn) == len(set(drawn)) == 12
    ends = {line.get_label(): line.get_ydata()[-1] for line in accuracy.lines}
    for arm, row in results["arms"].items():
        (numbers,) = row["test"].values()
        assert ends[arm] == numbers["avg@2"]["mean"]


def test_what_each_arm_has_used(whole):
    results = json.loads((whole[0] / "results.json").read_text())
    for row in results["arms"].values():
        steps = [whole[0] / step / "metrics.jsonl" for step in row["steps"]]
        seconds = sum(line["seconds"] for path in steps for line in lines_of(path))
        assert row["cost"]["minutes"] == pytest.approx(seconds / 60)
    names = ("labels", "validation", "updates", "dense updates")
    used = {arm: [row["cost"][n] for n in names] for arm, row in results["arms"].items()}
    assert used == {  # two problems a step here, so that two steps see four labels
        "recipe": [8, 4, 4, 4],
        "bridge": [4, 4, 2, 4],
        "direct": [8, 4, 4, 0],
        "raw-teacher": [0, 0, 0, 4],
        "no-warmup": [4, 4, 2, 4],
        "no-opd": [4, 4, 2, 4],
        "replay": [4, 4, 2, 6],
        "more-opd": [4, 4, 2, 6],
        "cold-stage-3": [4, 4, 2, 0],
    }
    run = whole[0]
    a, b = (set(problems_of(run / f"data/{name}.jsonl")) for name in "ab")
    assert not a & b and len(a | b) == 24
    seen = {p.parent.name: problems_of(p) for p in run.glob("*/samples.jsonl")}
    assert set(seen["1-teacher-rl"]) <= a and set(seen["3-student-rl"]) <= b
    for step in ("2a-fkl", "2b-opd", "raw-fkl", "more-opd"):
        assert set(seen[step]) <= set(problems_of(run / "data/prompts.jsonl"))


@pytest.fixture
def again(whole, tmp_path, monkeypatch):
    """(flags of the finished run, what is launched from now on); afterwards all is as before."""
    run, flags, launched = whole[0], whole[1], []
    shutil.copytree(run, tmp_path / "kept")
    monkeypatch.setattr(bridge, "launch", in_process(launched))
    yield [*flags, "--arms", "all", "--out", str(run)], launched
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "kept", run)


def names_of(launched, run):
    return [str(Path(out).relative_to(run)) for out in launched]


def test_what_is_done_is_not_done_again(whole, again, capsys):
    flags, launched = again
    bridge.main(flags)
    assert launched == []
    printed = capsys.readouterr().out
    assert printed.count("done before") == 26 and "runs again" not in printed
    assert (whole[0] / "table.md").read_text() in printed


def test_other_settings_run_anew_with_what_depends_on_them(whole, again, capsys):
    flags, launched = again
    before = (whole[0] / "2b-opd/final/model.safetensors").read_bytes()
    bridge.main([*flags, "--opd-lr", "0.001", "--arms", "recipe", "direct", "no-opd"])
    steps = ["2b-opd@2", "3-student-rl@2"]
    evaluations = ["eval/2b-opd-test@2", "eval/3-student-rl-test@2"]
    assert sorted(names_of(launched, whole[0])) == sorted(steps + evaluations)
    printed = capsys.readouterr().out
    was = bridge.SETTINGS["--opd-lr"][0]
    assert "2b-opd runs again" in printed and f"--lr was {was}" in printed
    assert f"--model was {whole[0]}/2b-opd/final" in printed
    assert (whole[0] / "2b-opd/final/model.safetensors").read_bytes() == before
    results = json.loads((whole[0] / "results.json").read_text())
    (numbers,) = results["arms"]["recipe"]["test"].values()
    measured = json.loads((whole[0] / "eval/3-student-rl-test@2/results.json").read_text())
    assert numbers["avg@2"] == measured["metrics"]["avg@2"]
    launched.clear()  # and back to what stands there still
    bridge.main([*flags, "--arms", "recipe", "direct", "no-opd"])
    assert launched == []


def test_what_stands_beside_the_data_is_no_reason_to_run_anew(tmp_path, monkeypatch):
    """There is a folder of the preset's name."""
    monkeypatch.chdir(tmp_path)
    args, flags = (
        types.SimpleNamespace(out=tmp_path),
        {"--preset": "tiny", "--data": "tiny/a.jsonl"},
    )
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/a.jsonl").write_text("1")
    assert bridge.place(args, "2b-opd", "opd.py", flags) == tmp_path / "2b-opd"
    (tmp_path / "tiny/README.md").write_text("new")
    assert bridge.place(args, "2b-opd", "opd.py", flags) == tmp_path / "2b-opd"
    (tmp_path / "tiny/a.jsonl").write_text("2")
    assert bridge.place(args, "2b-opd", "opd.py", flags) == tmp_path / "2b-opd@2"


def test_edited_kernels_and_another_model_run_anew(tmp_path, monkeypatch):
    for name in ("bridge.py", "opd.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    model = shutil.copytree(ROOT / "tiny/student", tmp_path / "model")
    monkeypatch.setattr(bridge, "__file__", str(tmp_path / "bridge.py"))
    args, flags = types.SimpleNamespace(out=tmp_path), {"--student": str(model)}
    places = [bridge.place(args, "2b-opd", "opd.py", flags)]
    with (tmp_path / "kernels/reference.py").open("a") as kernel:
        kernel.write("CHUNK = 1\n")
    places.append(bridge.place(args, "2b-opd", "opd.py", flags))
    shutil.copy(ROOT / "tiny/teacher/model.safetensors", model)
    places.append(bridge.place(args, "2b-opd", "opd.py", flags))
    assert places == [tmp_path / name for name in ("2b-opd", "2b-opd@2", "2b-opd@3")]


def test_other_data_run_anew(whole, again, capsys):
    flags, launched = again
    train = whole[0].parent / "train.jsonl"
    kept = train.read_text()
    train.write_text("".join(kept.splitlines(True)[:22]))
    bridge.main([*flags, "--arms", "bridge", "raw-teacher"])
    train.write_text(kept)
    assert "data/a.jsonl was" in capsys.readouterr().out
    anew = ["1-teacher-rl@2", "2a-fkl@2", "2b-opd@2"]
    assert [name for name in names_of(launched, whole[0]) if "eval" not in name] == anew


def test_an_edited_script_runs_anew_but_not_for_a_comment(again, tmp_path, monkeypatch, capsys):
    flags, launched = again
    for name in (*SCRIPTS, "bridge.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(bridge, "__file__", str(tmp_path / "bridge.py"))
    source = (ROOT / "opd.py").read_text()
    (tmp_path / "opd.py").write_text(f"# a comment\n{source}")
    bridge.main(flags)
    assert launched == []
    (tmp_path / "opd.py").write_text(f"{source}\nEDITED = True\n")
    monkeypatch.setattr(bridge, "launch", lambda command: 3)
    with pytest.raises(SystemExit):
        bridge.main(flags)
    printed = capsys.readouterr()
    assert "2b-opd runs again" in printed.out and "opd.py was" in printed.out
    assert "2a-fkl runs again" not in printed.out
    (tmp_path / "opd.py").write_text("def broken(:")
    with pytest.raises(SystemExit) as stop:
        bridge.main(flags)
    assert stop.value.code == 2 and "(opd.py, line 1)" in capsys.readouterr().err


def test_two_processes(whole, again, monkeypatch):
    """A step and its evaluation by torchrun; how many processes is no setting of theirs."""
    flags, launched = again
    for name in ("cold-student-rl", "eval/cold-student-rl-test"):
        shutil.rmtree(whole[0] / name)
    monkeypatch.setattr(bridge, "launch", lambda c: launched.append(c[0]) or LAUNCH(c))
    bridge.main([*flags, "--arms", "cold-stage-3", "--nproc", "2"])
    assert [Path(word).name for word in launched] == ["torchrun"] * 2
    assert "| **cold-stage-3** |" in (whole[0] / "table.md").read_text()
    metrics = lines_of(whole[0] / "cold-student-rl/metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]


def same_run(one, other):
    """The same weights, tables and numbers, whatever the time that it took."""
    for path in sorted(one.glob("*/*/model.safetensors")):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path
    numbers = []
    for run in (one, other):
        results = json.loads((run / "results.json").read_text())
        for arm in results["arms"].values():
            arm["cost"].pop("minutes")
            arm["model"] = Path(arm["model"]).relative_to(run)
            arm["test"] = list(arm["test"].values())
        numbers.append(results["arms"])
    assert numbers[0] == numbers[1]


def test_a_kill_between_and_inside_steps_changes_no_bit(tmp_path, monkeypatch):
    flags, launched = own_data(tmp_path), []
    flags += ["--arms", "recipe"]
    monkeypatch.setattr(bridge, "launch", in_process(launched))
    bridge.main([*flags, "--out", str(tmp_path / "whole")])
    count = len(launched)
    for _ in range(count):  # the first launch of each life ends, the second one is killed
        lived = []
        monkeypatch.setattr(bridge, "launch", in_process(lived, deadly=1))
        try:
            bridge.main([*flags, "--out", str(tmp_path / "killed")])
            break
        except Killed:
            assert len(lived) == 2
    assert len(lived) == 1  # all but the first and the last have been killed once
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def begin():
    """Starts commands, each a group of processes; none of them outlives the test."""
    started = []

    def start(command, log):
        options = {"cwd": ROOT, "stderr": DEVNULL}
        with log.open("w") as file:
            started.append(
                subprocess.Popen(command, stdout=file, start_new_session=True, **options)
            )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def child_of(process):
    return int(subprocess.check_output(["pgrep", "-P", str(process.pid)]))


def test_sigkill(tmp_path, begin):
    """A step that died with the bridge goes on; one that outlives it is waited for."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "bridge.py", *own_data(tmp_path), "--out", str(run)]
    command += ["--arms", "cold-stage-3"]
    first = begin(command, log)
    wait_for((run / "cold-student-rl/best").exists, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = begin(command, log)
    wait_for(lambda: "goes on with this run" in log.read_text().partition("cold-stud")[2], second)
    assert "eval/student-test: done before" in log.read_text()
    step = child_of(second)
    os.kill(step, signal.SIGSTOP)
    second.kill()
    second.wait()
    third = begin(command, log)
    wait_for(lambda: "once none of its steps is running" in log.read_text(), third)
    time.sleep(1)
    assert "done before" not in log.read_text() and third.poll() is None
    os.kill(step, signal.SIGCONT)
    assert third.wait() == 0
    printed = log.read_text()
    assert "cold-student-rl: done before" in printed and "| **cold-stage-3** |" in printed
    metrics = lines_of(run / "cold-student-rl/metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]


def test_sigterm_ends_the_step_too(tmp_path, begin):
    """At once: the step alone would take some ten seconds."""
    command = [sys.executable, "bridge.py", "--out", str(tmp_path / "run")]
    process = begin(command, tmp_path / "log")
    wait_for(lambda: "$ " in (tmp_path / "log").read_text(), process)
    time.sleep(0.5)
    step = child_of(process)
    process.terminate()
    assert process.wait() == 2
    for _ in range(40):
        if not Path(f"/proc/{step}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the step lives on")


# --- bad input ------------------------------------------------------------------------------------


def refusal(capsys, arguments, monkeypatch, status=None):
    """The one line on stderr of a run that launches nothing, or whose first step fails."""
    launched = []
    monkeypatch.setattr(bridge, "launch", lambda command: launched.append(command) or status)
    with pytest.raises(SystemExit) as stop:
        bridge.main(arguments)
    assert stop.value.code == 2 and (launched == []) == (status is None)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    return err[0]


def test_torchrun_is_for_the_steps(capsys, monkeypatch):
    monkeypatch.setattr(grpo, "WORLD", 2)
    assert "--nproc" in refusal(capsys, [], monkeypatch)


def test_other_tokenizers_are_refused_before_any_training(tmp_path, capsys, monkeypatch):
    shutil.copytree(ROOT / "tiny/teacher", tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text().replace('"7":', '"x":'))
    more = ["--teacher", str(tmp_path / "other"), "--out", str(tmp_path / "run")]
    assert "different tokenizers" in refusal(capsys, more, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_too_few_problems(tmp_path, capsys, monkeypatch):
    said = refusal(capsys, own_data(tmp_path, train=7), monkeypatch)
    assert "too few problems" in said and "3 A, 4 B, 7 A+B, 4 VAL, 12 PROMPTS" in said
    assert split(tmp_path / "more", "--prompts", str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"answer": "1"}', "no problem"),
        ('{"problem": "1+1"}', "no answer"),
        ('{"problem": "1+1", "answer": ""}', "no answer"),
    ],
)
def test_bad_lines(tmp_path, capsys, monkeypatch, line, said):
    flags = own_data(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    assert f"{tmp_path}/train.jsonl:25: {said}" in refusal(capsys, flags, monkeypatch)


def test_a_number_is_an_answer_and_prompts_need_none(tmp_path):
    flags = own_data(tmp_path)
    for name, row in ("train", {"problem": "1+1", "answer": 0}), ("prompts", {"prompt": "1+1"}):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    splits = splits_of(flags)
    assert len(splits["A+B"]) == 25 and splits["PROMPTS"][-1] == {"prompt": "1+1"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--student", "./nowhere"], "nowhere"),
        (["--teacher", "./nowhere"], "nowhere"),
        (["--data", "tiny/train.jsonl"], "come together"),
        (["--val-data", "tiny/val.jsonl"], "come together"),
        (["--skip-teacher-rl", "--arms", "all"], "name the --arms without raw-teacher"),
        (["--test-data", "a/test.jsonl", "b/test.jsonl"], "have the same name"),
        (["--teacher", "tests"], "tests holds no model"),
        (["--arms", "recepy"], "--arms"),
        (["--opd-steps", "0"], "--opd-steps must be above 0"),
        (["--opd-lr", "nan"], "--opd-lr must be above 0"),
    ],
)
def test_bad_flags(capsys, monkeypatch, more, said):
    assert said in refusal(capsys, more, monkeypatch)


def test_a_directory_of_something_else(tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    said = refusal(capsys, ["--out", str(tmp_path)], monkeypatch)
    assert f"{tmp_path} holds something that is not a run" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_file(tmp_path, capsys, monkeypatch):
    flags = own_data(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    assert "val.jsonl" in refusal(capsys, flags, monkeypatch)


def test_a_step_that_fails_is_named_with_its_command(tmp_path, capsys, monkeypatch):
    flags = [*own_data(tmp_path), "--out", str(tmp_path / "run")]
    said = refusal(capsys, flags, monkeypatch, status=2)
    assert "eval/student-test ended with status 2" in said
    assert f"eval_math.py --model tiny/student --data {tmp_path}/test.jsonl" in said


def test_the_error_of_a_step_is_shown_once_in_its_own_words(tmp_path):
    flags = own_data(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    command = [sys.executable, "bridge.py", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    own = [line for line in done.stderr.splitlines() if "test.jsonl" in line]
    assert len(own) == 2 and own[0].startswith("eval_math.py: ")
    assert own[1].startswith("bridge.py: eval/student-test ended with status 2")
    assert "Traceback" not in done.stderr


def test_thinking_is_one_flag_for_every_step(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for more in [], ["--thinking"]:
        bridge.main(["--dry-run", "--out", "x", "--arms", "all", *more])
        commands = [words for _, words in commands_of(capsys.readouterr().out)]
        assert len(commands) == 26 and {"--thinking" in words for words in commands} == {bool(more)}
        assert bridge.parse_arguments(more).grpo.thinking is bool(more)


def test_the_report_counts_updates_not_steps(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, flags, launched, _ = whole
    args = bridge.parse_arguments([*flags, "--arms", "recipe", "--out", str(run)])
    before, runs = len(launched), bridge.run_all(args, splits_of(flags))
    args.grpo.updates_per_step, args.out = 4, tmp_path
    bridge.report(args, runs, 4)
    cost = json.loads((tmp_path / "results.json").read_text())["arms"]["recipe"]["cost"]
    assert len(launched) == before
    assert (cost["updates"], cost["dense updates"]) == (4 * 2 * 2, 2 * 2)


RATES = {  # step: its script, the flag of its rate
    "1-teacher-rl": ("grpo.py", "--teacher-rl-lr"),
    "2a-fkl": ("fkl_warmup.py", "--fkl-lr"),
    "2b-opd": ("opd.py", "--opd-lr"),
    "3-student-rl": ("grpo.py", "--student-rl-lr"),
    "direct": ("grpo.py", "--direct-lr"),
    "raw-fkl": ("fkl_warmup.py", "--fkl-lr"),
    "raw-opd": ("opd.py", "--opd-lr"),
    "only-opd": ("opd.py", "--opd-lr"),
    "only-fkl": ("fkl_warmup.py", "--fkl-lr"),
    "replay": ("fkl_warmup.py", "--replay-lr"),
    "more-opd": ("opd.py", "--more-opd-lr"),
    "cold-student-rl": ("grpo.py", "--student-rl-lr"),
}


def test_each_step_has_its_own_script_and_rate(capsys):
    rates = {flag: str(i / 64) for i, flag in enumerate(bridge.SETTINGS, 1) if "-lr" in flag}
    given = [word for pair in rates.items() for word in pair]
    bridge.main(["--dry-run", "--out", "x", "--arms", "all", *given])
    commands = {
        words[-1]: (script, words) for script, words in commands_of(capsys.readouterr().out)
    }
    for step, (script, flag) in RATES.items():
        used, words = commands[f"x/{step}"]
        assert (used, words[words.index("--lr") + 1]) == (script, rates[flag]), step


def test_what_stands_last_in_each_arm(plan):
    last = "3-student-rl 2b-opd direct raw-opd only-opd only-fkl replay more-opd cold-student-rl"
    assert [steps[-1] for steps in bridge.ARMS.values()] == last.split()
    names, steps = list(plan), training(plan)
    assert all(f"eval/{name}-" in f"{names[names.index(name) + 1]}-" for name in steps)
    flat = {name for name, args in steps.items() if getattr(args, "lr_decay", 1) == 0}
    if steps["direct"].preset == "tiny":  # the paper's has no decay at all
        assert flat == {"2a-fkl", "raw-fkl"}
    else:
        assert {(args.lr, args.steps) for args in steps.values()} >= {(1e-6, 100), (1e-6, 200)}
        assert {args.lr for args in steps.values()} == {1e-6}


def test_the_pocket_world_is_the_default():
    args, splits = bridge.parse_arguments([]), splits_of([])
    assert (args.seed, [*args.arms], args.test_data) == (
        0,
        ["recipe", "direct"],
        ["tiny/test.jsonl"],
    )
    for split, name in ("A+B", "train"), ("VAL", "val"), ("PROMPTS", "prompts"):
        own = [row["problem"] for row in splits[split]]
        assert sorted(own) == sorted(problems_of(f"tiny/{name}.jsonl"))
