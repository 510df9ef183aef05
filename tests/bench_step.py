"""Seconds of a whole step of grpo.py and opd.py against TRL's trainers, side by side in one run.

    python tests/bench_step.py                     TRL's only where it is: pip install trl
    OMP_NUM_THREADS=1 python tests/bench_step.py --cpu-time         on a machine that is not quiet

A step lasts from its begin to the next one's: rollout, grading, scoring, loss, update and log, no
validation or checkpoint. Both start from the same weights and have the same problems in the same
order, number of rollouts, sampling, loss, learning rate, fp32 and threads. Their random draws
differ, so mean length and reward (or KL) stand beside the seconds. TRL recomputes no activations
and scores a step's rollouts at once (--trl-micro-batch); a round's first step is not counted.

grpo.py trains the pocket teacher. opd.py has the models that bridge.py hands it, a teacher after RL
and a student after the warmup, which are made first: the pocket student itself writes six tokens a
problem, so that a step would hardly be more than its overheads. Its rollouts are as many as
grpo.py's, and then those of its own pocket preset.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the scripts

import numpy as np
import torch
from transformers import AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
import fkl_warmup
import grpo
import opd

try:
    import trl
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
except ImportError:
    trl = None

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--steps", type=int, default=4, help="the timed steps of a round")
parser.add_argument("--lr", type=float, default=3e-4, help="constant; low: lengths stay alike")
parser.add_argument("--trl-micro-batch", type=int, default=256)
parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not those of the clock")
CASES = [  # problems, how many of them a step, completions of each
    (grpo, "tiny/train.jsonl", 32, 8),
    (opd, "tiny/prompts.jsonl", 32, 8),
    (opd, "tiny/prompts.jsonl", 128, 1),
]


@contextlib.contextmanager
def quiet():
    """A folder for a run; what the run prints is shown only if it fails."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield Path(folder)
        except BaseException:
            print(printed.getvalue(), file=sys.stderr)
            raise


def timed(begins, lengths, signals):
    """(seconds, mean length, reward or KL) of each step but the first and the last."""
    seconds = [after - before for before, after in itertools.pairwise(begins)]
    return list(zip(seconds, lengths, signals, strict=False))[1:]


def recipe_models(folder):
    """The teacher after step 1 of the recipe and the student after step 2a."""
    teacher, student = folder / "1-teacher-rl", folder / "2a-fkl"
    grpo.main(["--steps=10", f"--out={teacher}"])
    flags = ["--steps=50", "--lr=1e-2", "--lr-decay=0"]
    fkl_warmup.main([f"--teacher={teacher}/best", *flags, f"--out={student}"])
    return f"{teacher}/best", f"{student}/final"


def ours(case, model, teacher, seed, args, now):
    script, data, prompts, group = case
    begins, rollout = [], script.rollout

    def clocked(*arguments):
        begins.append(now())
        return rollout(*arguments)

    flags = dict(data=data, prompts_per_step=prompts, samples_per_prompt=group, lr=args.lr)
    flags |= dict(max_new_tokens=args.max_new_tokens, steps=args.steps + 2, device="cpu")
    flags |= dict(seed=seed, warmup_steps=0, val_every=10**9, save_every=10**9)
    flags |= dict(student=model, teacher=teacher, lr_decay=0) if script is opd else {}
    with quiet() as folder:
        (folder / "val.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n', encoding="utf-8")
        flags |= dict(val_data=folder / "val.jsonl", out=folder / "run")
        script.rollout = clocked
        try:
            script.main([f"--{key.replace('_', '-')}={value}" for key, value in flags.items()])
        finally:
            script.rollout = rollout
        lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    signals = [line["reward"] if script is grpo else line["kl"] for line in lines]
    # It validates once before the first step and once after the last.
    return timed(begins[1:-1], [line["length"] for line in lines], signals)


def theirs(case, model, teacher, seed, args, now):
    script, data, prompts, group = case
    begins, steps = [], args.steps + 2
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = dict(prompt_suffix="", thinking=False, max_new_tokens=args.max_new_tokens)
    problems = grpo.load_problems(data, tokenizer, types.SimpleNamespace(**settings), 256)
    rng, epochs = np.random.default_rng([seed, 0]), steps * prompts // len(problems) + 1
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(epochs)])
    problems = [problems[i] for i in order[: steps * prompts]]  # the scripts' own order
    rows = [{"prompt": p["prompt"], "answer": p["row"].get("answer")} for p in problems]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begins.append(now())

    def reward(completions, answer, **_):
        pairs = zip(answer, map(grpo.last_boxed, completions), strict=True)
        right = (b == a or (b is not None and grpo.same_answer(a, b)) for a, b in pairs)
        return [float(r) for r in right]

    micro = min(args.trl_micro_batch, prompts * group)
    options = dict(max_completion_length=args.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0)
    options |= dict(learning_rate=args.lr, lr_scheduler_type="constant", max_grad_norm=1.0)
    options |= dict(per_device_train_batch_size=micro, max_steps=steps, shuffle_dataset=False)
    options |= dict(gradient_accumulation_steps=prompts * group // micro, bf16=False, use_cpu=True)
    options |= dict(gradient_checkpointing=False, save_strategy="no", report_to="none")
    options |= dict(logging_steps=1, disable_tqdm=True, seed=seed)
    with quiet() as folder:
        common = dict(train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        common |= dict(callbacks=[Clock()])
        if script is grpo:  # the same clipping and the same denominator as Eq. 3 and Eq. 4
            options |= dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, delta=10.0)
            config = GRPOConfig(str(folder), num_generations=group, beta=0.0, **options)
            trainer = GRPOTrainer(model, reward, config, **common)
        else:  # beta 1 is the reverse KL; a prompt is answered as often as it stands there
            common["train_dataset"] = Dataset.from_list([r for r in rows for _ in range(group)])
            config = DistillationConfig(str(folder), beta=1.0, **options)
            trainer = DistillationTrainer(model, teacher, config, **common)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    signals = [line["reward"] if script is grpo else line["loss"] for line in lines]
    return timed(begins, [line["completions/mean_length"] for line in lines], signals)


def compare(case, model, teacher, args, now):
    """Prints a line for each side, and how many times their seconds are ours."""
    script, _, prompts, group = case
    rows = prompts * group
    print(f"{script.__name__}.py: {prompts} x {group} rollouts of at most {args.max_new_tokens}")
    measured = {ours: [], theirs: []} if trl else {ours: []}
    for seed, (run, steps) in itertools.product(range(args.rounds), measured.items()):
        grpo.same_answer.cache_clear()
        steps += run(case, model, teacher, seed, args, now)
    for run, steps in measured.items():
        seconds, lengths, signals = zip(*steps, strict=True)
        speed = statistics.median(rows * n / s for s, n, _ in steps)
        name = "reward" if script is grpo else "KL"
        line = f"{run.__name__:>7}: {statistics.median(seconds):.3f}, {speed:.0f} tokens/s, "
        line += f"length {statistics.mean(lengths):.1f}, {name} {statistics.mean(signals):.2f}"
        print(line)
    if trl:
        pairs = zip(measured[ours], measured[theirs], strict=True)
        ratios = sorted(them[0] / us[0] for us, them in pairs)
        print(f"  ratio: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main():
    args = parser.parse_args()
    now = time.process_time if args.cpu_time else time.monotonic
    unit, version = "CPU seconds" if args.cpu_time else "seconds", trl and trl.__version__
    print(f"{unit} a step, {torch.get_num_threads()} threads, TRL: {version}")
    of_grpo, *of_opd = CASES
    compare(of_grpo, "tiny/teacher", None, args, now)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            teacher, student = recipe_models(Path(folder))
        for case in of_opd:
            compare(case, student, teacher, args, now)
    if not trl:
        print("for TRL's trainers beside them: pip install -U trl (measured with 1.16)")


if __name__ == "__main__":
    main()
