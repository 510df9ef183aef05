"""What the scripts promise from end to end: settings arrive, files are whole, steps go downhill."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_math
import fkl_warmup
import grpo
import opd
import paced

ROOT = Path(__file__).parent.parent
STUDENT, TEACHER = str(ROOT / "tiny/student"), str(ROOT / "tiny/teacher")
PAIR = ["--student", STUDENT, "--teacher", TEACHER]
MODELS = {
    grpo: ["--model", TEACHER],
    fkl_warmup: PAIR,
    opd: PAIR,
    paced: [*PAIR, *"--weights uniform --schedule rkl".split()],
}
every_script = pytest.mark.parametrize("script", MODELS, ids=lambda script: script.__name__)
dense_scripts = pytest.mark.parametrize("script", [fkl_warmup, opd, paced])


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums = {f"{i}+{j}": f"{i + j}" for i in range(11, 15) for j in range(1, 6)}
    rows = [json.dumps({"problem": text, "answer": answer}) + "\n" for text, answer in sums.items()]
    Path("data.jsonl").write_text("".join(rows))
    return sums


def run(script, *more, models=None):
    """A run of a step: four prompts, two completions each."""
    small = "--data data.jsonl --prompts-per-step 4 --samples-per-prompt 2 --max-new-tokens 32"
    small += " --steps 1 --warmup-steps 0 --device cpu --out run"
    script.main([*(models or MODELS[script]), *small.split(), *more])
    return [json.loads(line) for line in Path("run/metrics.jsonl").open()]


@dense_scripts
def test_a_step_brings_the_student_closer_to_the_teacher(script, data, monkeypatch):
    """On the same text: on its own, which a step changes, the KL may rise at first."""
    drawn, rollout = {}, script.rollout
    monkeypatch.setattr(
        script,
        "rollout",
        lambda *a: drawn[a[2]] if a[2] in drawn else drawn.setdefault(a[2], rollout(*a)),
    )
    Path("data.jsonl").write_text('{"problem": "11+4"}\n')
    more = "--val-data data.jsonl --samples-per-prompt 8 --steps 2 --lr 1e-5".split()
    first, second = run(script, "--prompts-per-step", "1", *more)
    assert second["kl"] < first["kl"]


def test_a_step_makes_likelier_what_did_better(data, monkeypatch):
    """Every second completion of a group is called right; afterwards it has gained on the other."""
    drawn, rollout = [], grpo.rollout
    monkeypatch.setattr(
        grpo, "rollout", lambda *a: drawn.append((a[1], *rollout(*a))) or drawn[-1][1:]
    )
    monkeypatch.setattr(
        grpo, "grade", lambda t, ids, *_: ([""] * len(ids), [0.0, 1.0] * (len(ids) // 2))
    )
    run(grpo, "--lr", "1e-3", "--val-data", "data.jsonl")
    prompts, ids, mask, _ = drawn[1]  # after validation; the same rollouts, scored by each
    prompts = [prompt for prompt in prompts for _ in range(2)]
    gains = []
    for path in (TEACHER, "run/final"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logp = grpo.token_logprob(grpo.score(model, prompts, ids, mask), ids)[0]
        each = (logp * mask).sum(1)
        gains.append(float((each[1::2] - each[::2]).sum()))
    assert gains[1] > gains[0]


@every_script
def test_clipping_and_weight_decay_arrive(script, data, monkeypatch):
    norms, decays = [], []
    clip, adamw = script.clip_grad_norm_, torch.optim.AdamW
    monkeypatch.setattr(
        script, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm)
    )
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda p, weight_decay: decays.append(weight_decay) or adamw(p, weight_decay=weight_decay),
    )
    run(script, "--grad-clip", "0.125", "--weight-decay", "0.25")
    assert (norms, decays) == ([0.125], [0.25])


@every_script
def test_a_head_of_its_own_is_saved(script, data):
    """The pocket models' heads are their embeddings; larger models often have their own."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.save_pretrained("untied")
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained("untied")
    models = ["--model" if script is grpo else "--student", "untied", *MODELS[script][2:]]
    run(script, "--lr", "0", models=models)
    for name in ("best", "final", "checkpoint"):
        saved = AutoModelForCausalLM.from_pretrained(f"run/{name}", dtype=torch.float32)
        assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
        assert not torch.equal(saved.lm_head.weight, saved.model.embed_tokens.weight)


@dense_scripts
def test_no_problem_of_validation_is_trained_on(script, data, monkeypatch):
    held_out, drawn = [], []
    rollout = script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a: drawn.extend(map(tuple, a[1])) or rollout(*a))
    monkeypatch.setattr(
        script, "validate", lambda s, t, problems, args: held_out.extend(problems) or 0.0
    )
    run(script, "--prompts-per-step", "18")
    assert len({p["problem"] for p in held_out}) == 2 and len(set(drawn)) == 18
    assert not {tuple(p["ids"]) for p in held_out} & set(drawn)


@every_script
def test_checkpointing_is_on_where_a_gradient_is_taken(script, data, monkeypatch):
    seen, score = set(), script.score

    def spy(model, *rest):
        if torch.is_grad_enabled():
            seen.add((model.is_gradient_checkpointing, model.training))
        return score(model, *rest)

    monkeypatch.setattr(script, "score", spy)
    run(script, "--checkpointing", "1")
    assert seen == {(True, True)}


@pytest.mark.parametrize("script", [*MODELS, eval_math])
def test_the_prompt_has_the_suffix_and_special_tokens_once(script):
    class Tokenizer:
        chat_template = "a template that writes its own special tokens"

        def apply_chat_template(self, chat, **_):
            return f"<s>{chat[0]['content']}"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text, add_special_tokens]}

    tokenizer, args = Tokenizer(), types.SimpleNamespace(prompt_suffix=" Box it.", thinking=False)
    prompt = "<s>4+5 Box it."
    assert script.render("4+5", tokenizer, args) == (prompt, [prompt, False])
    tokenizer.chat_template = None
    assert script.render("4+5", tokenizer, args) == ("4+5 Box it.", ["4+5 Box it.", True])


@every_script
def test_a_gpu_computes_in_bf16(script, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch, "autocast", lambda kind, dtype, enabled: asked.append((kind, dtype, enabled))
    )
    for kind in ("cuda", "cpu"):
        script.autocast(types.SimpleNamespace(device=torch.device(kind)))
    assert asked == [("cuda", torch.bfloat16, True), ("cpu", torch.bfloat16, False)]


def test_padding_may_be_the_end_token():
    """A text ends with the first end token by position, whatever the padding is."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer, drawn = AutoTokenizer.from_pretrained(TEACHER), []
    args = types.SimpleNamespace(rollout_batch=8, max_new_tokens=48, temperature=1.0)
    prompts = [tokenizer("<|user|>4+5<|end|>")["input_ids"]]
    for padding in (0, tokenizer.eos_token_id):
        model.generation_config.pad_token_id = model.config.pad_token_id = padding
        drawn.append(grpo.rollout(model, prompts, 8, np.random.default_rng(0), args))
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    ids, mask, clipped = drawn[1]
    ends = [int(row[keep][-1]) for row, keep in zip(ids[~clipped], mask[~clipped], strict=True)]
    assert ends and set(ends) == {tokenizer.eos_token_id}


def test_the_evaluation_samples_as_it_is_told(data, monkeypatch):
    seen, choose = set(), eval_math.choose
    monkeypatch.setattr(eval_math, "choose", lambda z, how, u: seen.add(how) or choose(z, how, u))
    flags = "--data data.jsonl --n 1 --max-new-tokens 4 --temperature 0.7 --top-k 20 --top-p 0.8"
    eval_math.main(["--model", STUDENT, *flags.split(), "--out", "eval", "--device", "cpu"])
    assert seen == {(0.7, 20, 0.8)}
