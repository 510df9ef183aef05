"""PACED: distillation at the frontier of the student's competence (arXiv 2603.11178).

The paper's premise: a problem that the student always solves has nothing left to teach, one that it
never solves pulls in directions that do not add up. So each problem counts according to the
student's own pass rate p on it: not at all at p = 0 and p = 1, most in between. The rates come from
K rollouts of the student (in no token count), graded against labels, once before training unless
--refresh-every says otherwise. The loss reads no label, except in the hint of --self.

  Eq. 1  w_x = p_x^alpha (1 - p_x)^beta, with its peak at p = alpha / (alpha + beta)
  Eq. 2  KL_it = KL(pi_T‖pi_S) on the teacher's text (fkl), KL(pi_S‖pi_T) on the student's (rkl)
  Eq. 3  loss = sum_it (w_i / mean w) KL_it / (number of completion tokens in the whole update)

Ours: the mean in Eq. 3 is over the problems of the whole update (over only a few it evens the
weights out, over one it cancels the weight); problems of weight 0 are not sampled, so the weights
never change a step's number of rollouts. In the pocket world this skipping is what helps, and the
shape of Eq. 1 adds next to nothing (tiny/EVIDENCE.md). --self: the teacher is the frozen start
model, which sees the answer in its prompt (--hint). Of the paper's settings we know alpha and beta;
the preset takes the rest from OPD in the other paper. vs opd.py: the weights, and a schedule of
both directions.

    python paced.py                         the pocket student: half a minute on two cores
    python paced.py --self --student Qwen/Qwen3-1.7B --data labelled.jsonl --val-data val.jsonl
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import sys
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

# Set before torch starts its threads: a waiting thread spins briefly, then yields its core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import math_verify
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_, rnn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer

from kernels import softmax_kl

# --- arguments ------------------------------------------------------------------------------------
DAPO = "YouJiacheng/DAPO-Math-17k-dedup"
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FLAGS = [  # name, tiny preset, paper preset, least value, meaning
    ("--data", "tiny/pool.jsonl", DAPO, None, "a JSONL file, or a hub `name[[:config]:split]`"),
    ("--val-data", "tiny/val.jsonl", None, None, "chooses best/; else a part of --data does"),
    ("--seed", 0, 0, 0, "every random draw follows from it and from the step"),
    ("--prompts-per-step", 128, 256, 1, "B, the problems of a step"),
    ("--samples-per-prompt", 1, 1, 1, "G, the completions of a problem"),
    ("--max-new-tokens", 72, 8192, 1, "T, where a completion is cut"),
    ("--temperature", 1.0, 1.0, 1e-3, "of sampling and of scoring"),
    ("--prompt-suffix", "", SUFFIX, None, "appended to every problem"),
    ("--steps", 100, 100, 1, "batches of rollouts"),  # paper: our choice
    ("--lr", 1e-3, 1e-6, 0, "learning rate"),
    ("--lr-decay", 0.4, 0.0, 0, "last share of the steps, over which lr falls towards a tenth"),
    ("--warmup-steps", 5, 0, 0, "steps of linear warmup"),
    ("--weight-decay", 0.0, 0.1, 0, "of AdamW"),
    ("--grad-clip", 1.0, 1.0, 1e-9, "largest norm of the gradient"),
    ("--micro-batch", 32, 1, 1, "completions scored at once; does not change the gradient"),
    ("--rollout-batch", 2048, 64, 1, "completions sampled at once; bounds the KV cache"),
    ("--checkpointing", 0, 1, 0, "1: recompute activations for the gradient, to save memory"),
    ("--val-every", 10, 10, 1, "steps between validations"),  # paper: our choice
    ("--save-every", 10, 10, 1, "steps between checkpoints"),  # paper: our choice
    ("--pass-rollouts", 8, 8, 2, "K, the completions that a pass rate is estimated from"),
    ("--refresh-every", 0, 0, 0, "steps between estimates of the pass rates; 0: one, at the start"),
    ("--alpha", 1.0, 1.0, 0, "of p^alpha (1 - p)^beta"),
    ("--beta", 1.0, 1.0, 0, "of p^alpha (1 - p)^beta"),
    ("--hint", "({answer})", "The answer is {answer}. Show how to get it: ", None, "for --self"),
]
SCHEDULES = ("fkl", "rkl", "fkl-rkl", "rkl-fkl")  # with two directions, half of the steps each
MEASURE = "held-out KL"  # of validation; best/ has the lowest


def fail(message):
    """For a human reader: one line on stderr, exit status 2."""
    # An error that all ranks meet is printed once: the others wait until rank 0's exit ends them.
    time.sleep(10 if RANK else 0)
    tqdm.write(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def model_path(path):
    """A model's directory, which has a config.json, or a hub name."""
    config = Path(path, "config.json")
    found = config.exists() and "model_type" in config.read_text()
    if not found and (Path(path).is_dir() or path.count("/") > 1):  # hub names: one slash at most
        fail(f"{path} holds no model; to use a run, give its best/ or final/")
    return path


def parse_arguments(argv):
    """The settings, from the flags or else the preset, and the model's context length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--student", type=model_path, default="tiny/student", help="path or hub id")
    parser.add_argument("--teacher", type=model_path, help="path or hub id [tiny/teacher]")
    parser.add_argument("--out", help="directory of the run; the same command resumes it")
    parser.add_argument("--overwrite", action="store_true", help="start --out afresh")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--preset", choices=("tiny", "paper"), help="tiny below 10 M parameters")
    for name, tiny, paper, _, meaning in FLAGS:
        parser.add_argument(name, type=type(tiny), help=f"{meaning} [{tiny!r}, paper {paper!r}]")
    parser.add_argument("--thinking", action="store_true", help="the template's thinking mode")
    parser.add_argument("--show", action="store_true", help="print one scored rollout and stop")
    parser.add_argument("--weights", choices=("paced", "uniform", "filter"), default="paced")
    parser.add_argument("--schedule", choices=SCHEDULES, help="[fkl-rkl, with --self rkl]")
    parser.add_argument("--self", action="store_true", help="taught by the start model with --hint")
    args = parser.parse_args(argv)
    if args.self and args.teacher:
        fail("--self is its own teacher: leave out --teacher")
    args.teacher = args.student if args.self else args.teacher or "tiny/teacher"
    args.schedule = args.schedule or ("rkl" if args.self else "fkl-rkl")
    config = AutoConfig.from_pretrained(args.student)
    with torch.device("meta"):
        n_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    args.preset = args.preset or ("tiny" if n_parameters < 10e6 else "paper")
    own_data = args.data is not None  # without --val-data, part of it is for validation
    for name, tiny, paper, least, _ in FLAGS:
        key = name[2:].replace("-", "_")
        if getattr(args, key) is None and not (own_data and key == "val_data"):
            setattr(args, key, tiny if args.preset == "tiny" else paper)
        if least is not None and not least <= getattr(args, key) < float("inf"):
            fail(f"{name} must be at least {least}, not {getattr(args, key)}")
    return args, config.max_position_embeddings


# --- processes ------------------------------------------------------------------------------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered to rank 0
INNER_BAR = {"leave": False, "delay": 2, "disable": RANK > 0}  # shown after 2 s


def start_processes(device):
    """Under torchrun: joins the other processes; only rank 0 prints."""
    if device == "cuda":  # cuDNN's attention would make a new plan at every token
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:  # a rank may wait for another's rollout for longer than the usual ten minutes
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=3))
    if RANK:
        sys.stdout = open(os.devnull, "w")
        transformers.utils.logging.disable_progress_bar()


def gather(item):
    """The items of all processes, a list in the order of their ranks."""
    items = [item] * WORLD
    if WORLD > 1:
        dist.all_gather_object(items, item)
    return items


def total(*numbers):
    """Each number summed over the processes."""
    return [sum(column) for column in zip(*gather(numbers), strict=True)]


def shard(model):
    """FSDP2: each process keeps a share of every weight, gradient and moment."""
    if WORLD > 1:
        on = dist.init_device_mesh(model.device.type, (WORLD,))
        compute = torch.bfloat16 if model.device.type == "cuda" else None
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for layer in [*model.model.layers, model]:  # gathered until the backward pass
            fully_shard(layer, mesh=on, mp_policy=precision, reshard_after_forward=False)


# --- problems -------------------------------------------------------------------------------------
def read_rows(source):
    """(where, row) for each line of a JSONL file, or for each row of a hub data set."""
    if source.endswith(".jsonl") or Path(source).is_file():
        for number, line in enumerate(Path(source).open("rb"), 1):
            try:
                yield f"{source}:{number}", {**json.loads(line)}
            except (ValueError, TypeError):
                fail(f"{source}:{number}: not a JSON object; fix or delete this line")
        return
    name, *parts = source.split(":")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, *parts[:-1], split=parts[-1] if parts else "train")
    except ImportError:
        fail(f"{source} is not a file; data sets of the hub need: pip install datasets")
    except ValueError as error:  # no such split, or a set that holds several configurations
        fail(f"{source}: {' '.join(str(error).splitlines()[:2])}")
    if source == DAPO:  # the authors' split: 80 %, seed 42
        rows = rows.train_test_split(test_size=0.2, seed=42)["train"]
    yield from ((f"{source}[{i}]", row) for i, row in enumerate(rows))


def render(text, tokenizer, args):
    """The prompt of a problem, and its token ids."""
    prompt, plain = text + args.prompt_suffix, tokenizer.chat_template is None
    if not plain:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": args.thinking}
        # Some templates write today's date. They get this one: no prompt may change overnight.
        dated = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
        options["chat_template"] = dated + tokenizer.get_chat_template()
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return prompt, tokenizer(prompt, add_special_tokens=plain)["input_ids"]


def load_problems(source, tokenizer, args, context):
    """[{"where", "row", "problem", "prompt", "ids"}]; fails on a bad row, naming it."""
    there = gather(Path(source).exists())
    if any(there) and not all(there):
        fail(f"{source} is there for some processes only, not for rank {there.index(False)}")
    problems = []
    for where, row in read_rows(source):
        text = row.get("problem") or row.get("question") or row.get("prompt")
        if isinstance(text, list) and text and isinstance(text[-1], dict):  # DAPO's chat form
            text = str(text[-1].get("content") or "")
            text = re.sub(r"^Solve the following math problem[^\n]*\n+", "", text)
            text = re.sub(r"\n+Remember to put your answer on its own line[^\n]*$", "", text)
        if not text or not isinstance(text, str):
            fail(f"{where}: no problem (question, prompt) with text among {', '.join(row)}")
        prompt, ids = render(text, tokenizer, args)
        if not ids:  # transformers makes an empty tokenizer where it finds no files for one
            fail(f"{where}: a prompt without tokens: is the tokenizer missing from the model?")
        problems.append(dict(where=where, row=row, problem=text, prompt=prompt, ids=ids))
    fits = [p for p in problems if len(p["ids"]) + args.max_new_tokens <= context]
    if len(fits) < len(problems):
        print(f"{source}: skipped {len(problems) - len(fits)} prompts, too long for the context")
    room = f"a context of {context} tokens with --max-new-tokens {args.max_new_tokens}"
    return fits or fail(f"{source}: no problem, or none that fits {room}")


# --- grading --------------------------------------------------------------------------------------
logging.getLogger("math_verify").setLevel(logging.ERROR)  # a timeout is a wrong answer, not news
ANSWERS = ("answer", "solution", "ground_truth")
INTEGER = re.compile(r"-?\d{1,30}")
# Towers of powers, long exponents and factorials keep sympy busy for a second each.
TOWER = r"\^\s*\{[^{}]*\d\s*\^|\^\s*\d+\s*\^|\^[^-+=,]*[)}]\s*\^\W*\d\d"
COSTLY = re.compile(TOWER + r"|\^\W*\d{4,}|\d{3,}\s*!|[!)}]\s*!|binom\W*\d{4,}")
# What math-verify misreads. NOISE: 20,\!000 within a fraction, 1\,000 (as 1 * 0), a full stop at
# the end, degrees, a unit in words (as a product of its letters). FRACTION: 2 1/2 (as (2 + 1)/2),
# 1/2 x (as 1/(2x)), \frac\pi4 (not at all).
NOISE = r"(?<=\d)(,?\\[,;:! ] ?|[~ ])(?=\d{3}(?!\d))|(?<!\\right)[.,]$|°|(?<=\d) +[a-z]{3,}\.?$"
FRACTION = r"(?:\\[dt]?frac *(\\pi) *|(?<![\w.^/}!])(\d+)/)(\d+)(?![\w.^/!({])"


def last_boxed(text):
    r"""What the last balanced \boxed{} holds, or None."""
    # Only the last eight are tried: a text of nothing but open boxes would take minutes.
    for box in reversed(list(re.finditer(r"\\boxed\s*\{(?!\s*\})", text))[-8:]):
        depth, start = 1, box.end()
        for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[start : start + match.start()].strip()
    return None


def parse_answer(answer):
    """math-verify's reading of an answer; empty if it finds none within a second."""
    answer = re.sub(FRACTION, r"\\frac{\1\2}{\3}", re.sub(NOISE, "", answer))
    # It drops a final letter as a unit; adding \, keeps it (not after a number and a space: 4 t).
    answer = re.sub(r"^(?!-?[\d.,]+ .$)(.*(?<![a-zA-Z\\])[a-z])$", r"\1\\,", answer)
    # It cannot read \pm within a fraction, so it gets the answer once with each sign.
    both = dict.fromkeys(re.sub(r"\\pm(?![a-z])", sign, answer) for sign in "+-")
    # As LaTeX only: the extractor for plain expressions would evaluate the text as code.
    box, latex = f"\\boxed{{{', '.join(both)}}}", [math_verify.LatexExtractionConfig()]
    return math_verify.parse(box, latex, fallback_mode="no_fallback", parsing_timeout=1)


def read_answers(problems):
    """Adds each "answer": the last box of a solution, what follows GSM8K's ####, or the text."""
    for problem in tqdm(problems, "answers", leave=False, delay=2, disable=RANK > 0):
        places = [problem["row"], problem["row"].get("reward_model")]  # DAPO keeps it in the second
        found = [place.get(key) for place in places if isinstance(place, dict) for key in ANSWERS]
        text = next((str(answer) for answer in found if type(answer) in (str, int, float)), "")
        answer = last_boxed(text) or text.rpartition("####")[2].strip()
        # A sentence, or a text with \boxed 2 in it, would be read as a product of letters: it is
        # not taken as an answer unless it is in a box.
        meant = last_boxed(text) or not re.search(r"(?i)\\boxed|^[^\\]*\b(is|are|answer)\b", answer)
        readable = meant and (INTEGER.fullmatch(answer) or parse_answer(answer))
        problem["answer"] = answer if readable else None
    if bad := [p["where"] for p in problems if p["answer"] is None]:
        fail(f"{', '.join(bad[:20])}: no answer (solution, ground_truth) is readable; fix or drop")


@lru_cache(maxsize=100_000)
def same_answer(gold, answer):
    """The same text, the same integer, or the same mathematics."""
    if answer == gold or (INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold)):
        return answer == gold or int(answer) == int(gold)
    costly = len(answer) > 256 or (COSTLY.search(answer) and not COSTLY.search(gold))
    return not costly and math_verify.verify(*map(parse_answer, (gold, answer)), timeout_seconds=1)


def grade(tokenizer, completion_ids, mask, golds):
    """The completions as texts, and a reward of 1 for each whose last box holds the gold answer."""
    texts, rewards, slow = [], [], 0
    for ids, keep, gold in zip(completion_ids.cpu(), mask.cpu(), golds, strict=True):
        texts.append(tokenizer.decode(ids[keep], skip_special_tokens=True))
        answer, began = last_boxed(texts[-1]), time.process_time()
        # Hostile answers take a second each. After ten of them plus 1 % of all answers, no more
        # LaTeX is read, lest a step stall. Timed in CPU seconds: a busy machine costs no reward.
        read = answer and (slow < 10 + len(golds) // 100 or INTEGER.fullmatch(answer))
        rewards.append(float(answer == gold or bool(read and same_answer(gold, answer))))
        slow += time.process_time() - began > 0.5
    return texts, rewards


# --- rollout --------------------------------------------------------------------------------------
# What transformers calls a model's cache: renamed in 5.24; the old name is removed in 5.40.
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"


class KVLayer(DynamicLayer):
    """One layer's keys and values, written in place; room is made for 64 positions at a time."""

    def update(self, keys, values, *args, **kwargs):
        # Under autocast the keys' norm gives fp32: an fp32 cache would be cast whole at each token.
        new = torch.stack([keys.to(values.dtype), values])  # (2, n, heads, t, d)
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = new[:, :, :, :0]
        start, end = self.get_seq_length(), self.get_seq_length() + new.shape[3]
        if end > self.room.shape[3]:
            self.room = pad(self.room, (0, 0, 0, end + 64 - self.room.shape[3]))
        self.room[:, :, :, start:end] = new
        self.keys, self.values = self.room[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.room = self.room[:, indices]
        self.keys, self.values = self.room[:, :, :, : self.get_seq_length()]


def pad_left(texts, device):
    """The texts' ids, padded on the left with 0, and the mask of what is not padding, (n, L)."""
    ids = rnn.pad_sequence([torch.as_tensor(t, device=device) for t in texts], True, -1, "left")
    return ids.clamp(min=0), (ids >= 0).long()


def choose(logits, temperature, noise):
    """The next tokens (n,), drawn from the full softmax by inverting its running sum."""
    # In float64, because a running sum of 151,936 float32 terms loses the tail.
    running = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (n, V)
    token = torch.searchsorted(running / running[:, -1:], noise[:, None], right=True)
    return token.clamp(max=logits.shape[-1] - 1).squeeze(1)  # NaN gives V, and stops train()


@torch.inference_mode()
def decode(model, prompts, owner, noise, temperature):
    """Row i continues prompts[owner[i]] with noise[i]: ids, mask (n, T), clipped (n,) if no EOS."""
    completion_ids = torch.zeros_like(noise, dtype=torch.long)  # (n, T)
    eos_ids = torch.tensor(model.generation_config.eos_token_id, device=noise.device).view(-1)
    prompt_ids, attention = pad_left(prompts, noise.device)  # (B, P)
    position = (attention.cumsum(1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=KVLayer)
    options = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    out = model(prompt_ids, attention_mask=attention, position_ids=position, **options)
    logits = out.logits[owner, -1]  # (n, V)
    cache.batch_select_indices(owner)  # each prompt is read once, its cache repeated
    attention, position = attention[owner], position[owner, -1:]  # (n, P), (n, 1)
    rows = torch.arange(len(noise), device=noise.device)  # the rows still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # which of these have not ended
    for t in range(noise.shape[1]):
        token = completion_ids[rows, t] = choose(logits, temperature, noise[rows, t])
        alive = alive & ~torch.isin(token, eos_ids)
        if not alive.any() or t + 1 == noise.shape[1]:
            break
        if alive.float().mean() <= 0.75:  # dropping rows copies the cache: wait for many
            cache.batch_select_indices(alive)
            rows, attention, position = rows[alive], attention[alive], position[alive]
            token, alive = token[alive], alive[alive]
        attention, position = pad(attention, (0, 1), value=1), position + 1
        out = model(token[:, None], attention_mask=attention, position_ids=position, **options)
        logits = out.logits[:, -1]
    # The first EOS belongs to the completion; what follows it does not, whatever token it is.
    is_eos = torch.isin(completion_ids, eos_ids).long()
    mask = is_eos.cumsum(1) - is_eos == 0
    return completion_ids * mask, mask, ~is_eos.bool().any(1)


def rollout(model, prompts, group, rng, args):
    """`group` completions for each prompt, N = B * group rows, --rollout-batch of them at once."""
    model.eval()
    sharded = [layer for layer in model.modules() if isinstance(layer, FSDPModule)]
    hooks = [(layer._forward_pre_hooks, layer._forward_hooks) for layer in sharded]
    for layer in sharded:
        layer.unshard()  # all weights, so that decoding waits for no other process
        # FSDP2's hooks have nothing left to do, and would cost time at every layer and token.
        layer._forward_pre_hooks, layer._forward_hooks = {}, {}
    owner, parts = torch.arange(len(prompts), device=model.device).repeat_interleave(group), []
    with autocast(model):
        for part in tqdm(owner.split(args.rollout_batch), "rollout", **INNER_BAR):
            noise = torch.from_numpy(rng.random((len(part), args.max_new_tokens))).to(model.device)
            own = prompts[part[0] : part[-1] + 1]
            parts.append(decode(model, own, part - part[0], noise, args.temperature))
    for layer, kept in zip(sharded, hooks, strict=True):
        layer._forward_pre_hooks, layer._forward_hooks = kept
    torch.cuda.empty_cache()  # frees the KV cache's memory: NCCL allocates its own
    return [torch.cat(column) for column in zip(*parts, strict=True)]


# --- scoring --------------------------------------------------------------------------------------
def autocast(model):
    """fp32 weights compute in bf16 on a GPU, in fp32 on a CPU."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


def score(model, problems, completion_ids, mask, prompt="ids"):
    """The logits (n, T, V) that the tokens of the right-aligned completions were drawn from."""
    rows = zip(problems, completion_ids.tolist(), mask.sum(1).tolist(), strict=True)
    texts = [problem[prompt] + ids[len(ids) - n :] for problem, ids, n in rows]
    ids, attention = pad_left(texts, model.device)  # (n, L)
    position = (attention.cumsum(1) - 1).clamp(min=0)
    # The one shift: the logits at a position predict the token after it.
    before = torch.arange(ids.shape[1], device=model.device)[-1 - mask.shape[1] : -1]  # (T,)
    options = {"use_cache": False, "logits_to_keep": before}
    with autocast(model):
        return model(ids, attention_mask=attention, position_ids=position, **options).logits


def micro_batches(rows, problems, completion_ids, mask, args):
    """--micro-batch rows at a time, sorted by length, so that little is padded (on the left)."""
    lengths = mask.sum(1) + torch.tensor([len(p["ids"]) for p in problems], device=mask.device)
    parts = rows[lengths[rows].argsort(stable=True)].split(args.micro_batch)
    # FSDP2 needs every rank in every pass: one with no part left scores row 0's prompt alone.
    for number in tqdm(range(max(gather(len(parts)))), "score", **INNER_BAR):
        real = number < len(parts)
        part = parts[number] if real else rows.new_zeros(1)
        own = [problems[i] for i in part.tolist()]
        ids, keep = pad_left([completion_ids[i][mask[i] & real] for i in part], mask.device)
        yield part, own, ids, keep.bool()  # ids and keep (n, T)


# --- weights --------------------------------------------------------------------------------------
def pass_rates(student, tokenizer, problems, path, rng, args):
    """For each problem, the share of right answers in --pass-rollouts rollouts by the student."""
    rates, k, n = [], args.pass_rollouts, args.prompts_per_step
    # This may take days: path keeps the rates so far, so that a killed run resumes from them.
    known = gather(json.loads(path.read_text()) if path and path.exists() else [])[0]
    # The pool may be large: takes as many problems at once as a step, at least one per process.
    parts = np.array_split(problems, np.arange(n, len(problems) - WORLD + 1, n))
    for part in tqdm(parts[: 1 if args.show else None], "pass rates", **INNER_BAR):
        own = np.array_split(part, WORLD)[RANK]
        if len(rates) + len(part) <= len(known):
            rng.bit_generator.advance(len(own) * k * args.max_new_tokens)  # skip the noise of these
            rates = known[: len(rates) + len(part)]
            continue
        completion_ids, mask, _ = rollout(student, [p["ids"] for p in own], k, rng, args)
        golds = [p["answer"] for p in own for _ in range(k)]
        rewards = grade(tokenizer, completion_ids, mask, golds)[1]
        rates += np.concatenate(gather(np.reshape(rewards, (-1, k)).mean(1))).tolist()
        if path and RANK == 0:
            path.with_suffix(".new").write_text(json.dumps(rates))
            path.with_suffix(".new").replace(path)
    return rates


def problem_weight(pass_rate, args):
    """How much each problem counts, (problems,)."""
    if args.weights == "uniform":
        return np.ones_like(pass_rate)
    if args.weights == "filter":
        return ((pass_rate > 0.2) & (pass_rate < 0.8)).astype(float)
    return pass_rate**args.alpha * (1 - pass_rate) ** args.beta  # Eq. 1


def draw(kept, step, seed, n):
    """The problems of a step, counted from the last weighing: reshuffled epochs of the kept."""
    rng, epochs = np.random.default_rng(seed), (step + 1) * n // len(kept) + 1
    order = np.concatenate([rng.permutation(kept) for _ in range(epochs)])
    return order[step * n : (step + 1) * n]


# --- loss -----------------------------------------------------------------------------------------
def direction_at(step, args):
    """The direction of the KL, which switches after half of --steps if the schedule has two."""
    half = args.schedule.split("-")[-1 if 2 * step >= args.steps else 0]
    return {"fkl": "forward", "rkl": "reverse"}[half]


def sample(student, teacher, problems, direction, group, rng, args):
    """The teacher's completions for the forward KL, the student's for the reverse KL."""
    writer, prompt = (teacher, "teacher_ids") if direction == "forward" else (student, "ids")
    return rollout(writer, [p[prompt] for p in problems], group, rng, args)


def both_logits(student, teacher, problems, ids, mask):
    """The student's and the teacher's logits of the same tokens, (n, T, V)."""
    with torch.no_grad():
        theirs = score(teacher, problems, ids, mask, "teacher_ids")
    return score(student, problems, ids, mask), theirs


def distil_loss(student_logits, teacher_logits, weight, mask, n_tokens, direction, args):
    """The loss of a micro-batch and its KL (n, T); n_tokens: of the whole update / WORLD."""
    logits = student_logits, teacher_logits
    # In place: the gradient overwrites the student's logits, so nothing else may use them.
    kl = softmax_kl(*logits, direction, args.temperature, mask, inplace_backward=True)  # Eq. 2
    return (weight * kl).sum() / n_tokens, kl.detach()  # Eq. 3


# --- validation -----------------------------------------------------------------------------------
def validate(student, teacher, problems, args):
    """The KL that the schedule ends with, unweighted, always with the same noise."""
    rng, direction = np.random.default_rng([args.seed, 1, RANK]), direction_at(args.steps, args)
    problems = problems[RANK::WORLD]
    completion_ids, mask, _ = sample(student, teacher, problems, direction, 1, rng, args)
    rows, kl_sum = torch.arange(len(problems), device=student.device), 0.0
    student.eval()
    with torch.no_grad():
        for _, own, ids, keep in micro_batches(rows, problems, completion_ids, mask, args):
            logits = both_logits(student, teacher, own, ids, keep)
            kl_sum += float(softmax_kl(*logits, direction, args.temperature, keep).sum())
            del logits
    kl, tokens = total(kl_sum, int(mask.sum()))
    return kl / tokens


# --- teacher --------------------------------------------------------------------------------------
def load_teacher(student, tokenizer, args):
    """The teacher, frozen: fp32 on a CPU, bf16 on a GPU. Both heads get the same width."""
    theirs = AutoTokenizer.from_pretrained(args.teacher)
    if theirs.get_vocab() != tokenizer.get_vocab():
        fail(f"{args.teacher} and {args.student} have different vocabularies: no KL between them")
    if theirs.chat_template != tokenizer.chat_template:
        print("warning: teacher and student have different chat templates; the student's is used")
    if Path(args.teacher).resolve() == Path(args.student).resolve():
        print("teacher and student are the same model")
    elif not (Path(args.teacher).parent / "config.json").exists():
        print(f"{args.teacher} is not a run of ours: a teacher after RL (python grpo.py) is better")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(args.device)
    if teacher.generation_config.eos_token_id is None:
        teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    ends = [torch.tensor(m.generation_config.eos_token_id).view(-1) for m in (teacher, student)]
    if not torch.equal(*ends):
        both = torch.cat(ends).unique().tolist()
        print(f"warning: teacher and student end a text with different tokens: now any of {both}")
        teacher.generation_config.eos_token_id = student.generation_config.eos_token_id = both
    width = min(student.config.vocab_size, teacher.config.vocab_size)
    for model, name in ((student, args.student), (teacher, args.teacher)):
        if model.config.vocab_size > width:  # padding rows, which belong to no token
            print(f"the head of {name} is cut from {model.config.vocab_size} to {width}")
            model.resize_token_embeddings(width)
    return teacher.eval().requires_grad_(False)


# --- checkpoint -----------------------------------------------------------------------------------
def open_run(args, problems):
    """The directory of the run, made or reopened, and the state to resume from."""
    out = Path(args.out or time.strftime(f"runs/{Path(__file__).stem}-%Y%m%d-%H%M%S"))
    sources = [Path(__file__), *sorted(Path(__file__).parent.glob("kernels/*.py"))]
    trees = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in sources]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "overwrite", "show")}
    texts = {"code": "".join(trees), "data": repr([p["row"] for p in problems])}
    # Training changes all weights, so a file's first megabyte tells one model from another.
    models = [Path(settings[key]) for key in ("model", "student", "teacher") if settings.get(key)]
    weights = [file for path in models for file in sorted(path.glob("*.safetensors"))]
    texts["model"] = repr([file.open("rb").read(2**20) for file in weights])
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    config = {"settings": settings, "versions": versions, **hashes}
    path, state_path = out / "config.json", out / "checkpoint/state.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.overwrite and "settings" in old:  # a model's directory has a config.json, too
        named = [v for v in settings.values() if isinstance(v, str)]
        if inside := [v for v in named if Path(v).resolve().is_relative_to(out.resolve())]:
            fail(f"--overwrite would delete {inside[0]}, which lies in {out}: give another --out")
        shutil.rmtree(out)
    elif "settings" in old:
        # These may change: a run can be extended, or adapted to the memory.
        free = ("steps", "micro_batch", "rollout_batch", "checkpointing")
        was = old["settings"] | {key: settings[key] for key in free}
        differs = [f"{k} was {was.get(k)!r}" for k, v in settings.items() if v != was.get(k)]
        differs += [f"the {k} was edited" for k in hashes if old.get(k) != hashes[k]]
        if differs:
            fail(f"{out}: {', '.join(differs)}: --overwrite starts afresh, a new --out keeps both")
    elif out.exists() and set(out.iterdir()) - {path.with_suffix(".new")}:
        fail(f"{out} holds something that is not a run: give another --out")
    out.mkdir(parents=True, exist_ok=args.out is not None)  # never two runs in one
    path.with_suffix(".new").write_text(json.dumps(config, indent=1), encoding="utf-8")
    path.with_suffix(".new").replace(path)
    for old in out.glob("*.old"):  # killed between the two renames of save()
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    fresh = {"step": 0, "best": None, "bytes": {}}
    state = json.loads(state_path.read_text()) if state_path.exists() else fresh
    if state["step"] < args.steps:  # the run goes on: final/ is out of date
        shutil.rmtree(out / "final", ignore_errors=True)
    for path in (p for p in out.glob("*.jsonl") if p.stem in ("metrics", "samples", "rollouts")):
        os.truncate(path, state["bytes"].get(path.name, 0))  # back to the checkpoint
    return out, state


def save(path, model, tokenizer, optimizer=(), state=None):
    """Writes a model (or a checkpoint, given optimizer and state) as .new, then renames it."""
    weights, moments = state_dict.get_state_dict(model, optimizer, options=WHOLE)
    if RANK:
        return
    if model.config.tie_word_embeddings:  # FSDP2 gathers both names of one weight
        weights.pop("lm_head.weight", None)
    new, old = path.with_suffix(".new"), path.with_suffix(".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        if optimizer:
            torch.save(moments, new / "optimizer.pt")
            (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
    except Exception as error:  # on a full disk torch, safetensors, Python raise different errors
        shutil.rmtree(new, ignore_errors=True)
        fail(f"cannot write {path} ({error}): what was there is kept; make room, then resume")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


# --- main -----------------------------------------------------------------------------------------
def show(tokenizer, completion_ids, signal, name):
    """A line for each token of one completion: its learning signal, in colour on a terminal."""
    print(f"{name:>10}  token")
    for token, value in zip(completion_ids, signal.expand_as(completion_ids), strict=True):
        line = f"{value:+10.3f}  {tokenizer.decode([int(token)])!r}"
        print(f"\033[{32 if value > 0 else 31}m{line}\033[0m" if sys.stdout.isatty() else line)


def main(argv=None):
    try:
        train(*parse_arguments(argv))
    except (OSError, dist.DistError) as error:  # no such model or file, disk full, no free port
        fail(str(error).partition("\n")[0])
    except torch.OutOfMemoryError:
        fail('out of GPU memory: README, "From the laptop to the cluster", says what helps')
    except KeyboardInterrupt:
        fail("stopped; the same command with --out resumes")
    if WORLD > 1:
        dist.barrier()  # no process exits while another still writes
        dist.destroy_process_group()
        time.sleep(1)  # for gloo's threads: one still running would make Python abort at exit


def train(args, context):
    # Set-up: the processes, the data, the run on disk, the model.
    start_processes(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    if tokenizer.chat_template is None:
        print(f"{tokenizer.name_or_path} has no chat template: the problem goes in as it is")
    # vs grpo.py: the texts must fit the teacher, too.
    context = min(context, AutoConfig.from_pretrained(args.teacher).max_position_embeddings)
    problems = load_problems(args.data, tokenizer, args, context)
    if args.val_data is not None:
        val_problems = load_problems(args.val_data, tokenizer, args, context)
    else:
        every = max(10, -(-len(problems) // 256))  # spread over the file, which may be sorted
        val_problems = problems[::every]  # 256 at most
        del problems[::every]
        print(f"no --val-data: 1 in {every} problems set aside for it, {len(val_problems)} in all")
    weighted = args.weights != "uniform"
    labels = len(problems) if args.self or weighted else 0
    read_answers((problems if labels else []) + (val_problems if args.self else []))
    for problem in problems + val_problems:
        hint = args.hint.replace("{answer}", problem["answer"]) if args.self else ""
        problem["teacher_ids"] = render(hint + problem["problem"], tokenizer, args)[1]
        if len(problem["teacher_ids"]) + args.max_new_tokens > context:
            fail(f"{problem['where']}: its hint makes it too long: lower --max-new-tokens")
    if args.show:  # one rollout is shown: no need for many
        args.prompts_per_step = min(args.prompts_per_step, 32)
    fewest = min(args.prompts_per_step, len(problems), len(val_problems))
    if WORLD > fewest:
        fail(f"{WORLD} processes share {fewest} prompts of a step or a validation: too few")
    run = (None, {"step": 0}) if args.show or RANK else open_run(args, problems + val_problems)
    out, state = gather(run)[0]
    print(f"step {state['step']}; --out {out} goes on with this run" if out else "one rollout")
    print("settings:", *(f"{k}={v!r}" for k, v in vars(args).items()))
    if both := {p["problem"] for p in problems} & {p["problem"] for p in val_problems}:
        print(f"warning: {len(both)} problems are trained on and validated on")
    state = {"weighed": 0, "pass_rate": [0.5] * len(problems)} | state
    first_step, n, group = state["step"], args.prompts_per_step, args.samples_per_prompt
    if first_step >= args.steps and (out / "final").exists():
        return print(f"{out} is done after {first_step} steps; a larger --steps goes on")
    # fp32 weights whatever the file holds: in bf16 a step at lr 1e-6 moves almost nothing.
    source = out / "checkpoint" if first_step else args.student
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(args.device)
    transformers.utils.logging.disable_progress_bar()  # the bars of later saves
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    teacher = load_teacher(model, tokenizer, args)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    # Bytes per parameter: 12 for a checkpoint, 4 for a model. During a write, checkpoint/ and best/
    # exist twice, final/ only once; on resume the first two already exist once.
    needed = (20 if first_step else 36) * model.num_parameters()
    if out and shutil.disk_usage(out).free < needed:
        fail(f"{out}: the checkpoints need {needed / 1e9:.1f} GB; make room, or take another --out")
    if first_step:
        moments = torch.load(out / "checkpoint/optimizer.pt", weights_only=True, mmap=True)
        state_dict.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        for own in optimizer.state.values():  # copies, since the mapped file will be replaced
            own.update({key: value.clone() for key, value in own.items()})
        del moments
    elif out:
        state["best"] = validate(model, teacher, val_problems, args)
        save(out / "best", model, tokenizer)
        print(f"before the first step: {MEASURE} {state['best']:.4f}")

    done, name = {"initial": first_step, "total": args.steps}, Path(__file__).stem
    for step in (bar := tqdm(range(first_step, args.steps), name, disable=RANK > 0, **done)):
        began = time.monotonic()
        # 0 weigh: at the start, and every --refresh-every steps
        due = weighted and step % (args.refresh_every or args.steps) == 0
        if due:
            rng = np.random.default_rng([args.seed, 3, step, RANK])
            # Later rates depend on --steps, too (by decay and schedule): the file name includes it.
            path = out and out / f"rates-{step}-{step and args.steps}.json"
            rates = pass_rates(model, tokenizer, problems, path, rng, args)
            state |= {"weighed": step, "pass_rate": rates}
        weights = problem_weight(np.array(state["pass_rate"]), args)  # (problems,)
        kept = weights.nonzero()[0]
        if len(kept) == 0 and step == 0:
            edge = "every problem is at pass rate 0 or 1 (filter: none is between 0.2 and 0.8)"
            fail(f"{edge}; --overwrite this run with other --data or a larger --pass-rollouts")
        if len(kept) == 0:
            bar.write(f"the frontier is used up: after step {step} no problem has a weight left")
            # The same command resumes here, and ends here again.
            save(out / "checkpoint", model, tokenizer, optimizer, state | {"step": step})
            break
        ess = weights.sum() ** 2 / (weights**2).sum()
        if due:
            bar.write(f"{len(kept)} of {len(problems)} problems count, like {ess:.0f} equal ones")

        # 1 sample; [seed, 0, 0] draws what opd.py's [seed, 0] does: numpy ignores zeros at the end
        chosen = draw(kept, step - state["weighed"], [args.seed, 0, state["weighed"]], n)
        weight = (weights[chosen] / weights[chosen].mean())[RANK::WORLD].repeat(group)
        weight = torch.tensor(weight, dtype=torch.float32, device=model.device)[:, None]  # (N, 1)
        batch = [problems[i] for i in chosen[RANK::WORLD]]
        rng, direction = np.random.default_rng([args.seed, 2, step, RANK]), direction_at(step, args)
        completion_ids, mask, clipped = sample(model, teacher, batch, direction, group, rng, args)
        batch = [problem for problem in batch for _ in range(group)]  # N, like the rollouts
        rows = torch.arange(1 if args.show else len(batch), device=model.device)

        # 2 grade: nothing to do, the teacher judges every token
        texts = [tokenizer.decode(completion_ids[i][mask[i]]) for i in rows]
        rewards = [None] * len(texts)
        if step == first_step:
            bar.write(f"{batch[0]['prompt']!r} -> {texts[0]!r}")
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        fallen = 1 - (args.steps - step) / (args.lr_decay * args.steps) if args.lr_decay else 0.0
        lr *= 1 - 0.9 * max(0.0, fallen)
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        kl_sum, n_tokens = 0.0, total(int(mask.sum()))[0] / WORLD  # FSDP2 averages gradients
        for part, own, ids, keep in micro_batches(rows, batch, completion_ids, mask, args):
            # 3 score
            logits = both_logits(model, teacher, own, ids, keep)
            # 4 loss
            loss, kl = distil_loss(*logits, weight[part], keep, n_tokens, direction, args)
            del logits  # else they would stay in memory beside the next part's
            if args.show:
                return show(tokenizer, ids[-1][keep[-1]], (weight[part] * kl)[-1][keep[-1]], "w KL")
            loss.backward()
            kl_sum += float(kl.sum())
        # 5 update
        norm = clip_grad_norm_(model.parameters(), args.grad_clip)
        norm = float(norm.full_tensor() if WORLD > 1 else norm)
        optimizer.step()
        optimizer.zero_grad()
        if not np.isfinite(norm):
            fail(f"step {step + 1}: gradient not finite; what {out} holds is from before")

        # 6 log
        counts = len(mask), int(mask.sum()), int(clipped.sum())
        n_rows, tokens, cut, kl = total(*counts, kl_sum)
        seconds = time.monotonic() - began
        line = dict(
            length=tokens / n_rows, clipped=cut / n_rows,
            grad_norm=norm, lr=lr, tokens=tokens, seconds=seconds, val=None,
            reward=None, entropy=None, zero_variance=None, zero_weight=len(problems) - len(kept),
            labels=labels if weighted else min(labels, (step + 1) * n), kl=kl / tokens, ess=ess,
            pass_rate=np.mean(state["pass_rate"]) if weighted else None,
        )  # fmt: skip
        last = step + 1 == args.steps
        if last or (step + 1) % args.val_every == 0:
            line["val"] = validate(model, teacher, val_problems, args)
            bar.write(f"step {step + 1}: {MEASURE} {line['val']:.4f}")
            if line["val"] < state["best"]:
                state["best"] = line["val"]
                save(out / "best", model, tokenizer)
        some = list(zip(batch, texts, rewards, strict=True))[: 4 * group : group]
        samples = [{"problem": p["problem"], "completion": c, "reward": r} for p, c, r in some]
        files = {"metrics.jsonl": [line], "samples.jsonl": samples}
        for file_name, lines in files.items() if RANK == 0 else ():
            with (out / file_name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step + 1} | item) + "\n" for item in lines)
                state["bytes"][file_name] = file.tell()
        if last or (step + 1) % args.save_every == 0:
            state["step"] = step + 1
            save(out / "checkpoint", model, tokenizer, optimizer, state)
        shown = ("reward", "kl", "length", "clipped", "zero_variance")
        shown = {key: f"{line[key]:.2f}" for key in shown if line[key] is not None}
        bar.set_postfix(shown, tok_s=f"{tokens / seconds:.0f}")
        if step == first_step:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # of the process
            bar.write(f"peak memory: {(torch.cuda.max_memory_allocated() or peak) / 1e9:.2f} GB")
        if line["clipped"] > 0.5:
            bar.write(f"step {step + 1}: over half of the completions are cut: --max-new-tokens")
    save(out / "final", model, tokenizer)
    print(f"best {MEASURE} {state['best']:.4f}: {out}/best; after the last step: {out}/final")


if __name__ == "__main__":
    main()
