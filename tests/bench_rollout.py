"""Tokens per second of grpo.py's rollout against transformers' generate, side by side in one run.

    python tests/bench_rollout.py                                  tiny/teacher, 64 prompts x 8
    python tests/bench_rollout.py --model 1.7B --max-new-tokens 1024
                                          random weights in the shape of Qwen3-1.7B, for a GPU

Both sample the full softmax at temperature 1 from the same prompts. The lengths are mixed and the
same for both: each row draws one, at which it is made to end and before which it may not. On CUDA
neither uses cuDNN's attention, which the scripts turn off. The last three lines say where our time
goes, with the device waited for around each part.
"""

import argparse
import os
import statistics
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the scripts

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, Qwen3Config

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="tiny/teacher")
parser.add_argument("--prompts", type=int, default=64)
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
QWEN3_17B = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    eos_token_id=3,
)  # fmt: skip
END = 2.0  # stands in the noise of a row at the token where the row is made to end


def load(args):
    if args.model != "1.7B":
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        return AutoTokenizer.from_pretrained(args.model), model.to(args.device).eval()
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_17B), dtype=torch.float32)
    return AutoTokenizer.from_pretrained("tiny/teacher"), model.eval()


def profile(run, model, wait):
    """Prints which share of a run goes to the model, to choosing tokens, and to the rest."""
    spent, forward, choose = {"model": 0.0, "choose": 0.0}, model.forward, grpo.choose

    def timed(name, function):
        def wrapper(*args, **kwargs):
            wait()
            began = time.monotonic()
            result = function(*args, **kwargs)
            wait()
            spent[name] += time.monotonic() - began
            return result

        return wrapper

    model.forward, grpo.choose = timed("model", forward), timed("choose", choose)
    began = time.monotonic()
    run()
    whole = time.monotonic() - began
    model.forward, grpo.choose = forward, choose
    print(f"  model: {spent['model'] / whole:5.0%}")
    print(f" choose: {spent['choose'] / whole:5.0%} from logits to tokens, in float64")
    print(
        f"   rest: {1 - sum(spent.values()) / whole:5.0%} the cache of rows that have ended, masks"
    )


def main():
    args = parser.parse_args()
    grpo.start_processes(args.device)
    tokenizer, model = load(args)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    rng = np.random.default_rng(0)
    sums = ["+".join(map(str, rng.integers(1, 10, 2 + i % 7))) for i in range(args.prompts)]
    prompts = [tokenizer(text)["input_ids"] for text in sums]
    lengths = rng.integers(1, args.max_new_tokens + 1, args.prompts * args.group)
    end = torch.tensor(model.generation_config.eos_token_id).view(-1)[0].item()
    noise = rng.random((len(lengths), args.max_new_tokens))
    noise[np.arange(len(lengths)), lengths - 1] = END

    def ours():
        sample = grpo.choose

        def choose(logits, temperature, noise):
            logits[:, end] = -float("inf")
            token = sample(logits, temperature, noise.clamp(max=0.5))
            return torch.where(noise == END, end, token)

        grpo.choose = choose
        settings = types.SimpleNamespace(rollout_batch=4096, temperature=1.0)
        settings.max_new_tokens = args.max_new_tokens
        fixed = types.SimpleNamespace(random=lambda shape: noise)
        _, mask, _ = grpo.rollout(model, prompts, args.group, fixed, settings)
        grpo.choose = sample
        return mask.sum(1)

    def theirs():
        ids, mask = grpo.pad_left(prompts, args.device)
        last = torch.tensor(lengths, device=args.device) - 1

        def processor(input_ids, scores):
            scores[:, end] = -float("inf")
            scores[last == input_ids.shape[1] - ids.shape[1]] = -float("inf")
            scores[last == input_ids.shape[1] - ids.shape[1], end] = 0.0
            return scores

        options = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=end)
        options |= dict(num_return_sequences=args.group, max_new_tokens=args.max_new_tokens)
        with grpo.autocast(model):
            out = model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([processor]),
                **options,
            )
        return (out[:, ids.shape[1] :] != end).sum(1) + 1

    for run in (ours, theirs):  # warm up, and see that both did the same work
        assert (run().cpu().numpy() == lengths).all(), run.__name__
    seconds = {ours: [], theirs: []}
    for _ in range(args.repeats):
        for run in (ours, theirs):
            began = time.monotonic()
            run()
            wait()
            seconds[run].append(time.monotonic() - began)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.model}, {len(lengths)} rows of 1 to {args.max_new_tokens} tokens, {where}")
    for run in (ours, theirs):
        median = statistics.median(seconds[run])
        print(f"{run.__name__:>7}: {lengths.sum() / median:9.0f} tokens/s ({median:.2f} s)")
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    print(f"  ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    profile(ours, model, wait)


if __name__ == "__main__":
    main()
