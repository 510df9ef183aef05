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
    problems = [{"ids": prompt} for prompt in prompts for _ in range(2)]
    ids, mask = grpo.pad_left([i[keep] for i, keep in zip(ids, mask, strict=True)], "cpu")
    gains = []
    for path in (TEACHER, "run/final"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logp = grpo.token_logprob(grpo.score(model, problems, ids, mask.bool()), ids)[0]
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

        def get_chat_template(self):
            return self.chat_template

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


@every_script
def test_each_epoch_has_all_problems_in_an_order_of_its_own(script, data, monkeypatch):
    drawn, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a: drawn.append(a[1]) or rollout(*a))
    Path("val.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    run(script, *"--val-data val.jsonl --prompts-per-step 20 --steps 2".split())
    one, two = (prompts for prompts in drawn if len(prompts) == 20)
    assert sorted(one) == sorted(two) and len({*map(tuple, one)}) == 20 and one != two


@dense_scripts
def test_validation_has_the_temperature_of_training(script, data, monkeypatch):
    seen, kl = [], script.softmax_kl
    monkeypatch.setattr(script, "softmax_kl", lambda *a, **k: seen.append(a[3]) or kl(*a, **k))
    run(script, "--temperature", "0.5")
    assert len(seen) >= 3 and set(seen) == {0.5}  # before the step, in it and after it


@every_script
def test_a_gradient_that_is_not_finite_ends_the_run(script, data, monkeypatch, capsys):
    """What is on disk is from before it."""
    monkeypatch.setattr(script, "clip_grad_norm_", lambda p, norm: torch.tensor(torch.nan))
    with pytest.raises(SystemExit) as ended:
        run(script)
    assert ended.value.code == 2 and "step 1: gradient not finite" in capsys.readouterr().err
    assert {path.name for path in Path("run").glob("*/")} == {"best"}


@pytest.mark.parametrize("script", [*MODELS, eval_math])
def test_a_model_that_names_no_end_takes_the_tokenizers(script, data, monkeypatch):
    for path in (STUDENT, TEACHER):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), Path(path).name
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        model.save_pretrained(tokenizer)
        AutoTokenizer.from_pretrained(path).save_pretrained(tokenizer)
    masks, decode = [], script.decode
    monkeypatch.setattr(script, "decode", lambda *a: masks.append(decode(*a)[1]) or decode(*a))
    if script is eval_math:
        flags = "--model student --data data.jsonl --n 1 --max-new-tokens 32 --device cpu"
        eval_math.main([*flags.split(), "--out", "run"])
    else:
        run(script, models=[flag.replace(f"{ROOT}/tiny/", "") for flag in MODELS[script]])
    lengths = torch.cat([mask.sum(1) for mask in masks])
    assert 4 <= lengths.min() < 8  # \boxed{, a digit or more, }, the end


@every_script
@pytest.mark.parametrize("cut", [4, 5])
def test_the_run_warns_where_more_than_half_are_cut(script, cut, data, monkeypatch, capsys):
    rollout = script.rollout

    def partly_cut(*arguments):
        ids, mask, _ = rollout(*arguments)
        return ids, mask, torch.arange(len(ids)) < cut

    monkeypatch.setattr(script, "rollout", partly_cut)
    assert run(script)[0]["clipped"] == cut / 8
    assert ("over half of the completions are cut" in capsys.readouterr().out) == (cut == 5)


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_the_paper_trains_on_one_text_of_each_of_256_prompts(script):
    args, _ = script.parse_arguments([*PAIR, "--preset", "paper"])
    assert (args.prompts_per_step, args.samples_per_prompt) == (256, 1)
    assert (args.lr, args.max_new_tokens, args.temperature, args.thinking) == (1e-6, 8192, 1, False)


def test_the_sampled_estimator_scores_the_tokens_that_were_drawn(data, monkeypatch):
    drawn, scored, rollout, logprob = [], [], opd.rollout, opd.token_logprob
    monkeypatch.setattr(opd, "rollout", lambda *a: drawn.append(rollout(*a)) or drawn[-1])
    monkeypatch.setattr(opd, "token_logprob", lambda *a, **k: scored.append(a) or logprob(*a, **k))
    run(opd, "--estimator", "sampled", "--micro-batch", "1", "--val-data", "data.jsonl")
    ids, mask, _ = drawn[1]  # after validation
    texts = sorted(ids[i][mask[i]].tolist() for i in range(8))
    for of in (scored[::2], scored[1::2]):  # the student, the teacher
        assert sorted(ids[0].tolist() for _, ids, _ in of) == texts


@dense_scripts
@pytest.mark.parametrize("device, dtype", [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_the_teacher_is_bf16_on_a_gpu(script, device, dtype, monkeypatch):
    asked = []

    def load(path, dtype):
        asked.append((path, dtype))
        raise InterruptedError

    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    args = types.SimpleNamespace(student=STUDENT, teacher=TEACHER, device=device, self=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        script.load_teacher(None, tokenizer, args)
    assert asked == [(TEACHER, dtype)]


@every_script
def test_going_on_cuts_only_files_of_the_run(script, data):
    run(script)
    Path("run/metrics-of-before.jsonl").write_text("a copy\n")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')  # of a step that a kill took back
    assert [line["step"] for line in run(script, "--steps", "2")] == [1, 2]
    assert Path("run/metrics-of-before.jsonl").read_text() == "a copy\n"


@every_script
def test_overwrite_does_not_delete_what_the_run_reads(script, data, capsys):
    run(script)
    models = ["--model" if script is grpo else "--student", "run/best", *MODELS[script][2:]]
    with pytest.raises(SystemExit) as ended:
        run(script, "--overwrite", models=models)
    assert ended.value.code == 2 and "run/best, which lies in run" in capsys.readouterr().err
    assert Path("run/best/model.safetensors").exists()
    assert len(run(script, "--overwrite")) == 1


@every_script
def test_problems_on_both_sides_are_told(script, data, capsys):
    Path("val.jsonl").write_text("".join(Path("data.jsonl").open().readlines()[:3]))
    run(script, "--val-data", "val.jsonl")
    said = "problems are trained on and validated on"
    assert f"warning: 3 {said}" in capsys.readouterr().out
    run(script, "--overwrite")
    assert said not in capsys.readouterr().out  # every tenth, set aside


@every_script
def test_what_is_set_aside_comes_from_the_whole_file(script, data, monkeypatch, capsys):
    """Which may be sorted: of 2,560 problems every tenth, of one more every eleventh."""
    seen = []
    monkeypatch.setattr(script, "validate", lambda *a: seen.append(a[2]) or 0.0)
    for count, every, in_all in (2560, 10, 256), (2561, 11, 233):
        rows = [json.dumps({"problem": f"{i}+1", "answer": f"{i + 1}"}) for i in range(count)]
        Path("data.jsonl").write_text("\n".join(rows))
        seen.clear()
        run(script, "--overwrite")
        assert [p["problem"] for p in seen[0]] == [f"{i}+1" for i in range(0, count, every)]
        said = f"1 in {every} problems set aside for it, {in_all} in all"
        assert said in capsys.readouterr().out


@every_script
def test_one_rollout_is_shown_of_few(script, data, monkeypatch):
    sizes, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a: sizes.append(len(a[1])) or rollout(*a))
    rows = [{"problem": f"{i}+{j}", "answer": f"{i + j}"} for i in range(1, 9) for j in range(9)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.main([*MODELS[script], *"--data data.jsonl --prompts-per-step 64 --show".split()])
    assert sizes == [32]


@dense_scripts
def test_a_prompt_fits_the_teacher_too(script, data, capsys):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    teacher.config.max_position_embeddings = 40
    teacher.save_pretrained("short")
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained("short")
    models = [flag.replace(TEACHER, "short") for flag in MODELS[script]]
    with pytest.raises(SystemExit):
        run(script, "--max-new-tokens", "40", models=models)
    said = "none that fits a context of 40 tokens with --max-new-tokens 40\n"
    assert said in capsys.readouterr().err
