"""Tokens per second of grpo.py's rollout against transformers' generate, side by side in one run.

    python tests/bench_rollout.py                                  tiny/teacher, 64 prompts x 8
    python tests/bench_rollout.py --model Qwen/Qwen3-1.7B --max-new-tokens 1024

Both sample the full softmax at temperature 1 from the same prompts. The lengths are mixed and the
same for both: each row draws one, at which it is made to end and before which it may not.
"""

import argparse
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).parent.parent))
import grpo

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="tiny/teacher")
parser.add_argument("--prompts", type=int, default=64)
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
END = 2.0  # stands in the noise of a row at the token where the row is made to end


def main():
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
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
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[run].append(time.monotonic() - began)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{args.model}, {len(lengths)} rows of 1 to {args.max_new_tokens} tokens, {where}")
    for run in (ours, theirs):
        median = statistics.median(seconds[run])
        print(f"{run.__name__:>7}: {lengths.sum() / median:9.0f} tokens/s ({median:.2f} s)")
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    print(f"  ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
