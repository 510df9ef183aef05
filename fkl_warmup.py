"""Forward-KL warmup: a dense signal on the teacher's text (arXiv 2605.12483, step 2a).

The teacher answers, and at every token of its answer the student's whole next-token distribution is
pulled towards the teacher's. A student whose own answers are still poor places to learn from gets
good prefixes this way, and the forward KL makes it cover all that the teacher does. Learning on
its own prefixes is left to opd.py. No label is read: --data needs no answers.

  Eq. 1  KL_it = sum_v pi_T(v|s_t) (log pi_T(v|s_t) - log pi_S(v|s_t)), y_i from the teacher
  Eq. 2  loss = sum_it KL_it / (number of completion tokens in the whole update)

The teacher's rollouts are kept in rollouts.jsonl; --rollouts FILE learns from such a file again
instead of sampling (the replay control of bridge.py).
vs opd.py: who samples, and the direction of the KL.

    python fkl_warmup.py                    the pocket student: a minute or two on two cores
    python fkl_warmup.py --teacher runs/teacher/best --student Qwen/Qwen3-1.7B --data train.jsonl
"""

import argparse
import ast
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

# Set before torch starts its threads: a waiting thread spins briefly, then yields its core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
    ("--data", "tiny/prompts.jsonl", DAPO, None, "a JSONL file, or a hub `name[[:config]:split]`"),
    ("--val-data", "tiny/val.jsonl", None, None, "chooses best/; else a part of --data does"),
    ("--seed", 0, 0, 0, "every random draw follows from it and from the step"),
    ("--prompts-per-step", 128, 256, 1, "B, the problems of a step"),
    ("--samples-per-prompt", 1, 1, 1, "G, the completions of a problem"),
    ("--max-new-tokens", 72, 8192, 1, "T, where a completion is cut"),
    ("--temperature", 1.0, 1.0, 1e-3, "of sampling and of scoring"),
    ("--prompt-suffix", "", SUFFIX, None, "appended to every problem"),
    ("--steps", 400, 100, 1, "batches of rollouts"),  # paper: our choice
    ("--lr", 2e-3, 1e-6, 0, "learning rate"),  # paper: our choice
    ("--lr-decay", 0.4, 0.0, 0, "last share of the steps, over which lr falls towards a tenth"),
    ("--warmup-steps", 5, 0, 0, "steps of linear warmup"),
    ("--weight-decay", 0.0, 0.1, 0, "of AdamW"),
    ("--grad-clip", 1.0, 1.0, 1e-9, "largest norm of the gradient"),
    ("--micro-batch", 32, 1, 1, "completions scored at once; does not change the gradient"),
    ("--rollout-batch", 2048, 64, 1, "completions sampled at once; bounds the KV cache"),
    ("--checkpointing", 0, 1, 0, "1: recompute activations for the gradient, to save memory"),
    ("--val-every", 10, 10, 1, "steps between validations"),  # paper: our choice
    ("--save-every", 10, 10, 1, "steps between checkpoints"),  # paper: our choice
]
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
    parser.add_argument("--teacher", type=model_path, default="tiny/teacher", help="path or hub id")
    parser.add_argument("--out", help="directory of the run; the same command resumes it")
    parser.add_argument("--overwrite", action="store_true", help="start --out afresh")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--preset", choices=("tiny", "paper"), help="tiny below 10 M parameters")
    for name, tiny, paper, _, meaning in FLAGS:
        parser.add_argument(name, type=type(tiny), help=f"{meaning} [{tiny!r}, paper {paper!r}]")
    parser.add_argument("--thinking", action="store_true", help="the template's thinking mode")
    parser.add_argument("--show", action="store_true", help="print one scored rollout and stop")
    parser.add_argument("--rollouts", help="the rollouts.jsonl of a run, to learn from instead")
    args = parser.parse_args(argv)
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


# --- replay ---------------------------------------------------------------------------------------
def read_rollouts(tokenizer, args, context):
    """The problems of --rollouts, each with the completion that was stored for it."""
    problems = load_problems(args.rollouts, tokenizer, args, context)
    tokens = range(AutoConfig.from_pretrained(args.student).vocab_size)  # the head's padding, too
    for problem in problems:
        row = problem["row"]
        ids = row.get("completion_ids")
        known = isinstance(ids, list) and ids and all(i in tokens for i in ids)
        if not known or tokenizer.decode(ids) != row.get("completion"):
            fail(f"{problem['where']}: not a rollout of this tokenizer")
        if row.get("prompt", problem["prompt"]) != problem["prompt"]:
            fail(f"{problem['where']}: written after another prompt: {row['prompt']!r}")
    return problems


def replay(batch, model):
    """What rollout() would return, from the stored completions."""
    rows = [torch.tensor(p["row"]["completion_ids"], device=model.device) for p in batch]
    ids = rnn.pad_sequence(rows, True, -1)
    eos_ids = torch.tensor(model.generation_config.eos_token_id, device=model.device).view(-1)
    return ids.clamp(min=0), ids >= 0, ~torch.isin(ids, eos_ids).any(1)


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


# --- loss -----------------------------------------------------------------------------------------
def both_logits(student, teacher, problems, ids, mask):
    """The student's and the teacher's logits of the same tokens, (n, T, V)."""
    with torch.no_grad():
        theirs = score(teacher, problems, ids, mask)
    return score(student, problems, ids, mask), theirs


def distil_loss(student_logits, teacher_logits, mask, n_tokens, args):
    """The loss of a micro-batch and its KL (n, T); n_tokens: of the whole update / WORLD."""
    logits = student_logits, teacher_logits
    # In place: the gradient overwrites the student's logits, so nothing else may use them.
    kl = softmax_kl(*logits, "forward", args.temperature, mask, inplace_backward=True)  # Eq. 1
    return kl.sum() / n_tokens, kl.detach()  # Eq. 2


# --- validation -----------------------------------------------------------------------------------
def validate(student, teacher, problems, args):
    """The forward KL on the teacher's rollouts, which stay the same: sampled once per start."""
    rng = np.random.default_rng([args.seed, 1, RANK])
    problems = problems[RANK::WORLD]
    if not hasattr(teacher, "val_texts"):
        teacher.val_texts = rollout(teacher, [p["ids"] for p in problems], 1, rng, args)
    completion_ids, mask, _ = teacher.val_texts
    rows, kl_sum = torch.arange(len(problems), device=student.device), 0.0
    student.eval()
    with torch.no_grad():
        for _, own, ids, keep in micro_batches(rows, problems, completion_ids, mask, args):
            logits = both_logits(student, teacher, own, ids, keep)
            kl_sum += float(softmax_kl(*logits, "forward", args.temperature, keep).sum())
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
    if args.rollouts:
        problems = read_rollouts(tokenizer, args, context)
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
    if args.rollouts:  # one completion per line
        n, group = n * group, 1
    # Each epoch has an order of its own, and a longer run begins like a shorter one. The streams of
    # random numbers: [seed, 0] for this order, [seed, 1] for validation, [seed, 2] for rollouts.
    rng, epochs = np.random.default_rng([args.seed, 0]), args.steps * n // len(problems) + 1
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(epochs)])

    done, name = {"initial": first_step, "total": args.steps}, Path(__file__).stem
    for step in (bar := tqdm(range(first_step, args.steps), name, disable=RANK > 0, **done)):
        began = time.monotonic()
        # 1 sample
        batch = [problems[i] for i in order[step * n : (step + 1) * n][RANK::WORLD]]
        rng = np.random.default_rng([args.seed, 2, step, RANK])
        if args.rollouts:
            completion_ids, mask, clipped = replay(batch, model)
        else:
            own = [problem["ids"] for problem in batch]
            completion_ids, mask, clipped = rollout(teacher, own, group, rng, args)
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
        for _, own, ids, keep in micro_batches(rows, batch, completion_ids, mask, args):
            # 3 score
            logits = both_logits(model, teacher, own, ids, keep)
            # 4 loss
            loss, kl = distil_loss(*logits, keep, n_tokens, args)
            del logits  # else they would stay in memory beside the next part's
            if args.show:
                return show(tokenizer, ids[-1][keep[-1]], kl[-1][keep[-1]], "KL")
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
            reward=None, pass_rate=None, kl=kl / tokens, entropy=None, zero_variance=None, labels=0,
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
        columns = () if args.rollouts else zip(batch, texts, completion_ids, mask, strict=True)
        stored = [
            {key: p[key] for key in ("problem", "prompt")}
            | {"completion": text, "completion_ids": ids[keep].tolist()}
            for p, text, ids, keep in columns
        ]
        files["rollouts.jsonl"] = [line for lines in gather(stored) for line in lines]
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
