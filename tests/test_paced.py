"""paced.py: where the weights come from and go, the siblings to the bit, and its runs."""

import ast
import itertools
import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fkl_warmup
import opd
import paced

ROOT = Path(__file__).parent.parent
STUDENT, TEACHER = str(ROOT / "tiny/student"), str(ROOT / "tiny/teacher")
PROBLEMS = {"37+8+5": "50", "4+5": "9", "12+3+4+9": "28", "7+7": "14", "91+2+2": "95"}
RATES = [0.2, 0.5, 0.8, 0.0, 0.25]  # the filter's two edges, a problem of weight 0, two inside
WEIGHT = dict(zip(PROBLEMS, [0.16, 0.25, 0.16, 0.0, 0.1875], strict=True))
FORWARD, REVERSE = "forward", "reverse"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": problem, "answer": answer} for problem, answer in PROBLEMS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rates(monkeypatch):
    """Pass rates that differ, without a rollout."""
    monkeypatch.setattr(paced, "pass_rates", lambda *args: list(RATES))


def command(data, *more):
    """A run of seconds: three prompts a step, two completions each."""
    small = "--prompts-per-step 3 --samples-per-prompt 2 --max-new-tokens 40 --steps 4"
    small += " --val-every 2 --save-every 1 --micro-batch 4 --lr 1e-3 --device cpu"
    files = ["--student", STUDENT, "--data", data, "--val-data", data]
    return [*files, *small.split(), *more]


def taught(data, *more):
    return command(data, "--teacher", TEACHER, *more)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def spy_on_gradients(monkeypatch, script):
    """The gradients of a run's updates, as they come."""
    seen, clip = [], script.clip_grad_norm_

    def spy(parameters, largest):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, largest)

    monkeypatch.setattr(script, "clip_grad_norm_", spy)
    return seen


def spy_on_loss(monkeypatch):
    """(problem, weight, direction) for each completion that a run learns from."""
    scored, seen, both, loss = [], [], paced.both_logits, paced.distil_loss

    def spy_both(student, teacher, problems, *rest):
        scored[:] = [problem["problem"] for problem in problems]
        return both(student, teacher, problems, *rest)

    def spy_loss(student, teacher, weight, mask, n_tokens, direction, args):
        assert weight.shape == (len(mask), 1)
        own = zip(scored, weight[:, 0].tolist(), strict=True)
        seen.extend((problem, w, direction) for problem, w in own)
        return loss(student, teacher, weight, mask, n_tokens, direction, args)

    monkeypatch.setattr(paced, "both_logits", spy_both)
    monkeypatch.setattr(paced, "distil_loss", spy_loss)
    return seen


def pair():
    """The student, the teacher and their tokenizer."""
    load = AutoModelForCausalLM.from_pretrained
    models = [load(path, dtype=torch.float32).eval() for path in (STUDENT, TEACHER)]
    return *models, AutoTokenizer.from_pretrained(STUDENT)


# --- the weights ----------------------------------------------------------------------------------


def beta_kernel(alpha=1.0, beta=1.0, weights="paced"):
    args = types.SimpleNamespace(alpha=alpha, beta=beta, weights=weights)
    return lambda p: paced.problem_weight(np.asarray(p), args)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 1), (1, 3), (0.5, 0.5), (0.3, 2.0)])
def test_the_weight_is_zero_at_both_ends_and_peaks_between(alpha, beta):
    grid = np.linspace(0, 1, 10_001)
    weight = beta_kernel(alpha, beta)(grid)
    assert weight[0] == weight[-1] == 0 and (weight[1:-1] > 0).all()
    assert grid[weight.argmax()] == pytest.approx(alpha / (alpha + beta), abs=1e-4)
    assert weight[3000] == pytest.approx(0.3**alpha * 0.7**beta)


def test_the_filter_keeps_what_lies_strictly_between():
    kept = beta_kernel(weights="filter")([0.2, 0.2001, 0.5, 0.7999, 0.8])
    assert kept.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("rollouts", [2, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_weight_of_an_estimated_rate_is_too_low_by_1_over_k(rollouts, p, monkeypatch):
    """E[q (1 - q)] = p (1 - p) (1 - 1/K) for a rate q out of K rollouts."""
    rng, n = np.random.default_rng(0), 40_000
    monkeypatch.setattr(paced, "rollout", lambda *args: (None, None, None))
    monkeypatch.setattr(
        paced, "grade", lambda t, ids, mask, golds: (None, list(rng.random(len(golds)) < p))
    )
    args = types.SimpleNamespace(prompts_per_step=n // 3, pass_rollouts=rollouts, show=False)
    estimates = paced.pass_rates(None, None, [{"ids": [0], "answer": "1"}] * n, None, rng, args)
    weight = beta_kernel()(estimates)
    expected = p * (1 - p) * (1 - 1 / rollouts)
    assert len(weight) == n
    assert weight.mean() == pytest.approx(expected, abs=5 * weight.std() / math.sqrt(n))


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9])
def test_a_weight_that_is_off_by_delta_loses_at_most_its_square(delta):
    rng = np.random.default_rng(0)
    p = rng.random(500)
    best = beta_kernel()(p)
    assert best == pytest.approx(p - p * p)

    def lost(error):
        weight = best * (1 + error)
        return 1 - (weight * best).mean() ** 2 / ((weight**2).mean() * (best**2).mean())

    # Adversarial: too low by delta on the problems below some rank, too high on the others.
    for rank in (best.argsort().argsort(), rng.permutation(500)):
        losses = [lost(np.where(rank < k, -delta, delta)) for k in range(501)]
        assert 0.99 * delta**2 < max(losses) <= delta**2 + 1e-12  # the bound is tight
    assert max(lost(rng.uniform(-delta, delta, 500)) for _ in range(200)) <= delta**2


# --- the loss -------------------------------------------------------------------------------------


def brute_force(student, teacher, weight, mask, n_tokens, direction):
    """Equations 2 and 3 in Python floats, over five tokens."""
    total = 0.0
    for i, t in mask.nonzero().tolist():
        p, q = ([math.exp(z) for z in logits[i, t].tolist()] for logits in (student, teacher))
        p, q = ([x / sum(w) for x in w] for w in (p, q))
        p, q = (q, p) if direction == FORWARD else (p, q)
        total += weight[i] * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / n_tokens


@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
def test_loss_and_gradient_against_brute_force_on_five_tokens(direction):
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, dtype=torch.float64)
    teacher = 2 * torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    weight, n_tokens = torch.tensor([[0.5], [1.75], [0.75]]), 11  # of the whole update
    args = types.SimpleNamespace(temperature=1.0)

    def theirs(z, weight):
        return float(brute_force(z, teacher, weight, mask, n_tokens, direction))

    leaf = student.clone().requires_grad_()
    loss, kl = paced.distil_loss(leaf * 1.0, teacher, weight, mask, n_tokens, direction, args)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(theirs(student, weight), abs=1e-6)
    plain = theirs(student, torch.ones(3))  # what is logged
    assert float(kl.sum() / n_tokens) == pytest.approx(plain, abs=1e-6)
    assert (kl[~mask] == 0).all() and (leaf.grad[~mask] == 0).all()
    weight = weight.double()
    for index in itertools.product(range(3), range(4), range(5)):
        step = torch.zeros_like(student)
        step[index] = 1e-5
        slope = (theirs(student + step, weight) - theirs(student - step, weight)) / 2e-5
        assert float(leaf.grad[index]) == pytest.approx(slope, abs=1e-6), index


@pytest.mark.parametrize("schedule", ["fkl", "rkl"])
def test_the_micro_batch_does_not_change_the_gradient(schedule, monkeypatch, data, tmp_path, rates):
    gradients = spy_on_gradients(monkeypatch, paced)
    seen = spy_on_loss(monkeypatch)
    for size in ("1", "3", "4", "6"):
        more = ["--steps", "1", "--lr", "0", "--schedule", schedule, "--micro-batch", size]
        paced.main(taught(data, "--out", str(tmp_path / size), *more))
    assert len({weight for _, weight, _ in seen}) > 1
    assert float(gradients[0].norm()) > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(("schedule", "sibling"), [("rkl", opd), ("fkl", fkl_warmup)])
def test_uniform_weights_are_the_sibling_to_the_bit(
    schedule, sibling, monkeypatch, data, tmp_path, capsys
):
    ours, theirs = (spy_on_gradients(monkeypatch, script) for script in (paced, sibling))
    mine, other = tmp_path / "paced", tmp_path / "sibling"
    more = ["--weights", "uniform", "--schedule", schedule, "--out", str(mine)]
    paced.main(taught(data, *more))
    sibling.main(taught(data, "--out", str(other)))
    assert len(ours) == len(theirs) == 4 and len({float(g.norm()) for g in ours}) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (mine / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for name in ("final", "best"):
        files = [run / name / "model.safetensors" for run in (mine, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    metrics = [lines_of(run / "metrics.jsonl") for run in (mine, other)]
    for ours, theirs in zip(*metrics, strict=True):
        assert {key: ours[key] for key in theirs} | {"seconds": 0} == theirs | {"seconds": 0}


# --- pass rates and who is drawn ------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_pass_rate_is_the_share_of_right_rollouts(at_once):
    student, _, tokenizer = pair()
    settings = dict(temperature=1.0, rollout_batch=9, max_new_tokens=40)
    args = types.SimpleNamespace(pass_rollouts=6, prompts_per_step=at_once, show=False, **settings)
    problems = [{"ids": tokenizer(f"<|user|>{p}<|assistant|>")["input_ids"]} for p in PROBLEMS]
    rows = [p | {"answer": a} for p, a in zip(problems, PROBLEMS.values(), strict=True)]
    rates = paced.pass_rates(student, tokenizer, rows, None, np.random.default_rng(1), args)
    prompts, rng = [row["ids"] for row in rows], np.random.default_rng(1)
    ids, mask, _ = paced.rollout(student, prompts, 6, rng, args)
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]
    said = [re.findall(r"\\boxed\{(\d+)\}", text)[-1:] for text in texts]
    right = [one == [rows[i // 6]["answer"]] for i, one in enumerate(said)]
    assert rates == pytest.approx(np.reshape(right, (5, 6)).mean(1).tolist())
    assert len(set(rates)) > 2


def test_the_rates_come_from_the_student_alone(monkeypatch, data, tmp_path):
    calls, during, sizes = [], [], []
    load, estimate, rollout = paced.load_teacher, paced.pass_rates, paced.rollout

    def spy_load(*args):
        teacher = load(*args)
        teacher.register_forward_hook(lambda *_: calls.append("teacher"))
        return teacher

    def spy_estimate(student, *rest):
        before = len(calls)
        with monkeypatch.context() as patch:
            patch.setattr(paced, "rollout", lambda *a: sizes.append((a[0], a[2])) or rollout(*a))
            rates = estimate(student, *rest)
        during.append(len(calls) - before)
        assert sizes and all(asked == (student, 3) for asked in sizes)
        return rates

    monkeypatch.setattr(paced, "load_teacher", spy_load)
    monkeypatch.setattr(paced, "pass_rates", spy_estimate)
    more = ["--pass-rollouts", "3", "--refresh-every", "1", "--steps", "2"]
    paced.main(taught(data, "--out", str(tmp_path / "run"), *more))
    assert during == [0, 0] and calls


@pytest.mark.parametrize(
    ("weights", "kept", "ess"),
    [
        ("paced", WEIGHT, sum(WEIGHT.values()) ** 2 / sum(w * w for w in WEIGHT.values())),
        ("uniform", dict.fromkeys(PROBLEMS, 1.0), 5.0),
        ("filter", {"4+5": 1.0, "91+2+2": 1.0}, 2.0),
    ],
)
def test_each_arm_draws_what_it_keeps_and_as_many(
    weights, kept, ess, monkeypatch, data, tmp_path, rates, capsys
):
    kept = {problem: weight for problem, weight in kept.items() if weight}
    drawn = {}
    for schedule in ("fkl", "rkl"):
        with monkeypatch.context() as patch:
            seen, out = spy_on_loss(patch), tmp_path / schedule
            paced.main(
                taught(data, "--weights", weights, "--schedule", schedule, "--out", str(out))
            )
        assert {problem for problem, *_ in seen} == set(kept)  # weight 0 is never drawn
        assert len(seen) == 4 * 3 * 2  # steps, problems, completions
        for i in range(0, len(seen), 6):
            step = sorted(seen[i : i + 6])
            mean = sum(kept[problem] for problem, *_ in step) / 6
            assert [w for _, w, _ in step] == pytest.approx([kept[p] / mean for p, *_ in step])
        # Epoch after epoch: each of the kept equally often, as far as 12 draws go.
        counts = [sum(problem == own for own, *_ in seen) / 2 for problem in kept]
        assert max(counts) - min(counts) <= 1
        drawn[schedule] = [sorted((p, w) for p, w, _ in seen[i : i + 6]) for i in range(0, 24, 6)]
        for line in lines_of(out / "metrics.jsonl"):
            assert line["zero_weight"] == 5 - len(kept)
            assert line["ess"] == pytest.approx(ess)
            assert line["labels"] == (0 if weights == "uniform" else 5)
            rate = None if weights == "uniform" else pytest.approx(np.mean(RATES))
            assert line["pass_rate"] == rate
        printed = capsys.readouterr().out
        said = re.search(f"{len(kept)} of 5 problems count, like {ess:.0f} ", printed)
        assert bool(said) == (weights != "uniform")
    assert drawn["fkl"] == drawn["rkl"]  # one weight path for both directions


SECOND_REVERSE = [FORWARD] * 2 + [REVERSE] * 2


@pytest.mark.parametrize(
    ("schedule", "path"),
    [("fkl-rkl", SECOND_REVERSE), ("rkl-fkl", SECOND_REVERSE[::-1]), (None, SECOND_REVERSE)],
)
def test_the_schedule_says_who_samples_and_which_direction(
    schedule, path, monkeypatch, data, tmp_path, rates
):
    sampled, kls, rollout, kl = [], [], paced.rollout, paced.softmax_kl
    names = {AutoModelForCausalLM.from_pretrained(STUDENT).num_parameters(): REVERSE}
    monkeypatch.setattr(
        paced,
        "rollout",
        lambda m, *a: sampled.append(names.get(m.num_parameters(), FORWARD)) or rollout(m, *a),
    )
    monkeypatch.setattr(paced, "softmax_kl", lambda *a, **k: kls.append(a[2]) or kl(*a, **k))
    more = ["--schedule", schedule] if schedule else []
    more += ["--micro-batch", "6", "--val-every", "4", "--out", str(tmp_path / "run")]
    paced.main(taught(data, *more))
    # Validation, before and after, is of the direction that the schedule ends with.
    assert kls == sampled == [path[-1], *path, path[-1]]


# --- self-distillation ----------------------------------------------------------------------------


def test_each_model_is_scored_after_its_own_prompt():
    student, teacher, tokenizer = pair()
    texts = [("37+8+5", "(50)37+8+5"), ("4+5", "(9)4+5"), ("7+7", "7+7")]
    rows = [[tokenizer(f"<|user|>{t}<|assistant|>")["input_ids"] for t in two] for two in texts]
    problems = [{"ids": own, "teacher_ids": theirs} for own, theirs in rows]
    ids, mask = torch.randint(5, 15, (3, 6)), torch.arange(6) >= torch.tensor([[0], [4], [2]])
    with torch.no_grad():
        both = paced.both_logits(student, teacher, problems, ids * mask, mask)
        models = zip((student, teacher), ("ids", "teacher_ids"), both, strict=True)
        for (model, key, logits), i in itertools.product(models, range(3)):
            own, said = problems[i][key], ids[i][mask[i]].tolist()
            alone = model(torch.tensor([own + said])).logits[0, len(own) - 1 : -1]
            assert torch.allclose(logits[i][mask[i]], alone, atol=1e-4)


def test_the_teacher_is_the_frozen_start_model_and_alone_sees_the_answer(
    data, tmp_path, monkeypatch, rates
):
    teachers, scored, asked, tokenizer = [], [], [], AutoTokenizer.from_pretrained(STUDENT)
    load, score, rollout = paced.load_teacher, paced.score, paced.rollout

    def note(seen, model, prompts):
        seen.extend((model is teachers[-1], text) for text in map(tokenizer.decode, prompts))

    def spy_score(model, problems, ids, mask, prompt="ids"):
        note(scored, model, [problem[prompt] for problem in problems])
        return score(model, problems, ids, mask, prompt)

    def spy_rollout(model, prompts, *args):
        note(asked, model, prompts)
        return rollout(model, prompts, *args)

    monkeypatch.setattr(paced, "load_teacher", lambda *a: teachers.append(load(*a)) or teachers[-1])
    monkeypatch.setattr(paced, "score", spy_score)
    monkeypatch.setattr(paced, "rollout", spy_rollout)
    start = weights_of(AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32))
    out = tmp_path / "run"
    for steps in ("2", "4"):  # the second one resumes
        more = ["--self", "--lr", "0.01", "--steps", steps, "--out", str(out)]
        paced.main(command(data, *more))
        assert torch.equal(weights_of(teachers[-1]), start)
        final = AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
        assert not torch.allclose(weights_of(final), start, atol=1e-3)
    assert len(teachers) == 2
    hinted = {f"<|user|>({answer}){problem}<|assistant|>" for problem, answer in PROBLEMS.items()}
    plain = {f"<|user|>{problem}<|assistant|>" for problem in PROBLEMS}
    assert {text for is_teacher, text in scored if is_teacher} == hinted
    assert {text for is_teacher, text in scored if not is_teacher} == plain
    assert {text for _, text in asked} == plain and not any(by for by, _ in asked)  # reverse KL
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["schedule"], settings["teacher"]) == ("rkl", STUDENT)
    assert all(line["labels"] == 5 for line in lines_of(out / "metrics.jsonl"))


def test_the_hint_of_real_models_is_a_sentence_and_its_answer_a_label(data, tmp_path, monkeypatch):
    seen, render = [], paced.render
    monkeypatch.setattr(paced, "render", lambda text, *a: seen.append(text) or render(text, *a))
    more = ["--self", "--preset", "paper", "--weights", "uniform", "--steps", "1"]
    paced.main(command(data, *more, "--out", str(tmp_path / "run")))
    assert "The answer is 50. Show how to get it: 37+8+5" in seen and "37+8+5" in seen
    assert lines_of(tmp_path / "run/metrics.jsonl")[0]["labels"] == 3  # in the prompts of the step


# --- the runs -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script catches it."""


def test_a_run_that_is_killed_between_two_refreshes_changes_no_bit(data, tmp_path, monkeypatch):
    estimated, updates, limit = [], [], [None]
    estimate, clip, draw, drawn = paced.pass_rates, paced.clip_grad_norm_, paced.draw, []

    def spy(*args):
        estimated.append(len(updates))
        return [0.25 + rate / 2 for rate in estimate(*args)]  # so that no problem drops out

    def deadly(*args):
        if len(updates) == limit[0]:
            raise Killed
        updates.append(1)
        return clip(*args)

    monkeypatch.setattr(paced, "pass_rates", spy)
    monkeypatch.setattr(paced, "clip_grad_norm_", deadly)
    monkeypatch.setattr(paced, "draw", lambda *a: drawn.append((a[1], a[2])) or draw(*a))
    more = "--steps 6 --refresh-every 2 --pass-rollouts 4 --prompts-per-step 2".split()
    whole = tmp_path / "whole"
    paced.main(taught(data, "--out", str(whole), *more))
    assert estimated == [0, 2, 4]
    # The epochs begin anew with the weights.
    assert drawn == [(step % 2, [0, 0, step - step % 2]) for step in range(6)]
    metrics = [line | {"seconds": 0} for line in lines_of(whole / "metrics.jsonl")]
    assert len({line["pass_rate"] for line in metrics}) > 1
    for after in (3, 4):  # in the middle of a period, and at its start
        out, limit[0] = tmp_path / f"killed{after}", after
        updates.clear()
        with pytest.raises(Killed):
            paced.main(taught(data, "--out", str(out), *more))
        limit[0] = None
        estimated.clear()
        paced.main(taught(data, "--out", str(out), *more))
        assert estimated == [4]  # what the checkpoint knows is not estimated again
        assert [line | {"seconds": 0} for line in lines_of(out / "metrics.jsonl")] == metrics
        for name in ("final/model.safetensors", "best/model.safetensors", "samples.jsonl"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_rates_are_not_lost_to_a_kill(data, tmp_path, monkeypatch):
    """They may take days: what there is when a run is killed is not estimated again."""
    sizes, limit, rollout = [], [None], paced.rollout

    def deadly(*args):
        if len(sizes) == limit[0]:
            raise Killed
        sizes.append(len(args[1]))
        return rollout(*args)

    def even(tokenizer, ids, mask, golds):
        return None, [float(total % 2 == 0) for total in (ids * mask).sum(1).tolist()]

    monkeypatch.setattr(paced, "rollout", deadly)
    monkeypatch.setattr(paced, "grade", even)
    more = "--prompts-per-step 2 --refresh-every 2 --save-every 100 --val-every 100".split()
    whole = tmp_path / "whole"
    paced.main(taught(data, "--out", str(whole), *more))
    # Validation, rates, two steps; rates of two steps more; validation.
    assert sizes == [5, *(2, 2, 1), 2, 2, *(2, 2, 1), 2, 2, 5]
    for killed, again in (3, [5, 1, *sizes[4:]]), (8, [5, 2, 2, 1, 2, 2, 5]):
        out, limit[0] = tmp_path / f"killed{killed}", killed
        sizes.clear()
        with pytest.raises(Killed):
            paced.main(taught(data, "--out", str(out), *more))
        limit[0] = None
        sizes.clear()
        paced.main(taught(data, "--out", str(out), *more))
        assert sizes == again
        # A run of more steps is another one from the first on, by its decay and its schedule.
        kept = "final/model.safetensors", "samples.jsonl", "rates-0-0.json", "rates-2-4.json"
        for name in kept:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_rates_go_on_with_another_number_of_processes(tmp_path, monkeypatch):
    """Of 9 problems one process takes 4, 4, 1, two take 4, 5: of 8 rates 4 are of use to them."""
    path, sizes = tmp_path / "rates.json", []
    path.write_text(json.dumps([0.5] * 8))

    def gather(item):
        return [item, item[:2] if isinstance(item, np.ndarray) else item]

    monkeypatch.setattr(paced, "WORLD", 2)
    monkeypatch.setattr(paced, "gather", gather)
    monkeypatch.setattr(paced, "rollout", lambda *a: sizes.append(len(a[1])) or (None,) * 3)
    monkeypatch.setattr(paced, "grade", lambda t, i, m, golds: (None, [1.0] * len(golds)))
    args = types.SimpleNamespace(prompts_per_step=4, pass_rollouts=2, max_new_tokens=8, show=False)
    problems = [{"ids": [0], "answer": "1"}] * 9
    rates = paced.pass_rates(None, None, problems, path, np.random.default_rng(0), args)
    assert rates == [0.5] * 4 + [1.0] * 5 == json.loads(path.read_text()) and sizes == [3]


@pytest.mark.parametrize("world, sizes", [(1, [4, 4, 1]), (2, [4, 5])])
def test_rates_are_estimated_a_step_of_problems_at_a_time(world, sizes, monkeypatch):
    """And none so small that a process would have no share."""
    split, found = np.array_split, []
    monkeypatch.setattr(paced, "WORLD", world)
    monkeypatch.setattr(paced, "gather", lambda item: [item] * world)
    monkeypatch.setattr(np, "array_split", lambda *a: found.extend(map(len, split(*a))) or [])
    args = types.SimpleNamespace(prompts_per_step=4, pass_rollouts=2, show=False)
    paced.pass_rates(None, None, [{"ids": [0], "answer": "1"}] * 9, None, None, args)
    assert found == sizes


def test_without_refresh_the_rates_are_estimated_once(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(paced, "pass_rates", lambda *a: calls.append(1) or list(RATES))
    for weights in ("paced", "uniform"):  # uniform weights need none
        paced.main(taught(data, "--out", str(tmp_path / weights), "--weights", weights))
        assert len(calls) == 1


def test_a_frontier_that_is_used_up_ends_the_run(data, tmp_path, monkeypatch, capsys):
    rates, out = itertools.cycle([RATES, [0.0, 1.0, 1.0, 0.0, 1.0]]), tmp_path / "run"
    updates, clip = [], paced.clip_grad_norm_
    monkeypatch.setattr(paced, "clip_grad_norm_", lambda *a: updates.append(1) or clip(*a))
    monkeypatch.setattr(paced, "pass_rates", lambda *args: list(next(rates)))
    often = ["--refresh-every", "2", "--save-every", "3"]  # no checkpoint where it ends
    for _ in "ab":  # the same command ends again, and trains no step anew
        paced.main(taught(data, "--out", str(out), *often))
        said = capsys.readouterr()
        assert "the frontier is used up: after step 2" in said.out
        assert "the frontier" not in said.err
        assert f"after the last step: {out}/final" in said.out
        assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [1, 2]
        files = [out / name / "model.safetensors" for name in ("final", "checkpoint")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert files[0].read_bytes() != Path(STUDENT, "model.safetensors").read_bytes()
        next(rates)  # of step 1
    assert len(updates) == 2


def test_show_prints_the_weighted_kl_of_every_token(data, tmp_path, monkeypatch, capsys, rates):
    monkeypatch.chdir(tmp_path)
    paced.main(taught(data, "--show", "--samples-per-prompt", "16"))
    above, _, below = capsys.readouterr().out.partition(" w KL  token\n")
    named = ast.literal_eval(above.strip().splitlines()[-1].split(" -> ")[1])
    tokens = [ast.literal_eval(line.split("  ")[-1]) for line in below.splitlines()]
    assert "".join(tokens) == named and tokens[-1] == "<|end|>"  # not the longest rollout's
    assert not (tmp_path / "runs").exists()


def test_show_measures_the_pass_rates_of_one_step_s_problems(data, tmp_path, monkeypatch):
    """A pool may have thousands, and one rollout is to be shown."""
    monkeypatch.chdir(tmp_path)
    graded = []

    def verdicts(tokenizer, completion_ids, mask, golds):
        graded.extend(golds)
        return None, [float(i % 2) for i in range(len(golds))]

    monkeypatch.setattr(paced, "grade", verdicts)
    paced.main(taught(data, "--show", "--pass-rollouts", "4"))
    assert len(graded) == 3 * 4 < len(PROBLEMS) * 4


# --- bad input ------------------------------------------------------------------------------------


def refusal(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        paced.main(arguments)
    assert stop.value.code == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]
    assert len(err) == 1, err
    return err[0]


@pytest.mark.parametrize(
    ("weights", "rates"),
    [("paced", [0.0, 1.0, 1.0, 0.0, 0.0]), ("filter", [0.2, 0.8, 1.0, 0.0, 0.0])],
)
def test_no_problem_at_the_frontier(weights, rates, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paced, "pass_rates", lambda *args: rates)
    more = ["--weights", weights, "--out", str(tmp_path / "run")]
    said = refusal(capsys, taught(data, *more))
    assert "every problem is at pass rate 0 or 1" in said and "--overwrite" in said
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alpha", "-1"], "--alpha must be at least 0"),
        (["--beta", "-1"], "--beta must be at least 0"),
        (["--alpha", "nan"], "--alpha must be at least 0"),
        (["--pass-rollouts", "1"], "--pass-rollouts must be at least 2"),
        (["--refresh-every", "-1"], "--refresh-every must be at least 0"),
        (["--self"], "--self is its own teacher"),
        (["--schedule", "both"], "--schedule"),
        (["--weights", "none"], "--weights"),
        (["--teacher", "./nowhere"], "nowhere"),
    ],
)
def test_bad_flags(more, said, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refusal(capsys, taught(data, *more))


@pytest.mark.parametrize("line", ['{"problem": "4+5"}', '{"problem": "4+5", "answer": ""}'])
def test_a_problem_without_an_answer_is_named(line, data, capsys, tmp_path):
    with open(data, "a") as file:
        file.write(line + "\n")
    said = refusal(capsys, taught(data, "--out", str(tmp_path / "run")))
    assert f"{data}:6: no answer" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("direction", [FORWARD, REVERSE])
def test_the_temperature_divides_both_logits(direction):
    (student, teacher), mask = torch.randn(2, 1, 2, 5), torch.ones(1, 2, dtype=torch.bool)
    warm, one = (types.SimpleNamespace(temperature=t) for t in (2.0, 1.0))
    rest = torch.ones(1, 1), mask, 2, direction
    kl = paced.distil_loss(student, teacher, *rest, warm)[1]
    assert torch.allclose(kl, paced.distil_loss(student / 2, teacher / 2, *rest, one)[1])
