"""The whole recipe in one command: sparse-to-dense (arXiv 2605.12483), its baseline, its controls.

Labels are few, prompts many. One half of the labels trains the teacher, who can make something of
them (step 1). What he has learnt goes into the student token by token, without a label: the bridge
(steps 2a and 2b). The other half trains the student, who by then can use it too (step 3). Direct
GRPO, the baseline, spends all labels on the student, and as many updates as steps 1 and 3 together.

recipe_steps() is the recipe, ARMS says which of its steps make an arm, and the rest of this file
runs the scripts one after another, each as the command that it prints, with an evaluation after
each. What several arms have in common runs once. No label of step 3 is seen before it, the prompts
of steps 2a and 2b have no answers, and the test file reaches eval_math.py and nothing else.

    python bridge.py                        the pocket models: some minutes on two cores
    python bridge.py --arms all             with every control
    python bridge.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --nproc 8
"""

import argparse
import ast
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# --- the recipe -----------------------------------------------------------------------------------

SETTINGS = {  # flag: tiny models (tiny/TUNING.md); the paper's (steps ours; None: the script's)
    "--teacher-rl-steps": (10, 100),  # tiny: short of its ceiling, which leaves step 3 something
    "--teacher-rl-lr": (3e-4, None),
    "--fkl-steps": (50, 100),
    "--fkl-lr": (1e-2, None),
    "--opd-steps": (60, 100),
    "--opd-lr": (4e-3, None),
    "--student-rl-steps": (20, 100),
    "--student-rl-lr": (1.2e-4, None),
    "--direct-lr": (1.2e-4, None),
    "--replay-lr": (2.56e-5, None),
    "--more-opd-lr": (4e-4, None),
}
# A step of grpo.py by its own presets: its updates, and the problems and samples of an update.
GRPO = {"tiny": (1, 32, 8), "paper": (4, 128, 8)}
DAPO = "YouJiacheng/DAPO-Math-17k-dedup"  # the paper's problems
RL, FKL, OPD, EVAL = "grpo.py", "fkl_warmup.py", "opd.py", "eval_math.py"


def recipe_steps(s):
    """{step: (script, flags)} in the order of the runs; in capitals what is there before."""
    updates, problems, samples = GRPO[s.preset]
    dense_steps, rl_updates = s.fkl_steps + s.opd_steps, s.student_rl_steps * updates
    flat = {"--lr-decay": 0}  # the rate falls at the end of the bridge, in step 2b
    alike = {"--prompts-per-step": problems, "--samples-per-prompt": samples}  # to step 3
    again = alike | {"--rollouts": "rollouts of 2a-fkl"}

    def rl(model, labels, n, lr):
        return {"--model": model, "--data": labels, "--val-data": "VAL", "--steps": n, "--lr": lr}

    def dense(student, teacher, n, lr):
        data = {"--data": "PROMPTS", "--val-data": "VAL-PROMPTS"}
        return {"--student": student, "--teacher": teacher, **data, "--steps": n, "--lr": lr}

    return {
        "1-teacher-rl": (RL, rl("TEACHER", "A", s.teacher_rl_steps, s.teacher_rl_lr)),
        "2a-fkl": (FKL, dense("STUDENT", "1-teacher-rl", s.fkl_steps, s.fkl_lr) | flat),
        "2b-opd": (OPD, dense("2a-fkl", "1-teacher-rl", s.opd_steps, s.opd_lr)),
        "3-student-rl": (RL, rl("2b-opd", "B", s.student_rl_steps, s.student_rl_lr)),
        "direct": (RL, rl("STUDENT", "A+B", s.teacher_rl_steps + s.student_rl_steps, s.direct_lr)),
        "raw-fkl": (FKL, dense("STUDENT", "TEACHER", s.fkl_steps, s.fkl_lr) | flat),
        "raw-opd": (OPD, dense("raw-fkl", "TEACHER", s.opd_steps, s.opd_lr)),
        "only-opd": (OPD, dense("STUDENT", "1-teacher-rl", dense_steps, s.opd_lr)),
        "only-fkl": (FKL, dense("STUDENT", "1-teacher-rl", dense_steps, s.fkl_lr)),
        "replay": (FKL, dense("2b-opd", "1-teacher-rl", rl_updates, s.replay_lr) | again),
        "more-opd": (OPD, dense("2b-opd", "1-teacher-rl", rl_updates, s.more_opd_lr) | alike),
        "cold-student-rl": (RL, rl("STUDENT", "B", s.student_rl_steps, s.student_rl_lr)),
    }


BRIDGE = ["1-teacher-rl", "2a-fkl", "2b-opd"]
ARMS = {
    "recipe": [*BRIDGE, "3-student-rl"],
    "bridge": BRIDGE,
    "direct": ["direct"],
    "raw-teacher": ["raw-fkl", "raw-opd"],  # before RL
    "no-warmup": ["1-teacher-rl", "only-opd"],
    "no-opd": ["1-teacher-rl", "only-fkl"],
    "replay": [*BRIDGE, "replay"],  # stored rollouts of the teacher instead of step 3
    "more-opd": [*BRIDGE, "more-opd"],  # ours: a stronger control than replay
    "cold-stage-3": ["cold-student-rl"],  # step 3 without the bridge
}


# --- arguments ------------------------------------------------------------------------------------
def fail(message, status=2):
    """A person reads this: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_arguments(argv):
    """The settings: by hand, else the column of SETTINGS that the student's size asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--teacher", default="tiny/teacher", help="directory or hub name")
    parser.add_argument("--student", default="tiny/student", help="directory or hub name")
    parser.add_argument("--data", help=f"labelled problems, JSONL [tiny/train.jsonl, paper {DAPO}]")
    parser.add_argument("--val-data", help="chooses best/ [tiny/val.jsonl, paper 256 of the same]")
    parser.add_argument("--test-data", nargs="+", help="[tiny/test.jsonl, paper math500 aime24 25]")
    parser.add_argument("--prompts", help="unlabelled [tiny/prompts.jsonl, else those of --data]")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=["recipe", "direct"])
    parser.add_argument("--out", type=Path, help="of the run; the same command resumes it")
    parser.add_argument("--seed", type=int, default=0, help="draws the split, goes to every script")
    parser.add_argument("--nproc", type=int, default=1, help="of each step; by torchrun from 2 on")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("--skip-teacher-rl", action="store_true", help="--teacher has had its RL")
    parser.add_argument("--skip-student-rl", action="store_true", help="stop after the bridge")
    for flag, (tiny, paper) in SETTINGS.items():
        kind = int if flag.endswith("steps") else float
        parser.add_argument(flag, type=kind, help=f"[{tiny}, paper {paper or 'as the script'}]")
    args = parser.parse_args(argv)
    config = AutoConfig.from_pretrained(args.student)
    with torch.device("meta"):
        n_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    # One preset for all steps, because teacher and student must agree on the form of a prompt.
    tiny = n_parameters < 10e6
    args.preset = "tiny" if tiny else "paper"
    for flag, presets in SETTINGS.items():
        key, least = flag[2:].replace("-", "_"), int(flag.endswith("steps"))
        if getattr(args, key) is None:
            setattr(args, key, presets[0 if tiny else 1])
        elif not least <= getattr(args, key) < float("inf"):
            fail(f"{flag} must be at least {least}, not {getattr(args, key)}")
    if args.data or args.val_data:
        if not (args.data and args.val_data and args.test_data):
            fail("--data, --val-data and --test-data come together (or --test-data alone)")
    elif tiny:
        args.data, args.val_data = "tiny/train.jsonl", "tiny/val.jsonl"
        args.prompts = args.prompts or "tiny/prompts.jsonl"
    benchmarks = ["tiny/test.jsonl"] if tiny else ["math500", "aime24", "aime25"]
    args.test_data = args.test_data or benchmarks
    skipped = ["1-teacher-rl"] * args.skip_teacher_rl
    skipped += ["3-student-rl", "cold-student-rl"] * args.skip_student_rl
    chosen = ARMS if "all" in args.arms else args.arms
    arms = {arm: [step for step in ARMS[arm] if step not in skipped] for arm in chosen}
    args.arms = {arm: steps for arm, steps in arms.items() if steps}
    args.out = args.out or Path(time.strftime("runs/bridge-%Y%m%d-%H%M%S"))
    return args if args.arms else fail("--skip-student-rl leaves nothing of --arms")


# --- problems -------------------------------------------------------------------------------------
PROBLEM, LABEL = ("problem", "question", "prompt"), ("answer", "solution", "ground_truth")


def read_rows(path, labelled):
    """{problem: row} of a JSONL file; each problem once, because labels are counted by problem."""
    rows = {}
    for number, line in enumerate(Path(path).open(encoding="utf-8"), 1):
        try:  # said now, because the step that reads this line may be hours away
            row = dict(json.loads(line))
            problem = next(row[key] for key in PROBLEM if row.get(key))
            fields = row | (row.get("reward_model") or {})  # DAPO keeps its answers there
            if labelled:
                next(key for key in LABEL if fields.get(key) not in (None, ""))
        except (ValueError, TypeError, StopIteration):
            fail(f"{path}:{number}: not a JSON object with a problem{' and an answer' * labelled}")
        rows.setdefault(json.dumps(problem), row)
    return rows


def split_problems(args):
    """{name: rows}: the labels of steps 1 and 3, those of validation, and problems without."""
    if args.data:
        labels, val = read_rows(args.data, True), read_rows(args.val_data, True)
        rows = [row for problem, row in labels.items() if problem not in val]
        rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))]
        a, b, val = rows[: len(rows) // 2], rows[len(rows) // 2 :], list(val.values())
    else:  # the authors' split: 80 %, seed 42
        try:
            from datasets import load_dataset
        except ImportError:
            fail(f"{DAPO} needs: pip install datasets; or bring --data, --val-data, --test-data")
        parts = load_dataset(DAPO, split="train").train_test_split(test_size=0.2, seed=42)
        a, held_out = list(parts["train"]), list(parts["test"])
        val, b = held_out[:256], held_out[256:]
    prompts = list(read_rows(args.prompts, False).values()) if args.prompts else a + b
    counts = f"{len(a)} labels for step 1, {len(b)} for step 3, {len(val)} for validation, "
    counts += f"{len(prompts)} prompts for steps 2a and 2b"
    if min(len(a), len(b), len(prompts)) < 8 or not val:
        fail(f"too few problems: {counts}; needed are 8, 8, 1 and 8")
    print(counts)
    bare = [{key: row[key] for key in PROBLEM if key in row} for row in prompts + val]
    splits = {"A": a, "B": b, "A+B": a + b, "VAL": val}
    return splits | {"PROMPTS": bare[: len(prompts)], "VAL-PROMPTS": bare[len(prompts) :]}


# --- a step ---------------------------------------------------------------------------------------
def write_whole(path, text):
    """Written aside, then renamed: never a half-written file."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def fingerprint(path):
    """Tells a file from another of its name; as in the scripts, comments in code don't count."""
    if path.suffix == ".py":
        content = ast.dump(ast.parse(path.read_text(encoding="utf-8"), path.name)).encode()
    else:  # the size and a megabyte are enough, because training moves all weights
        content = str(path.stat().st_size).encode() + path.open("rb").read(2**20)
    return hashlib.sha256(content).hexdigest()[:8]


def place(args, name, script, flags):
    """The directory of this very run, else a new one; bridge.json keeps what each was run with."""
    here, record = Path(__file__).parent, args.out / "bridge.json"
    code = [here / script, *(here.glob("kernels/*.py") if script != EVAL else ())]
    used = flags | {path.name: fingerprint(path) for path in code}
    for path in (Path(str(value)) for flag, value in flags.items() if flag != "--preset"):
        files = (file for file in (path, *path.glob("*")) if file.is_file())
        used |= {str(file): fingerprint(file) for file in files}
    known = json.loads(record.read_text()) if record.exists() else {}
    for folder in known:
        if known[folder] == used:
            return folder
    tried = [folder for folder in known if folder.partition("@")[0] == name]
    folder = f"{name}@{len(tried) + 1}" if tried else name
    if tried:
        was = known[tried[-1]]
        differs = [f"{k} was {was.get(k)}" for k in was | used if was.get(k) != used.get(k)]
        print(f"\n{name} runs anew, {args.out / tried[-1]} stays: {', '.join(differs)}")
    write_whole(record, json.dumps(known | {folder: used}, indent=1))
    return folder


def launch(command):
    """Runs a command, whose output goes where ours goes; its exit status."""
    with subprocess.Popen(command, close_fds=False) as process:  # it holds the lock too
        try:
            return process.wait()
        finally:
            process.terminate()  # where it has not ended because we are stopped
            process.wait()  # else it would outlive us, if only by a moment


def run(args, name, script, flags):
    """Prints and runs a script, unless it has run just so before; its directory."""
    flags = {**flags, "--preset": args.preset, "--seed": args.seed}
    out = args.out / (name if args.dry_run else place(args, name, script, flags))
    command = [sys.executable]
    if args.nproc > 1:
        torchrun = Path(sys.executable).with_name("torchrun")  # a venv need not be activated
        command = [str(torchrun) if torchrun.exists() else "torchrun", "--standalone"]
        command += ["--nproc-per-node", str(args.nproc), "--"]
    command += [os.path.relpath(Path(__file__).with_name(script))]
    command += [str(part) for pair in flags.items() for part in pair] + ["--out", str(out)]
    if not args.dry_run and ((out / "final").exists() or (out / "results.json").exists()):
        print(f"{name}: done before, in {out}")
        return out
    print(f"\n{name}\n$ {shlex.join(command)}")
    if not args.dry_run and (status := launch(command)):
        fail(f"{name} ended with status {status}, see above; again: {shlex.join(command)}")
    return out


def run_all(args, splits):
    """Every step that an arm needs, each evaluated; {step, or (model, test): its directory}."""
    paths = {"TEACHER": args.teacher, "STUDENT": args.student}
    for name, rows in splits.items():
        paths[name] = str(args.out / f"data/{name.lower()}.jsonl")
        if not args.dry_run:
            write_whole(Path(paths[name]), "".join(json.dumps(row) + "\n" for row in rows))
    needed = {step for steps in args.arms.values() for step in steps}
    steps = {name: step for name, step in recipe_steps(args).items() if name in needed}
    outs, rates = {}, {}  # seconds a step, by script

    def evaluate(model):
        for test in args.test_data:
            name, flags = f"eval/{model.lower()}-{Path(test).stem}", {"--model": paths[model]}
            outs[model, test] = run(args, name, EVAL, flags | {"--data": test})

    evaluate("STUDENT")
    evaluate("TEACHER")
    paths["1-teacher-rl"] = args.teacher  # if it is skipped
    for i, (name, (script, flags)) in enumerate(steps.items()):
        began = time.time()
        flags = {flag: paths.get(v, v) for flag, v in flags.items() if v is not None}
        out = outs[name] = run(args, name, script, flags)
        paths[name] = str(out / ("best" if script == RL else "final"))
        paths[f"rollouts of {name}"] = str(out / "rollouts.jsonl")
        ended = time.time()
        evaluate(name)
        if not args.dry_run and (out / "final").stat().st_mtime > began:  # not done before
            rates[script] = (ended - began) / flags["--steps"]
            mean, left = np.mean([*rates.values()]), [*steps.values()][i + 1 :]
            seconds = sum(flags["--steps"] * rates.get(script, mean) for script, flags in left)
            seconds += len(left) * (time.time() - ended)
            print(f"about {seconds / 60:.1f} minutes to go")
    return outs


# --- report ---------------------------------------------------------------------------------------
def report(args, outs, val_labels):
    """What each arm has come to and what it has used: results.json, table.md, curves.png."""
    models, arms = {}, {}
    for model, test in (key for key in outs if isinstance(key, tuple)):
        metrics = json.loads((outs[model, test] / "results.json").read_text())["metrics"]
        found = {key: metrics[key] for key in metrics if key.startswith(("avg@", "greedy"))}
        models.setdefault(model, {"test": {}})["test"][test] = found
    for step in (key for key in outs if isinstance(key, str)):
        lines = [json.loads(line) for line in (outs[step] / "metrics.jsonl").open()]
        sparse = lines[0]["kl"] is None
        signal, times = ("reward", GRPO[args.preset][0]) if sparse else ("kl", 1)
        updates = [line["step"] * times for line in lines]
        models[step][signal] = [updates, [line[signal] for line in lines]]
        models[step]["cost"] = {
            "labels": lines[-1]["labels"],
            "validation": val_labels if sparse else 0,
            "updates": updates[-1] if sparse else 0,
            "dense updates": 0 if sparse else updates[-1],
            "rollout tokens": sum(line["tokens"] for line in lines),
            "minutes": sum(line["seconds"] for line in lines) / 60,
        }
    for arm, steps in args.arms.items():
        costs = [models[step]["cost"] for step in steps]
        cost = {key: sum(cost[key] for cost in costs) for key in costs[0]}  # A and B share no label
        cost["validation"] = max(cost["validation"] for cost in costs)  # it is one file
        last = outs[steps[-1]] / ("best" if "reward" in models[steps[-1]] else "final")
        tests = models[steps[-1]]["test"]
        arms[arm] = {"steps": steps, "model": str(last), "test": tests, "cost": cost}
    results = {"settings": vars(args), "models": models, "arms": arms}
    table = table_of(models | {f"**{arm}**": row for arm, row in arms.items()})
    write_whole(args.out / "results.json", json.dumps(results, indent=1, default=str))
    write_whole(args.out / "table.md", table)
    draw(models, arms, args.out / "curves.png")
    print(f"\n{table}\n{args.out}: table.md, results.json, curves.png")


def table_of(rows):
    """Markdown: where each model and each arm has come to, and what it has used."""
    *_, last = rows.values()
    names = [f"{name}, {Path(test).stem}" for test in last["test"] for name in last["test"][test]]
    table = [["", *names, *last["cost"]], ["---"] * (1 + len(names) + len(last["cost"]))]
    for name, row in rows.items():
        numbers = [number for test in row["test"].values() for number in test.values()]
        cells = ["{mean:.3f} ({low:.3f} to {high:.3f})".format(**number) for number in numbers]
        for value in row.get("cost", {}).values():
            cells.append(f"{value:.1f}" if isinstance(value, float) else f"{value:,}")
        table.append([name, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def draw(models, arms, path):
    """Accuracy from step to step, and each step's learning curve."""
    figure = Figure(figsize=(16, 5), layout="tight")
    accuracy, reward, kl = figure.subplots(1, 3)
    lines = {"teacher": ["TEACHER", "1-teacher-rl"] if "1-teacher-rl" in models else ["TEACHER"]}
    for arm, row in arms.items():
        lines[arm] = ["STUDENT", *(step for step in row["steps"] if step not in lines["teacher"])]
    for label, names in lines.items():
        tests = [next(iter(models[name]["test"].values())) for name in names]
        mean, low, high = np.array([[*next(iter(test.values())).values()] for test in tests]).T
        accuracy.errorbar(names, mean, [mean - low, high - mean], fmt="o-", capsize=3, label=label)
    accuracy.set(title="accuracy, sampled, on the first test", ylim=(0, 1))
    accuracy.tick_params(axis="x", rotation=90)
    reward.set(title="GRPO: mean reward of the rollouts", xlabel="updates")
    kl.set(title="dense steps: KL per token", xlabel="updates", yscale="log")
    for name, model in models.items():
        for axis, key in (reward, "reward"), (kl, "kl"):
            if key in model:
                axis.plot(*model[key], label=name)
    for axis in figure.axes:
        if axis.lines:
            axis.legend(fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path)


# --- main -----------------------------------------------------------------------------------------
def bridge(args):
    models = args.teacher, args.student
    teacher, student = (AutoTokenizer.from_pretrained(model).get_vocab() for model in models)
    if teacher != student:
        fail(f"{args.teacher} and {args.student} have different tokenizers: no bridge between them")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "lock").exists():
        fail(f"{args.out} holds something that is no run of the recipe: give another --out")
    splits = split_problems(args)
    if args.dry_run:
        run_all(args, splits)
        return
    print(f"--out {args.out} goes on with this run, once no step of it is at work any more")
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    with (args.out / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)  # a step that outlives us, killed, still holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        report(args, run_all(args, splits), len(splits["VAL"]))


def main(argv=None):
    try:
        bridge(parse_arguments(argv))
    except (OSError, SyntaxError) as error:  # no such model or file, no room; a slip in a script
        fail(str(error).splitlines()[0])
    except KeyboardInterrupt:
        fail("stopped; the same command with --out goes on at the unfinished step", 130)


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.stdout.reconfigure(line_buffering=True)  # ours and the scripts' lines in their order
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a step is ended with us
    main()
