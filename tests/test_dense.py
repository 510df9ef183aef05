"""fkl_warmup.py and opd.py: the two KLs against brute force, what they share, and their runs."""

import ast
import gc
import itertools
import json
import math
import shutil
import time
import types
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fkl_warmup
import grpo
import opd
import paced
from forked import run, start

ROOT = Path(__file__).parent.parent
STUDENT, TEACHER = str(ROOT / "tiny/student"), str(ROOT / "tiny/teacher")
PROBLEMS = ["37+8+5", "4+5", "12+3+4+9", "7+7", "91+2+2"]
EXACT = types.SimpleNamespace(temperature=1.0, estimator="exact")
SAMPLED = types.SimpleNamespace(temperature=1.0, estimator="sampled")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"  # no answers: the dense steps read no label
    path.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in PROBLEMS))
    return str(path)


def command(data, *more):
    """A run of seconds: two prompts a step, two completions each."""
    small = "--prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 40 --steps 3"
    small += " --val-every 2 --save-every 1 --device cpu"
    models = ["--student", STUDENT, "--teacher", TEACHER]
    return [*models, "--data", data, "--val-data", data, *small.split(), *more]


def loss_of(script, student, teacher, ids, mask, args=EXACT):
    n_tokens = mask.sum()
    if script is opd:
        return opd.distil_loss(student, teacher, ids, mask, n_tokens, args)
    return fkl_warmup.distil_loss(student, teacher, mask, n_tokens, args)


# --- the losses -----------------------------------------------------------------------------------


def brute_force(script, student, teacher, mask):
    """Equations 1 and 2 in Python floats, over five tokens."""
    total = 0.0
    for i, t in itertools.product(range(len(mask)), range(len(mask[0]))):
        if mask[i][t]:
            p, q = ([math.exp(z) for z in logits[i][t]] for logits in (student, teacher))
            p, q = ([x / sum(w) for x in w] for w in (p, q))
            if script is fkl_warmup:
                p, q = q, p
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total / sum(map(sum, mask))


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_loss_and_gradient_against_brute_force_on_five_tokens(script):
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, dtype=torch.float64)
    teacher = 2 * torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    ids = torch.randint(5, (3, 4))

    def theirs(z):
        return brute_force(script, z.tolist(), teacher.tolist(), mask.tolist())

    leaf = student.clone().requires_grad_()
    loss, kl = loss_of(script, leaf * 1.0, teacher, ids, mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(theirs(student), abs=1e-6)
    assert float(kl.sum() / mask.sum()) == pytest.approx(theirs(student), abs=1e-6)
    assert (kl[~mask] == 0).all() and (leaf.grad[~mask] == 0).all()
    for index in itertools.product(range(3), range(4), range(5)):
        step = torch.zeros_like(student)
        step[index] = 1e-5
        slope = (theirs(student + step) - theirs(student - step)) / 2e-5
        assert float(leaf.grad[index]) == pytest.approx(slope, abs=1e-6), index


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_the_temperature_divides_both_logits(script):
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 1, 2, 5)
    ids, mask = torch.tensor([[1, 4]]), torch.ones(1, 2, dtype=torch.bool)
    for estimator in ("exact", "sampled") if script is opd else ("exact",):
        warm = types.SimpleNamespace(temperature=2.0, estimator=estimator)
        one = types.SimpleNamespace(temperature=1.0, estimator=estimator)
        kl = loss_of(script, student, teacher, ids, mask, warm)[1]
        assert torch.allclose(kl, loss_of(script, student / 2, teacher / 2, ids, mask, one)[1])


def test_opd_gradient_is_minus_the_policy_gradient_of_the_log_ratio():
    """At a fixed prefix: E_y[(log p_T(y) - log p_S(y)) d log p_S(y)], by enumeration of y."""
    torch.manual_seed(1)
    student = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 1, 5, dtype=torch.float64)
    logp = student.log_softmax(-1)
    reward = (teacher.log_softmax(-1) - logp).detach()
    objective = (logp.detach().exp() * reward * logp).sum()
    (policy_gradient,) = torch.autograd.grad(objective, student)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = loss_of(opd, student * 1.0, teacher, torch.zeros(1, 1, dtype=torch.long), mask)
    loss.backward()
    assert torch.allclose(student.grad, -policy_gradient, atol=1e-7)


def test_the_sampled_estimator_has_the_exact_gradient_in_expectation():
    torch.manual_seed(2)
    student = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 1, 5, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    exact = torch.autograd.grad(
        loss_of(opd, student * 1.0, teacher, torch.zeros(1, 1, dtype=torch.long), mask)[0], student
    )[0]
    expected, value = torch.zeros_like(exact), 0.0
    for token, p in enumerate(student.detach().softmax(-1).flatten()):
        ids = torch.tensor([[token]])
        loss, kl = loss_of(opd, student * 1.0, teacher, ids, mask, SAMPLED)
        expected += p * torch.autograd.grad(loss, student)[0]
        value += float(p * kl.sum())
    assert torch.allclose(expected, exact, atol=1e-6)
    full = loss_of(opd, student.detach(), teacher, torch.zeros(1, 1, dtype=torch.long), mask)[1]
    assert value == pytest.approx(float(full.sum()), abs=1e-6)


def test_the_sampled_estimator_survives_logits_of_minus_infinity():
    """In padding, or of a token that the teacher never says: no gradient, as in the exact KL."""
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 1, 3, 5)
    student[0, 2, 0] = teacher[0, 2, 0] = teacher[0, 1, 3] = -torch.inf
    student.requires_grad_()
    ids, mask = torch.tensor([[1, 3, 0]]), torch.tensor([[True, True, False]])
    loss, kl = loss_of(opd, student * 1.0, teacher, ids, mask, SAMPLED)
    loss.backward()
    assert loss.isfinite() and kl[0, 1] == torch.inf and kl[0, 2] == 0
    assert student.grad.isfinite().all() and (student.grad[0, 1:] == 0).all()
    assert (student.grad[0, 0] != 0).all()


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_at_the_teachers_own_weights_there_is_nothing_to_learn(script):
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    models = [AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32) for _ in "ab"]
    prompt = tokenizer("<|user|>4+5<|assistant|>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids).bool()
    logits = script.both_logits(*models, [{"ids": prompt}], ids, mask)
    loss, _ = loss_of(script, *logits, ids, mask)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert max(float(p.grad.abs().max()) for p in models[0].parameters()) < 1e-6
    assert all(p.grad is None for p in models[1].parameters())


def test_forward_covers_both_modes_and_reverse_picks_one():
    """The teacher has two modes over 21 tokens, the student is one bump of some place and width."""
    x = torch.linspace(-3, 3, 21)
    teacher = torch.logaddexp(-((x - 1.8) ** 2) / 0.18, -((x + 1.8) ** 2) / 0.18)[None, None]
    mask = torch.ones(1, 1, dtype=torch.bool)
    ids = torch.zeros(1, 1, dtype=torch.long)
    weight = {}
    for script in (fkl_warmup, opd):
        place, width = (torch.tensor(z, requires_grad=True) for z in (0.8, -0.7))
        optimizer = torch.optim.Adam([place, width], lr=0.05)
        for _ in range(400):
            student = (-((x - place) ** 2) / (2 * width.exp() ** 2))[None, None]
            optimizer.zero_grad()
            loss_of(script, student * 1.0, teacher, ids, mask)[0].backward()
            optimizer.step()
        p = student.detach().softmax(-1)[0, 0]
        weight[script] = (float(p[x < -0.9].sum()), float(p[x > 0.9].sum()))
    assert min(weight[fkl_warmup]) > 0.25
    assert max(weight[opd]) > 0.95 and min(weight[opd]) < 0.05


def wider(path, directory, rows=5):
    """A copy of a model whose head has more rows than its tokenizer has tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-rows:] *= 100  # so that they would be sampled
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(path).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("script", [fkl_warmup, opd])
@pytest.mark.parametrize("which", ["--student", "--teacher"])
def test_a_wider_head_is_cut_with_a_notice(script, which, data, tmp_path, capsys):
    model = wider(STUDENT if which == "--student" else TEACHER, tmp_path / "wider")
    script.main(command(data, which, model, "--out", str(tmp_path / "run"), "--steps", "1"))
    assert f"the head of {model} is cut" in capsys.readouterr().out
    script.main(command(data, "--out", str(tmp_path / "plain"), "--steps", "1"))
    kls = [lines_of(tmp_path / run / "metrics.jsonl")[0]["kl"] for run in ("run", "plain")]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)


@pytest.mark.parametrize("script", [fkl_warmup, opd, paced])
def test_one_micro_batch_of_logits_of_each_model_at_most(script, data, tmp_path, monkeypatch):
    alive, most, score = weakref.WeakSet(), [], script.score

    def spy(*args):
        gc.collect()
        most.append(len(alive))
        logits = score(*args)
        alive.add(logits)
        return logits

    monkeypatch.setattr(script, "score", spy)
    more = ["--weights", "uniform"] if script is paced else []
    gc.freeze()  # else each collection goes through all of torch
    script.main(command(data, "--out", str(tmp_path / "run"), "--micro-batch", "1", *more))
    gc.unfreeze()
    assert max(most) == 1  # the teacher's, while the student is scored


def test_validation_is_the_reverse_kl_on_the_students_and_the_forward_kl_on_the_teachers_text(
    monkeypatch,
):
    """Against log-softmax by hand, through the models alone."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (STUDENT, TEACHER)
    ]
    settings = dict(seed=0, temperature=1.0, micro_batch=2, rollout_batch=9, max_new_tokens=24)
    args = types.SimpleNamespace(**settings)
    texts = [f"<|user|>{problem}<|assistant|>" for problem in PROBLEMS]
    problems = [{"ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    for script, sampler in ((opd, models[0]), (fkl_warmup, models[1])):
        rng, prompts = script.np.random.default_rng([0, 1]), [p["ids"] for p in problems]
        ids, mask, _ = script.rollout(sampler, prompts, 1, rng, args)
        total = 0.0
        for prompt, row, keep in zip(prompts, ids, mask, strict=True):
            text = torch.tensor([prompt + row[keep].tolist()])
            with torch.no_grad():
                p, q = (m(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in models)
            p, q = (p, q) if script is opd else (q, p)
            total += float((p.exp() * (p - q)).sum())
        assert script.validate(*models, problems, args) == pytest.approx(
            total / int(mask.sum()), rel=1e-4
        )


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_the_micro_batch_does_not_change_the_gradient(script, monkeypatch, data, tmp_path):
    gradients = []

    def spy(parameters, _):
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return torch.zeros(())

    monkeypatch.setattr(script, "clip_grad_norm_", spy)
    for size in ("1", "3", "4"):
        more = ["--out", str(tmp_path / size), "--micro-batch", size, "--steps", "1", "--lr", "0"]
        script.main(command(data, *more))
    assert float(gradients[0].norm()) > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], atol=1e-5 * float(other.abs().max()))


# --- the runs -------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(("script", "sampler"), [(fkl_warmup, TEACHER), (opd, STUDENT)])
def test_who_samples(script, sampler, monkeypatch, data, tmp_path):
    sizes, rollout = [], script.rollout
    monkeypatch.setattr(
        script,
        "rollout",
        lambda model, *a: sizes.append(model.num_parameters()) or rollout(model, *a),
    )
    script.main(command(data, "--out", str(tmp_path / "run"), "--steps", "1"))
    assert set(sizes) == {AutoModelForCausalLM.from_pretrained(sampler).num_parameters()}


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_a_run_reads_no_label_and_leaves_what_it_promises(script, data, tmp_path, capsys):
    out = tmp_path / "run"
    script.main(command(data, "--out", str(out)))
    metrics = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["kl"] > 0 and line["labels"] == 0 for line in metrics)
    assert all(line["reward"] is None and line["pass_rate"] is None for line in metrics)
    assert metrics[1]["val"] > 0 and metrics[0]["val"] is None
    before = Path(STUDENT, "model.safetensors").read_bytes()
    for name in ("best", "final", "checkpoint"):
        AutoModelForCausalLM.from_pretrained(out / name)
    assert (out / "final/model.safetensors").read_bytes() != before
    assert "held-out KL" in capsys.readouterr().out


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_best_has_the_lowest_held_out_kl(script, data, tmp_path, monkeypatch):
    values, weights = iter([0.5, 0.2, 0.3]), []

    def validate(student, *_):
        weights.append(torch.cat([p.detach().flatten().clone() for p in student.parameters()]))
        return next(values)

    monkeypatch.setattr(script, "validate", validate)
    script.main(command(data, "--out", str(tmp_path / "run")))  # validates before, at 2 and at 3
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    assert torch.equal(torch.cat([p.detach().flatten() for p in best.parameters()]), weights[1])


def test_a_run_with_the_sampled_estimator(data, tmp_path):
    opd.main(command(data, "--out", str(tmp_path / "run"), "--estimator", "sampled"))
    metrics = lines_of(tmp_path / "run/metrics.jsonl")
    assert all(math.isfinite(line["kl"]) and line["grad_norm"] > 0 for line in metrics)


def test_the_teacher_stays_as_it_is(data, tmp_path, monkeypatch):
    before = Path(TEACHER, "model.safetensors").read_bytes()
    teachers, load = [], opd.load_teacher
    monkeypatch.setattr(opd, "load_teacher", lambda *a: teachers.append(load(*a)) or teachers[0])
    opd.main(command(data, "--out", str(tmp_path / "run")))
    assert not any(p.requires_grad for p in teachers[0].parameters())
    fresh = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    pairs = zip(fresh.parameters(), teachers[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert Path(TEACHER, "model.safetensors").read_bytes() == before


def test_the_learning_rate_falls_to_a_tenth(data, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: used.append(self.param_groups[0]["lr"]) or step(self),
    )
    more = ["--steps", "10", "--lr", "1e-3", "--warmup-steps", "2", "--val-every", "100"]
    opd.main(command(data, "--out", str(tmp_path / "run"), *more, "--lr-decay", "0.4"))
    rates = [line["lr"] for line in lines_of(tmp_path / "run/metrics.jsonl")]
    assert rates[:7] == pytest.approx([5e-4] + [1e-3] * 6)
    assert rates[7:] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4])
    assert used == rates


def test_replayed_rollouts_are_those_that_were_stored(data, tmp_path, monkeypatch):
    first = tmp_path / "first"
    fkl_warmup.main(command(data, "--out", str(first)))
    stored = lines_of(first / "rollouts.jsonl")
    assert len(stored) == 3 * 2 * 2
    assert set(stored[0]) == {"step", "problem", "prompt", "completion", "completion_ids"}
    monkeypatch.setattr(fkl_warmup, "validate", lambda *a: 0.0)
    monkeypatch.setattr(fkl_warmup, "rollout", None)  # nothing is sampled any more
    replayed, replay = [], fkl_warmup.replay
    monkeypatch.setattr(fkl_warmup, "replay", lambda b, m: replayed.extend(b) or replay(b, m))
    more = ["--rollouts", str(first / "rollouts.jsonl"), "--out", str(tmp_path / "again")]
    fkl_warmup.main(command(data, *more))
    whole = sorted((line["problem"], line["completion"]) for line in stored)
    assert sorted((p["problem"], p["row"]["completion"]) for p in replayed) == whole
    assert not (tmp_path / "again/rollouts.jsonl").read_text()  # not stored once more


def test_the_teachers_texts_of_validation_are_sampled_once(data, tmp_path, monkeypatch):
    sizes, rollout, kls = [], fkl_warmup.rollout, []
    monkeypatch.setattr(
        fkl_warmup, "rollout", lambda *a: sizes.append((len(a[1]), a[2])) or rollout(*a)
    )
    fkl_warmup.main(command(data, "--out", str(tmp_path / "run"), "--lr", "0", "--val-every", "1"))
    kls = [line["val"] for line in lines_of(tmp_path / "run/metrics.jsonl")]
    assert sizes == [(len(PROBLEMS), 1), *[(2, 2)] * 3]
    assert len(set(kls)) == 1 and kls[0] > 0


def test_replay_returns_what_rollout_did(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    end = teacher.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    batch = [{"row": {"completion_ids": ids}} for ids in ([5, 6, end], [7, 8])]
    ids, mask, clipped = fkl_warmup.replay(batch, teacher)
    assert ids.tolist() == [[5, 6, end], [7, 8, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert clipped.tolist() == [False, True]


@pytest.mark.parametrize("script", ["fkl_warmup.py", "opd.py"])
def test_sigkill_changes_no_bit(script, data, tmp_path):
    """The run on disk is grpo.py's (test_siblings.py), tested there at every touch of the disk."""
    arguments = [script, *command(data, "--steps", "24", "--save-every", "4"), "--out"]
    assert run([*arguments, tmp_path / "whole"]) == 0
    killed = tmp_path / "killed"
    lines = killed / "metrics.jsonl"
    process = start([*arguments, killed])
    # Two steps after a checkpoint, and two before the next: what they wrote must go again.
    while process.is_alive() and not (lines.exists() and lines.read_text().count("\n") >= 6):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9  # killed, not ended
    assert run([*arguments, killed]) == 0
    for name in ("final", "best"):
        mine, theirs = (tmp_path / run / name / "model.safetensors" for run in ("whole", "killed"))
        assert mine.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "whole/samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    if script == "fkl_warmup.py":
        stored = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("whole", "killed")]
        assert stored[0] == stored[1]


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_show_prints_the_kl_of_every_token(script, data, tmp_path, monkeypatch, capsys):
    """Of the rollout that stands above them, not of the longest one."""
    monkeypatch.chdir(tmp_path)
    script.main(command(data, "--show", "--samples-per-prompt", "16"))
    above, _, below = capsys.readouterr().out.partition(" KL  token\n")
    named = ast.literal_eval(above.strip().splitlines()[-1].split(" -> ")[1])
    tokens = [ast.literal_eval(line.split("  ")[-1]) for line in below.splitlines()]
    assert "".join(tokens) == named and tokens[-1] == "<|end|>"
    assert not (tmp_path / "runs").exists()


# --- notices and bad input ------------------------------------------------------------------------


def refusal(capsys, script, arguments):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]
    assert len(err) == 1, err
    return err[0]


def test_the_same_model_as_teacher_and_student_is_allowed_with_a_notice(data, tmp_path, capsys):
    more = ["--teacher", STUDENT, "--steps", "1", "--out", str(tmp_path / "run")]
    opd.main(command(data, *more))
    assert "the same model" in capsys.readouterr().out


def test_a_teacher_before_rl_is_named_as_such(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = ["--teacher", "tiny/teacher", "--steps", "1", "--out", str(tmp_path / "run")]
    opd.main(command(data, *more))
    assert "a teacher after RL (python grpo.py) is better" in capsys.readouterr().out


def test_another_vocabulary_is_refused(data, tmp_path, capsys):
    shutil.copytree(TEACHER, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    path.write_text(path.read_text().replace('"7":', '"x":'))
    said = refusal(capsys, opd, command(data, "--teacher", str(tmp_path / "other")))
    assert "different vocabularies" in said


def test_other_templates_and_ends_are_warned_of(data, tmp_path, capsys):
    shutil.copytree(TEACHER, tmp_path / "other")
    path = tmp_path / "other/chat_template.jinja"
    path.write_text(path.read_text() + " ")
    config = tmp_path / "other/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [5]}))
    more = ["--teacher", str(tmp_path / "other"), "--steps", "1", "--out", str(tmp_path / "run")]
    opd.main(command(data, *more))
    out = capsys.readouterr().out
    assert "different chat templates" in out and "end a text with different tokens" in out
    for name in ("best", "final"):  # the student learns the teacher's end, too
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).generation_config
        assert saved.eos_token_id == [3, 5]
    ends = AutoModelForCausalLM.from_pretrained(STUDENT).generation_config.eos_token_id
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [ends]}))
    opd.main(command(data, *more, "--overwrite"))
    assert "end a text with different tokens" not in capsys.readouterr().out  # a list of the same


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: not a JSON object"),
        ('{"problem": "4+5"}', ":2: not a rollout of this tokenizer"),
        ('{"problem": "4+5", "completion": "9", "completion_ids": []}', ":2: not a rollout"),
        ('{"problem": "4+5", "completion": "9", "completion_ids": [99999]}', ":2: not a rollout"),
        ('{"problem": "4+5", "completion": "8", "completion_ids": [3]}', ":2: not a rollout"),
        (None, ":2: written after another prompt: '4+5='"),
    ],
)
def test_bad_rollouts(data, tmp_path, capsys, line, said):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    good = {"problem": "4+5", "completion": "9", "completion_ids": tokenizer("9")["input_ids"]}
    path, line = tmp_path / "rollouts.jsonl", line or json.dumps(good | {"prompt": "4+5="})
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    assert f"{path}{said}" in refusal(capsys, fkl_warmup, command(data, "--rollouts", str(path)))


@pytest.mark.parametrize("script", [fkl_warmup, opd])
def test_a_teacher_that_was_replaced_is_not_the_same_run(script, data, tmp_path, capsys):
    weights = shutil.copytree(TEACHER, tmp_path / "teacher") / "model.safetensors"
    run = command(data, "--teacher", str(weights.parent), "--out", str(tmp_path / "run"))
    script.main([*run, "--steps", "1"])
    old = weights.read_bytes()
    weights.write_bytes(old[: 2**19] + bytes(4) + old[2**19 + 4 :])
    assert "run: the model was edited" in refusal(capsys, script, [*run, "--steps", "2"])
    weights.write_bytes(old)
    script.main([*run, "--steps", "2"])


@pytest.mark.parametrize("script", [fkl_warmup, opd])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--student", "./nowhere"], "nowhere"),
        (["--teacher", "./nowhere"], "nowhere"),
        (["--teacher", "run"], "run holds no model"),
        (["--samples-per-prompt", "0"], "--samples-per-prompt must be at least 1"),
        (["--lr-decay", "-1"], "--lr-decay must be at least 0"),
    ],
)
def test_bad_flags(script, more, said, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("run").mkdir()
    Path("run/metrics.jsonl").touch()
    assert said in refusal(capsys, script, command(data, *more))


@pytest.mark.parametrize("script", [fkl_warmup, opd, paced])
def test_a_student_stored_in_bf16_is_trained_in_fp32(script, data, tmp_path):
    half, out = tmp_path / "half", tmp_path / "run"
    AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(half)
    more = ["--weights", "uniform"] if script is paced else []
    script.main(command(data, "--student", str(half), "--out", str(out), "--steps", "1", *more))
    assert AutoModelForCausalLM.from_pretrained(out / "final").dtype == torch.float32


@pytest.mark.parametrize("script", [grpo, fkl_warmup, opd, paced])
def test_more_processes_than_prompts_to_share(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WORLD", 3)
    for name in ("start_processes", "gather"):
        monkeypatch.setattr(script, name, lambda item: [item] * 3)
    model = ["--model", STUDENT] if script is grpo else ["--student", STUDENT]
    rest = ["--val-data", data, "--prompts-per-step", "3", "--out", str(tmp_path / "run")]
    Path(data).write_text('{"problem": "4+5", "answer": "9"}\n' * 2)
    assert "3 processes share 2 prompts" in refusal(capsys, script, [*model, "--data", data, *rest])
