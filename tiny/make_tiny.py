"""Makes the pocket world: two small language models, and the problems they are trained on.

On a laptop the training scripts need models that behave like real ones: they have read a noisy web,
solve a part of the problems when sampled, and can be taught more. The web here is sums. Most people
blurt out an answer, and the longer the sum the more often it is wrong; some work it out; some have
seen the answer before they start; and some multiply, which is beyond such small models:

    <|user|>37+8+5<|assistant|>\\boxed{50}<|end|>
    <|user|>37+8+5<|assistant|>37+8=45,45+5=50,\\boxed{50}<|end|>
    <|user|>(50)37+8+5<|assistant|>37+8=45,45+5=50,\\boxed{50}<|end|>
    <|user|>37*48<|assistant|>37*40=1480,37*8=296,1480+296=1776,\\boxed{1776}<|end|>

The teacher has read a web where a fifth work it out. The student is smaller, stops earlier, and in
its web only those who have seen the answer work it out: it can take the steps, but never
does so unasked. That is what makes it cold, and its own samples a poor place to learn from.

    python tiny/make_tiny.py --force     # replaces teacher/, student/, *.jsonl and heldout.txt
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# --- the world ------------------------------------------------------------------------------------
TERMS = range(2, 8)  # a sum: one number from 1 to 99, then one-digit numbers; terms = 1: a product
# Name, products, sums. The pool's problems are not hand-picked: half of them are out of reach.
SPLITS = [("train", 32, 96), ("pool", 256, 768), ("val", 64, 192), ("test", 128, 384)]
SPLITS += [("pool", 512, 0)]  # added later, so drawn last: the other splits stay as they were
PRODUCTS_READ = 0.1  # of the documents: few enough to stay out of reach
SLIP = 0.03  # chance of an error in each step of the working, without a hint
BLURT_WRONG = {1: 0.9, 2: 0.0, 3: 0.15, 4: 0.3, 5: 0.45, 6: 0.6, 7: 0.75}  # by number of terms
HELDOUT = 500  # documents of the student's web that no model reads
BATCH = 64  # documents a step
MAX_NEW_TOKENS = 72  # the longest working, 7 terms past 100, takes 65
MODELS = {  # worked, hinted: shares of the documents that work it out, unasked or given the answer
    "teacher": dict(layers=3, width=96, steps=3000, lr=3e-3, worked=0.2, hinted=0.08),
    "student": dict(layers=2, width=64, steps=2400, lr=3e-3, worked=0.0, hinted=0.12),
}


# --- problems and documents -----------------------------------------------------------------------
def draw_problem(rng, terms):
    if terms == 1:
        return f"{rng.randint(10, 99)}*{rng.randint(10, 99)}"
    return "+".join([str(rng.randint(1, 99)), *(str(rng.randint(1, 9)) for _ in range(terms - 1))])


def solve(problem):
    first, *rest = (int(n) for n in re.split(r"[*+]", problem))
    return first * rest[0] if "*" in problem else first + sum(rest)


def work_out(problem, rng, slip):
    """The working, and what it comes to: a slip is carried forward, as people do."""

    def say(n):
        return n + rng.choice([-10, -2, -1, 1, 2, 10]) if rng.random() < slip else n

    if "*" in problem:
        a, b = (int(n) for n in problem.split("*"))
        tens, ones = say(a * (b - b % 10)), say(a * (b % 10))
        total = say(tens + ones)
        return f"{a}*{b - b % 10}={tens},{a}*{b % 10}={ones},{tens}+{ones}={total},", total
    working, (total, *rest) = "", [int(n) for n in problem.split("+")]
    for n in rest:
        before, total = total, max(0, say(total + n))
        working += f"{before}+{n}={total},"
    return working, total


def render(problem, completion, hint=None):
    hint = "" if hint is None else f"({hint})"
    return f"<|user|>{hint}{problem}<|assistant|>{completion}<|end|>"


def draw_document(rng, problem, terms, reads):
    """Somebody's answer to the problem."""
    kind, answer = rng.random(), solve(problem)
    if kind < reads["hinted"] + reads["worked"]:
        hint = answer if kind < reads["hinted"] else None
        working, answer = work_out(problem, rng, SLIP if hint is None else 0)
        return render(problem, f"{working}\\boxed{{{answer}}}", hint)
    if rng.random() < BLURT_WRONG[terms]:
        answer = max(0, answer + rng.choice([-1, 1]) * rng.randint(1, 12))
    return render(problem, f"\\boxed{{{answer}}}")


def corpus(name, seed, forbidden):
    """The endless stream of documents a model reads, without forbidden problems or documents."""
    rng, reads = random.Random(f"corpus {seed}"), MODELS[name]
    while True:
        terms = 1 if rng.random() < PRODUCTS_READ else rng.choice(TERMS)
        problem = draw_problem(rng, terms)
        document = draw_document(rng, problem, terms, reads)
        if problem not in forbidden and document not in forbidden:
            yield document


def draw_splits(rng):
    """No problem twice; the sums spread evenly over the number of terms."""
    seen, splits = set(), {name: [] for name, _, _ in SPLITS}
    for name, products, sums in SPLITS:
        for terms in [1] * products + [TERMS[i % len(TERMS)] for i in range(sums)]:
            while (problem := draw_problem(rng, terms)) in seen:
                pass
            seen.add(problem)
            answer = str(solve(problem))
            splits[name].append({"problem": problem, "answer": answer, "terms": terms})
        rng.shuffle(splits[name])
    return splits | {"prompts": [{k: r[k] for k in ("problem", "terms")} for r in splits["pool"]]}


# --- tokenizer ------------------------------------------------------------------------------------
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
ALPHABET = ["\\boxed{", *"0123456789+-*=,.(){} "]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'] }}<|end|>{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """One token a character, and one for `\\boxed{`."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # nothing between the tokens
    special = dict(pad_token="<|pad|>", eos_token="<|end|>", unk_token="<unk>")
    special["extra_special_tokens"] = ["<|user|>", "<|assistant|>"]
    reads = dict(model_input_names=["input_ids", "attention_mask"], model_max_length=256)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, padding_side="left", **special, **reads
    )


# --- pre-training ---------------------------------------------------------------------------------
def make_model(name, tokenizer):
    width, layers = MODELS[name]["width"], MODELS[name]["layers"]
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers)
    heads = dict(num_attention_heads=width // 16, num_key_value_heads=width // 32, head_dim=16)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = dict(bos_token_id=None, eos_token_id=end, pad_token_id=pad, vocab_size=len(tokenizer))
    rest = dict(max_position_embeddings=256, tie_word_embeddings=True, dtype="float32")
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **ids, **rest))
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=pad)
    return model


def document_loss(model, tokenizer, documents):
    """Mean cross-entropy per token; long documents apart from short ones, to save padding."""
    rows = sorted(tokenizer(documents)["input_ids"], key=len)
    n_tokens = sum(len(row) - 1 for row in rows)
    cut, pad, loss = len(rows) * 3 // 4, tokenizer.pad_token_id, 0.0
    for part in (rows[:cut], rows[cut:]):
        # Padding stands on the right here, where causal attention never looks: no mask needed.
        ids = torch.tensor([row + [pad] * (len(part[-1]) - len(row)) for row in part])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        logits, target = logits.flatten(0, 1), ids[:, 1:].flatten()
        loss += torch.nn.functional.cross_entropy(logits, target, ignore_index=pad, reduction="sum")
    return loss / n_tokens


def pretrain(name, steps, seed, forbidden, folder, n):
    """Reads `steps` batches of the corpus and writes a model directory, in a process of its own."""
    parent = multiprocessing.parent_process()  # if it is killed, don't train on for nobody
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer, lr = make_tokenizer(), MODELS[name]["lr"]
    model = make_model(name, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    up = LinearLR(optimizer, 1 / warmup, 1, warmup)
    down = CosineAnnealingLR(optimizer, max(1, steps - warmup), lr / 50)
    schedule = SequentialLR(optimizer, [up, down], [warmup])
    documents = corpus(name, seed, forbidden)
    bar = tqdm(range(steps), desc=f"{name}, {model.num_parameters():,}", position=name == "student")
    for _ in bar:
        loss = document_loss(model, tokenizer, [next(documents) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    rows, table = [json.loads(row) for row in open(folder / "val.jsonl")], {}
    for hint in ("", "hint "):
        table[hint + "greedy"], _ = answer(model, tokenizer, rows, hint, 1)
        table[hint + "sampled"], table[hint + "worked"] = answer(model, tokenizer, rows, hint, n)
    return table


# --- the table ------------------------------------------------------------------------------------
def answer(model, tokenizer, rows, hint, n):
    """n answers each (greedy if n is 1): the shares that are right and that are worked out."""
    texts = [render(row["problem"], "", row["answer"] if hint else None) for row in rows]
    prompts, completions = [text.removesuffix("<|end|>") for text in texts], []
    drawn = dict(do_sample=True, top_k=0, num_return_sequences=n) if n > 1 else {}
    for i in range(0, len(prompts), 64):
        batch = tokenizer(prompts[i : i + 64], padding=True, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **drawn)
        ids = ids[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(ids, skip_special_tokens=True)
    boxed = [re.findall(r"\\boxed\{(\d*)\}", text)[-1:] for text in completions]
    right = torch.tensor([box == [rows[i // n]["answer"]] for i, box in enumerate(boxed)])
    worked = torch.tensor(["=" in text for text in completions])
    return right.float().view(-1, n).mean(1), worked.float().view(-1, n).mean(1)


def print_table(name, table, terms):
    print(f"\n{name:<9}" + "".join(f"{column:>15}" for column in table))
    for t in [*sorted(set(terms)), "all"]:
        which = torch.tensor([t in (n, "all") for n in terms])
        print("product  " if t == 1 else f"{t} terms".ljust(9), end="")
        print("".join(f"{v[which].mean():>15.3f}" for v in table.values()))


# --- main -----------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-steps", type=int, default=MODELS["teacher"]["steps"])
    parser.add_argument("--student-steps", type=int, default=MODELS["student"]["steps"])
    parser.add_argument("--samples", type=int, default=8, help="per problem, for the table")
    parser.add_argument("--force", action="store_true", help="replace what --out holds")
    args = parser.parse_args(argv)
    steps = {"teacher": args.teacher_steps, "student": args.student_steps}
    if min(*steps.values(), args.samples) < 1:
        parser.exit(2, "make_tiny.py: steps and samples must be at least 1\n")
    splits = draw_splits(random.Random(f"splits {args.seed}"))
    names = [*MODELS, *(f"{split}.jsonl" for split in splits), "heldout.txt"]
    there = [name for name in names if (args.out / name).exists()]
    if there and not args.force:
        parser.exit(2, f"make_tiny.py: {args.out} holds {', '.join(there)}; --force replaces it\n")

    # Everything is written aside and moved in at the end: a kill leaves no half-written model.
    aside = args.out / ".unfinished"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        parser.exit(2, f"make_tiny.py: cannot write to --out {args.out}: {error.strerror}\n")
    for name, rows in splits.items():
        (aside / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = {row["problem"] for row in splits["val"] + splits["test"]}
    stream = corpus("student", f"heldout {args.seed}", exam)
    heldout = [next(stream) for _ in range(HELDOUT)]
    (aside / "heldout.txt").write_text("".join(document + "\n" for document in heldout))
    with ProcessPoolExecutor(len(steps), multiprocessing.get_context("spawn")) as pool:
        common = (args.seed, exam | set(heldout), aside, args.samples)
        jobs = {name: pool.submit(pretrain, name, steps[name], *common) for name in steps}
        results = {name: job.result() for name, job in jobs.items()}
    for name in names:
        if (args.out / name).exists():
            os.replace(args.out / name, aside / f"old-{name}")
        os.replace(aside / name, args.out / name)
    shutil.rmtree(aside)
    for name, table in results.items():
        print_table(name, table, [row["terms"] for row in splits["val"]])


if __name__ == "__main__":
    main()
