"""The whole recipe in one command: sparse-to-dense (arXiv 2605.12483), its baseline, its controls.

Labels are few, prompts many. Some of the labels (A: half, or 80 % of DAPO) train the teacher, which
can make use of them. What it has learnt goes into the student token by token, without a label: the
bridge. The other labels (B) train the student, which by then can use them too. Direct GRPO, the
baseline, spends all labels on the student. The test file is for the evaluation after each step: no
training reads it.

    python bridge.py                        the pocket models: a few minutes on two cores
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
from matplotlib.figure import Figure
from transformers import AutoTokenizer

import grpo  # its presets, and how it reads problems

# --- the recipe -----------------------------------------------------------------------------------
RL, FKL, OPD, EVAL = "grpo.py", "fkl_warmup.py", "opd.py", "eval_math.py"
KEPT = {RL: "best", FKL: "final", OPD: "final", EVAL: "results.json"}  # what a step hands on
SETTINGS = {  # flag: tiny models (tiny/TUNING.md); larger ones (RL and OPD rates: the paper's)
    "--teacher-rl-steps": (10, 100),  # tiny: stops early, which leaves step 3 something to do
    "--teacher-rl-lr": (3e-4, 1e-6),
    "--fkl-steps": (50, 100),
    "--fkl-lr": (1e-2, 1e-6),
    "--opd-steps": (60, 100),
    "--opd-lr": (4e-3, 1e-6),
    "--student-rl-steps": (20, 100),
    "--student-rl-lr": (1.2e-4, 1e-6),
    "--direct-lr": (1.2e-4, 1e-6),
    "--replay-lr": (2.56e-5, 1e-6),
    "--more-opd-lr": (4e-4, 1e-6),
}


def recipe_steps(s):
    """{step: (script, flags)} in the order of the runs; what no step makes is in capitals."""
    updates, samples = s.grpo.updates_per_step, s.grpo.samples_per_prompt
    problems = s.grpo.prompts_per_step // updates
    dense_steps, rl_updates = s.fkl_steps + s.opd_steps, s.student_rl_steps * updates
    flat = {"--lr-decay": 0}  # the rate falls only at the end of the bridge, in 2b
    alike = {"--prompts-per-step": problems, "--samples-per-prompt": samples}  # as in step 3
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
ARMS = {  # a step that several arms have in common runs once
    "recipe": [*BRIDGE, "3-student-rl"],
    "bridge": BRIDGE,
    "direct": ["direct"],
    "raw-teacher": ["raw-fkl", "raw-opd"],  # without RL
    "no-warmup": ["1-teacher-rl", "only-opd"],
    "no-opd": ["1-teacher-rl", "only-fkl"],
    "replay": [*BRIDGE, "replay"],  # stored rollouts of the teacher instead of step 3
    "more-opd": [*BRIDGE, "more-opd"],  # ours: a stronger control than replay
    "cold-stage-3": ["cold-student-rl"],  # step 3 without the bridge
}


# --- arguments ------------------------------------------------------------------------------------
def fail(message):
    """For a human reader: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments(argv):
    """The settings, from the flags or else the column of SETTINGS for the student's size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    model = {"type": grpo.model_path, "help": "directory or hub name"}
    parser.add_argument("--teacher", default="tiny/teacher", **model)
    parser.add_argument("--student", default="tiny/student", **model)
    parser.add_argument("--data", help="labelled problems, JSONL [tiny/train.jsonl, paper DAPO]")
    parser.add_argument("--val-data", help="chooses best/ [tiny/val.jsonl, paper 256 of the same]")
    parser.add_argument("--test-data", nargs="+", help="[tiny/test.jsonl, paper math500 aime24 25]")
    parser.add_argument("--prompts", help="unlabelled [tiny/prompts.jsonl, else those of --data]")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=["recipe", "direct"])
    parser.add_argument("--out", type=Path, help="directory of the run; its command resumes it")
    parser.add_argument("--seed", type=int, default=0, help="draws the split, goes to every script")
    parser.add_argument("--nproc", type=int, default=1, help="processes of each step, by torchrun")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("--thinking", action="store_true", help="the template's thinking mode")
    parser.add_argument("--skip-teacher-rl", action="store_true", help="--teacher has had it")
    parser.add_argument("--skip-student-rl", action="store_true", help="leave step 3 out")
    for flag, (tiny, paper) in SETTINGS.items():
        parser.add_argument(flag, type=type(tiny), help=f"[{tiny}, paper {paper}]")
    args = parser.parse_args(argv)
    # One preset for all steps, because teacher and student must agree on the form of a prompt.
    like = ["--model", args.student, "--seed", str(args.seed), *["--thinking"] * args.thinking]
    args.grpo, args.context = grpo.parse_arguments(like)
    args.preset = args.grpo.preset
    for flag, (tiny, paper) in SETTINGS.items():
        key = flag[2:].replace("-", "_")
        if getattr(args, key) is None:
            setattr(args, key, tiny if args.preset == "tiny" else paper)
        elif not 0 < getattr(args, key) < float("inf"):
            fail(f"{flag} must be above 0, not {getattr(args, key)}")
    if (args.data or args.val_data) and not (args.data and args.val_data and args.test_data):
        fail("--data, --val-data and --test-data come together (or --test-data alone)")
    if args.preset == "tiny" and not args.data:
        args.data, args.val_data = "tiny/train.jsonl", "tiny/val.jsonl"
        args.prompts = args.prompts or "tiny/prompts.jsonl"
    tests = {"tiny": ["tiny/test.jsonl"], "paper": ["math500", "aime24", "aime25"]}
    args.test_data = args.test_data or tests[args.preset]
    if len({Path(test).stem for test in args.test_data}) < len(args.test_data):
        fail("two of --test-data have the same name: the table could not tell them apart")
    args.out = args.out or Path(time.strftime("runs/bridge-%Y%m%d-%H%M%S"))
    skip = {"1-teacher-rl": args.skip_teacher_rl, "3-student-rl": args.skip_student_rl}
    chosen = ARMS if "all" in args.arms else args.arms
    if args.skip_teacher_rl and "raw-teacher" in chosen:
        fail("--skip-teacher-rl leaves no teacher before RL: name the --arms without raw-teacher")
    args.arms = {arm: [step for step in ARMS[arm] if not skip.get(step)] for arm in chosen}
    return args


# --- problems -------------------------------------------------------------------------------------
def split_problems(args, tokenizer):
    """{name: rows}: labelled problems for steps 1 and 3 and for validation, and unlabelled ones."""

    def read(path, labelled=True):
        context = args.context if labelled else float("inf")  # else their reader handles long ones
        problems = grpo.load_problems(path, tokenizer, args.grpo, context)
        if labelled and not args.dry_run:  # so that it fails now, not hours later
            grpo.read_answers(problems)
        rows = {}
        for problem in problems:  # each once, because labels are counted by problem
            rows.setdefault(problem["problem"], problem["row"])
        return rows

    if args.data:
        rows, val = read(args.data), read(args.val_data)
        for test in filter(os.path.isfile, args.test_data):
            if both := read(test, labelled=False).keys() & {*rows, *val}:
                print(f"warning: {len(both)} problems of {test} are in --data or --val-data, too")
        rows = [row for problem, row in rows.items() if problem not in val]
        rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))]
        a, b, val = rows[: len(rows) // 2], rows[len(rows) // 2 :], list(val.values())
    else:  # the authors' split: 80 %, seed 42
        try:
            from datasets import load_dataset
        except ImportError:
            fail("DAPO needs: pip install datasets; or bring --data, --val-data and --test-data")
        parts = load_dataset(grpo.DAPO, split="train").train_test_split(test_size=0.2, seed=42)
        a, held_out = list(parts["train"]), list(parts["test"])
        val, b = held_out[:256], held_out[256:]
    prompts = list(read(args.prompts, labelled=False).values()) if args.prompts else a + b
    splits = {"A": a, "B": b, "A+B": a + b, "VAL": val}
    for name, rows in ("PROMPTS", prompts), ("VAL-PROMPTS", val):
        keys = "problem", "question", "prompt"
        splits[name] = [{key: row[key] for key in keys if key in row} for row in rows]
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    print(f"problems: {counts}")
    if min(map(len, splits.values())) < 4:
        fail(f"too few problems, 4 of each are needed: {counts} (A and B without those of VAL)")
    return splits


# --- the runs -------------------------------------------------------------------------------------
def write_whole(path, text):
    """Writes to .new, then renames: never a half-written file."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def place(args, name, script, flags):
    """The directory of the run with these inputs, new if none exists; bridge.json records them."""
    here, record = Path(__file__).parent, args.out / "bridge.json"
    files = [here / script, *(here.glob("kernels/*.py") if script != EVAL else ())]
    for path in map(Path, map(str, flags.values())):
        model = (".safetensors", ".json", ".jinja")
        files += [file for file in path.glob("*") if file.suffix in model]
        files += [path] if path.is_file() else []
    used = dict(flags)
    for path in files:
        # The first 64 MiB will do: training changes all weights, and data are seldom longer.
        key, content = str(path), path.open("rb").read(2**26)
        if path.suffix == ".py":  # its syntax tree: comments don't count
            key, content = path.name, ast.dump(ast.parse(content, path.name)).encode()
        used[key] = hashlib.sha256(content).hexdigest()[:8]
    known = json.loads(record.read_text()) if record.exists() else {}
    runs = known.setdefault(name, [])
    if used not in runs:
        if runs:
            was = [f"{key} was {old}" for key, old in runs[-1].items() if used.get(key) != old]
            print(f"\n{name} runs again, in a new directory: {', '.join(was)}")
        runs.append(used)
        write_whole(record, json.dumps(known, indent=1))
    number = runs.index(used) + 1
    return args.out / (f"{name}@{number}" if number > 1 else name)


def launch(command):
    """Runs a command, its output going where ours goes; returns its exit status."""
    process = subprocess.Popen(command, close_fds=False)  # so that it inherits the lock
    try:
        return process.wait()
    finally:
        process.terminate()  # if we are stopped before it has ended
        process.wait()  # else it would outlive us, if only by a moment


def run_all(args, splits):
    """Runs each step that an arm needs and evaluates each model; [(name, script, flags, out)]."""
    steps, plan = recipe_steps(args), []
    needed = {step for arm in args.arms.values() for step in arm}
    for model in ["STUDENT", "TEACHER", *(step for step in steps if step in needed)]:
        plan += [(model, *steps[model])] if model in steps else []
        for test in args.test_data:
            name = f"eval/{model.lower()}-{Path(test).stem}"
            plan.append((name, EVAL, {"--model": model, "--data": test}))
    launcher = [sys.executable]
    if args.nproc > 1:
        torchrun = Path(sys.executable).with_name("torchrun")  # a venv need not be activated
        launcher = [str(torchrun) if torchrun.exists() else "torchrun", "--standalone"]
        launcher += ["--nproc-per-node", str(args.nproc), "--"]
    paths = {"TEACHER": args.teacher, "STUDENT": args.student, "1-teacher-rl": args.teacher}
    paths |= {name: f"{args.out}/data/{name.lower()}.jsonl" for name in splits}
    runs, rates = [], {}  # rates: each script's seconds per step or per evaluation
    for name, script, named in plan:
        flags = {flag: paths.get(value, value) for flag, value in named.items()}
        flags |= {"--preset": args.preset, "--seed": args.seed}
        flags |= {"--thinking": None} if args.thinking else {}  # without a value
        out = args.out / name if args.dry_run else place(args, name, script, flags)
        runs.append((name, script, named, out))
        paths[name] = str(out / KEPT[script])
        paths[f"rollouts of {name}"] = str(out / "rollouts.jsonl")
        command = [*launcher, os.path.relpath(Path(__file__).with_name(script))]
        command += [str(part) for pair in flags.items() for part in pair if part is not None]
        command += ["--out", str(out)]
        if args.dry_run:
            print(f"\n{name}\n$ {shlex.join(command)}")
        elif (out / ("results.json" if script == EVAL else "final")).exists():
            print(f"{name}: done before, in {out}")
        else:
            print(f"\n{name}\n$ {shlex.join(command)}")
            began = time.time()
            if status := launch(command):
                fail(f"{name} ended with status {status}, see above; again: {shlex.join(command)}")
            rates[script] = (time.time() - began) / flags.get("--steps", 1)
            if script == EVAL:
                continue
            later = [(s, f.get("--steps", 1)) for _, s, f in plan[len(runs) :]]
            seconds = sum(rates.get(s, rates[script]) * steps for s, steps in later)
            print(f"about {seconds / 60:.1f} minutes to go")
    return runs


# --- report ---------------------------------------------------------------------------------------
def report(args, runs, val_labels):
    """What each arm has achieved and what it cost: results.json, table.md, curves.png."""
    models, logs, arms, times = {}, {}, {}, args.grpo.updates_per_step
    figure = Figure(figsize=(16, 6), layout="tight")
    accuracy, reward, kl = figure.subplots(1, 3)
    for name, script, flags, out in runs:
        if script == EVAL:
            metrics = json.loads((out / "results.json").read_text())["metrics"]
            found = {key: metrics[key] for key in metrics if key.startswith(("avg@", "greedy"))}
            models.setdefault(flags["--model"], {"test": {}})["test"][flags["--data"]] = found
        else:
            models[name] = {"model": str(out / KEPT[script]), "test": {}}
            logs[name] = lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
            axis, signal, each = (reward, "reward", times) if script == RL else (kl, "kl", 1)
            axis.plot([r["step"] * each for r in lines], [r[signal] for r in lines], label=name)
    paths = {"teacher": [name for name in ("TEACHER", "1-teacher-rl") if name in models]}
    for arm, steps in args.arms.items():
        paths[arm] = ["STUDENT", *(step for step in steps if step not in paths["teacher"])]
        lines = [line for step in steps for line in logs[step]]
        sparse = [line for line in lines if line["kl"] is None]
        cost = {
            "labels": sum(logs[step][-1]["labels"] for step in steps),  # A and B share none
            "validation": val_labels if sparse else 0,
            "updates": len(sparse) * times,
            "dense updates": len(lines) - len(sparse),
            "rollout tokens": sum(r["tokens"] for s in steps if s != "replay" for r in logs[s]),
            "minutes": sum(line["seconds"] for line in lines) / 60,
        }
        arms[arm] = {"steps": steps, **models[steps[-1]], "cost": cost}
    for label, names in paths.items():
        tests = [models[name]["test"][args.test_data[0]] for name in names]
        accuracy.plot(names, [[*test.values()][0]["mean"] for test in tests], "o-", label=label)
    accuracy.set(title=f"accuracy on {args.test_data[0]}, sampled", ylim=(0, 1))
    accuracy.tick_params(axis="x", rotation=90)
    reward.set(title="GRPO: mean reward of the rollouts", xlabel="updates")
    kl.set(title="dense steps: KL per token", xlabel="updates", yscale="log")
    for axis in figure.axes:
        axis.legend(handles=axis.lines, fontsize=8)
    figure.savefig(args.out / "curves.png")
    settings = {key: value for key, value in vars(args).items() if key not in ("grpo", "context")}
    results = {"settings": settings, "models": models, "arms": arms}
    write_whole(args.out / "results.json", json.dumps(results, indent=1, default=str))
    tests = models["STUDENT"]["test"]
    columns = [f"{key}, {Path(test).stem}" for test in tests for key in tests[test]]
    table = [["", *columns, *cost], ["---"] * (1 + len(columns) + len(cost))]
    for name, row in (models | {f"**{arm}**": arms[arm] for arm in arms}).items():
        numbers = [number for test in row["test"].values() for number in test.values()]
        cells = ["{mean:.3f} ({low:.3f} to {high:.3f})".format(**number) for number in numbers]
        cells += [f"{round(value, 1):,}" for value in row.get("cost", {}).values()]
        table.append([name, *cells])
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    write_whole(args.out / "table.md", text)
    print(f"\n{text}\n{args.out}: table.md, results.json, curves.png")


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    try:
        if grpo.WORLD > 1:
            fail("start it without torchrun: --nproc gives that to each step")
        args = parse_arguments(argv)
        teacher, student = map(AutoTokenizer.from_pretrained, (args.teacher, args.student))
        if teacher.get_vocab() != student.get_vocab():
            fail(f"{args.teacher} and {args.student} have different tokenizers: no bridge between")
        if args.out.exists() and any(args.out.iterdir()) and not (args.out / "lock").exists():
            fail(f"{args.out} holds something that is not a run of the recipe: give another --out")
        splits = split_problems(args, student)
        if args.dry_run:
            return run_all(args, splits)
        print(f"--out {args.out} goes on with this run, once none of its steps is running any more")
        (args.out / "data").mkdir(parents=True, exist_ok=True)
        with (args.out / "lock").open("w") as lock:  # a step that outlives us still holds it
            os.set_inheritable(lock.fileno(), True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name, rows in splits.items():
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_whole(args.out / f"data/{name.lower()}.jsonl", lines)
            report(args, run_all(args, splits), len(splits["VAL"]))
    except (OSError, SyntaxError) as error:  # no such file; a syntax error in a script
        fail(str(error).splitlines()[0])
    except KeyboardInterrupt:
        fail("stopped; the same command with --out resumes at the unfinished step")


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.stdout.reconfigure(line_buffering=True)  # keeps our lines and the scripts' in order
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that launch() ends the step, too
    main()
