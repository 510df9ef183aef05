"""Every claim of both papers on the pocket world, over seeds: run, compared and judged.

    python tiny/evidence.py                           skips what these same scripts have already run
    python tiny/evidence.py --tune --seeds 100 101    how the learning rates were chosen

A seed redraws all that comes after the base models: the split of the labels, the order, every
sample. Its result is one small file, tiny/evidence/seed-N.json, with its settings and the hash of
the scripts that made it; EVIDENCE.md is written from these files and why.md. A claim compares arms,
paired seed by seed; one that takes several comparisons is as weak as its weakest.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "tiny/evidence"
DENSE = {"--fkl-lr": 1e-2, "--opd-lr": 4e-3}
FKL, RKL = {"--schedule": "fkl", "--lr": 6.25e-3}, {"--schedule": "rkl", "--lr": 2.5e-3}
ARMS = {  # script, flags; learning rates other than those of the bridge before it are the arm's own
    "recipe": ("bridge.py", DENSE | {"--student-rl-lr": 1.2e-4}),
    "bridge": ("bridge.py", DENSE),
    "direct": ("bridge.py", {"--direct-lr": 1.2e-4}),
    "raw-teacher": ("bridge.py", {"--fkl-lr": 1.6e-3, "--opd-lr": 6.4e-4}),
    "no-warmup": ("bridge.py", {"--opd-lr": 4e-3}),
    "no-opd": ("bridge.py", {"--fkl-lr": 1e-2}),
    "replay": ("bridge.py", DENSE | {"--replay-lr": 2.56e-5}),
    "more-opd": ("bridge.py", DENSE | {"--more-opd-lr": 4e-4}),
    "cold-stage-3": ("bridge.py", {"--student-rl-lr": 4.8e-5}),
    "uniform-fkl": ("paced.py", FKL | {"--weights": "uniform"}),
    "filter-fkl": ("paced.py", FKL | {"--lr": 1e-3, "--weights": "filter"}),
    "paced-fkl": ("paced.py", FKL),
    "paced-rkl": ("paced.py", RKL),
    "paced-fkl-rkl": ("paced.py", FKL | {"--schedule": "fkl-rkl"}),
    "paced-rkl-fkl": ("paced.py", RKL | {"--schedule": "rkl-fkl"}),
    "self-uniform": ("paced.py --self", RKL | {"--weights": "uniform"}),
    "self-paced": ("paced.py --self", RKL | {"--lr": 6.25e-3}),
}
GRID = (0.4, 1.0, 2.5)  # multiples of these rates
PAPER, PAPER_DECODING = "0.7 / 0.8 / 20", "--temperature 0.7 --top-p 0.8 --top-k 20".split()
COLUMNS = {"sampled": "avg@8", "paper": PAPER, "greedy": "greedy", "forgets": "heldout loss"}

CLAIMS = {  # paper: [(claim, the arms that should be ahead > the others: the column that decides)]
    "sparse-to-dense": [
        ("RL'd teacher and bridge beat GRPO, same labels", "recipe, bridge > direct"),
        ("the teacher before RL falls behind", "bridge > raw-teacher"),
        ("warmup, then OPD beats either alone", "bridge > no-warmup, no-opd"),
        ("GRPO adds after the bridge, and lags cold", "recipe > bridge, cold-stage-3"),
        ("and beats as many updates of replay", "recipe > replay"),
    ],
    "PACED": [
        ("PACED forward KL beats unweighted", "paced-fkl > uniform-fkl"),
        ("and a hard filter, 0.2 < p < 0.8", "paced-fkl > filter-fkl"),
        ("FKL, then RKL is best", "paced-fkl-rkl > paced-fkl, paced-rkl, paced-rkl-fkl"),
        ("self-distillation with reverse KL gains", "self-uniform, self-paced > student"),
        ("it forgets less than unweighted", "uniform-fkl > paced-fkl: forgets"),
    ],
    "ours": [
        ("GRPO after the bridge beats as many updates of OPD", "recipe > more-opd"),
        ("weights help self-distillation", "self-paced > self-uniform"),
    ],
}


def differences(seeds, text, column=None):
    """[(arm, other, mean paired difference, half-width of its 95 % interval, two-sided p)]."""
    text, _, decides = text.partition(": ")
    column, freedom = column or decides or "sampled", len(seeds) - 1
    # In u = atan(t / sqrt(freedom)), the density of Student's t goes as cos(u)^(freedom - 1).
    u = np.linspace(0, np.pi / 2, 200_000, endpoint=False)
    t, density = np.tan(u) * np.sqrt(freedom), np.cos(u) ** (freedom - 1)
    tail = 1 - density.cumsum() / density.sum()  # P(|T| > t)
    found = []
    for pair in itertools.product(*(arms.split(", ") for arms in text.split(" > "))):
        d = np.subtract(*([seed["arms"][name][column] for seed in seeds] for name in pair))
        error = max(d.std(ddof=1) / np.sqrt(len(d)), 1e-12)
        p = np.interp(abs(d.mean()) / error, t, tail)
        found.append((*pair, float(d.mean()), float(t[tail > 0.05][-1] * error), float(p)))
    return found


def holm(ps):
    """p values adjusted for their number: the smallest times n, the next times n - 1, ..."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(np.array(ps)[order] * np.arange(len(ps), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order)]


def verdicts(seeds, claims):
    """For each claim of a paper: shown, sharpening only, contradicted or not shown."""
    if len(seeds) < 3:
        return ["too few seeds"] * len(claims)
    # A claim needs all its comparisons: take the largest p. One can contradict it: the smallest.
    parts, said = [differences(seeds, text) for _, text in claims], []
    for_it = holm([max(p if mean > 0 else 1.0 for *_, mean, _, p in own) for own in parts])
    against = [min(p if mean < 0 else 1.0 for *_, mean, _, p in own) * len(own) for own in parts]
    for (_, text), shown, contradicted in zip(claims, for_it, holm(against), strict=True):
        greedy = differences(seeds, text, "greedy") if ": " not in text else []
        sharper = any(mean + half < 0 for *_, mean, half, _ in greedy)
        word = "contradicted" if contradicted < 0.05 else "not shown"
        said.append(("sharpening only" if sharper else "shown") if shown < 0.05 else word)
    return said


# --- runs -----------------------------------------------------------------------------------------
def origin():
    """The settings, and the hash of the syntax trees, without docstrings, of scripts and world."""
    digest = hashlib.sha256()
    world = ROOT / "tiny/make_tiny.py"
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), world]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        digest.update(ast.dump(tree).encode())
    return {"settings": json.loads(json.dumps(ARMS)), "code": digest.hexdigest()}


def run(out, script, *flags):
    """Runs a script with one thread, its output in a log file beside `out`; returns `out`."""
    command = [script, *map(str, flags), "--out", str(out)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("a") as log:
        options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        done = subprocess.run([sys.executable, *command], stdout=log, stderr=log, **options)
    if done.returncode:
        raise SystemExit(f"evidence.py: failed, see {log.name}: python {' '.join(command)}")
    return out


@torch.no_grad()
def heldout_loss(model):
    """Nats per token on documents that no model has read: forgetting raises it."""
    texts = (ROOT / "tiny/heldout.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="right")
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    model = transformers.AutoModelForCausalLM.from_pretrained(model)
    return float(model(**batch, labels=labels).loss)


def evaluate(model, data, seed, out, *decoding):
    """Accuracy, sampled and greedy."""
    flags = ("--model", model, "--data", data, "--seed", seed, *decoding)
    out = run(Path(f"{out}-eval{'-paper' * bool(decoding)}"), "eval_math.py", *flags)
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    return metrics["avg@8"]["mean"], metrics["greedy"]["mean"]


def train(arm, flags, out, seed, data):
    """An arm's model and cost. Steps that bridge.py's arms share run once: they share --out."""
    script, own = ARMS[arm][0].split(), [part for pair in flags.items() for part in pair]
    if script == ["bridge.py"]:
        flags = ("--arms", arm, "--seed", seed, "--test-data", data)
        out = run(out / "bridge", *script, *own, *flags)
        arm = json.loads((out / "results.json").read_text())["arms"][arm]
        cost = {key: arm["cost"][key] for key in ("labels", "updates", "minutes")}
        return arm["model"], cost | {"updates": cost["updates"] + arm["cost"]["dense updates"]}
    teacher = () if "--self" in script else ("--teacher", out / "bridge/1-teacher-rl/best")
    out = run(out / f"{arm}-{flags['--lr']:.2g}", *script, *own, *teacher, "--seed", seed)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cost = {"labels": lines[-1]["labels"], "updates": lines[-1]["step"]}
    return out / "final", cost | {"minutes": sum(line["seconds"] for line in lines) / 60}


def run_seed(seed, out=Path("runs/evidence"), data="tiny/test.jsonl"):
    """Runs every arm of a seed into its one file; resumes what a kill left half-done."""
    target, out = RECORDS / f"seed-{seed}.json", out / f"seed-{seed}"
    record = {"seed": seed} | origin() | {"arms": {}}
    if target.exists() and json.loads(target.read_text()) | {"arms": {}} == record:
        return
    for arm in ("student", *ARMS):
        model, cost = "tiny/student", {"labels": 0, "updates": 0, "minutes": 0.0}
        if arm in ARMS:
            model, cost = train(arm, ARMS[arm][1], out, seed, data)
        sampled, greedy = evaluate(model, data, seed, out / arm)
        paper, _ = evaluate(model, data, seed, out / arm, *PAPER_DECODING)
        lost = heldout_loss(model) - heldout_loss("tiny/student")
        record["arms"][arm] = cost | dict(sampled=sampled, paper=paper, greedy=greedy, forgets=lost)
        print(f"seed {seed}, {arm}: {sampled:.3f}", flush=True)
    target.with_suffix(".new").write_text(json.dumps(record, indent=1), encoding="utf-8")
    target.with_suffix(".new").replace(target)


def tune_seed(seed, data="tiny/val.jsonl"):
    """{arm: its sampled accuracy at each point of the grid}."""
    scores, out = {arm: [] for arm in ARMS}, Path(f"runs/tuning/seed-{seed}")
    for (arm, (_, flags)), factor in itertools.product(ARMS.items(), GRID):
        rates = {flag for flag in flags if flag.endswith("lr")}
        tried = {flag: flags[flag] * factor for flag in rates - set(DENSE) or rates}
        model, _ = train(arm, flags | tried, out, seed, data)
        scores[arm] += evaluate(model, data, seed, out / f"{arm}-{factor}")[:1]
        print(f"seed {seed}, {arm}, {factor} x: {scores[arm][-1]:.3f}", flush=True)
    return scores


# --- report ---------------------------------------------------------------------------------------
def table(head, rows):
    return "".join(f"| {' | '.join(map(str, r))} |\n" for r in [head, ["---"] * len(head), *rows])


def evidence(seeds):
    """EVIDENCE.md, from the seeds' records and why.md."""
    arms, claims = [], []
    for arm in seeds[0]["arms"]:
        runs = [seed["arms"][arm] for seed in seeds]
        values = [[run[column] for run in runs] for column in COLUMNS]
        cells = [f"{np.mean(own):.3f} ± {np.std(own, ddof=1):.3f}" for own in values]
        minutes = np.mean([run["minutes"] for run in runs])
        arms.append([arm, *cells, runs[0]["labels"], runs[0]["updates"], f"{minutes:.1f}"])
    for paper, own in CLAIMS.items():
        for (claim, text), verdict in zip(own, verdicts(seeds, own), strict=True):
            shown = [differences(seeds, text, c) for c in (None, "paper", "greedy")]
            for found in zip(*shown[: 1 if ": " in text else 3], strict=True):
                cells = [f"{mean:+.3f} ± {half:.3f}" for *_, mean, half, _ in found]
                cells += [""] * (3 - len(cells)) + [f"**{verdict}**" if verdict else ""]
                claims.append([paper, claim, " − ".join(found[0][:2]), *cells])
                paper = claim = verdict = ""
    numbers = " ".join(str(seed["seed"]) for seed in seeds)
    every = [json.loads(path.read_text()) for path in RECORDS.glob("seed-*.json")]
    rounds = {seed["code"] + str(seed["settings"]) for seed in every}
    return f"""# Evidence

Mean ± s.d. over seeds on `tiny/test.jsonl`, written by `python tiny/evidence.py --seeds {numbers}`.
It holds for this one pocket world (`tiny/README.md`), not for real models. World, step counts and
learning rates were chosen on `tiny/val.jsonl`, seeds 100 and more (`tiny/TUNING.md`). There have
been {len(rounds)} rounds of fresh seeds, which differ in world, settings or code.

{table(["arm", *COLUMNS.values(), "labels", "updates", "minutes"], arms)}
{table(["paper", "claim", "compared", "difference", PAPER, "greedy", "verdict"], claims)}
![every arm, a dot a seed](evidence.png)

{(RECORDS / "why.md").read_text(encoding="utf-8")}"""


def tuning(numbers, scores):
    """TUNING.md: every score, the best mean of an arm in bold."""
    rows = []
    for arm in scores[0]:
        cells = [[own[arm][i] for own in scores] for i in range(len(GRID))]
        best = int(np.argmax(np.mean(cells, 1)))
        cells = [", ".join(f"{score:.3f}" for score in cell) for cell in cells]
        cells[best] = f"**{cells[best]}**"
        rows.append([arm, " ".join(map(str, itertools.chain(*ARMS[arm][1].items()))), *cells])
    return f"""# Tuning

avg@8 at temperature 1 on `tiny/val.jsonl`, seeds {numbers}. Every arm's own learning rates (those
that are not the bridge's before it) at the same three multiples, the best in bold. Written by
`python tiny/evidence.py --tune --seeds {numbers}`.

{table(["arm", "settings", *(f"{factor} x" for factor in GRID)], rows)}"""


def draw(seeds, path):
    """Every arm's accuracy: a dot per seed, a bar for their mean."""
    figure, arms = Figure(figsize=(12, 5), layout="tight"), list(seeds[0]["arms"])
    axis = figure.subplots()
    for column, mark in ("sampled", "oC0"), ("greedy", "xC1"):
        values = np.array([[seed["arms"][arm][column] for seed in seeds] for arm in arms])
        axis.plot(arms, values, mark, alpha=0.5)
        axis.plot(arms, values.mean(1), "_k", markersize=14)
    axis.tick_params(axis="x", rotation=45)
    axis.set(title="sampled (o) and greedy (x), a dot a seed", ylabel="accuracy", ylim=(0, 1))
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=range(24, 30))
    parser.add_argument("--tune", action="store_true", help="every arm at each rate of the grid")
    parser.add_argument("--jobs", type=int, default=2, help="arms side by side, of different seeds")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    with ProcessPoolExecutor(args.jobs) as pool:  # loading a model is not safe in threads
        scores = list(pool.map(tune_seed if args.tune else run_seed, args.seeds))
    if args.tune:
        text = tuning(" ".join(map(str, args.seeds)), scores)
        (ROOT / "tiny/TUNING.md").write_text(text, encoding="utf-8")
        return
    seeds = [json.loads((RECORDS / f"seed-{seed}.json").read_text()) for seed in args.seeds]
    (ROOT / "tiny/EVIDENCE.md").write_text(evidence(seeds), encoding="utf-8")
    draw(seeds, ROOT / "tiny/evidence.png")
    print(evidence(seeds))


if __name__ == "__main__":
    main()
