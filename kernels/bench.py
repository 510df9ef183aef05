"""Time and peak memory of the kernels, from the logits to the gradient of the logits.

    python -m kernels.bench                                            every problem
    python -m kernels.bench --tokens 4096 --vocabularies 151936        one

On CUDA, in bf16: eager torch, torch.compile, ours, and Liger where it is installed (pip install
liger-kernel). First each gradient is compared with float64 on 64 tokens. Times are from CUDA
events: 10 warm-up runs, then 50 that count, the L2 cache flushed before each; what an in-place
gradient overwrites is restored outside the timing. The GPU sleeps a millisecond before each, so
that Python gets ahead of it. The Markdown table names the GPU.

Without CUDA: the reference against the same eager torch (F.kl_div on log_softmax with autograd), in
fp32 on one thread. 27 is the vocabulary of the pocket models: there eager is faster, at half a
millisecond or so, and takes about as little memory.
"""

import argparse
import importlib
import importlib.util
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from kernels import softmax_kl, token_logprob

TOKENS = (256, 1024, 4096, 16384)
VOCABULARIES = (32_000, 151_669, 151_936)
# The fewest times a logit must move: the forward reads, the backward reads again and writes.
MOVES = {"forward KL": 2 + 3, "reverse KL": 2 + 3, "token_logprob": 1 + 2}


# --- what is compared: functions of logits, teacher logits and ids that return a scalar loss -----


def eager_kl(logits, teacher, ids, direction):
    student, teacher = F.log_softmax(logits.float(), -1), F.log_softmax(teacher.float(), -1)
    of, against = (student, teacher) if direction == "reverse" else (teacher, student)
    return F.kl_div(against, of, reduction="none", log_target=True).sum(-1).mean()


def our_kl(logits, teacher, ids, direction, inplace=False):
    return softmax_kl(logits, teacher, direction, inplace_backward=inplace).mean()


def liger_kl(logits, teacher, ids):
    """Takes log-probabilities, and has a gradient for the forward KL only."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return loss(F.log_softmax(logits.float(), -1), F.log_softmax(teacher.float(), -1))


def eager_logprob(logits, teacher, ids):
    log_p = F.log_softmax(logits.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (log_p.gather(-1, ids[:, None])[:, 0] + 0.1 * entropy).mean()


def our_logprob(logits, teacher, ids, inplace=False):
    logp, entropy = token_logprob(logits, ids, inplace_backward=inplace)
    return (logp + 0.1 * entropy).mean()


def contestants(kernel):
    """{name: loss} for one of the names in MOVES."""
    eager, ours = eager_logprob, our_logprob
    if kernel != "token_logprob":
        direction = kernel.split()[0]
        eager, ours = partial(eager_kl, direction=direction), partial(our_kl, direction=direction)
    losses = {"eager": eager, "ours": ours, "ours, in place": partial(ours, inplace=True)}
    if kernel == "forward KL" and importlib.util.find_spec("liger_kernel"):
        losses["Liger kl_div"] = liger_kl
    return losses


# --- how it is measured --------------------------------------------------------------------------


class Problem:
    """Logits of a student and of a teacher not far from it, and ids."""

    def __init__(self, tokens, vocabulary, dtype, device):
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": dtype}
        self.original = torch.randn(tokens, vocabulary, **options).mul_(2)
        self.teacher = torch.randn(tokens, vocabulary, **options).add_(self.original)
        self.ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        self.logits = self.original.clone().requires_grad_()

    def reset(self):
        self.logits.grad = None
        with torch.no_grad():
            self.logits.copy_(self.original)

    def run(self, loss):
        loss(self.logits, self.teacher, self.ids).backward()


def gradient_error(problem, kernel, loss):
    """The largest error on 64 tokens, relative to the token's largest gradient in float64."""
    problem.reset()
    problem.run(loss)
    logits = problem.original[:64].double().requires_grad_()
    log_p, log_q = logits.log_softmax(-1), problem.teacher[:64].double().log_softmax(-1)
    if kernel == "token_logprob":
        truth = log_p.gather(-1, problem.ids[:64, None])[:, 0] - 0.1 * (log_p.exp() * log_p).sum(-1)
    elif kernel == "reverse KL":
        truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        truth = (log_q.exp() * (log_q - log_p)).sum(-1)
    (truth.sum() / len(problem.ids)).backward()
    error = (problem.logits.grad[:64] - logits.grad).abs().amax(-1)
    return (error / logits.grad.abs().amax(-1)).max().item()


def times(run, reset, device, warmup=10, repeats=50):
    """Milliseconds of each repeat."""
    if device == "cpu":
        spans = []
        for _ in range(warmup + repeats):
            reset()
            start = time.perf_counter()
            run()
            spans.append(1e3 * (time.perf_counter() - start))
        return spans[warmup:]
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any L2
    events = []
    for _ in range(warmup + repeats):
        reset()
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # cycles
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[warmup:]]


def peak_memory(run, reset, device):
    """Peak bytes of a run, beyond those allocated before it."""
    reset()
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()
        events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak = now = 0
        for event in events:
            now += event.nbytes()  # negative where memory is given back
            peak = max(peak, now)
        return peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device, size=2 << 30, **counts):
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    spans = times(partial(target.copy_, source), lambda: None, device, **counts)
    return 2 * size / statistics.median(spans) * 1e3


# --- tables --------------------------------------------------------------------------------------


def measure(kernel, name, loss, problem, device, bandwidth, **counts):
    """One row of the table."""
    cells = [kernel, *(f"{n:,}" for n in problem.logits.shape), name]
    run = partial(problem.run, loss)
    try:
        error = gradient_error(problem, kernel, loss)
        spans = times(run, problem.reset, device, **counts)
        memory = peak_memory(run, problem.reset, device)
    except torch.OutOfMemoryError:
        return [*cells, "out of memory", "", "", "", ""]
    low, median, high = statistics.quantiles(spans, n=4)
    copy = problem.logits.numel() * problem.logits.element_size()
    share = MOVES[kernel] * copy / (median / 1e3) / bandwidth
    figures = [f"{median:.3f}", f"{high - low:.3f}", f"{share:.0%}", f"{memory / copy:.2f}"]
    return [*cells, *figures, f"{error:.1e}"]


def markdown(rows):
    head = ["kernel", "T", "V", "by", "ms", "IQR ms", "of copy", "memory", "gradient error"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 9, *rows])


def gpu_report(out, tokens, vocabularies, device="cuda"):
    bandwidth = copy_bandwidth(device)
    versions = [f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package):
            found = getattr(importlib.import_module(package), "__version__", "")
            versions.append(f"{package} {found}".strip())
    text = f"""# {torch.cuda.get_device_name()}

{", ".join(versions)}. bf16 logits to their gradient, median and interquartile range of 50 runs.
"of copy": bandwidth, if every logit moved as seldom as it can ({MOVES["forward KL"]} times in the
KLs, {MOVES["token_logprob"]} in token_logprob), as a share of a plain copy's, measured in this run:
{bandwidth / 1e12:.2f} TB/s. "memory": peak above the inputs, in copies of the student's logits.
"gradient error": against float64 on 64 tokens, relative to each token's largest. The fewest tokens
of the smallest vocabulary fit into the L2 cache, so that their backward may seem to beat a copy.
"""
    rows = []
    for kernel in MOVES:
        for vocabulary in vocabularies:
            for n in tokens:
                try:
                    problem = Problem(n, vocabulary, torch.bfloat16, device)
                except torch.OutOfMemoryError:
                    print(f"no memory for T {n}, V {vocabulary:,}", flush=True)
                    continue
                torch.compiler.reset()  # or it would give up after a few shapes
                losses = contestants(kernel)
                losses["torch.compile"] = torch.compile(losses["eager"], dynamic=False)
                for name, loss in losses.items():
                    rows.append(measure(kernel, name, loss, problem, device, bandwidth))
                    torch.cuda.empty_cache()
                    print(*rows[-1], sep="  ", flush=True)
                with open(out, "w", encoding="utf-8") as file:
                    file.write(f"{text}\n{markdown(rows)}\n")


def cpu_report(sizes=((256, 32_000), (256, 151_936), (4096, 27)), rounds=10):
    """Prints, and returns {(kernel, vocabulary): (time, peak memory)}, ours divided by eager's."""
    shares = {}
    for kernel in MOVES:
        for tokens, vocabulary in sizes:
            problem = Problem(tokens, vocabulary, torch.float32, "cpu")
            losses = {name: contestants(kernel)[name] for name in ("eager", "ours")}
            runs = {name: partial(problem.run, loss) for name, loss in losses.items()}
            spans, peaks = {"eager": [], "ours": []}, {}
            repeats = rounds * max(1, 2**21 // (tokens * vocabulary))
            for _ in range(repeats):  # alternating, since other programs may slow either
                for name, run in runs.items():
                    spans[name] += times(run, problem.reset, "cpu", warmup=1, repeats=1)
            for name, run in runs.items():
                peaks[name] = peak_memory(run, problem.reset, "cpu")
                low, median, high = statistics.quantiles(spans[name], n=4)
                print(f"{kernel}, T {tokens}, V {vocabulary:,}, {name}: {median:.2f} ms", end=" ")
                print(f"(IQR {high - low:.2f}), peak {peaks[name] / 2**20:.1f} MiB", flush=True)
            ratio = statistics.median(spans["ours"]) / statistics.median(spans["eager"])
            shares[kernel, vocabulary] = ratio, peaks["ours"] / peaks["eager"]
            print("  ours / eager: time {:.2f}, memory {:.2f}".format(*shares[kernel, vocabulary]))
    return shares


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench.md", help="the Markdown table (CUDA)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="T (CUDA)")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="(CUDA)")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        gpu_report(args.out, args.tokens, args.vocabularies)
    else:
        torch.set_num_threads(1)  # several would wait for each other, hence for other programs
        print(
            "No CUDA: the reference against F.kl_div on log_softmax with autograd, fp32, one thread"
        )
        cpu_report()


if __name__ == "__main__":
    main()
