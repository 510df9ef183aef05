"""Every claim of both papers on the pocket world, over seeds: run, compared, called by its name.

    python tiny/evidence.py --seeds 0 1 2 3 4         what is there already does not run again
    python tiny/evidence.py --tune --seeds 100 101    how the learning rates were chosen

A seed redraws all that comes after the base models: the split of the labels, the order, every
sample. Its result is one small file, tiny/evidence/seed-N.json, with its commands and the hash of
the code that made it; seeds made by different code don't mix. EVIDENCE.md is written from these
files alone. A claim compares arms, paired seed by seed; where it takes several comparisons it is
as weak as the weakest. The p values of a paper's claims are adjusted together (Holm, 5 %).
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
ROUND = 1  # of seeds that no choice had seen

# --- arms -----------------------------------------------------------------------------------------
DENSE = {"--fkl-lr": 4e-3, "--opd-lr": 4e-3}
PACED = {"--schedule": "fkl", "--lr": 1e-3}
ARMS = {  # script, flags; the learning rates that are not the bridge's before it are the arm's own
    "recipe": ("bridge.py", DENSE | {"--student-rl-lr": 3e-5}),
    "bridge": ("bridge.py", DENSE),
    "direct": ("bridge.py", {"--direct-lr": 3e-4}),
    "raw-teacher": ("bridge.py", DENSE),
    "no-warmup": ("bridge.py", {"--opd-lr": 4e-3}),
    "no-opd": ("bridge.py", {"--fkl-lr": 4e-3}),
    "replay": ("bridge.py", DENSE | {"--replay-lr": 4e-4}),
    "more-opd": ("bridge.py", DENSE | {"--more-opd-lr": 4e-4}),
    "cold-stage-3": ("bridge.py", {"--student-rl-lr": 3e-4}),
    "uniform fkl": ("paced.py", PACED | {"--weights": "uniform"}),
    "filter fkl": ("paced.py", PACED | {"--weights": "filter"}),
    "paced fkl": ("paced.py", PACED),
    "paced rkl": ("paced.py", PACED | {"--schedule": "rkl"}),
    "paced fkl-rkl": ("paced.py", PACED | {"--schedule": "fkl-rkl"}),
    "paced rkl-fkl": ("paced.py", PACED | {"--schedule": "rkl-fkl"}),
    "self uniform": ("paced.py --self", PACED | {"--schedule": "rkl", "--weights": "uniform"}),
    "self paced": ("paced.py --self", PACED | {"--schedule": "rkl"}),
}
GRID = (0.4, 1.0, 2.5)  # times these rates
PAPER_DECODING = ("--temperature", 0.7, "--top-p", 0.8, "--top-k", 20)
COLUMNS = {"sampled": "avg@8", "paper": "avg@8, 0.7 / 0.8 / 20", "greedy": "greedy"}
COLUMNS |= {"forgets": "heldout loss"}

# --- claims ---------------------------------------------------------------------------------------
CLAIMS = {  # paper: [(claim, [(the arm that should be ahead, the other)])]
    "sparse-to-dense": [
        ("RL'd teacher and bridge beat GRPO, same labels", "recipe > direct, bridge > direct"),
        ("the teacher before RL falls behind", "bridge > raw-teacher"),
        ("warmup, then OPD beats either alone", "bridge > no-warmup, bridge > no-opd"),
        ("GRPO adds after the bridge, and lags cold", "recipe > bridge, recipe > cold-stage-3"),
        ("and beats as many updates of replay", "recipe > replay"),
    ],
    "PACED": [
        ("PACED forward KL beats unweighted", "paced fkl > uniform fkl"),
        ("and a hard filter, 0.2 < p < 0.8", "paced fkl > filter fkl"),
        ("forward, then reverse KL is the best schedule",
         "paced fkl-rkl > paced fkl, paced fkl-rkl > paced rkl, paced fkl-rkl > paced rkl-fkl"),
        ("self-distillation gains, with weights more",
         "self paced > student, self paced > self uniform"),
        ("it forgets less than unweighted", "uniform fkl > paced fkl: forgets"),
    ],
    "ours, beside replay": [("GRPO beats as many updates of OPD", "recipe > more-opd")],
}  # fmt: skip


def comparisons(text):
    """The pairs of arms, and the column that decides."""
    text, _, column = text.partition(": ")
    return [tuple(pair.split(" > ")) for pair in text.split(", ")], column or "sampled"


# --- statistics -----------------------------------------------------------------------------------
def tail(t, freedom):
    """P(|T| > t) of Student's t, whose density in u = atan(t / sqrt(f)) is that of cos(u)^(f-1)."""
    u = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(u) ** (freedom - 1)
    return float(density[u >= np.arctan(t / np.sqrt(freedom))].sum() / density.sum())


def difference(seeds, pair, column):
    """Mean of the paired differences, half of its 95 % interval, and the two-sided p."""
    ahead, other = ([seed["arms"][arm][column] for seed in seeds] for arm in pair)
    d, freedom = np.subtract(ahead, other), len(seeds) - 1
    error = max(d.std(ddof=1) / np.sqrt(len(d)), 1e-12)
    low, high = 0.0, 1000.0  # the t beyond which 5 % lie, by halving
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > 0.05 else (low, middle)
    return float(d.mean()), float(high * error), tail(abs(d.mean()) / error, freedom)


def holm(ps):
    """p values adjusted for their number: the smallest times n, the next times n - 1, ..."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = largest
    return adjusted


def verdicts(seeds, claims):
    """For each claim of a paper: shown, sharpening only, contradicted or not shown."""
    if len(seeds) < 3:
        return ["too few seeds"] * len(claims)
    parts = []  # of each claim, its differences
    for _, text in claims:
        pairs, column = comparisons(text)
        parts.append([difference(seeds, pair, column) for pair in pairs])
    # All comparisons of a claim must hold: the largest p. One is enough against it: the smallest.
    for_it = holm([max(p if mean > 0 else 1.0 for mean, _, p in own) for own in parts])
    against = holm([min(p if mean < 0 else 1.0 for mean, _, p in own) * len(own) for own in parts])
    said = []
    for (_, text), shown, contradicted in zip(claims, for_it, against, strict=True):
        pairs, column = comparisons(text)
        greedy = [difference(seeds, pair, "greedy") for pair in pairs if column == "sampled"]
        if shown < 0.05:
            sharper = any(mean + half < 0 for mean, half, _ in greedy)
            said.append("sharpening only" if sharper else "shown")
        else:
            said.append("contradicted" if contradicted < 0.05 else "not shown")
    return said


# --- runs -----------------------------------------------------------------------------------------
def code_hash():
    """Of the syntax trees of all that a seed runs; comments and docstrings don't count."""
    digest = hashlib.sha256()
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("kernels/*.py")), Path(__file__)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            if documented and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def run(commands, out, script, *flags):
    """A script with one thread, its output in a file beside its run; the directory of the run."""
    command = [script, *map(str, flags), "--out", str(out)]
    commands.append(shlex.join(["python", *command]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("a") as log:
        options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        done = subprocess.run([sys.executable, *command], stdout=log, stderr=log, **options)
    if done.returncode:
        raise SystemExit(f"evidence.py: failed, see {log.name}: {commands[-1]}")
    return out


def heldout_loss(model):
    """Nats a token on documents that no model has read: what a model forgets raises it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    model, losses, tokens = AutoModelForCausalLM.from_pretrained(model), [], []
    for text in (ROOT / "tiny/heldout.txt").read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
        tokens.append(ids.shape[1] - 1)
    return np.average(losses, weights=tokens)


def evaluate(commands, model, data, seed, out, *decoding):
    flags = ("--model", model, "--data", data, "--seed", seed, *decoding)
    out = run(commands, Path(f"{out}-eval{'-paper' * bool(decoding)}"), "eval_math.py", *flags)
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    return metrics["avg@8"]["mean"], metrics["greedy"]["mean"]


def measure(commands, model, data, seed, out):
    """Accuracy in the three ways, and how much it has lost of what the base models know."""
    sampled, greedy = evaluate(commands, model, data, seed, out)
    paper, _ = evaluate(commands, model, data, seed, out, *PAPER_DECODING)
    forgets = heldout_loss(model) - heldout_loss("tiny/student")
    return {"sampled": sampled, "paper": paper, "greedy": greedy, "forgets": forgets}


def train(commands, arm, flags, out, seed, data):
    """An arm's model and cost. What arms of bridge.py share runs once, because they share --out."""
    script, own = ARMS[arm][0].split(), [part for pair in flags.items() for part in pair]
    if script == ["bridge.py"]:
        flags = ("--arms", arm, "--seed", seed, "--test-data", data)
        out = run(commands, out / "bridge", *script, *own, *flags)
        arm = json.loads((out / "results.json").read_text())["arms"][arm]
        cost = {key: arm["cost"][key] for key in ("labels", "updates", "minutes")}
        return arm["model"], cost | {"updates": cost["updates"] + arm["cost"]["dense updates"]}
    teacher = () if "--self" in script else ("--teacher", out / "bridge/1-teacher-rl/best")
    name = f"{arm.replace(' ', '-')}-{flags['--lr']:.2g}"
    out = run(commands, out / name, *script, *own, *teacher, "--seed", seed)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    minutes = sum(line["seconds"] for line in lines) / 60
    cost = {"labels": lines[-1]["labels"], "updates": lines[-1]["step"], "minutes": minutes}
    return out / "final", cost


def run_seed(seed, out, data, results):
    """Every arm of a seed, into its one file; what a kill left half-done is resumed."""
    target, commands = results / f"seed-{seed}.json", []
    if target.exists() and json.loads(target.read_text())["code"] == code_hash():
        return
    arms = {"student": {"labels": 0, "updates": 0, "minutes": 0.0}}
    arms["student"] |= measure(commands, "tiny/student", data, seed, out / "student")
    for arm, (_, flags) in ARMS.items():
        model, cost = train(commands, arm, flags, out, seed, data)
        arms[arm] = cost | measure(commands, model, data, seed, out / arm.replace(" ", "-"))
        print(f"seed {seed}, {arm}: {arms[arm]['sampled']:.3f}", flush=True)
    record = {"seed": seed, "code": code_hash(), "commands": commands, "arms": arms}
    results.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".new").write_text(json.dumps(record, indent=1), encoding="utf-8")
    target.with_suffix(".new").replace(target)


def tune_seed(seed, out, data):
    """{arm: its sampled accuracy at each point of the grid}."""
    scores = {arm: [] for arm in ARMS}
    for (arm, (_, flags)), factor in itertools.product(ARMS.items(), GRID):
        rates = {flag: rate for flag, rate in flags.items() if flag.endswith("lr")}
        own = set(rates) - set(DENSE) or rates
        tried = flags | {flag: rates[flag] * factor for flag in own}
        model, _ = train([], arm, tried, out, seed, data)
        place = out / f"{arm.replace(' ', '-')}-{factor}"
        scores[arm].append(evaluate([], model, data, seed, place)[0])
        print(f"seed {seed}, {arm}, {factor} x: {scores[arm][-1]:.3f}", flush=True)
    return scores


# --- report ---------------------------------------------------------------------------------------
def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def evidence(seeds):
    """EVIDENCE.md, from the seeds' records alone."""
    arms, claims = [], []
    for arm in seeds[0]["arms"]:
        runs = [seed["arms"][arm] for seed in seeds]
        values = [[run[column] for run in runs] for column in COLUMNS]
        cells = [f"{np.mean(own):.3f} ± {np.std(own, ddof=len(own) > 1):.3f}" for own in values]
        minutes = np.mean([run["minutes"] for run in runs])
        arms.append([arm, *cells, runs[0]["labels"], runs[0]["updates"], f"{minutes:.1f}"])
    for paper, own in CLAIMS.items():
        for (claim, text), verdict in zip(own, verdicts(seeds, own), strict=True):
            pairs, column = comparisons(text)
            for pair in pairs if len(seeds) > 1 else ():
                shown = (column, "paper", "greedy") if column == "sampled" else (column,)
                cells = ["{:+.3f} ± {:.3f}".format(*difference(seeds, pair, c)) for c in shown]
                cells += [""] * (3 - len(cells))
                claims.append([paper, claim, " − ".join(pair), *cells, f"**{verdict}**"])
                paper = claim = verdict = ""
    numbers = " ".join(str(seed["seed"]) for seed in seeds)
    return f"""# Evidence

Mean ± standard deviation over seeds {numbers}, on `tiny/test.jsonl`. Written by

    python tiny/evidence.py --seeds {numbers}

from `tiny/evidence/seed-*.json`, all made by the same code. It holds for this one pocket world
(`tiny/README.md`), not for real models. The world, step counts and learning rates were chosen on
`tiny/val.jsonl` with seeds of 100 and more (`tiny/TUNING.md`). Round {ROUND} of fresh seeds.

{table(["arm", *COLUMNS.values(), "labels", "updates", "minutes"], arms)}
Heldout loss: its rise over the base student's, on `tiny/heldout.txt`, in nats a token. Minutes: of
the steps, one thread. *Shown*: all differences at temperature 1 are positive, and the largest of
their p values, adjusted over the claims of the paper (Holm), is below 5 %; *contradicted*: one is
negative in the same sense; *sharpening only*: shown, but a greedy difference lies below 0 with its
interval. Differences are paired by seed, with their 95 % paired-t intervals.

{table(["paper", "claim", "compared", "difference", "0.7 / 0.8 / 20", "greedy", "verdict"], claims)}
![every arm, a dot a seed](evidence.png)
"""


def tuning(seeds, scores):
    """TUNING.md: every score, the best mean of an arm in bold."""
    rows = []
    for arm in scores[0]:
        cells = [[own[arm][i] for own in scores] for i in range(len(GRID))]
        best = int(np.argmax(np.mean(cells, 1)))
        cells = [", ".join(f"{score:.3f}" for score in cell) for cell in cells]
        cells[best] = f"**{cells[best]}**"
        rates = [f"{flag} {rate}" for flag, rate in ARMS[arm][1].items() if flag.endswith("lr")]
        rows.append([arm, " ".join(rates), *cells])
    numbers = " ".join(map(str, seeds))
    head = ["arm", "rates", *(f"{factor} x" for factor in GRID)]
    return f"""# Tuning

avg@8 at temperature 1 on `tiny/val.jsonl`, seeds {numbers}. Every arm's own learning rates (those
that are not the bridge's before it) at the same three multiples. Written by

    python tiny/evidence.py --tune --seeds {numbers}

{table(head, rows)}"""


def draw(seeds, path):
    """Every arm's accuracy: a dot a seed, a bar their mean."""
    figure, arms = Figure(figsize=(12, 5), layout="tight"), list(seeds[0]["arms"])
    axis = figure.subplots()
    for column, mark in ("sampled", "o"), ("greedy", "x"):
        values = np.array([[seed["arms"][arm][column] for arm in arms] for seed in seeds])
        for own in values:
            axis.plot(arms, own, mark, color="C0" if mark == "o" else "C1", alpha=0.5)
        axis.plot(arms, values.mean(0), "_", color="black", markersize=14)
    axis.tick_params(axis="x", rotation=45)
    axis.set(title="sampled (o) and greedy (x), a dot a seed", ylabel="accuracy", ylim=(0, 1))
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tune", action="store_true", help="every arm at each rate of the grid")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, a thread each")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    data, results = "tiny/val.jsonl" if args.tune else "tiny/test.jsonl", ROOT / "tiny/evidence"

    def one(seed):
        out = Path(f"runs/{'tuning' if args.tune else 'evidence'}/seed-{seed}")
        return tune_seed(seed, out, data) if args.tune else run_seed(seed, out, data, results)

    with ThreadPoolExecutor(args.jobs) as pool:
        scores = list(pool.map(one, args.seeds))
    if args.tune:
        (ROOT / "tiny/TUNING.md").write_text(tuning(args.seeds, scores), encoding="utf-8")
        return
    seeds = [json.loads((results / f"seed-{seed}.json").read_text()) for seed in args.seeds]
    (ROOT / "tiny/EVIDENCE.md").write_text(evidence(seeds), encoding="utf-8")
    draw(seeds, ROOT / "tiny/evidence.png")
    print(evidence(seeds))


if __name__ == "__main__":
    main()
