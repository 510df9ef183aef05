"""Measures the signal-to-noise ratio of distillation gradients, by the student's pass rate.

PACED says that the gradients of problems which the student never solves (p = 0) are incoherent,
that those of problems it always solves (p = 1) are near zero, and that their SNR vanishes at both
ends, as its weight p^alpha (1 - p)^beta does. Nothing is trained here; this is only measured:

  p    the share of right answers among the student's --pass-rollouts
  g_x  the gradient of problem x's own, unweighted loss with respect to all weights of the student,
       from --grad-rollouts fresh completions (forward KL: the teacher's, reverse KL: the student's)
  SNR  of a bin of p: ‖mean g‖ / sqrt(mean ‖g - mean g‖^2) over the problems of the bin
  SNR* the same with ‖mean g‖^2 from pairs of different problems, 0 where that is negative. For n
       gradients of pure noise the SNR is 1 / sqrt(n - 1): the fewer problems, the better a bin
       looks. SNR* has no such floor, so bins are compared by it: in curve, bands and slopes.

Bands are 95 %, a bootstrap over the problems of a bin. Bins differ in more than p: in the pocket
world the kind of problem varies with it, and nearly all with p = 0 are products.

    python tiny/snr_probe.py                                     one to three minutes
    python tiny/snr_probe.py --teacher runs/grpo-DATE-TIME/best  a teacher after RL
"""

import argparse
import os
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the scripts

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import paced

# Finer towards the ends, where the slopes are decided; p = 0 and p = 1 are bins of their own.
EDGES = [Fraction(i, 32) for i in (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 30, 31, 32)]
NAMES = ["0", *(f"({a}, {b}{')' if b == 1 else ']'}" for a, b in pairwise(EDGES)), "1"]
FEWEST = 8  # problems that a bin needs to be measured
RESAMPLES = 2000
SLOPES = np.arange(-600, 601) / 100  # the slopes tried: a band that ends at -6 or 6 is open
LARGEST = 8e9  # bytes of all gradients


def fail(message):
    """As paced.py's, under our name."""
    tqdm.write(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments(argv):
    """Our settings, and those of paced.py with its model's context length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--student", default="tiny/student", help="directory")
    parser.add_argument("--teacher", default="tiny/teacher", help="directory")
    parser.add_argument("--data", default="tiny/pool.jsonl", help="problems with answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pass-rollouts", type=int, default=64, help="completions of each p")
    parser.add_argument("--grad-rollouts", type=int, default=16, help="completions of each g")
    parser.add_argument("--out", help="directory to fill [runs/snr-DATE-TIME]")
    args = parser.parse_args(argv)
    for name, least in {"seed": 0, "pass_rollouts": 64, "grad_rollouts": 1}.items():
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}")
    if Path(args.student).resolve() == Path(args.teacher).resolve():
        fail("--student and --teacher are the same model: there is no gradient")
    shared = ("student", "teacher", "data", "seed", "pass_rollouts")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in shared]
    return args, *paced.parse_arguments(flags)


# --- gradients ------------------------------------------------------------------------------------
def problem_gradients(student, teacher, problems, direction, group, rng, args):
    """The gradient of each problem's own loss, (problems, weights)."""
    sampled = paced.sample(student, teacher, problems, direction, group, rng, args)
    completion_ids, mask = (column.split(group) for column in sampled[:2])  # one part per problem
    weights = list(student.parameters())
    gradients = torch.empty(len(problems), sum(weight.numel() for weight in weights))
    for i, problem in enumerate(tqdm(problems, f"{direction} gradients", leave=False, delay=2)):
        texts = [ids[keep] for ids, keep in zip(completion_ids[i], mask[i], strict=True)]
        ids, keep = paced.pad_left(texts, mask[i].device)  # right-aligned, as score() wants them
        keep = keep.bool()
        logits = paced.both_logits(student, teacher, [problem] * group, ids, keep)
        # The sum over tokens: Eq. 3 of paced.py divides by the tokens of the whole update, the same
        # for all problems. A mean per problem would make short answers weigh as much as long ones.
        one = torch.ones(group, 1, device=keep.device)
        loss, _ = paced.distil_loss(*logits, one, keep, group, direction, args)
        gradients[i] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    return gradients


# --- signal and noise -----------------------------------------------------------------------------
def pair_mean(matrix, counts):
    """The mean over pairs of different problems, of which a resample holds counts (R, n).

    A bootstrap draws some problems twice; paired with itself, one would turn noise into signal.
    """
    pairs = ((counts @ matrix) * counts).sum(1) - counts**2 @ matrix.diagonal()
    return pairs / (counts.sum(1) ** 2 - (counts**2).sum(1))


def measure(gram, counts):
    """SNR* and mean cosine of each resample (R,), from all products g_i·g_j of a bin, (n, n)."""
    square = gram.diagonal()
    signal = pair_mean(gram, counts)  # without the noise / n that ‖mean g‖^2 holds
    noise = counts @ square / counts.sum(1) - signal
    length = np.sqrt(square).clip(min=1e-30)
    cosine = pair_mean(gram / np.outer(length, length), counts)
    return np.sqrt((signal / noise).clip(min=0)), cosine


def measure_bin(gram, rng):
    """All numbers of one bin; SNR* and cosine: the value, followed by those of the resamples."""
    n, mean, square = len(gram), gram.mean(), gram.diagonal().mean()
    counts = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
    snr, cosine = measure(gram, counts)
    defined = np.sqrt(mean / (square - mean))
    return dict(size=np.sqrt(square), defined=defined, pure=(n - 1) ** -0.5, snr=snr, cosine=cosine)


def bin_of(rates):
    """The number of each rate's bin, in the order of NAMES."""
    return np.digitize(rates, [float(edge) for edge in EDGES], right=True) + (rates == 1)


def log_log_slope(x, snr, n):
    """The s of SNR ~ x^s over bins of n problems, for each resample: snr is (R, bins).

    Least squares on SNR itself, whose error goes as 1 / sqrt(n) alone: on its logarithm a bin near
    0 would decide everything, and one at 0 could not take part.
    """
    if len(x) < 2:
        return np.full(len(snr), np.nan)
    powers = x ** SLOPES[:, None]  # (slopes, bins)
    explained = (snr @ (n * powers).T) ** 2 / (n * powers**2).sum(1)  # (R, slopes)
    return np.where(snr.any(1), SLOPES[explained.argmax(1)], np.nan)


def end_slopes(bins, args):
    """For both ends: how many bins, the kernel's slope over them, SNR*'s (value, resamples)."""
    for left in (True, False):
        own = [b for b in bins if 0 < b["p"] < 1 and (b["p"] < 0.5) == left]
        p, n = (np.array([b[key] for b in own]) for key in ("p", "n"))
        kernel = p**args.alpha * (1 - p) ** args.beta
        snr = np.array([kernel, *zip(*(b["snr"] for b in own), strict=True)])
        slopes = log_log_slope(p if left else 1 - p, snr, n)
        yield len(own), slopes[0], slopes[1:]


# --- report ---------------------------------------------------------------------------------------
def band(values):
    return np.nanpercentile(values, [2.5, 97.5])


def with_band(values):
    if not len(values) or np.isnan(values[0]):
        return "-"
    return "{:.3f} ({:.3f} to {:.3f})".format(values[0], *band(values))


def table(bins, slopes, args):
    """Two Markdown tables: the bins, and the slopes at both ends."""
    lines = ["| pass rate | problems | mean p | ‖g‖ | SNR | of pure noise | SNR* | cosine |"]
    lines.append("|---" * 8 + "|")
    for b in bins:
        cells = [b["name"], b["n"], f"{b['p']:.3f}", *["-"] * 5]
        if "snr" in b:
            cells[3:6] = f"{b['size']:.3g}", f"{b['defined']:.3f}", f"{b['pure']:.3f}"
            cells[6:] = with_band(b["snr"]), with_band(b["cosine"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| slope at | bins | weight | its own slope | SNR*'s slope |"]
    lines.append("|---" * 5 + "|")
    names = ("p -> 0", f"alpha {args.alpha:g}"), ("p -> 1", f"beta {args.beta:g}")
    for (end, name), (count, kernel, values) in zip(names, slopes, strict=True):
        kernel = "-" if np.isnan(kernel) else f"{kernel:.2f}"
        lines.append(f"| {end} | {count} | {name} | {kernel} | {with_band(values)} |")
    return "\n".join(lines) + "\n"


def draw(results, args, path):
    """SNR* by pass rate with its bands, and over it the kernel, scaled by least squares."""
    figure, x = Figure(figsize=(12, 5.2), layout="constrained"), np.linspace(0, 1, 201)
    for axis, direction in zip(figure.subplots(1, 2, sharey=True), results, strict=True):
        bins, slopes = results[direction]
        keys = ("p", "defined", "pure", "snr")
        p, defined, pure, snr = (np.array([b[key] for b in bins if "snr" in b]) for key in keys)
        low, high = np.transpose([band(values) for values in snr])
        span = np.maximum(0, [snr[:, 0] - low, high - snr[:, 0]])
        axis.errorbar(p, snr[:, 0], span, fmt="o-", capsize=3, label="SNR* (95 %)")
        axis.plot(p, defined, "x", color="grey", label="SNR")
        axis.plot(p, pure, "_", color="grey", markersize=12, label="SNR of pure noise")
        kernel, there = (v**args.alpha * (1 - v) ** args.beta for v in (x, p))
        kernel *= there @ snr[:, 0] / max(there @ there, 1e-30)
        axis.plot(x, kernel, "--", label=f"p^{args.alpha:g} (1-p)^{args.beta:g}, scaled")
        ends = [f"slope at {e}: {with_band(s[2])}" for e, s in zip((0, 1), slopes, strict=True)]
        axis.set_title(f"{direction} KL\n" + "\n".join(ends), fontsize=10)
        axis.set_xlabel("the student's pass rate")
    axis.set_ylim(0)  # of both panels, once all is drawn
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    FigureCanvasAgg(figure).print_png(path)


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    try:
        probe(*parse_arguments(argv))
    except OSError as error:  # no such model, no such file, no room
        fail(str(error).splitlines()[0])


def probe(own, args, context):
    out = Path(own.out or time.strftime("runs/snr-%Y%m%d-%H%M%S"))
    if out.exists() and any(out.iterdir()):
        fail(f"{out} holds something: give another --out")
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    problems = paced.load_problems(args.data, tokenizer, args, context)
    paced.read_answers(problems)
    problems = [problem | {"teacher_ids": problem["ids"]} for problem in problems]
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    student.to(args.device).eval()
    teacher = paced.load_teacher(student, tokenizer, args)
    needed = 4 * len(problems) * student.num_parameters()
    if needed > LARGEST:
        fail(f"the gradients need {needed / 1e9:.0f} GB, over {LARGEST / 1e9:.0f}: shorten --data")
    out.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng([args.seed, 0])
    rates = np.array(paced.pass_rates(student, tokenizer, problems, None, rng, args))
    which, results, grams = bin_of(rates), {}, {}
    if np.bincount(which).max() < FEWEST:
        fail(f"no bin of pass rates holds {FEWEST} problems: take a longer --data")
    text = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in vars(own).items())
    for number, direction in enumerate(("forward", "reverse"), 1):
        # Noise of its own: if p and g shared completions, chance would tie the two together.
        rng = np.random.default_rng([args.seed, number])
        more = problems, direction, own.grad_rollouts, rng, args
        gradients = problem_gradients(student, teacher, *more)
        grams[direction], bins = (gradients @ gradients.T).double().numpy(), []
        for i in np.unique(which):
            at = (which == i).nonzero()[0]
            bins.append(dict(name=NAMES[i], n=len(at), p=rates[at].mean()))
            if len(at) >= FEWEST:
                bins[-1] |= measure_bin(grams[direction][np.ix_(at, at)], rng)
        results[direction] = bins, list(end_slopes([b for b in bins if "snr" in b], args))
        text += f"\n\n### {direction} KL\n\n{table(*results[direction], args)}"
    print(text)
    (out / "snr.md").write_text(text, encoding="utf-8")
    np.savez(out / "snr.npz", pass_rate=rates, **grams)  # to bin it in another way
    draw(results, args, out / "snr.png")
    print(f"the table: {out}/snr.md; the picture: {out}/snr.png; p and all g_i·g_j: {out}/snr.npz")


if __name__ == "__main__":
    main()
