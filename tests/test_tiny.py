"""The pocket world: the committed models and problems, and make_tiny.py, which wrote them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import make_tiny

TINY = Path(make_tiny.__file__).parent
SIZES = {"train": 128, "prompts": 1536, "pool": 1536, "val": 256, "test": 512}
PRODUCTS = {"train": 32, "prompts": 768, "pool": 768, "val": 64, "test": 128}
MODELS = ("teacher", "student")
DOCUMENT = re.compile(r"<\|user\|>(\(\d+\))?([\d+*]+)<\|assistant\|>(.*)\\boxed\{(\d+)\}<\|end\|>")


def rows(name):
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def value(problem):
    """The answer, computed without make_tiny's help."""
    total = 0
    for part in problem.split("+"):
        product = 1
        for factor in part.split("*"):
            product *= int(factor)
        total += product
    return total


def exam():
    return {row["problem"] for row in rows("val") + rows("test")}


# --- the model directories ------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_directory_loads_and_needs_no_code(name):
    model = AutoModelForCausalLM.from_pretrained(TINY / name)
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.padding_side == "left"
    assert {p.suffix for p in (TINY / name).iterdir()} == {".json", ".jinja", ".safetensors"}
    assert "auto_map" not in (TINY / name / "config.json").read_text()


def test_student_is_smaller():
    size = {n: AutoModelForCausalLM.from_pretrained(TINY / n).num_parameters() for n in MODELS}
    assert size["student"] < size["teacher"] / 2


def test_committed_files_are_small():
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 4e6


# --- the tokenizer --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_round_trips(name):
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    texts = [row["problem"] for split in SIZES for row in rows(split)]
    texts += (TINY / "heldout.txt").read_text().splitlines()
    texts += ["37+8=45,45+5=50,\\boxed{50}", "(50)37+8+5", "1 + 2 = 3."]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert len(tokenizer("\\boxed{50}")["input_ids"]) == 4
    ids = tokenizer("<|assistant|>3+4=7,\\boxed{7}<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3+4=7,\\boxed{7}"
    assert len(ids) == 11 and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", MODELS)
def test_chat_template_writes_what_the_models_read(name):
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    chat = [{"role": "user", "content": "37+8"}, {"role": "assistant", "content": "\\boxed{45}"}]
    for how in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        prompt = tokenizer.apply_chat_template(
            chat[:1], tokenize=False, add_generation_prompt=True, **how
        )
        assert prompt == "<|user|>37+8<|assistant|>"
        document = tokenizer.apply_chat_template(chat, tokenize=False, **how)
        assert document == make_tiny.render("37+8", "\\boxed{45}")


def test_batches_are_padded_on_the_left():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    batch = tokenizer(["1+2", "10+2"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


# --- the problems ---------------------------------------------------------------------------------
def test_sizes_and_fields():
    for name, size in SIZES.items():
        fields = {"problem", "terms"} | ({"answer"} if name != "prompts" else set())
        assert len(rows(name)) == size
        assert all(set(row) == fields for row in rows(name))


def test_prompts_are_the_pool_without_answers():
    assert rows("prompts") == [{k: r[k] for k in ("problem", "terms")} for r in rows("pool")]


def test_no_problem_twice():
    problems = [row["problem"] for name in ("train", "pool", "val", "test") for row in rows(name)]
    assert len(set(problems)) == len(problems)


def test_answers_are_right():
    for name in ("train", "pool", "val", "test"):
        for row in rows(name):
            assert row["answer"] == str(value(row["problem"])), row
            assert row["terms"] == row["problem"].count("+") + 1, row


def test_terms_are_spread_evenly():
    for name in SIZES:
        count = Counter(row["terms"] for row in rows(name))
        sums = [count[terms] for terms in make_tiny.TERMS]
        assert max(sums) - min(sums) <= 1
        assert count[1] == PRODUCTS[name]
        assert set(count) == {1, *make_tiny.TERMS}


# --- the corpus -----------------------------------------------------------------------------------
def test_corpus_holds_no_exam_problem_and_no_heldout_document():
    heldout = (TINY / "heldout.txt").read_text().splitlines()
    assert len(heldout) == 500

    def read(forbidden):
        return set(islice(make_tiny.corpus("student", 0, forbidden), 20_000))

    def met(documents):
        return {DOCUMENT.fullmatch(d)[2] for d in documents} & exam()

    assert not met(heldout)
    documents = read(exam() | set(heldout))
    assert not met(documents) and not documents & set(heldout)
    assert met(read(set())) and read(set()) & set(heldout)  # or the two lines above say nothing


@pytest.mark.parametrize("name, shares", [("teacher", (0.08, 0.20)), ("student", (0.12, 0.0))])
def test_corpus_is_what_the_readme_says(name, shares):
    n, hinted, worked, slipped = 20_000, 0, 0, 0
    for document in islice(make_tiny.corpus(name, 1, set()), n):
        hint, problem, working, answer = DOCUMENT.fullmatch(document).groups()
        right = int(answer) == value(problem)
        if hint:
            hinted += 1
            assert working and right and hint == f"({answer})"
        elif working:
            worked += 1
            slipped += not right
        for step in working.split(",")[:-1] if hint else ():
            left, result = step.split("=")
            assert value(left) == int(result)
    assert abs(hinted / n - shares[0]) < 0.01
    assert abs(worked / n - shares[1]) < 0.01
    assert worked == 0 or 0.03 < slipped / worked < 0.2


def test_the_longest_working_fits():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    working, answer = make_tiny.work_out("99" + "+9" * 6, make_tiny.random.Random(0), slip=0)
    ids = tokenizer(f"{working}\\boxed{{{answer}}}<|end|>")["input_ids"]
    assert len(ids) <= make_tiny.MAX_NEW_TOKENS


# --- what the models can do -----------------------------------------------------------------------
def test_base_accuracies():
    """128 problems × 2 samples: wide margins around the numbers in the README."""
    torch.manual_seed(0)
    got = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(TINY / name)
        tokenizer = AutoTokenizer.from_pretrained(TINY / name)
        for hint in (False, True):
            right, worked = make_tiny.answer(model, tokenizer, rows("val")[:128], hint, 2)
            got[name, hint] = right.mean().item()
            unasked = (0.05, 0.5) if name == "teacher" else (-1, 0.05)
            assert worked.mean() > 0.9 if hint else unasked[0] < worked.mean() < unasked[1]
    assert 0.20 < got["teacher", False] < 0.60, got
    assert 0.05 < got["student", False] < 0.32, got
    assert got["student", True] > got["student", False] + 0.15, got
    assert got["teacher", False] > got["student", False], got


# --- make_tiny.py ---------------------------------------------------------------------------------
def command(out, *flags, steps=2):
    sizes = ["--teacher-steps", str(steps), "--student-steps", "2", "--samples", "1"]
    return [sys.executable, make_tiny.__file__, "--out", str(out), *sizes, *flags]


def snapshot(folder):
    """{path: bytes} of all that stands there."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def visible(folder):
    return {k: v for k, v in snapshot(folder).items() if not k.startswith(".unfinished")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "world"
    done = subprocess.run(command(out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_small_run_writes_everything_and_a_table(made):
    out, printed = made
    names = {"teacher", "student", "heldout.txt"} | {f"{name}.jsonl" for name in SIZES}
    assert {p.name for p in out.iterdir()} == names
    for name in MODELS:
        AutoModelForCausalLM.from_pretrained(out / name)
    lines = printed.splitlines()
    assert sum(line.startswith("all") for line in lines) == 2
    assert sum(line.startswith("2 terms") for line in lines) == 2


def test_problems_are_the_committed_ones(made):
    for name in SIZES:
        assert (made[0] / f"{name}.jsonl").read_bytes() == (TINY / f"{name}.jsonl").read_bytes()
    assert (made[0] / "heldout.txt").read_bytes() == (TINY / "heldout.txt").read_bytes()


def test_refuses_to_overwrite_without_force(made, capsys):
    before = snapshot(made[0])
    with pytest.raises(SystemExit) as stop:
        make_tiny.main(["--out", str(made[0])])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and "--force" in said
    assert snapshot(made[0]) == before


@pytest.mark.parametrize(
    "flags", [["--out", "file/x"], ["--out", "new", "--student-steps", "0"], ["--samples", "0"]]
)
def test_bad_input_is_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        make_tiny.main(flags)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_kill_leaves_no_half_written_model_and_nothing_running(made):
    """Over a finished world, once the student is written aside and the teacher trains on."""
    out, _ = made
    before = visible(out)
    run = subprocess.Popen(
        command(out, "--force", "--seed", "1", steps=100_000),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.time() + 60
        while not (out / ".unfinished" / "student" / "tokenizer.json").exists():
            assert run.poll() is None and time.time() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)  # the main process only, not its children
        run.wait()
        assert visible(out) == before
        deadline = time.time() + 30
        while time.time() < deadline:  # the children notice and end by themselves
            try:
                os.killpg(run.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("something of a killed run is still running")
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_same_seed_same_bytes_even_after_a_kill(made):
    """Runs after the kill above: what that left aside is in nobody's way."""
    out, _ = made
    before = visible(out)
    done = subprocess.run(command(out, "--force"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == before
