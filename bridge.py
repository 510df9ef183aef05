"""The whole recipe in one command: sparse-to-dense (arXiv 2605.12483), its baseline, its controls.

Labels are few, prompts many. One half of the labels trains the teacher, who can make something of
them (step 1). What he has learnt goes into the student token by token, without a label: the bridge
(steps 2a and 2b). The other half trains the student, who by then can use it too (step 3). Direct
GRPO, the baseline, spends all labels on the student, and as many updates as steps 1 and 3 together.

recipe_steps() is the recipe, a list; ARMS says which of its steps make an arm. The rest of this
file runs the scripts one after another, each as the command that it prints, and evaluates after
every step. What several arms have in common runs once. No label of step 3 is seen before it, the
prompts of steps 2a and 2b have no answers, and the test file reaches eval_math.py and nothing else.

    python bridge.py                        the pocket models: some minutes on two cores
    python bridge.py --arms all             with every control
    python bridge.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# --- the recipe -----------------------------------------------------------------------------------

SETTINGS = {  # flag: tiny models (to be tuned); the paper's (step counts ours; None: the script's)
    "--teacher-rl-steps": (30, 100),
    "--teacher-rl-lr": (3e-4, None),
    "--fkl-steps": (50, 100),
    "--fkl-lr": (4e-3, None),
    "--opd-steps": (150, 100),
    "--opd-lr": (4e-3, None),
    "--student-rl-steps": (20, 100),
    "--student-rl-lr": (3e-5, None),
    "--direct-lr": (3e-4, None),
    "--replay-lr": (4e-4, None),  # a tenth: where the decay of step 2b has ended
    "--more-opd-lr": (4e-4, None),
}
# A step of grpo.py by its own presets: its updates, and the problems and samples of an update.
GRPO = {"tiny": (1, 32, 8), "paper": (4, 128, 8)}
RL, FKL, OPD, EVAL = "grpo.py", "fkl_warmup.py", "opd.py", "eval_math.py"
INPUTS = ("--model", "--student", "--teacher", "--data", "--val-data", "--rollouts")


def recipe_steps(args):
    """Every step of every arm, in the order of the runs. In capitals: what is there before."""
    n1, r1, n2a, r2a, n2b, r2b, n3, r3, direct, replay, more = args.settings
    updates, problems, samples = GRPO[args.preset]
    alike = {"--prompts-per-step": problems, "--samples-per-prompt": samples}  # to step 3
    flat = {"--lr-decay": 0}  # the rate falls at the end of the bridge, in step 2b
    again = alike | {"--rollouts": "2a-fkl/rollouts.jsonl"}
    # fmt: off
    return [
        # step            script trains     teacher         data       steps         lr      more
        ("1-teacher-rl",    RL,  "TEACHER", None,           "A",       n1,           r1,     {}),
        ("2a-fkl",          FKL, "STUDENT", "1-teacher-rl", "PROMPTS", n2a,          r2a,    flat),
        ("2b-opd",          OPD, "2a-fkl",  "1-teacher-rl", "PROMPTS", n2b,          r2b,    {}),
        ("3-student-rl",    RL,  "2b-opd",  None,           "B",       n3,           r3,     {}),
        ("direct",          RL,  "STUDENT", None,           "A+B",     n1 + n3,      direct, {}),
        ("raw-fkl",         FKL, "STUDENT", "TEACHER",      "PROMPTS", n2a,          r2a,    flat),
        ("raw-opd",         OPD, "raw-fkl", "TEACHER",      "PROMPTS", n2b,          r2b,    {}),
        ("only-opd",        OPD, "STUDENT", "1-teacher-rl", "PROMPTS", n2a + n2b,    r2b,    {}),
        ("only-fkl",        FKL, "STUDENT", "1-teacher-rl", "PROMPTS", n2a + n2b,    r2a,    {}),
        ("replay",          FKL, "2b-opd",  "1-teacher-rl", "PROMPTS", n3 * updates, replay, again),
        ("more-opd",        OPD, "2b-opd",  "1-teacher-rl", "PROMPTS", n3 * updates, more,   alike),
        ("cold-student-rl", RL,  "STUDENT", None,           "B",       n3,           r3,     {}),
    ]
    # fmt: on


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
DAPO = "YouJiacheng/DAPO-Math-17k-dedup"


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
    parser.add_argument("--out", help="directory of the run; the same command resumes it")
    parser.add_argument("--seed", type=int, default=0, help="draws the split, goes to every script")
    parser.add_argument("--nproc", type=int, default=0, help="by torchrun; 1 at most so far")
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
    args.preset = "tiny" if n_parameters < 10e6 else "paper"
    args.settings = []
    for flag, presets in SETTINGS.items():
        value, least = getattr(args, flag[2:].replace("-", "_")), int(flag.endswith("steps"))
        value = presets[args.preset == "paper"] if value is None else value
        if value is not None and not least <= value < float("inf"):
            fail(f"{flag} must be at least {least}, not {value}")
        args.settings.append(value)
    if args.data or args.val_data:
        if not (args.data and args.val_data and args.test_data):
            fail("--data, --val-data and --test-data come together (or --test-data alone)")
    elif args.preset == "tiny":
        args.data, args.val_data = "tiny/train.jsonl", "tiny/val.jsonl"
        args.prompts = args.prompts or "tiny/prompts.jsonl"
    benchmarks = {"tiny": ["tiny/test.jsonl"], "paper": ["math500", "aime24", "aime25"]}
    args.test_data = args.test_data or benchmarks[args.preset]
    skipped = ["1-teacher-rl"] * args.skip_teacher_rl
    skipped += ["3-student-rl", "cold-student-rl"] * args.skip_student_rl
    chosen = ARMS if "all" in args.arms else args.arms
    args.arms = {arm: [step for step in ARMS[arm] if step not in skipped] for arm in chosen}
    args.arms = {arm: steps for arm, steps in args.arms.items() if steps}
    return args if args.arms else fail("--skip-student-rl leaves nothing of --arms")


# --- problems -------------------------------------------------------------------------------------
PROBLEM, LABEL = ("problem", "question", "prompt"), ("answer", "solution", "ground_truth")


def read_rows(path, labelled):
    """{problem: row} of a JSONL file; each problem once, because labels are counted by problem."""
    rows = {}
    for number, line in enumerate(Path(path).open(encoding="utf-8"), 1):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            fail(f"{path}:{number}: not a JSON object; mend or delete this line")
        found = [row[key] for key in PROBLEM if row.get(key)]
        if not found:
            fail(f"{path}:{number}: no problem (nor question, nor prompt)")
        answers = row | (row.get("reward_model") or {})  # DAPO keeps it there
        # Said now, because the step that reads this label may be hours away.
        if labelled and all(answers.get(key) in (None, "") for key in LABEL):
            fail(f"{path}:{number}: no answer (nor solution, nor ground_truth)")
        rows.setdefault(json.dumps(found[0]), row)
    return rows


def split_problems(args):
    """{name: rows}: the labels of steps 1 and 3, those of validation, and problems without."""
    if args.data:
        labels, val = read_rows(args.data, True), read_rows(args.val_data, True)
        rows = [row for problem, row in labels.items() if problem not in val]
        if len(rows) < len(labels):
            print(f"{args.data}: left out {len(labels) - len(rows)} problems of --val-data")
        order, half = np.random.default_rng(args.seed).permutation(len(rows)), len(rows) // 2
        a, b = [rows[i] for i in order[:half]], [rows[i] for i in order[half:]]
        val = list(val.values())
    else:  # the authors' split: 80 %, seed 42
        try:
            from datasets import load_dataset
        except ImportError:
            fail(f"{DAPO} needs: pip install datasets; or bring --data, --val-data, --test-data")
        parts = load_dataset(DAPO, split="train").train_test_split(test_size=0.2, seed=42)
        a, held_out = list(parts["train"]), list(parts["test"])
        val, b = held_out[:256], held_out[256:]
    prompts = list(read_rows(args.prompts, False).values()) if args.prompts else a + b
    if min(len(a), len(b), len(prompts)) < 8 or not val:
        counts = f"{len(a)} + {len(b)} labelled, {len(prompts)} without, {len(val)} for validation"
        fail(f"too few problems: {counts}; needed are 8 + 8, 8 and 1")
    splits = {"A": a, "B": b, "A+B": a + b, "VAL": val, "PROMPTS": prompts, "VAL-PROMPTS": val}
    for name in ("PROMPTS", "VAL-PROMPTS"):
        splits[name] = [{key: row[key] for key in PROBLEM if key in row} for row in splits[name]]
    return splits


# --- a step ---------------------------------------------------------------------------------------
def write_whole(path, text):
    """Written aside, then renamed: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def contents(path):
    """Tells a file or a model directory from another of its name; None for a name of the hub."""
    digest = hashlib.sha256()
    files = sorted(file for file in [Path(path), *Path(path).glob("*")] if file.is_file())
    for file in files:
        with file.open("rb") as opened:  # a megabyte of weights is enough: training moves it too
            most = -1 if file.suffix == ".jsonl" else 2**20
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(most))
    return digest.hexdigest() if files else None


def place(run, name, script, flags):
    """The directory of a step: that of the very same step if there is one, else a new one."""
    folder = Path(__file__).parent
    sources = [folder / script, *sorted(folder.glob("kernels/*.py")) * (script != EVAL)]
    # As in the scripts: the syntax trees, so that comments don't count.
    trees = [ast.parse(path.read_text(encoding="utf-8"), path.name) for path in sources]
    files = {flags[flag]: contents(flags[flag]) for flag in INPUTS if flag in flags}
    step = {"script": script, "flags": flags, "contents": files}
    step["code"] = hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()
    same = [known for known, other in run["steps"].items() if other == step]
    tried = [known for known in run["steps"] if known.partition("@")[0] == name]
    if same:
        return same[0]
    if tried:
        was = run["steps"][tried[-1]]
        old = {flag: was["flags"].get(flag, "not given") for flag in was["flags"] | flags}
        said = [f"{flag} was {value}" for flag, value in old.items() if value != flags.get(flag)]
        said += [f"{f} changed" for f in files if was["contents"].get(f, files[f]) != files[f]]
        said += [f"{script} was edited"] * (was["code"] != step["code"])
        print(f"\n{name} runs anew, {run['out'] / tried[-1]} stays: {', '.join(said)}")
        name = f"{name}@{len(tried) + 1}"
    run["steps"][name] = step
    if not run["dry"]:
        write_whole(run["out"] / "bridge.json", json.dumps(run["steps"], indent=1))
    return name


def launch(command, lock):
    """The exit status of a command, whose output goes where ours goes."""
    # It holds the lock too: if only we are killed, whoever resumes waits until it has ended.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, pass_fds=[lock], env=environment).returncode


def run_step(run, name, script, flags):
    """Runs a script, unless it has done just that before; the directory of its run."""
    out = run["out"] / place(run, name, script, flags)
    command = [sys.executable, os.path.relpath(Path(__file__).with_name(script))]
    if run["nproc"] and script != EVAL:
        torchrun = Path(sys.executable).with_name("torchrun")  # a venv need not be activated
        command[:1] = [str(torchrun) if torchrun.exists() else "torchrun"]
        command[1:1] = ["--nproc-per-node", str(run["nproc"])]
    command += [str(part) for pair in flags.items() for part in pair] + ["--out", str(out)]
    run["number"] += 1
    title = f"[{run['number']}/{run['of']}] {name}"
    end = out / ("results.json" if script == EVAL else "final")
    if (out / "config.json").exists() and end.exists() and not run["dry"]:
        print(f"{title}: done before, in {out}")
        return out
    print(f"\n{title}\n$ {shlex.join(command)}")
    if not run["dry"]:
        began, status = time.monotonic(), launch(command, run["lock"])
        if status:
            fail(f"{name} ended with status {status}, see above; again: {shlex.join(command)}")
        rate = (time.monotonic() - began) / flags.get("--steps", 1)
        run["rates"].setdefault(script, []).append(rate)
    return out


def minutes_to_go(run, steps, evaluations):
    """What is left takes as long as the same script has taken, else as the others have."""
    rates = {script: np.mean(rates) for script, rates in run["rates"].items()}
    others = [rate for script, rate in rates.items() if script != EVAL] or [0]
    steps = [step for step in steps if not (run["out"] / step[0] / "final").exists()]
    seconds = sum(step[5] * rates.get(step[1], np.mean(others)) for step in steps)
    return (seconds + len(steps) * evaluations * rates.get(EVAL, 0)) / 60


# --- report ---------------------------------------------------------------------------------------
def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy(out):
    """avg@n and greedy with their intervals, as eval_math.py has left them."""
    metrics = read_json(out / "results.json")["metrics"]
    return {name: metrics[name] for name in metrics if name.startswith(("avg@", "greedy"))}


def metrics_of(out):
    """(updates so far, what was logged) for each step of a run."""
    times = read_json(out / "config.json")["settings"].get("updates_per_step", 1)
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"] * times, line) for line in lines]


def costs(outs, val_labels):
    """What an arm has used, by what its steps have logged."""
    cost = dict.fromkeys(("labels", "validation", "updates", "dense updates", "rollout tokens"), 0)
    cost["minutes"] = 0.0
    for metrics in map(metrics_of, outs):
        updates, last = metrics[-1]
        sparse = last["kl"] is None
        cost["labels"] += last["labels"]  # no problem is in both A and B
        cost["validation"] = val_labels if sparse else cost["validation"]
        cost["updates" if sparse else "dense updates"] += updates
        cost["rollout tokens"] += sum(line["tokens"] for _, line in metrics)
        cost["minutes"] += sum(line["seconds"] for _, line in metrics) / 60
    return cost


def table_of(results):
    """Markdown: where each model and each arm has come to, and what each arm has cost."""
    tests, first = results["models"]["STUDENT"], next(iter(results["arms"].values()))
    names = [f"{name}, {Path(test).stem}" for test in tests for name in tests[test]]
    rows = [["", *names, *first["cost"]], ["---"] * (1 + len(names) + len(first["cost"]))]

    def cells(tests):
        numbers = [number.values() for test in tests.values() for number in test.values()]
        return ["{:.3f} ({:.3f} to {:.3f})".format(*number) for number in numbers]

    rows += [[name, *cells(tests)] for name, tests in results["models"].items()]
    for arm, row in results["arms"].items():
        cost = [f"{v:.1f}" if isinstance(v, float) else f"{v:,}" for v in row["cost"].values()]
        rows.append([f"**{arm}**", *cells(row["test"]), *cost])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(results, outs, path):
    """The arms over the student's updates, and what each step saw of its own progress."""
    figure = Figure(figsize=(16, 4.5), layout="tight")
    arms, sparse, dense = figure.subplots(1, 3)
    models, test = results["models"], next(iter(results["models"]["STUDENT"]))
    for arm, row in results["arms"].items():
        steps = [step for step in row["steps"] if step != "1-teacher-rl"]
        x = np.cumsum([0, *(metrics_of(outs[step])[-1][0] for step in steps)])
        sampled, greedy = zip(*(models[m][test].values() for m in ("STUDENT", *steps)), strict=True)
        mean, low, high = np.array([list(number.values()) for number in sampled]).T
        line = arms.errorbar(x, mean, [mean - low, high - mean], fmt="o-", capsize=3, label=arm)
        arms.plot(x, [number["mean"] for number in greedy], "x:", color=line[0].get_color())
    for name, style in ("TEACHER", ":"), ("1-teacher-rl", "--"):
        if name in models:
            mean = next(iter(models[name][test].values()))["mean"]
            arms.axhline(mean, color="grey", linestyle=style, label=name)
    for step, out in outs.items():
        x, lines = zip(*metrics_of(out), strict=True)
        axis, key = (sparse, "reward") if lines[0]["kl"] is None else (dense, "kl")
        axis.plot(x, [line[key] for line in lines], label=step)
    arms.set(title=f"{Path(test).stem}: sampled (o), greedy (x)", xlabel="the student's updates")
    sparse.set(title="GRPO: mean reward of the rollouts", xlabel="updates")
    dense.set(title="dense steps: KL per token", xlabel="updates", yscale="log")
    for axis in figure.axes:
        axis.legend(fontsize=8) if axis.get_legend_handles_labels()[0] else None
    FigureCanvasAgg(figure).print_png(path)


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    try:
        bridge(parse_arguments(argv))
    except (OSError, SyntaxError) as error:  # no such model or file, no room; a slip in a script
        fail(str(error).splitlines()[0])
    except KeyboardInterrupt:
        fail("stopped; the same command with --out goes on at the unfinished step", 130)


def bridge(args):
    models = args.teacher, args.student
    teacher, student = (AutoTokenizer.from_pretrained(model).get_vocab() for model in models)
    if teacher != student:
        fail(f"{args.teacher} and {args.student} have different tokenizers: no bridge between them")
    splits = split_problems(args)
    out = Path(args.out or time.strftime("runs/bridge-%Y%m%d-%H%M%S"))
    if out.exists() and any(out.iterdir()) and not (out / "lock").exists():
        fail(f"{out} holds something that is no run of the recipe: give another --out")
    sizes = {name: len(rows) for name, rows in splits.items()}
    print(f"--out {out} goes on with this run")
    print("labels: {A} (A, step 1), {B} (B, step 3), {VAL} (validation); ".format(**sizes), end="")
    print("{PROMPTS} prompts without (steps 2a and 2b)".format(**sizes))
    run = {"out": out, "dry": args.dry_run, "nproc": args.nproc, "number": 0}
    run |= {"steps": {}, "rates": {}}
    if args.dry_run:
        return run_arms(args, run, splits)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"a step in {out} is still at work: waiting until it has ended")
            fcntl.flock(lock, fcntl.LOCK_EX)
        run["steps"] = read_json(out / "bridge.json") if (out / "bridge.json").exists() else {}
        run_arms(args, run | {"lock": lock.fileno()}, splits)


def run_arms(args, run, splits):
    """Every step that an arm needs, each evaluated; then the report."""
    places = {"TEACHER": args.teacher, "STUDENT": args.student}
    for name, rows in splits.items():
        places[name] = str(run["out"] / f"data/{name.lower()}.jsonl")
        if not run["dry"]:
            write_whole(Path(places[name]), "".join(json.dumps(row) + "\n" for row in rows))
    if args.skip_teacher_rl:
        places["1-teacher-rl"] = args.teacher
        print("--skip-teacher-rl: what labels and updates the teacher has had is not counted")
    needed = {step for steps in args.arms.values() for step in steps}
    steps = [step for step in recipe_steps(args) if step[0] in needed]
    bases = ["STUDENT", "TEACHER"] if needed - {"direct", "cold-student-rl"} else ["STUDENT"]
    run["of"] = len(steps) + (len(bases) + len(steps)) * len(args.test_data)
    always, evaluations, outs = {"--preset": args.preset, "--seed": args.seed}, {}, {}

    def evaluate(name):
        evaluations[name] = {}
        for test in args.test_data:
            flags = {"--model": places[name], "--data": test, **always}
            out = run_step(run, f"eval/{name.lower()}-{Path(test).stem}", EVAL, flags)
            evaluations[name][test] = out

    for name in bases:
        evaluate(name)
    for i, (name, script, trains, teacher, data, updates, lr, more) in enumerate(steps):
        flags = {"--model": places[trains]}
        if teacher:
            flags = {"--student": places[trains], "--teacher": places[teacher]}
        flags |= {"--data": places[data], "--val-data": places["VAL-PROMPTS" if teacher else "VAL"]}
        flags |= {**always, "--steps": updates} | ({} if lr is None else {"--lr": lr})
        flags |= {flag: places.get(value, value) for flag, value in more.items()}
        outs[name] = run_step(run, name, script, flags)
        places[name] = str(outs[name] / ("final" if teacher else "best"))
        places[f"{name}/rollouts.jsonl"] = str(outs[name] / "rollouts.jsonl")
        evaluate(name)
        if not run["dry"]:
            left = minutes_to_go(run, steps[i + 1 :], len(args.test_data))
            print(f"about {left:.1f} minutes to go")
    if run["dry"]:
        return
    results = {"settings": vars(args), "models": {}, "arms": {}}
    for name, by_test in evaluations.items():
        results["models"][name] = {test: accuracy(out) for test, out in by_test.items()}
    for arm, chain in args.arms.items():
        cost = costs([outs[step] for step in chain], len(splits["VAL"]))
        results["arms"][arm] = {"steps": chain, "test": results["models"][chain[-1]], "cost": cost}
    write_whole(run["out"] / "results.json", json.dumps(results, indent=1))
    write_whole(run["out"] / "table.md", table_of(results))
    draw(results, outs, run["out"] / "curves.png")
    print(f"\n{table_of(results)}\n{run['out']}: table.md, results.json, curves.png")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # ours and the scripts' lines in their order
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a step is ended with us
    main()
