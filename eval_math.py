"""Evaluation: how often a model is right, and how sure one can be of that number.

Each problem is answered n times by sampling and once greedily. A benchmark's problems stand for
more of their kind, so every number is a mean over problems, with a 95 % interval by bootstrap over
problems. (An interval of width 0 says that all problems agreed, and no more than that.)

  Eq. 1  avg@n = c / n, where c of the n samples of a problem are right
  Eq. 2  pass@k = 1 - C(n - c, k) / C(n, k), the chance that k of the n hold a right one: unbiased
  Eq. 3  maj@n = is the answer with most votes right? Answers that are equal as mathematics vote
         together, no box is no vote, and in a tie of m answers each counts 1/m

Evaluation may filter (top-p, top-k); training never does. What is drawn follows from (--seed,
problem, index), so a run that was killed ends with the same samples. samples.jsonl holds them all
with what decided each verdict; --regrade judges that file anew, without a model.

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
from collections import Counter
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import math_verify
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

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
    ("--max-new-tokens", 72, 8192, 1, "T, where a completion is cut"),  # paper: ours
    ("--temperature", 1.0, 0.7, 1e-3, "of sampling"),
    ("--top-k", 0, 20, 0, "sample from the likeliest k tokens only; 0: from all"),
    ("--top-p", 1.0, 0.8, 1e-3, "and of these from the likeliest that together reach p"),
    ("--prompt-suffix", "", SUFFIX, None, "stands behind every problem"),
    ("--rollout-batch", 1024, 64, 1, "completions sampled at once; bounds the KV cache"),
]


def fail(message):
    """A person reads this: one line on stderr, exit status 2."""
    # What fails on all ranks is said by rank 0, whose end ends the others; they give it the time.
    time.sleep(10 if RANK else 0)
    tqdm.write(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments(argv):
    """The settings: by hand, else from the preset; and the model's context length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--model", default="tiny/student", help="directory or hub name")
    parser.add_argument("--out", help="directory of the run; the same command resumes it")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--preset", choices=("tiny", "paper"), help="tiny below 10 M parameters")
    for name, tiny, paper, _, meaning in FLAGS:
        parser.add_argument(name, type=type(tiny), help=f"{meaning} [{tiny!r}, paper {paper!r}]")
    parser.add_argument("--thinking", action="store_true", help="the template's thinking mode")
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k [1 2 4 ... n]")
    parser.add_argument("--plot", action="store_true", help="draw results.png (needs matplotlib)")
    parser.add_argument("--regrade", metavar="FILE", help="judge a samples.jsonl anew, and stop")
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
    return args, config.max_position_embeddings


def which_k(given, n):
    """The k of pass@k: those asked for, else 1, 2, 4, ... and n."""
    if given and not 1 <= min(given) <= max(given) <= n:
        fail(f"--k {max(given)}: pass@k needs k from 1 to the number of samples, which is {n}")
    return sorted({*given} if given else {n, *(2**i for i in range(n.bit_length()))})


# --- processes ------------------------------------------------------------------------------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun


def start_processes(device):
    """Under torchrun: finds the others, and leaves the talking to rank 0."""
    if WORLD == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Gloo for tensors on a CPU, nccl for those on a GPU. Some rollouts take far longer than others.
    dist.init_process_group(timeout=timedelta(hours=3))
    if RANK:
        sys.stdout = open(os.devnull, "w")
        transformers.utils.logging.disable_progress_bar()


def gather(item):
    """What every process holds, a list in the order of their ranks."""
    items = [item] * WORLD
    if WORLD > 1:
        dist.all_gather_object(items, item)
    return items


# --- problems -------------------------------------------------------------------------------------
def fetch(name):
    """The rows of a benchmark as lines of JSON, from the hub or from what its client has kept."""
    repo, file, *split = BENCHMARKS[name]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would count its retries
    try:
        if split:
            from datasets import load_dataset

            return [json.dumps(row) for row in load_dataset(repo, file, split=split[0])]
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, file, repo_type="dataset")).open("rb")
    except (ImportError, OSError) as error:
        why = "no network" if isinstance(error, OSError) else f"pip install {error.name}"
        url = f"{QWEN}/{name}" if split else f"https://huggingface.co/datasets/{repo}/resolve/main"
        fail(f"{name}: {why}; or download {url}/test.jsonl and point --data to that file")


def read_rows(source):
    """(where, row) for each line of a JSONL file, or for each problem of a benchmark."""
    # vs grpo.py: benchmarks by their names, no other data sets of the hub
    lines = fetch(source) if source in BENCHMARKS else Path(source).open("rb")
    for number, line in enumerate(lines, 1):
        try:
            yield f"{source}:{number}", dict(json.loads(line))
        except (ValueError, TypeError):
            fail(f"{source}:{number}: not a JSON object; mend or delete this line")


def render(text, tokenizer, args):
    """The prompt of a problem, and its token ids."""
    plain, prompt = tokenizer.chat_template is None, text + args.prompt_suffix
    if not plain:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": args.thinking}
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return prompt, tokenizer(prompt, add_special_tokens=plain)["input_ids"]


def load_problems(source, tokenizer, args, context):
    """[{"where", "row", "problem", "prompt", "ids"}]; a row that cannot be used is named."""
    there = gather(Path(source).exists())
    if any(there) and not all(there):
        fail(f"{source} is there for some processes only, not for rank {there.index(False)}")
    problems = []
    for where, row in read_rows(source):
        text = row.get("problem") or row.get("question") or row.get("prompt")
        if isinstance(text, list) and text and isinstance(text[-1], dict):  # DAPO's chat form
            text = str(text[-1].get("content"))
            text = re.sub(r"^Solve the following math problem[^\n]*\n+", "", text)
            text = re.sub(r"\n+Remember to put your answer on its own line[^\n]*$", "", text)
        if not text or not isinstance(text, str):
            fail(f"{where}: no problem (nor question, nor prompt)")
        prompt, ids = render(text, tokenizer, args)
        problems.append(dict(where=where, row=row, problem=text, prompt=prompt, ids=ids))
    fits = [p for p in problems if len(p["ids"]) + args.max_new_tokens <= context]
    if len(fits) < len(problems):
        print(f"{source}: skipped {len(problems) - len(fits)} prompts, too long for the context")
    return fits or fail(f"{source}: not one problem that fits a context of {context} tokens")


# --- grading --------------------------------------------------------------------------------------
ANSWERS = ("answer", "solution", "ground_truth")
INTEGER = re.compile(r"-?\d{1,30}")
# Towers of powers, long exponents and factorials keep sympy busy for a second each.
COSTLY = re.compile(r"\^\s*\S+\s*\^|\^\W*[\d.]{4,}|\)\s*\^.*\)\s*\^|\d{3,}\s*!|[!)}]\s*!|binom")
# What math-verify misreads: 1\,000 as 1 * 0, a full stop at the end, 2 1/2 as (2 + 1)/2.
SPURIOUS = re.compile(r"(?<=\d)(\\[,;: ]|[~ ])(?=\d{3}(?!\d))|(?<!\\right)\.$")
MIXED = re.compile(r"(?<=\d) +(\d+)/(\d+)$")
LATEX = [math_verify.LatexExtractionConfig()]  # the expression extractor would evaluate the text


def last_boxed(text):
    r"""What the last balanced \boxed{} holds, or None."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    for start in reversed(starts[-8:]):  # a text of nothing but boxes must not take a minute
        depth = 1
        for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[start : start + match.start()].strip()
    return None


def parse_answer(answer):
    """math-verify's reading of an answer; empty if it finds none within a second."""
    answer = MIXED.sub(r"\\frac{\1}{\2}", SPURIOUS.sub("", answer))
    box = f"\\boxed{{{answer}}}"
    return math_verify.parse(box, LATEX, fallback_mode="no_fallback", parsing_timeout=1)


def read_answers(problems):
    """Adds the "answer" of each problem: the last box of a solution, GSM8K's ####, or the text."""
    for problem in problems:
        places = [problem["row"], problem["row"].get("reward_model")]  # DAPO keeps it in the second
        found = [place.get(key) for place in places if isinstance(place, dict) for key in ANSWERS]
        text = next((str(answer) for answer in found if answer is not None), "")
        answer = last_boxed(text) or text.rpartition("####")[2].strip()
        if not INTEGER.fullmatch(answer) and not parse_answer(answer):
            fail(f"{problem['where']}: no answer (nor solution, nor ground_truth) in {text!r}")
        problem["answer"] = answer


@lru_cache(maxsize=100_000)
def same_answer(gold, answer):
    """The same text, the same integer, or the same mathematics."""
    if answer == gold or (INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold)):
        return answer == gold or int(answer) == int(gold)
    if len(answer) > 256 or COSTLY.search(answer):
        return False
    return math_verify.verify(parse_answer(gold), parse_answer(answer), timeout_seconds=1)


def judge(gold, completion):
    """The answer that a completion gives, whether it is right, and what decided that."""
    # vs grpo.py: the clock has a say within math-verify only; and a file can be judged anew
    answer = last_boxed(completion)
    if answer is None:
        return {"answer": None, "right": False, "grader": "no box"}
    screened = len(answer) > 256 or COSTLY.search(answer)
    integers = INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold)
    grader = "integer" if integers else "screen" if screened else "math-verify"
    grader = "text" if answer == gold else grader
    return {"answer": answer, "right": same_answer(gold, answer), "grader": grader}


# --- rollout --------------------------------------------------------------------------------------
class KVLayer(DynamicLayer):
    """One layer's keys and values, written in place; room is made for 64 positions at a time."""

    def update(self, key_states, value_states, *args, **kwargs):
        # Under autocast the keys leave their norm in fp32: cast here once, not at every token.
        new = torch.stack([key_states.to(value_states.dtype), value_states])
        if not self.is_initialized:
            self.lazy_initialization(new[0], new[1])
            self.room = new[:, :, :, :0]
        start, end = self.get_seq_length(), self.get_seq_length() + new.shape[3]
        if end > self.room.shape[3]:
            more = end - self.room.shape[3] + 64
            self.room = torch.nn.functional.pad(self.room, (0, 0, 0, more))
        self.room[:, :, :, start:end] = new
        self.keys, self.values = self.room[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.room = self.room[:, indices]
        self.keys, self.values = self.room[:, :, :, : self.get_seq_length()]


def pad_left(prompts, device):
    """prompt_ids and their mask, (n, P); any id serves as padding, the mask tells which it is."""
    ids = pad_sequence([torch.tensor(p, device=device) for p in prompts], True, -1, "left")
    return ids.clamp(min=0), (ids >= 0).long()


def choose(logits, sampling, noise):
    """The next tokens (n,): from the likeliest down, where their running sum passes the noise."""
    # vs grpo.py: filtered, and in an order that makes noise 0 the greedy choice
    temperature, top_k, top_p = sampling
    size = logits.shape[-1]
    logits, ids = logits.topk(min(top_k or size, size))  # (n, K)
    p = (logits.double() / temperature).softmax(-1)
    running = p.cumsum(-1)
    last = (~(running - p >= top_p)).sum(-1, keepdim=True) - 1  # (n, 1), the one to reach top_p
    place = torch.searchsorted(running / running.gather(1, last), noise[:, None], right=True)
    return ids.gather(1, place.clamp(max=ids.shape[1] - 1)).squeeze(1)  # the clamp: NaN


@torch.inference_mode()
def decode(model, prompts, owner, noise, temperature):
    """Continue prompts[owner[i]] with noise[i]; completion_ids, mask (n, T) and clipped (n,)."""
    device, (n, length) = model.device, noise.shape
    eos_ids = torch.tensor(model.generation_config.eos_token_id, device=device).view(-1)
    prompt_ids, prompt_mask = pad_left(prompts, device)  # (B, P)
    position = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=KVLayer)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    out = model(prompt_ids, attention_mask=prompt_mask, position_ids=position, **options)
    cache.batch_select_indices(owner)  # each prompt is read once, its cache repeated
    logits, position = out.logits[owner, -1], position[owner, -1]  # (n, V), (n,)
    attention = torch.nn.functional.pad(prompt_mask[owner], (0, length), value=1)  # (n, P + T)
    completion_ids = torch.zeros(n, length, dtype=torch.long, device=device)
    rows = torch.arange(n, device=device)  # those still in the batch
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    for t in range(length):
        token = choose(logits, temperature, noise[rows, t])
        completion_ids[rows, t] = token
        finished = finished | torch.isin(token, eos_ids)
        if finished.all() or t == length - 1:
            break
        if finished.float().mean() >= 0.25:  # dropping rows copies the cache: not for a few
            kept = (~finished).nonzero().squeeze(1)
            rows, token, finished = rows[kept], token[kept], finished[kept]
            position, attention = position[kept], attention[kept]
            cache.batch_select_indices(kept)
        position = position + 1
        seen = attention[:, : prompt_ids.shape[1] + t + 1]
        out = model(token[:, None], attention_mask=seen, position_ids=position[:, None], **options)
        logits = out.logits[:, -1]
    # Up to and with the first EOS, by position: the padding may be the EOS token too.
    is_eos = torch.isin(completion_ids, eos_ids).long()
    mask = is_eos.cumsum(1) - is_eos == 0
    return completion_ids * mask, mask, ~is_eos.bool().any(1)


def draw(model, problems, rows, args):
    """A completion for each (problem, index) of rows; index 0 is the greedy one."""
    noise = np.zeros((len(rows), args.max_new_tokens))
    for i, (number, index) in enumerate(rows):
        if index > 0:  # its own stream: another batch size or another n draws the same
            noise[i] = np.random.default_rng([args.seed, number, index]).random(noise.shape[1])
    first = rows[0][0]
    prompts = [problem["ids"] for problem in problems[first : rows[-1][0] + 1]]
    owner = torch.tensor([number - first for number, _ in rows], device=model.device)
    noise = torch.from_numpy(noise).to(model.device)
    return decode(model, prompts, owner, noise, (args.temperature, args.top_k, args.top_p))


# --- samples --------------------------------------------------------------------------------------
def write_whole(path, content):
    """JSON written aside, then renamed: never a half-written file."""
    path.with_suffix(".new").write_text(json.dumps(content, indent=1))
    path.with_suffix(".new").replace(path)


def open_run(args, model, problems):
    """The directory of the run, made or reopened, and what its samples come from."""
    out = Path(args.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    while args.out is None and out.exists():  # two runs in one second
        out = out.with_name(out.name + "b")
    asked = ("out", "k", "plot", "regrade", "compare")  # what no sample depends on
    config = {"settings": {k: v for k, v in vars(args).items() if k not in asked}}
    config["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    # Training moves the first values of a tensor: they tell a model from another of its name.
    values = [p.detach().flatten()[:256].float().tolist() for p in model.parameters()]
    prompts = [problem["prompt"] for problem in problems]  # the template is part of the model
    pairs = [[problem["problem"], problem["answer"]] for problem in problems]
    code = ast.dump(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    for name, content in ("model", [values, prompts]), ("data", pairs), ("code", code):
        config[name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = out / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        now, was = config["settings"], old["settings"]
        differs = [f"{k} was {was.get(k)!r}" for k in now if now[k] != was.get(k)]
        differs += [f"another {k}" for k in ("model", "data", "code") if old[k] != config[k]]
        if differs:
            fail(f"{out}: {', '.join(differs)}: a new --out keeps both; --regrade takes no samples")
    elif out.exists() and set(out.iterdir()) - {path.with_suffix(".new")}:
        fail(f"{out} holds something that is no run: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, config)
    return out, config


def complete(model, tokenizer, problems, part, args):
    """A line of samples.jsonl for each (problem, index) of part."""
    lines = []
    drawn = (tensor.cpu() for tensor in draw(model, problems, part, args)) if part else ([], [], [])
    for (number, index), ids, mask, clipped in zip(part, *drawn, strict=True):
        problem = problems[number]
        text = tokenizer.decode(ids[mask], skip_special_tokens=True)
        line = {"problem": number, "index": index, "where": problem["where"]}
        line |= {key: problem["row"][key] for key in STRATA if key in problem["row"]}
        line |= {"completion": text, "tokens": int(mask.sum()), "clipped": bool(clipped)}
        lines.append(line | {"gold": problem["answer"]} | judge(problem["answer"], text))
    return lines


def take_samples(model, tokenizer, problems, path, args):
    """The lines of samples.jsonl: those that are there, and from there on new ones."""
    lines = None
    if RANK == 0:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a kill may have cut the last line
        lines = [line for _, line in read_rows(str(path))]
    lines = gather(lines)[0]
    rows = [(number, index) for number in range(len(problems)) for index in range(args.n + 1)]
    bar, size = tqdm(total=len(rows), desc="eval", disable=RANK > 0), args.rollout_batch
    bar.update(len(lines))
    done = len(lines) if len(lines) == len(rows) else len(lines) // size * size
    for start in range(done, len(rows), size * WORLD):  # a batch for each process
        # A batch that a kill left half-written is drawn whole: in other company a row's logits
        # differ by a rounding error. What is there already stays.
        own = rows[start + RANK * size : start + (RANK + 1) * size]
        drawn = gather(complete(model, tokenizer, problems, own, args))
        new = [line for part in drawn for line in part][len(lines) - start :]
        if not lines:
            first = problems[0]["prompt"], new[0]["completion"]
            bar.write("{!r} -> {!r}: {}".format(*first, new[0]["right"]))
        lines += new
        if RANK == 0:
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
        bar.update(len(new))
        bar.set_postfix(right=f"{np.mean([line['right'] for line in lines]):.3f}")
    return lines


# --- metrics --------------------------------------------------------------------------------------
def pass_at_k(n, c, k):
    """The chance that k of n samples, c of them right, hold a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # Eq. 2


def majority(samples):
    """1 if the right answers win the vote, 0 if they lose it, 1/m if they are one of m in a tie."""
    right = sum(sample["right"] for sample in samples)
    wrong = [s["answer"] for s in samples if not s["right"] and s["answer"] is not None]
    votes = Counter()  # for each wrong answer; of those that are equal the first one gets all
    for answer, count in Counter(wrong).items():
        votes[next((first for first in votes if same_answer(first, answer)), answer)] += count
    ballot = [right, *votes.values()]
    return (right == max(ballot) > 0) / ballot.count(max(ballot))  # Eq. 3


def measure(problems, ks):
    """{name: a value for each problem (P,)}; a problem is its samples, the greedy one first."""
    n = len(problems[0]) - 1
    drawn = [own[1:] for own in problems]
    right = [sum(sample["right"] for sample in own) for own in drawn]
    values = {f"avg@{n}": [c / n for c in right]}  # Eq. 1
    values["greedy"] = [own[0]["right"] for own in problems]
    values |= {f"pass@{k}": [pass_at_k(n, c, k) for c in right] for k in ks}
    values[f"maj@{n}"] = [majority(own) for own in tqdm(drawn, "vote", leave=False, delay=2)]
    values["length"] = [np.mean([sample["tokens"] for sample in own]) for own in drawn]
    values["clipped"] = [np.mean([sample["clipped"] for sample in own]) for own in drawn]
    values["no box"] = [np.mean([sample["answer"] is None for sample in own]) for own in drawn]
    return {name: np.array(column, float) for name, column in values.items()}


def interval(values, resamples=4000):
    """The mean over problems, and where 95 % of the means of resampled problems lie."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summarize(lines, ks):
    """Every number of the table, and those that --compare pairs: {"metrics", "by", "each"}."""
    size = lines[-1]["index"] + 1
    problems = [lines[i : i + size] for i in range(0, len(lines), size)]
    values = measure(problems, ks)
    main = [name for name in values if name.startswith(("avg", "greedy", "maj"))]
    results = {"metrics": {name: interval(column) for name, column in values.items()}, "by": {}}
    for field in (field for field in STRATA if field in lines[0]):
        strata = np.array([str(samples[0].get(field)) for samples in problems])
        order = sorted({*strata.tolist()}, key=lambda s: s.zfill(9) if s.isdigit() else s)
        results["by"][field] = {
            stratum: {"problems": int((strata == stratum).sum())}
            | {name: interval(values[name][strata == stratum]) for name in main}
            for stratum in order
        }
    columns = {name.split("@")[0]: values[name].tolist() for name in main}
    columns["where"] = [samples[0]["where"] for samples in problems]
    rows = zip(*columns.values(), strict=True)
    return results | {"each": [dict(zip(columns, row, strict=True)) for row in rows]}


# --- report ---------------------------------------------------------------------------------------
def report(out, lines, args, config):
    """Writes results.json, prints the table and draws the picture."""
    n = lines[-1]["index"]
    results = config | {"n": n} | summarize(lines, which_k(args.k, n))
    write_whole(out / "results.json", results)
    print(f"\n{len(results['each'])} problems; mean (95 % interval, bootstrap over problems)")
    for name, number in results["metrics"].items():
        print("{:<8} {:9.3f} ({:.3f} to {:.3f})".format(name, *number.values()))
    for field, strata in results["by"].items():
        names = [*next(iter(strata.values()))][1:]
        print(f"\n{field:<22} problems", *(f"{name:>13}{'':11}" for name in names))
        for stratum, (problems, *numbers) in ((s, strata[s].values()) for s in strata):
            cells = ("{:7.3f} ({:.3f} to {:.3f})".format(*number.values()) for number in numbers)
            print(f"{stratum:<22} {problems:>8}", *cells)
    if results["metrics"]["clipped"]["mean"] > 0.5:
        print("over half of the completions are cut: --max-new-tokens")
    print(f"\nthe numbers: {out}/results.json; what they come from: {out}/samples.jsonl")
    if args.plot:
        draw_results(results, out / "results.png")


def draw_results(results, path):
    """The pass@k curve, and the accuracy by difficulty, with their intervals."""
    import matplotlib.pyplot as plt

    metrics, avg = results["metrics"], f"avg@{results['n']}"
    panels = {"pass@k": {name[5:]: metrics[name] for name in metrics if name.startswith("pass@")}}
    for field, strata in results["by"].items():
        panels[f"{avg} by {field}"] = {name: numbers[avg] for name, numbers in strata.items()}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, numbers) in zip(axes[0], panels.items(), strict=True):
        mean, low, high = np.array([[*number.values()] for number in numbers.values()]).T
        span = np.maximum(0, [mean - low, high - mean])
        axis.errorbar([*numbers], mean, span, fmt="o-" if title == "pass@k" else "o", capsize=3)
        axis.set(title=title, ylim=(0, 1))
    figure.autofmt_xdate()  # room for the names of subjects
    figure.savefig(path, dpi=150)
    print(f"the picture: {path}")


def regrade(path, args):
    """Judges every completion of a samples.jsonl anew; the file itself stays as it is."""
    lines, changed = [], 0
    for where, line in read_rows(path):
        if not {"index", "gold", "completion", "right"} <= line.keys():
            fail(f"{where}: not a line of a samples.jsonl")
        lines.append(line | judge(line["gold"], line["completion"]))
        changed += lines[-1]["right"] != line["right"]
    size = 1 + max((line["index"] for line in lines), default=0)
    cut = len(lines) % size  # a killed run may end within a problem
    if len(lines) < size or size == 1:
        fail(f"{path}: not one problem with all its samples")
    print(f"{path}: {changed} of {len(lines)} verdicts changed, the last {cut} lines left out")
    config = Path(path).with_name("config.json")
    config = json.loads(config.read_text()) if config.exists() else {}
    report(Path(path).parent, lines[: len(lines) - cut], args, config)


def compare(one, other):
    """The second run minus the first: paired by problem, because problems differ more than runs."""
    runs = [json.loads(Path(out, "results.json").read_text()) for out in (one, other)]
    if runs[0].get("data") != runs[1].get("data") or len(runs[0]["each"]) != len(runs[1]["each"]):
        fail(f"{one} and {other} are about different problems: nothing to pair")
    pairs = list(zip(runs[0]["each"], runs[1]["each"], strict=True))
    print(f"{other} minus {one}, {len(pairs)} problems; difference (95 % interval, paired)")
    for name in ("avg", "greedy", "maj"):
        a, b = np.array([[a[name], b[name]] for a, b in pairs]).T
        numbers = a.mean(), b.mean(), *interval(b - a).values()
        print("{:<8} {:.3f} -> {:.3f} {:+8.3f} ({:+.3f} to {:+.3f})".format(name, *numbers))
    for side, sign in ("right", 1), ("wrong", -1):  # by more than half of the votes
        moved = [(a, b) for a, b in pairs if ((b["maj"] > 0.5) - (a["maj"] > 0.5)) == sign]
        print(f"{len(moved)} problems became {side} by majority; avg before and after:")
        for a, b in moved:
            print(f"  {a['where']}  {a['avg']:.2f} -> {b['avg']:.2f}")


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # a timeout is a verdict, not an event
    try:
        args, context = parse_arguments(argv)
        if args.compare:
            compare(*args.compare)
        elif args.regrade:
            regrade(args.regrade, args)
        else:
            evaluate(args, context)
    except (OSError, ImportError, dist.DistError) as error:  # no model, file, matplotlib, port
        fail(str(error).strip().splitlines()[0])
    if WORLD > 1:
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()
        time.sleep(1)  # for gloo's threads: one that is still busy when Python ends would abort it


def evaluate(args, context):
    start_processes(args.device)
    which_k(args.k, args.n)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        print(f"{args.model} has no chat template: the problem goes in as it is")
    # vs grpo.py: nothing is skipped, because the mean would be one over the shorter problems
    problems = load_problems(args.data, tokenizer, args, float("inf"))
    longest = max(problems, key=lambda problem: len(problem["ids"]))
    room = context - len(longest["ids"])
    if room < args.max_new_tokens:
        fail(f"{longest['where']}: a context of {context} leaves {room}: lower --max-new-tokens")
    read_answers(problems)
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    out, config = gather(None if RANK else open_run(args, model, problems))[0]
    print(f"--out {out} goes on with this run")
    print("settings:", *(f"{k}={v!r}" for k, v in vars(args).items()))
    lines = take_samples(model, tokenizer, problems, out / "samples.jsonl", args)
    if RANK == 0:
        report(out, lines, args, config)


if __name__ == "__main__":
    main()
