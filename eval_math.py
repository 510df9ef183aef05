"""Evaluation: how often a model is right, and how sure one can be of that number.

Each problem is answered n times by sampling and once greedily. Every number is a mean over problems
and has a 95 % interval, by bootstrap over problems: for a few dozen it is too narrow, and where all
agree it has no width. Evaluation may filter (top-p, top-k), training never does. What is drawn
follows from (--seed, problem, index), so a killed run, once resumed, ends with the same samples;
samples.jsonl holds them, and --regrade judges that file anew, without a model.

  Eq. 1  avg@n = c / n, where c of the n samples of a problem are right
  Eq. 2  pass@k = 1 - C(n - c, k) / C(n, k), the chance of a right one among k of the n: unbiased
  Eq. 3  maj@n = is the answer with the most votes right? Mathematically equal answers vote
         together, no box means no vote, and in a tie of m answers each counts 1/m

    python eval_math.py                     the pocket student: a quarter of a minute
    python eval_math.py --model Qwen/Qwen3-1.7B --data math500 --out runs/base --plot
    python eval_math.py --compare runs/base runs/tuned
"""

import argparse
import ast
import hashlib
import json
import logging
import math
import os
import re
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
from huggingface_hub import hf_hub_download
from torch.nn.functional import pad
from torch.nn.utils import rnn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer

# --- arguments ------------------------------------------------------------------------------------
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QWEN = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data"
BENCHMARKS = {  # data set on the hub; its JSONL file, or its configuration and split
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "aime24": ("HuggingFaceH4/aime_2024", "default", "train"),
    "aime25": ("math-ai/aime25", "test.jsonl"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
STRATA = ("level", "subject", "terms")  # fields of the data that the results are broken down by
FLAGS = [  # name, tiny preset, paper preset, least value, meaning
    ("--data", "tiny/test.jsonl", "math500", None, f"a JSONL file, or {', '.join(BENCHMARKS)}"),
    ("--seed", 0, 0, 0, "every random draw follows from it, the problem and the sample's index"),
    ("--n", 8, 16, 1, "samples of a problem, beside the greedy one"),
    ("--max-new-tokens", 72, 8192, 1, "T, where a completion is cut"),  # paper: our choice
    ("--temperature", 1.0, 0.7, 1e-3, "of sampling"),
    ("--top-k", 0, 20, 0, "sample from the likeliest k tokens only; 0: from all"),
    ("--top-p", 1.0, 0.8, 1e-3, "and of these from the likeliest that together reach p"),
    ("--prompt-suffix", "", SUFFIX, None, "appended to every problem"),
    ("--rollout-batch", 1024, 64, 1, "completions sampled at once; bounds the KV cache"),
]


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
    parser.add_argument("--model", type=model_path, default="tiny/student", help="path or hub id")
    parser.add_argument("--out", help="directory of the run; the same command resumes it")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--preset", choices=("tiny", "paper"), help="tiny below 10 M parameters")
    for name, tiny, paper, _, meaning in FLAGS:
        parser.add_argument(name, type=type(tiny), help=f"{meaning} [{tiny!r}, paper {paper!r}]")
    parser.add_argument("--thinking", action="store_true", help="the template's thinking mode")
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k [1 2 4 ... n]")
    parser.add_argument("--plot", action="store_true", help="draw results.png (needs matplotlib)")
    parser.add_argument("--regrade", metavar="FILE", help="grade a samples.jsonl again, and stop")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs: B minus A")
    args = parser.parse_args(argv)
    if args.regrade or args.compare:
        return args, None
    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        n_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    args.preset = args.preset or ("tiny" if n_parameters < 10e6 else "paper")
    for name, tiny, paper, least, _ in FLAGS:
        key = name[2:].replace("-", "_")
        if getattr(args, key) is None:
            setattr(args, key, tiny if args.preset == "tiny" else paper)
        if least is not None and not least <= getattr(args, key) < float("inf"):
            fail(f"{name} must be at least {least}, not {getattr(args, key)}")
    if args.k and not 1 <= min(args.k) <= max(args.k) <= args.n:
        fail(f"--k {max(args.k)}: pass@k needs a k from 1 to --n, which is {args.n}")
    return args, config.max_position_embeddings


# --- processes ------------------------------------------------------------------------------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun


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


# --- problems -------------------------------------------------------------------------------------
def fetch(name):
    """The rows of a benchmark as lines of JSON, from the hub or from its client's cache."""
    repo, file, *split = BENCHMARKS[name]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        if not split:
            return Path(hf_hub_download(repo, file, repo_type="dataset")).open("rb")
        from datasets import load_dataset

        return [json.dumps(row) for row in load_dataset(repo, file, split=split[0])]
    except (ImportError, OSError, ValueError):
        url = f"{QWEN}/{name}" if split else f"https://huggingface.co/datasets/{repo}/resolve/main"
        fail(f"{name}: no network or `datasets`; download {url}/test.jsonl and point --data to it")


def read_rows(source):
    """(where, row) for each line of a JSONL file, or for each problem of a benchmark."""
    lines = fetch(source) if source in BENCHMARKS else Path(source).open("rb")
    for number, line in enumerate(lines, 1):
        try:
            yield f"{source}:{number}", {**json.loads(line)}
        except (ValueError, TypeError):
            fail(f"{source}:{number}: not a JSON object; fix or delete this line")


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


def judge(gold, completion):
    """The answer that a completion gives, whether it is right, and what decided that."""
    answer = last_boxed(completion)
    if answer is None:
        return {"answer": None, "right": False, "grader": "no box"}
    screened = len(answer) > 256 or (COSTLY.search(answer) and not COSTLY.search(gold))
    integers = INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold)
    grader = "integer" if integers else "screen" if screened else "math-verify"
    grader = "text" if answer == gold else grader
    return {"answer": answer, "right": same_answer(gold, answer), "grader": grader}


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


def choose(logits, sampling, noise):
    """The next tokens (n,): from the likeliest down, the one whose running sum passes the noise."""
    # vs grpo.py: filtered, and in an order that makes noise 0 the greedy choice
    temperature, top_k, top_p = sampling
    logits, ids = logits.topk(min(top_k, logits.shape[-1]) or logits.shape[-1])  # (n, K)
    p = (logits.double() / temperature).softmax(-1)
    running = p.cumsum(-1)
    last = (~(running - p >= top_p)).sum(-1, keepdim=True) - 1  # (n, 1), the first to reach top_p
    place = torch.searchsorted(running / running.gather(1, last), noise[:, None], right=True)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1)).squeeze(1)  # NaN gives K


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


# --- samples --------------------------------------------------------------------------------------
def write_whole(path, content):
    """Writes JSON to .new, then renames: never a half-written file."""
    path.with_suffix(".new").write_text(json.dumps(content, indent=1))
    path.with_suffix(".new").replace(path)


def open_run(args, model, problems):
    """The directory of the run, made or reopened, its config, and the samples already in it."""
    out = Path(args.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    # Settings that no sample depends on (rollout_batch matters only through rounding).
    asked = ("out", "k", "plot", "regrade", "compare", "rollout_batch")
    config = {"settings": {k: v for k, v in vars(args).items() if k not in asked}}
    config["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    # What tells models apart: training changes the first values, a prompt shows the template.
    values = [p.detach().flatten()[:256].float().tolist() for p in model.parameters()]
    pairs = [[problem["problem"], problem["answer"]] for problem in problems]
    code = ast.dump(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    for key, content in ("model", [values, problems[0]["prompt"]]), ("data", pairs), ("code", code):
        config[key] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = out / "config.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if "settings" in old:  # a model's directory has a config.json, too
        now, was = config["settings"], old["settings"]
        differs = [f"{k} was {was.get(k)!r}" for k in now if now[k] != was.get(k)]
        differs += [f"another {k}" for k in ("model", "data", "code") if old.get(k) != config[k]]
        if differs:
            fail(f"{out}: {', '.join(differs)}: a new --out keeps both; --regrade takes no samples")
    elif out.exists() and set(out.iterdir()) - {path.with_suffix(".new")}:
        fail(f"{out} holds something that is not a run: give another --out")
    out.mkdir(parents=True, exist_ok=args.out is not None)  # never two runs in one
    write_whole(path, config)
    path = out / "samples.jsonl"
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut the last line
    return out, config, [line for _, line in read_rows(path)]


def draw(model, tokenizer, problems, rows, args):
    """A line of samples.jsonl for each (problem, index) of rows; index 0 is the greedy one."""
    # A random stream for each sample: another batch size or n draws the same ones.
    noise = [np.random.default_rng([args.seed, *row]).random(args.max_new_tokens) for row in rows]
    noise = torch.tensor(np.array(noise), device=model.device)
    noise[[index == 0 for _, index in rows]] = 0
    first = rows[0][0]
    prompts = [problem["ids"] for problem in problems[first : rows[-1][0] + 1]]
    owner = torch.tensor([number - first for number, _ in rows], device=model.device)
    drawn = decode(model, prompts, owner, noise, (args.temperature, args.top_k, args.top_p))
    for (number, index), ids, mask, clipped in zip(rows, *drawn, strict=True):
        problem = problems[number]
        text = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)
        line = {"problem": number, "index": index, "where": problem["where"]}
        line |= {key: problem["row"][key] for key in STRATA if key in problem["row"]}
        line |= {"completion": text, "tokens": int(mask.sum()), "clipped": bool(clipped)}
        yield line | {"gold": problem["answer"]} | judge(problem["answer"], text)


# --- metrics --------------------------------------------------------------------------------------
def same_vote(one, other):
    """Whether answers are equal, with either as gold; costly ones as text: there are many pairs."""
    costly = COSTLY.search(one) or COSTLY.search(other)
    return one == other or not costly and (same_answer(one, other) or same_answer(other, one))


def measure(samples, ks):
    """The numbers of one problem; the first of its samples is the greedy one."""
    greedy, *drawn = samples
    n, c = len(drawn), sum(sample["right"] for sample in drawn)
    votes = {}  # for wrong answers; equal ones count towards the first
    for answer in (s["answer"] for s in drawn if not s["right"] and s["answer"] is not None):
        first = next((vote for vote in votes if same_vote(vote, answer)), answer)
        votes[first] = votes.get(first, 0) + 1
    ballot = [c, *votes.values()]
    return {
        f"avg@{n}": c / n,  # Eq. 1
        "greedy": float(greedy["right"]),
        **{f"pass@{k}": 1 - math.comb(n - c, k) / math.comb(n, k) for k in ks},  # Eq. 2
        f"maj@{n}": (c == max(ballot) > 0) / ballot.count(max(ballot)),  # Eq. 3
        "length": np.mean([sample["tokens"] for sample in drawn]),
        "clipped": np.mean([sample["clipped"] for sample in drawn]),
        "no box": np.mean([sample["answer"] is None for sample in drawn]),
    }


def intervals(rows, resamples=4000):
    """Each number's mean over problems, and where 95 % of the means of resampled problems lie."""
    chosen = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    numbers = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
        numbers[name] = {"mean": float(values.mean()), "low": float(low), "high": float(high)}
    return numbers


# --- report ---------------------------------------------------------------------------------------
def report(out, lines, args, config):
    """Writes results.json, prints its table and draws its picture."""
    n = max((line["index"] for line in lines), default=0)
    problems = [lines[i : i + n + 1] for i in range(0, len(lines) - n, n + 1)]  # complete ones
    ks = sorted(args.k or {n, *(2**i for i in range(n.bit_length()))})
    if not problems or not 1 <= ks[0] <= ks[-1] <= n:
        fail(f"{out}: {len(problems)} problems with all {n} samples; --k must be from 1 to {n}")
    rows = [measure(samples, ks) for samples in tqdm(problems, "vote", leave=False, delay=2)]
    metrics, by, avg, strata = intervals(rows), {}, f"avg@{n}", {}
    for field in (field for field in STRATA if any(field in line for line in lines)):
        names = [str(samples[0].get(field)) for samples in problems]
        by[field] = {}
        for name in sorted({*names}, key=lambda s: s.zfill(9) if s.isdigit() else s):
            own = [row for row, other in zip(rows, names, strict=True) if other == name]
            by[field][name] = {"problems": len(own)} | intervals(own)
            strata[f"{avg}, {field} {name}"] = by[field][name][avg]
    each = [  # for --compare
        {"avg": row[avg], "greedy": row["greedy"], "maj": row[f"maj@{n}"], "where": own[0]["where"]}
        for row, own in zip(rows, problems, strict=True)
    ]
    write_whole(out / "results.json", config | {"n": n, "metrics": metrics, "by": by, "each": each})
    print(f"\n{len(problems)} problems: mean (95 % interval, bootstrap); more: {out}/results.json")
    for name, number in (metrics | strata).items():
        print("{:<38} {mean:9.3f} ({low:.3f} to {high:.3f})".format(name, **number))
    if metrics["clipped"]["mean"] > 0.5:
        print("over half of the completions are cut: --max-new-tokens")
    if len(problems) < 50:
        print("so few problems: these intervals are too narrow, and have no width where all agree")
    if args.plot:
        import matplotlib.pyplot as plt

        curve = {name: metrics[name] for name in metrics if name.startswith("pass@")}
        panels = [numbers for numbers in (curve, strata) if numbers]
        size = {"figsize": (6 * len(panels), 5), "squeeze": False, "subplot_kw": {"ylim": (0, 1)}}
        figure, axes = plt.subplots(1, len(panels), **size)
        for axis, numbers in zip(axes[0], panels, strict=True):
            mean, low, high = np.array([[*number.values()] for number in numbers.values()]).T
            span = np.maximum(0, [mean - low, high - mean])
            axis.errorbar([*numbers], mean, span, fmt="o", capsize=3)
        figure.autofmt_xdate()  # room for the names of subjects
        figure.savefig(out / "results.png", dpi=150, bbox_inches="tight")


def regrade(path, args):
    """Judges every completion of a samples.jsonl anew; the file itself stays as it is."""
    lines, changed = [], 0
    for where, line in read_rows(path):
        if not {"index", "where", "completion", "tokens", "clipped", "gold", "right"} <= {*line}:
            fail(f"{where}: not a line of a samples.jsonl of eval_math.py")
        lines.append(line | judge(line["gold"], line["completion"]))
        changed += lines[-1]["right"] != line["right"]
    print(f"{path}: {changed} of {len(lines)} verdicts changed")
    config = Path(path).with_name("config.json")
    config = json.loads(config.read_text()) if config.exists() else {}
    report(Path(path).parent, lines, args, config)


def compare(one, other):
    """The second run minus the first: paired by problem, because problems differ more than runs."""
    a, b = (json.loads(Path(out, "results.json").read_text()) for out in (one, other))
    same = a.get("data") and a["data"] == b.get("data")
    if not same or not len(a.get("each", "")) == len(b.get("each", "")) > 0:
        fail(f"{one} and {other} are not known to be about the same problems: nothing to pair")
    pairs = [*zip(a["each"], b["each"], strict=True)]
    gains = [{name: b[name] - a[name] for name in ("avg", "greedy", "maj")} for a, b in pairs]
    was, now = (run.get("settings", {}) for run in (a, b))
    for a, b in pairs:
        if (a["maj"] > 0.5) != (b["maj"] > 0.5):  # the right answer won without a tie
            side = "right" if b["maj"] > 0.5 else "wrong"
            print(f"{a['where']} became {side} by majority; avg {a['avg']:.2f} -> {b['avg']:.2f}")
    print(f"{other} minus {one}, {len(pairs)} problems; difference (95 % interval, paired)")
    for key in (key for key in was if key != "model" and was[key] != now.get(key)):
        print(f"not made alike: {key} {was[key]!r} and {now.get(key)!r}")
    for name, gain in intervals(gains).items():
        print("{:<8} {mean:+9.3f} ({low:+.3f} to {high:+.3f})".format(name, **gain))


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    try:
        args, context = parse_arguments(argv)
        if args.compare:
            compare(*args.compare)
        elif args.regrade:
            regrade(args.regrade, args)
        else:
            evaluate(args, context)
    except (OSError, ImportError, dist.DistError) as error:  # no model, file, matplotlib, port
        fail(str(error).strip().partition("\n")[0])
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --rollout-batch")
    except KeyboardInterrupt:
        fail("stopped; the same command with --out resumes")
    if WORLD > 1:
        dist.barrier()  # no process exits while another still writes
        dist.destroy_process_group()
        time.sleep(1)  # for gloo's threads: one still running would make Python abort at exit


def evaluate(args, context):
    start_processes(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        print(f"{args.model} has no chat template: the problem goes in as it is")
    problems = load_problems(args.data, tokenizer, args, float("inf"))  # vs grpo.py: skips none
    longest = max(problems, key=lambda problem: len(problem["ids"]))
    size = len(longest["ids"])
    if size + args.max_new_tokens > context:
        fail(f"{longest['where']}: {size} of {context} tokens: drop it, or lower --max-new-tokens")
    read_answers(problems)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    out, config, lines = gather(None if RANK else open_run(args, model, problems))[0]
    print(f"--out {out} goes on with this run:", *(f"{k}={v!r}" for k, v in vars(args).items()))

    rows = [(number, index) for number in range(len(problems)) for index in range(args.n + 1)]
    bar = tqdm(desc="eval", total=len(rows), initial=len(lines), disable=RANK > 0)
    # A batch cut short by a kill is redrawn whole: beside other rows, logits round differently.
    size = args.rollout_batch
    done = len(lines) if len(lines) == len(rows) else len(lines) // size * size
    for start in range(done, len(rows), size * WORLD):  # a batch for each process
        own = rows[start + RANK * size : start + (RANK + 1) * size]
        drawn = gather([*draw(model, tokenizer, problems, own, args)] if own else [])
        new = [line for part in drawn for line in part][len(lines) - start :]
        if not lines:
            bar.write(f"{problems[0]['prompt']!r} -> {new[0]['completion']!r}: {new[0]['right']}")
        lines += new
        if RANK == 0:
            with (out / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
        bar.set_postfix(right=f"{np.mean([line['right'] for line in lines]):.3f}")
        bar.update(len(new))
    if RANK == 0:
        report(out, lines, args, config)


if __name__ == "__main__":
    main()
