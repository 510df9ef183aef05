"""grpo.py: the loss against brute force, the rollout against transformers, a run and its kills."""

import gc
import itertools
import json
import math
import random
import shutil
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import eval_math
import fkl_warmup
import grpo
import opd
import paced
from forked import run, start

ROOT = Path(__file__).parent.parent
TEACHER = str(ROOT / "tiny/teacher")
PROBLEMS = [("37+8+5", "50"), ("4+5", "9"), ("12+3+4+9", "28"), ("7+7", "14"), ("91+2+2", "95")]


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": problem, "answer": answer} for problem, answer in PROBLEMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(data, *more):
    """A run of seconds: two prompts a step, four completions each."""
    small = "--prompts-per-step 2 --samples-per-prompt 4 --max-new-tokens 40 --steps 3"
    small += " --val-every 2 --save-every 1 --device cpu"
    return ["--model", TEACHER, "--data", data, "--val-data", data, *small.split(), *more]


def prompt_ids_of(tokenizer, problems):
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


# --- the loss -------------------------------------------------------------------------------------


def brute_force_loss(logits, old_logits, tokens, reward, lengths):
    """Equations 1 to 4 in Python floats, one token at a time; one group."""

    def probability(rows, i, t):
        weights = [math.exp(z) for z in rows[i][t]]
        return weights[tokens[i][t]] / sum(weights)

    mean = sum(reward) / len(reward)
    std = math.sqrt(sum((r - mean) ** 2 for r in reward) / (len(reward) - 1))
    total = 0.0
    for i, length in enumerate(lengths):
        advantage = (reward[i] - mean) / (std + 1e-6)
        for t in range(length):
            ratio = probability(logits, i, t) / probability(old_logits, i, t)
            clipped = min(max(ratio, 0.8), 1.28)
            objective = min(ratio * advantage, clipped * advantage)
            if advantage < 0:
                objective = max(objective, 10 * advantage)
            total += objective
    return -total / sum(lengths)


def test_loss_and_gradient_against_brute_force_on_five_tokens():
    torch.manual_seed(0)
    reward, lengths = [1.0, 0.0, 0.0, 1.0], [3, 1, 2, 3]
    logits = (2 * torch.randn(4, 3, 5, dtype=torch.float64)).requires_grad_()
    old_logits = logits.detach() + torch.randn(4, 3, 5, dtype=torch.float64)
    tokens = torch.randint(5, (4, 3))
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]

    def ours(z):
        logp, old = (
            x.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) for x in (z, old_logits)
        )
        advantage = grpo.group_advantage(torch.tensor([reward], dtype=torch.float64), "grpo")
        return grpo.policy_loss(logp, old, advantage.view(-1, 1), mask, mask.sum())

    def theirs(z):
        return brute_force_loss(z.tolist(), old_logits.tolist(), tokens.tolist(), reward, lengths)

    loss = ours(logits)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(theirs(logits), abs=1e-12)
    for index in itertools.product(range(4), range(3), range(5)):
        step = torch.zeros_like(logits)
        step[index] = 1e-6
        slope = (theirs(logits.detach() + step) - theirs(logits.detach() - step)) / 2e-6
        assert float(logits.grad[index]) == pytest.approx(slope, abs=1e-8), index


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "flows"),
    [
        (+1.0, 1.1, 1.1, True),  # inside the clip range: the plain policy gradient
        (+1.0, 1.5, 1.28, False),  # risen far enough: no further push up
        (+1.0, 0.5, 0.5, True),  # too low for a good token: pushed up however low
        (-1.0, 0.9, -0.9, True),
        (-1.0, 0.5, -0.8, False),  # fallen far enough
        (-1.0, 1.5, -1.5, True),  # too high for a bad token: pushed down
        (-1.0, 50.0, -10.0, False),  # but never by more than the dual clip
    ],
)
def test_clip_in_every_quadrant(advantage, ratio, objective, flows):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True]])
    a = torch.tensor([[advantage]], dtype=torch.float64)
    loss = grpo.policy_loss(logp, torch.zeros_like(logp), a, mask, 1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-objective)
    assert float(logp.grad) == pytest.approx(-advantage * ratio if flows else 0.0)


def test_advantage_of_a_group():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantage = grpo.group_advantage(reward, "grpo")
    assert torch.allclose(advantage[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    assert (advantage[1:] == 0).all()  # exactly, and no NaN
    assert torch.equal(grpo.group_advantage(reward, "dr_grpo")[0], reward[0] - 0.25)


@pytest.mark.parametrize("group", [2, 3])
def test_expected_gradient_is_the_true_one_times_a_constant(group):
    """Without the std, at a fixed length T, it is (1 - 1/G)/T times the gradient of E[reward]."""
    torch.manual_seed(1)
    first = torch.randn(2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    sequences = list(itertools.product(range(2), repeat=2))
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    first_p, second_p = first.log_softmax(-1), second.log_softmax(-1)
    logp = torch.stack([torch.stack([first_p[a], second_p[a, b]]) for a, b in sequences])  # (4, T)
    probability = logp.sum(1).exp()
    true = torch.autograd.grad((probability * rewards).sum(), [first, second], retain_graph=True)

    expected = torch.zeros((), dtype=torch.float64)
    mask = torch.ones(group, 2, dtype=torch.bool)
    for drawn in itertools.product(range(4), repeat=group):
        rows = list(drawn)
        advantage = grpo.group_advantage(rewards[rows][None], "dr_grpo").view(-1, 1)
        loss = grpo.policy_loss(logp[rows], logp[rows].detach(), advantage, mask, mask.sum())
        expected = expected + probability[rows].prod().detach() * loss
    ours = torch.autograd.grad(expected, [first, second])
    for mine, right in zip(ours, true, strict=True):
        assert torch.allclose(mine, -right * (1 - 1 / group) / 2, atol=1e-12)


def test_what_lies_behind_the_end_has_no_part_even_if_it_explodes():
    logp = torch.tensor([[0.0, 200.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = grpo.policy_loss(logp, torch.tensor([[0.0, -200.0]]), torch.ones(1, 1), mask, 1)
    loss.backward()
    assert float(loss) == -1.0
    assert logp.grad.tolist() == [[-1.0, 0.0]]


def gradients_of_a_step(monkeypatch, data, *more):
    """The gradient just before the first update of a run."""
    seen = []

    def spy(parameters, _):
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return torch.zeros(())

    def rewards(tokenizer, completion_ids, mask, golds):
        return golds, [float(i % 3 == 0) for i in range(len(golds))]

    monkeypatch.setattr(grpo, "clip_grad_norm_", spy)
    monkeypatch.setattr(grpo, "grade", rewards)
    monkeypatch.chdir(Path(data).parent)
    grpo.main(command(data, "--steps", "1", "--lr", "0", *more))
    return seen


def test_the_micro_batch_does_not_change_the_gradient(monkeypatch, data):
    runs = [
        gradients_of_a_step(
            monkeypatch, data, "--out", size, "--micro-batch", size, "--updates-per-step", "2"
        )
        for size in ("1", "3", "8")
    ]
    for one, three, eight in zip(*runs, strict=True):
        assert float(one.norm()) > 1e-3
        assert torch.allclose(one, eight, atol=1e-5 * float(one.abs().max()))
        assert torch.allclose(three, eight, atol=1e-5 * float(one.abs().max()))


def test_the_token_mean_is_over_the_whole_update(monkeypatch, data):
    seen, loss = [], grpo.policy_loss
    monkeypatch.setattr(
        grpo, "policy_loss", lambda *a: seen.append((int(a[3].sum()), int(a[4]))) or loss(*a)
    )
    more = ("--micro-batch", "1", "--updates-per-step", "2")
    gradients_of_a_step(monkeypatch, data, "--out", "run", *more)
    for update in (seen[:4], seen[4:]):
        assert {n_tokens for _, n_tokens in update} == {sum(tokens for tokens, _ in update)}


def test_one_micro_batch_of_logits_at_most(monkeypatch, data):
    alive, most, score = weakref.WeakSet(), [], grpo.score

    def spy(*args):
        gc.collect()
        most.append(len(alive))
        logits = score(*args)
        alive.add(logits)
        return logits

    monkeypatch.setattr(grpo, "score", spy)
    more = ("--micro-batch", "2", "--updates-per-step", "2")
    gradients_of_a_step(monkeypatch, data, "--out", "run", *more)
    assert len(most) == 8 and max(most) == 0


def test_pi_old_is_what_the_weights_before_the_step_said(monkeypatch, data):
    """With two updates the second one's pi has moved, its pi_old has not."""
    seen, loss = [], grpo.policy_loss
    monkeypatch.setattr(
        grpo, "policy_loss", lambda *a: seen.append([x.detach().clone() for x in a[:4]]) or loss(*a)
    )
    monkeypatch.setattr(
        grpo,
        "grade",
        lambda t, i, m, golds: (golds, [float(i % 3 == 0) for i in range(len(golds))]),
    )
    more = ("--updates-per-step", "2", "--steps", "1", "--lr", "1e-2")
    grpo.main(command(data, "--out", str(Path(data).parent / "run"), *more))
    (first, first_old, _, mask), (second, second_old, _, other) = seen
    assert torch.allclose(first[mask], first_old[mask], atol=1e-5)
    assert not torch.allclose(second[other], second_old[other], atol=1e-2)


def test_each_completion_meets_its_own_prompt_and_answer(monkeypatch, data, tmp_path):
    asked, scored, graded = {}, [], []
    rollout, score, grade = grpo.rollout, grpo.score, grpo.grade

    def spy_rollout(model, prompts, group, rng, args):
        ids, mask, clipped = rollout(model, prompts, group, rng, args)
        # Each completion's first token tells its prompt.
        ids[:, 0] = torch.arange(len(prompts)).repeat_interleave(group)
        asked.update(enumerate(prompts))
        return ids, mask, clipped

    def spy_grade(tokenizer, ids, mask, golds):
        graded.extend(zip(ids[:, 0].tolist(), golds, strict=True))
        return grade(tokenizer, ids, mask, golds)

    def spy_score(model, problems, ids, mask):
        firsts = [int(row[keep][0]) for row, keep in zip(ids, mask, strict=True)]
        scored.extend((asked[i], own["ids"]) for i, own in zip(firsts, problems, strict=True))
        return score(model, problems, ids, mask)

    for name, spy in (("rollout", spy_rollout), ("grade", spy_grade), ("score", spy_score)):
        monkeypatch.setattr(grpo, name, spy)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    answers = {tuple(prompt_ids_of(tokenizer, [p])[0]): answer for p, answer in PROBLEMS}
    more = ("--steps", "1", "--prompts-per-step", "5", "--micro-batch", "3")
    grpo.main(command(data, "--out", str(tmp_path / "run"), *more))
    assert len(scored) == 20 and all(mine == prompt for mine, prompt in scored)
    validation, training, again = graded[:20], graded[20:40], graded[40:]
    assert all(answers[tuple(asked[i])] == gold for i, gold in again)
    assert [gold for _, gold in validation] == [gold for _, gold in again]
    assert len({gold for _, gold in training}) == 5
    assert all(len({gold for i, gold in training if i == own}) == 1 for own in range(5))


def test_settings_reach_the_sampler_the_advantage_and_the_optimizer(monkeypatch, data, tmp_path):
    temperatures, kinds = set(), set()
    choose, advantage = grpo.choose, grpo.group_advantage
    monkeypatch.setattr(grpo, "choose", lambda z, t, u: temperatures.add(t) or choose(z, t, u))
    monkeypatch.setattr(
        grpo, "group_advantage", lambda r, kind: kinds.add(kind) or advantage(r, kind)
    )
    optimizers, adamw = [], torch.optim.AdamW

    def spy(*args, **kwargs):
        optimizers.append(adamw(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    more = (
        "--temperature",
        "0.5",
        "--advantage",
        "dr_grpo",
        "--weight-decay",
        "0.25",
        "--lr",
        "0.01",
    )
    grpo.main(command(data, "--out", str(tmp_path / "run"), "--steps", "1", *more))
    assert temperatures == {0.5} and kinds == {"dr_grpo"}
    (settings,) = optimizers[0].param_groups
    assert (settings["weight_decay"], settings["lr"]) == (0.25, 0.01)


def test_the_entropy_is_the_mean_over_the_completions_tokens(monkeypatch, data, tmp_path):
    """Uniform over eight tokens where the mask is, over more behind it."""

    def logits(model, prompts, ids, mask):
        eight = torch.where(torch.arange(model.config.vocab_size) < 8, 0.0, -50.0)
        return torch.where(mask[..., None], eight, 0.0) + 0 * model.lm_head.weight.sum()

    logprob = grpo.token_logprob
    monkeypatch.setattr(grpo, "score", logits)
    monkeypatch.setattr(grpo, "token_logprob", lambda z, i, t, **kw: logprob(z, i % 8, t, **kw))
    more = ("--steps", "1", "--prompts-per-step", "5", "--micro-batch", "20")
    grpo.main(command(data, "--out", str(tmp_path / "run"), *more))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["entropy"] == pytest.approx(math.log(8), rel=1e-4)


def test_scoring_divides_by_the_temperature_of_sampling(monkeypatch, data):
    seen, logprob = [], grpo.token_logprob
    monkeypatch.setattr(
        grpo, "token_logprob", lambda z, i, t, **kw: seen.append(t) or logprob(z, i, t, **kw)
    )
    more = ("--temperature", "0.7", "--updates-per-step", "2", "--micro-batch", "4")
    gradients_of_a_step(monkeypatch, data, "--out", "run", *more)
    assert seen == [0.7] * 4  # pi_old of two micro-batches, pi of two


def test_checkpointing_does_not_change_the_gradient(monkeypatch, data):
    (plain,) = gradients_of_a_step(monkeypatch, data, "--out", "plain")
    (again,) = gradients_of_a_step(monkeypatch, data, "--out", "again", "--checkpointing", "1")
    assert torch.allclose(plain, again, atol=1e-6 * float(plain.abs().max()))


def test_pi_old_is_scored_only_for_several_updates(monkeypatch, data):
    calls = []
    score = grpo.score
    monkeypatch.setattr(grpo, "score", lambda *a: calls.append(1) or score(*a))
    gradients_of_a_step(monkeypatch, data, "--out", "one", "--micro-batch", "4")
    assert len(calls) == 2
    more = ("--micro-batch", "4", "--updates-per-step", "2")
    gradients_of_a_step(monkeypatch, data, "--out", "two", *more)
    assert len(calls) == 2 + 4


def test_the_end_token_carries_gradient_and_nothing_behind_it(teacher, tokenizer):
    problems = [{"ids": ids} for ids in prompt_ids_of(tokenizer, ["4+5", "37+8+5"])]
    end = tokenizer.eos_token_id
    ids = torch.tensor([[5, end, 7, 7], [5, 6, 7, end]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    two = types.SimpleNamespace(micro_batch=2)
    ((part, own, ids, mask),) = grpo.micro_batches(torch.arange(2), problems, ids, mask, two)
    assert part.tolist() == [0, 1] and own == problems
    assert ids.tolist() == [[0, 0, 5, end], [5, 6, 7, end]]
    logits = grpo.score(teacher, problems, ids, mask)
    logits.retain_grad()
    logp = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    grpo.policy_loss(logp, logp.detach(), torch.tensor([[1.0], [-1.0]]), mask, 6).backward()
    size = logits.grad.abs().sum(-1)
    assert (size[mask] > 0).all()
    assert (size[~mask] == 0).all()


# --- rollout and scoring --------------------------------------------------------------------------


def greedy(logits, temperature, noise):
    return logits.argmax(-1)


def sample(model, prompts, group=1, seed=0, **settings):
    settings = {"rollout_batch": 1000, "max_new_tokens": 48, "temperature": 1.0} | settings
    args = types.SimpleNamespace(**settings)
    return grpo.rollout(model, prompts, group, np.random.default_rng(seed), args)


@torch.no_grad()
def scored_rows(model, prompts, completion_ids, mask):
    """Of each completion the logits of its own tokens, (its length, V)."""
    own = [ids[keep] for ids, keep in zip(completion_ids, mask, strict=True)]
    ids, keep = grpo.pad_left(own, "cpu")
    logits = grpo.score(model, [{"ids": prompt} for prompt in prompts], ids, keep.bool())
    return [row[-len(text) :] for row, text in zip(logits, own, strict=True)]


def test_greedy_decoding_equals_generate(teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(grpo, "choose", greedy)
    problems = ["4+5", "37+8+5", "12+3+4+9+9+9", "91*77", "5+5", "66+1+2+3+4", "8+1"]
    prompts = prompt_ids_of(tokenizer, problems)
    completion_ids, mask, clipped = sample(teacher, prompts)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = teacher.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48
        )[0, len(prompt) :]
        assert completion_ids[i][mask[i]].tolist() == theirs.tolist(), problems[i]
        assert bool(clipped[i]) == (int(theirs[-1]) != tokenizer.eos_token_id)


def test_the_rollout_batch_does_not_change_what_is_sampled(teacher, tokenizer):
    prompts = prompt_ids_of(tokenizer, [problem for problem, _ in PROBLEMS])
    whole = sample(teacher, prompts, group=3)
    for size in (1, 4, 7):
        parts = sample(teacher, prompts, group=3, rollout_batch=size)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    other = sample(teacher, prompts, group=3, seed=1)
    assert not torch.equal(whole[0], other[0])


def test_every_end_id_of_the_generation_config_ends_a_completion(teacher, tokenizer, monkeypatch):
    comma = tokenizer.convert_tokens_to_ids(",")
    for ends in ([tokenizer.eos_token_id, comma], [comma], comma):
        monkeypatch.setattr(teacher.generation_config, "eos_token_id", ends)
        prompts = prompt_ids_of(tokenizer, ["12+3+4+9"] * 8)
        completion_ids, mask, _ = sample(teacher, prompts, group=4)
        for ids, keep in zip(completion_ids, mask, strict=True):
            own = ids[keep].tolist()
            assert comma not in own[:-1]
            assert (ids[~keep] == 0).all()
        assert any(comma == ids[keep][-1] for ids, keep in zip(completion_ids, mask, strict=True))


def test_what_is_sampled_is_what_is_scored(teacher, tokenizer, monkeypatch):
    """The logits that a token was drawn from are those it is scored with, at every position."""
    seen, choose = [], grpo.choose
    monkeypatch.setattr(grpo, "choose", lambda z, *rest: seen.append(z) or choose(z, *rest))
    prompts = prompt_ids_of(tokenizer, ["4+5", "12+3+4+9+9+9", "66+1+2+3+4"])
    completion_ids, mask, _ = sample(teacher, prompts, max_new_tokens=6)
    scored = scored_rows(teacher, prompts, completion_ids, mask)
    for t, drawn in enumerate(seen):
        if len(drawn) == len(prompts):  # until a finished row leaves the batch
            for i in mask[:, t].nonzero()[:, 0].tolist():
                assert torch.allclose(drawn[i], scored[i][t], atol=1e-4)
    assert len(seen[1]) == len(prompts)


SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=0)
WINDOW = dict(sliding_window=3, head_dim=8)  # shorter than a prompt and a token


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", dict(n_embd=32, n_layer=2, n_head=2)),
        ("gpt_neox", {}),
        ("llama", {}),
        ("mistral", WINDOW),
        ("gemma3_text", WINDOW | dict(layer_types=["sliding_attention", "full_attention"] * 2)),
        ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    ],
)
def test_any_causal_model_is_sampled_and_scored(kind, more, monkeypatch):
    """They take the cache at other places, its old name only with a warning; two have windows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"eos_token_id": 3} | more)
    model, prompts = AutoModelForCausalLM.from_config(config).eval(), [[5, 6, 7], [8, 9]]
    for weight in model.parameters():  # else attention hardly tells one position from another
        weight.data += torch.randn_like(weight) / 5
    model.generation_config.eos_token_id = 3
    args = types.SimpleNamespace(rollout_batch=4, max_new_tokens=8, temperature=100.0)
    drawn, choose = [], grpo.choose
    monkeypatch.setattr(grpo, "choose", lambda z, *rest: drawn.append(z) or choose(z, *rest))
    ids, mask, _ = grpo.rollout(model, prompts, 2, np.random.default_rng(0), args)
    scored = scored_rows(model, [p for p in prompts for _ in range(2)], ids, mask)
    with torch.no_grad():
        whole = torch.cat([torch.tensor([[8, 9]]), ids[2:3, mask[2]]], 1)
        alone = model(whole, use_cache=False).logits[0, 1:-1]
    assert torch.allclose(scored[2], alone, atol=1e-4)
    together = [z for z in drawn if len(z) == 4]  # until a row has left
    assert len(together) > 3  # beyond the window
    for t, logits in enumerate(together):
        for i in mask[:, t].nonzero()[:, 0].tolist():
            assert torch.allclose(logits[i], scored[i][t], atol=1e-4)


def test_batched_scoring_equals_one_by_one(teacher, tokenizer):
    prompts = prompt_ids_of(tokenizer, [problem for problem, _ in PROBLEMS])
    completion_ids, mask, _ = sample(teacher, prompts)
    batched = scored_rows(teacher, prompts, completion_ids, mask)
    for i, prompt in enumerate(prompts):
        row = completion_ids[i : i + 1, mask[i]]
        # Not through our own padding: the model alone, on the plain sequence.
        with torch.no_grad():
            alone = teacher(torch.cat([torch.tensor([prompt]), row], 1)).logits
        assert torch.allclose(batched[i], alone[0, len(prompt) - 1 : -1], atol=1e-4)


def test_a_micro_batch_is_as_wide_as_its_longest_text(teacher, monkeypatch):
    """Padding stands in front of all; a prompt and a completion that are long need not meet."""
    lengths = [(9, 2), (2, 9), (6, 5), (5, 1), (3, 3), (1, 4)]  # of prompt and completion
    problems, widths = [{"ids": [5] * p} for p, _ in lengths], []
    mask = torch.arange(9) < torch.tensor([[t] for _, t in lengths])
    completion_ids = torch.randint(5, 15, mask.shape)  # what is behind an end is anything
    forward, three = teacher.forward, types.SimpleNamespace(micro_batch=3)

    def spy(ids, **options):
        widths.append(ids.shape)
        return forward(ids, **options)

    monkeypatch.setattr(teacher, "forward", spy)
    rows, seen = torch.arange(6), []
    for part, own, ids, keep in grpo.micro_batches(rows, problems, completion_ids, mask, three):
        assert own == [problems[i] for i in part]
        for i, row, kept in zip(part.tolist(), ids, keep, strict=True):
            assert kept.tolist() == sorted(kept.tolist())  # the completion is at the end
            assert row[kept].tolist() == completion_ids[i][mask[i]].tolist()
        assert grpo.score(teacher, own, ids, keep).shape[:2] == ids.shape
        seen += part.tolist()
    assert sorted(seen) == list(range(6)) and widths == [(3, 6), (3, 11)]


def test_a_micro_batch_for_the_others_sake_has_a_gradient_of_zero(teacher, monkeypatch):
    """FSDP2 works on all ranks at once: who has fewer micro-batches scores a text of no tokens."""
    monkeypatch.setattr(grpo, "gather", lambda count: [count, count + 1])
    mask = torch.ones(2, 4, dtype=torch.bool)
    rows, two = torch.arange(2), types.SimpleNamespace(micro_batch=2)
    problems, completion_ids = [{"ids": [5, 6]}, {"ids": [7]}], torch.full((2, 4), 8)
    parts = list(grpo.micro_batches(rows, problems, completion_ids, mask, two))
    (*_, keep), (part, own, ids, no) = parts
    assert keep.sum() == 8 and part.tolist() == [0] and own == problems[:1] and no.shape == (1, 0)
    logits = grpo.score(teacher, own, ids, no)
    logp, entropy = grpo.token_logprob(logits, ids, inplace_backward=True)
    teacher.zero_grad()
    grpo.policy_loss(logp, logp.detach(), torch.ones(1, 1), no, 8).backward()
    assert entropy.shape == (1, 0)
    assert all((p.grad == 0).all() for p in teacher.parameters())


def test_decoding_stops_when_all_have_ended_be_it_one_by_one(teacher, monkeypatch):
    """One of eight ends early and stays in the batch, as dropping it alone would not pay."""
    end, widths, forward = teacher.generation_config.eos_token_id, [], teacher.forward
    end = end[0] if isinstance(end, list) else end

    def choose(logits, temperature, row):
        last = torch.where(row == 0, 1, 4)  # counted in forward passes
        return torch.where(last == len(widths), end, 7)

    def spy(ids, **options):
        widths.append(len(ids))
        return forward(ids, **options)

    monkeypatch.setattr(grpo, "choose", choose)
    monkeypatch.setattr(teacher, "forward", spy)
    rows = torch.arange(8.0)[:, None].repeat(1, 20)
    _, mask, clipped = grpo.decode(teacher, [[5, 6]], torch.zeros(8, dtype=torch.long), rows, 1.0)
    assert widths == [1, 8, 8, 8]  # the prompt, then each token but the last
    assert mask.sum(1).tolist() == [1, *[4] * 7] and not clipped.any()


def test_choose_follows_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, -float("inf"), 0.0]).expand(40_000, 4)
    noise = torch.from_numpy(np.random.default_rng(0).random(40_000))
    counts = torch.bincount(grpo.choose(logits, 0.7, noise), minlength=4) / 40_000
    assert torch.allclose(counts, (logits[0] / 0.7).softmax(-1), atol=0.01)
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    padded = torch.tensor([[-float("inf"), 1.0, 1.0, -float("inf")]]).expand(2, 4)
    assert grpo.choose(padded, 1.0, extremes).tolist() == [1, 2]  # never a row of probability 0
    # A tail of rare tokens, each far below what fp32 can add to a running sum of almost 1.
    logits = torch.full((100, 151_936), -20.0).index_fill(1, torch.tensor([0]), 0.0)
    rare = torch.arange(151_836, 151_936)
    noise = (1 + (rare.double() - 0.5) * math.exp(-20)) / (1 + 151_935 * math.exp(-20))
    assert torch.equal(grpo.choose(logits, 1.0, noise), rare)


def test_under_autocast_the_cache_is_in_the_lower_precision(teacher, tokenizer, monkeypatch):
    rooms, update = [], grpo.KVLayer.update

    def spy(self, *args, **kwargs):
        kept = update(self, *args, **kwargs)
        rooms.append((self.room.dtype, kept[0].dtype, kept[1].dtype))
        return kept

    monkeypatch.setattr(grpo.KVLayer, "update", spy)
    monkeypatch.setattr(grpo, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
    sample(teacher, prompt_ids_of(tokenizer, ["4+5", "37+8"]), max_new_tokens=4)
    assert set(rooms) == {(torch.bfloat16,) * 3}


def test_a_model_stored_in_bf16_is_trained_in_fp32(data, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(tmp_path / "half")
    seen, validate = set(), grpo.validate
    monkeypatch.setattr(
        grpo,
        "validate",
        lambda m, *a: seen.update(p.dtype for p in m.parameters()) or validate(m, *a),
    )
    grpo.main(command(data, "--model", str(tmp_path / "half"), "--out", str(tmp_path / "run")))
    assert seen == {torch.float32}


def test_a_token_does_not_copy_the_cache():
    layer = grpo.KVLayer()
    layer.update(torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4))
    place = layer.room.data_ptr()
    for length in range(6, 70):
        new = torch.full((2, 1, 1, 4), float(length))
        keys, values = layer.update(new, -new)
        assert layer.room.data_ptr() == place
        assert keys.shape == (2, 1, length, 4)
        assert (keys[:, :, -1] == length).all() and (values[:, :, -1] == -length).all()
    before = keys.clone()
    for _ in range(20):  # over the end of the room
        keys, _ = layer.update(new, new)
    assert torch.equal(keys[:, :, :69], before)
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.keys, keys[1:])


# --- problems and grading -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{50}", "50"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{x : x > 1\\right.}", "\\left\\{x : x > 1\\right."),
        ("\\boxed{7} and then \\boxed{8", "7"),
        ("\\boxed {9}", "9"),
        ("\\boxed{}", None),
        ("\\boxed{5}, as asked for within \\boxed{ }", "5"),  # a part of the question
        ("no box", None),
        ("\\boxed{1", None),
        ("\\boxed{" * 50_000, None),
        ("{" * 100_000 + "\\boxed{3}", "3"),
    ],
)
def test_last_balanced_box(text, answer):
    assert grpo.last_boxed(text) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("50", "50", True),
        ("50", "050", True),
        ("50", "51", False),
        ("50", "", False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("\\frac{1}{2}", "\\frac{1}{3}", False),
        ("1,000", "1000", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("\\{1,2\\}", "\\{1,3\\}", False),
        ("(1,2]", "(1,2)", False),
        ("\\text{Evelyn}", "\\text{Evelyn}", True),
        ("\\text{Evelyn}", "\\text{Bob}", False),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2 + y^2", "x^2+y^2", True),  # powers, but no tower of them
        ("\\frac{a^2}{b^2}", "\\dfrac{a^2}{b^2}", True),
        ("2^{10} \\cdot 3^5", "2^{10}\\cdot3^5", True),
        ("90^\\circ, 45^\\circ", "90^\\circ,45^\\circ", True),
        ("x^4 - 2x^2 + 1", "(x-1)^2(x+1)^2", True),
        ("120", "\\binom{10}{3}", True),
        ("10^{2024} - 1", "10^{2024}-1", True),  # a long power, as the gold answer
        ("\\frac{12}{5525}", "\\frac{12}{5,\\!525}", True),
        ("\\frac{\\pi}{4}, -1", "\\frac\\pi4, -1", True),
        ("y = \\frac{x}{2} + 2", "y = 1/2 x + 2", True),
        ("\\frac{2\\pi}{3}", "2/3\\pi", True),
        ("x^{\\frac{1}{2}}", "x^{1/2}", True),
        ("\\frac{5}{2}", "2 1/2", True),
        ("0.75", "1.5/2", True),
        ("0.4", "1/2.5", True),
        ("4t", "4t", True),
        ("4t", "4 \\cdot t", True),
        ("4t", "4", False),  # no unit
        ("5", "5 m", True),  # a unit
        ("a + b + c", "c+b+a", True),
        ("\\sin^2 t", "1 - \\cos^2 t", True),
        ("5", "9^{9^{9^9}}", False),
        ("5", "\\text{__import__('os').system('touch pwned')}", False),
    ],
)
def test_same_answer(gold, answer, same):
    assert grpo.same_answer(gold, answer) is same


@pytest.mark.parametrize("script", ["grpo", "paced", "eval_math"])
def test_an_answer_that_takes_too_long_is_wrong_and_nothing_is_printed(script, tmp_path):
    code = f"import {script}; assert not {script}.same_answer('5', '(x+y+z)^{{300}}')"
    (tmp_path / "check.py").write_text(code)
    began = time.monotonic()
    assert run([tmp_path / "check.py"], tmp_path / "said") == 0
    assert time.monotonic() - began < 30
    assert (tmp_path / "said").read_text() == ""


def test_hostile_answers_do_not_stall_a_step(tokenizer, monkeypatch):
    towers = [f"9^{{9^{{9^{{{i}}}}}}}" for i in range(30)] + [f"{i}{i}99999!" for i in range(30)]
    towers += [f"(10^{{999}})^{{99{i}}}" for i in range(30)] + ["1" * 10**6, "{" * 10**5]
    texts = [f"\\boxed{{{tower}}}" for tower in towers]
    monkeypatch.setattr(tokenizer.__class__, "decode", lambda self, i, **_: texts[int(i[0])])
    ids = torch.arange(len(texts))[:, None]
    began = time.monotonic()
    _, rewards = grpo.grade(tokenizer, ids, torch.ones_like(ids).bool(), ["5"] * len(texts))
    assert time.monotonic() - began < 5
    assert sum(rewards) == 0


def test_a_batch_spends_seconds_at_most_on_what_no_screen_catches(tokenizer, monkeypatch):
    texts = [f"\\boxed{{x + {i}}}" for i in range(99)] + ["\\boxed{99}", "\\boxed{099}"]
    monkeypatch.setattr(tokenizer.__class__, "decode", lambda self, i, **_: texts[int(i[0])])
    clock = iter(range(10_000))
    monkeypatch.setattr(grpo.time, "process_time", lambda: next(clock))  # each takes a second
    calls = []
    monkeypatch.setattr(grpo, "same_answer", lambda *a: calls.append(a) or False)
    ids = torch.arange(101)[:, None]
    _, rewards = grpo.grade(tokenizer, ids, torch.ones_like(ids).bool(), ["99"] * 101)
    assert len(calls) == 12 and calls[-1] == ("99", "099")  # integers are read all the same
    assert rewards[99] == 1.0  # the same text still counts


def load(tokenizer, path, labelled=True):
    args = types.SimpleNamespace(thinking=False, prompt_suffix="", max_new_tokens=8)
    problems = grpo.load_problems(str(path), tokenizer, args, 256)
    if labelled:
        grpo.read_answers(problems)
    return problems


@pytest.mark.parametrize(
    ("row", "problem", "answer"),
    [
        ({"problem": "4+5", "answer": 9}, "4+5", "9"),
        ({"question": "4+5", "answer": "4+5=9\n#### 9"}, "4+5", "9"),
        ({"prompt": "4+5", "solution": "so \\boxed{\\frac{1}{2}}"}, "4+5", "\\frac{1}{2}"),
        ({"problem": "4+5", "ground_truth": "9"}, "4+5", "9"),
        ({"problem": "4+5", "solution": "\\boxed{x is odd}"}, "4+5", "x is odd"),
        ({"problem": "4+5", "answer": None, "solution": "\\boxed{9}"}, "4+5", "9"),
        ({"problem": "4+5", "answer": ["9"], "solution": "\\boxed{9}"}, "4+5", "9"),
        ({"problem": "4+5", "answer": 9.5}, "4+5", "9.5"),
        (
            {
                "prompt": [
                    {
                        "role": "user",
                        "content": "Solve the following math problem step by step. The last line "
                        "of your response should be of the form Answer: $Answer (without quotes) "
                        "where $Answer is the answer to the problem.\n\n4+5\n\nRemember to put "
                        'your answer on its own line after "Answer:".',
                    }
                ],
                "reward_model": {"ground_truth": "9", "style": "rule"},
            },
            "4+5",
            "9",
        ),
    ],
)
def test_forms_of_data(tokenizer, tmp_path, row, problem, answer):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    (loaded,) = load(tokenizer, tmp_path / "d.jsonl")
    assert (loaded["problem"], loaded["answer"]) == (problem, answer)
    assert loaded["prompt"] == f"<|user|>{problem}<|assistant|>"


class HubData(list):
    def train_test_split(self, test_size, seed):
        assert (test_size, seed) == (0.2, 42)
        return {"train": HubData(self[: int(0.8 * len(self))])}


def test_data_sets_of_the_hub(tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit):
        load(tokenizer, "openai/gsm8k")
    assert "pip install datasets" in capsys.readouterr().err
    rows = [{"problem": f"{i}+1", "answer": f"{i + 1}"} for i in range(10)]
    asked = []
    fake = types.SimpleNamespace(
        load_dataset=lambda *name, split: asked.append((*name, split)) or HubData(rows)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(load(tokenizer, "some/data:test")) == 10
    assert len(load(tokenizer, grpo.DAPO)) == 8
    assert len(load(tokenizer, "some/data:main:test")) == 10
    assert asked == [("some/data", "test"), (grpo.DAPO, "train"), ("some/data", "main", "test")]

    def several(name, split):
        raise ValueError("Config name is missing.\nPick one of main, socratic\nExample: ...")

    fake.load_dataset = several
    with pytest.raises(SystemExit):
        load(tokenizer, "openai/gsm8k")
    assert capsys.readouterr().err == (
        "grpo.py: openai/gsm8k: Config name is missing. Pick one of main, socratic\n"
    )


def test_unlabelled_problems_and_prompts_that_are_too_long(tokenizer, tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text(
        json.dumps({"problem": "4+5"}) + "\n" + json.dumps({"problem": "1+" * 200 + "1"})
    )
    assert [p["problem"] for p in load(tokenizer, path, labelled=False)] == ["4+5"]
    assert "skipped 1 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("script", [grpo, fkl_warmup, opd, paced, eval_math])
def test_a_template_that_writes_the_date_makes_the_same_prompt_on_every_day(script):
    """As Llama's does: a run, its rollouts and its evaluation would be those of another prompt."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    date = "{{ strftime_now('%d %b %Y') }}{{ strftime_now(format='')[:0] }}"
    tokenizer.chat_template = {"default": date + ": {{ messages[0]['content'] }}"}
    args = types.SimpleNamespace(thinking=False, prompt_suffix="!")
    assert script.render("4+5", tokenizer, args)[0] == "26 Jul 2024: 4+5!"


def test_a_tokenizer_without_chat_template(tmp_path, data, monkeypatch, capsys):
    shutil.copytree(TEACHER, tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    monkeypatch.chdir(tmp_path)
    grpo.main(command(data, "--model", "plain", "--out", "x", "--steps", "1"))
    out = capsys.readouterr().out
    assert "no chat template" in out
    assert "<|user|>" not in out


# --- a run on disk --------------------------------------------------------------------------------

KEYS = "step reward pass_rate kl entropy length clipped zero_variance grad_norm lr tokens labels"


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_leaves_what_it_promises(tmp_path, data, capsys):
    out = tmp_path / "run"
    grpo.main(command(data, "--out", str(out), "--warmup-steps", "2", "--lr", "1e-3"))
    printed = capsys.readouterr().out
    for promised in (f"--out {out}", "<|user|>", "reward", "peak memory", "best avg@G"):
        assert promised in printed
    metrics = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert set(metrics[0]) == {*KEYS.split(), "seconds", "val"}
    assert [line["lr"] for line in metrics] == [5e-4, 1e-3, 1e-3]
    assert [line["labels"] for line in metrics] == [2, 4, 5]
    assert [line["val"] is None for line in metrics] == [True, False, False]
    assert {"step", "problem", "completion", "reward"} == set(lines_of(out / "samples.jsonl")[0])
    for name in ("best", "final", "checkpoint"):
        AutoModelForCausalLM.from_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / name)
    assert not [path for path in out.iterdir() if path.suffix in (".new", ".old")]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["versions"]["torch"] == torch.__version__
    final = (out / "final/model.safetensors").read_bytes()
    assert final != Path(TEACHER, "model.safetensors").read_bytes()
    # Done: the same command does nothing, more steps go on, and the next script can start from it.
    grpo.main(command(data, "--out", str(out), "--warmup-steps", "2", "--lr", "1e-3"))
    assert "a larger --steps goes on" in capsys.readouterr().out
    grpo.main(
        command(data, "--out", str(out), "--warmup-steps", "2", "--lr", "1e-3", "--steps", "4")
    )
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [1, 2, 3, 4]
    grpo.main(command(data, "--model", str(out / "best"), "--out", str(tmp_path / "next")))


def test_best_is_the_best_on_validation(tmp_path, data, monkeypatch):
    values = iter([0.2, 0.5, 0.4])
    weights = []

    def validate(model, *_):
        weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        return next(values)

    monkeypatch.setattr(grpo, "validate", validate)
    grpo.main(command(data, "--out", str(tmp_path / "run")))  # validates before, at 2 and at 3
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    assert torch.equal(torch.cat([p.detach().flatten() for p in best.parameters()]), weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_without_out_every_run_is_a_new_one(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grpo.main(command(data, "--steps", "1"))
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("grpo-20")
    first = f"step 0; --out runs/{run.name} goes on with this run"
    assert capsys.readouterr().out.startswith(first)


def test_two_runs_in_one_second_do_not_meet(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo.time, "strftime", lambda form: "runs/grpo-20261121-140305")
    grpo.main(command(data, "--steps", "1"))
    assert "File exists" in refusal(capsys, command(data, "--steps", "1"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["grpo-20261121-140305"]


def test_help_names_every_flag_and_both_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag[0] in printed for flag in grpo.FLAGS)
    assert "[32, paper 512]" in printed


def test_without_validation_data_a_tenth_is_set_aside(tmp_path, monkeypatch, capsys):
    rows = [
        {"problem": f"{i}+{j}", "answer": f"{i + j}"} for i in range(1, 8) for j in range(1, 10)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    monkeypatch.setattr(
        grpo, "validate", lambda model, tokenizer, problems, args: seen.extend(problems) or 0.0
    )
    monkeypatch.chdir(tmp_path)
    small = command("d.jsonl", "--out", "x", "--steps", "1", "--prompts-per-step", "56")
    del small[4:6]  # --val-data
    grpo.main(small)
    assert "7 in all" in capsys.readouterr().out
    used = {line["problem"] for line in lines_of("x/samples.jsonl")}
    assert not used & {p["problem"] for p in seen}
    assert lines_of("x/metrics.jsonl")[0]["labels"] == 56


def test_show_prints_one_rollout_token_by_token(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grpo.main(command(data, "--show", "--samples-per-prompt", "8"))
    printed = capsys.readouterr().out
    assert "'<|end|>'" in printed and "\033" not in printed
    assert not (tmp_path / "runs").exists()


def test_show_is_in_colour_on_a_terminal_only(tokenizer, monkeypatch, capsys):
    ids, signal = torch.tensor([5, 6]), torch.tensor([1.5, -0.5])
    monkeypatch.setattr(grpo.sys.stdout, "isatty", lambda: True, raising=False)
    grpo.show(tokenizer, ids, signal, "advantage")
    green, red = capsys.readouterr().out.splitlines()[1:]
    assert green.startswith("\033[32m") and "+1.500" in green
    assert red.startswith("\033[31m") and "-0.500" in red


def test_the_papers_settings_and_who_gets_them(monkeypatch):
    args, _ = grpo.parse_arguments(["--model", TEACHER, "--preset", "paper"])
    got = (args.data, args.prompts_per_step, args.samples_per_prompt, args.updates_per_step)
    assert got == (grpo.DAPO, 512, 8, 4)
    assert (args.lr, args.weight_decay, args.grad_clip, args.temperature) == (1e-6, 0.1, 1.0, 1.0)
    assert (args.max_new_tokens, args.val_data) == (8192, None) and "boxed" in args.prompt_suffix
    assert args.checkpointing  # the activations of 8,192 tokens leave no room on a card
    assert (grpo.CLIP_LOW, grpo.CLIP_HIGH, grpo.DUAL_CLIP) == (0.2, 0.28, 10.0)
    config = Qwen3Config(hidden_size=512, num_hidden_layers=8, vocab_size=32_000)  # > 10 M
    monkeypatch.setattr(grpo.AutoConfig, "from_pretrained", lambda name: config)
    assert grpo.parse_arguments([])[0].preset == "paper"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script catches it."""


def run_with_a_kill(monkeypatch, arguments, at):
    """Run until the at-th touch of the disk and die there; True if the run ended before."""
    touches = itertools.count()

    def deadly(function):
        def wrapper(*args, **kwargs):
            if next(touches) == at:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(grpo.torch, "save", deadly(torch.save))
        patch.setattr(grpo.json, "dumps", deadly(json.dumps))
        patch.setattr(grpo.shutil, "rmtree", deadly(shutil.rmtree))
        for name in ("rename", "replace", "write_text", "mkdir"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        try:
            grpo.main(arguments)
        except Killed:
            return False
    return True


def same_run(one, other):
    for name in ("final", "best", "checkpoint"):
        weights = [(run / name / "model.safetensors").read_bytes() for run in (one, other)]
        assert weights[0] == weights[1], name
    moments = [torch.load(run / "checkpoint/optimizer.pt")["state"] for run in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for key, state in moments[0].items():
        for name, value in state.items():
            assert torch.equal(value, moments[1][key][name]), (key, name)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    metrics = [lines_of(run / "metrics.jsonl") for run in (one, other)]
    for mine, theirs in zip(*metrics, strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


def test_a_kill_at_any_touch_of_the_disk_changes_no_bit(tmp_path, data, monkeypatch):
    arguments = command(data, "--updates-per-step", "2")
    whole = tmp_path / "whole"
    grpo.main([*arguments, "--out", str(whole)])
    killed = tmp_path / "killed"
    deaths = 0
    # Each life dies a little later than the one before it, until one reaches the end.
    for at in itertools.count():
        if run_with_a_kill(monkeypatch, [*arguments, "--out", str(killed)], at):
            break
        deaths += 1
        for name in ("best", "final", "checkpoint"):  # what is there is whole
            for folder in (killed / name, killed / f"{name}.old"):
                if folder.exists():
                    AutoModelForCausalLM.from_pretrained(folder)
    assert deaths > 30
    same_run(whole, killed)


def test_sigkill_at_random_moments_changes_no_bit(tmp_path, data):
    more = ["--steps", "60", "--save-every", "5", "--samples-per-prompt", "8"]
    arguments = ["grpo.py", *command(data, *more), "--out"]
    assert run([*arguments, tmp_path / "whole"]) == 0
    rng, killed = random.Random(0), tmp_path / "killed"
    for _ in range(2):
        process = start([*arguments, killed])
        while not (killed / "checkpoint").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -9  # killed, not ended
    assert run([*arguments, killed]) == 0
    same_run(tmp_path / "whole", killed)


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, data, monkeypatch, capsys):
    free = types.SimpleNamespace(free=10_000_000)
    monkeypatch.setattr(grpo.shutil, "disk_usage", lambda path: free)
    said = refusal(capsys, command(data, "--out", str(tmp_path / "run")))
    assert "0.0 GB" in said and "make room" in said
    assert not (tmp_path / "run/best").exists()


def test_completions_that_are_cut_are_warned_of(tmp_path, data, capsys):
    more = ("--max-new-tokens", "2", "--steps", "1")
    grpo.main(command(data, "--out", str(tmp_path / "run"), *more))
    assert "over half of the completions are cut" in capsys.readouterr().out
    (line,) = lines_of(tmp_path / "run/metrics.jsonl")
    assert (line["clipped"], line["length"]) == (1.0, 2.0)
    assert line["tokens"] == 2 * line["labels"] * 4  # of four completions each


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, data, monkeypatch, capsys):
    out, calls = tmp_path / "run", itertools.count()

    def full(*args):
        if next(calls) == 1:
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        torch_save(*args)

    torch_save = torch.save
    monkeypatch.setattr(grpo.torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        grpo.main(command(data, "--out", str(out)))
    assert stop.value.code == 2
    assert "make room" in capsys.readouterr().err
    assert json.loads((out / "checkpoint/state.json").read_text())["step"] == 1
    assert not (out / "checkpoint.new").exists()
    grpo.main(command(data, "--out", str(out)))
    assert (out / "final").exists()


def test_a_final_of_before_an_extension_does_not_pass_for_its_end(tmp_path, data, monkeypatch):
    out, save = tmp_path / "run", grpo.save

    def killed_at_final(path, *args):
        if path.name == "final":
            raise Killed
        save(path, *args)

    grpo.main(command(data, "--out", str(out), "--steps", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "save", killed_at_final)
        with pytest.raises(Killed):
            grpo.main(command(data, "--out", str(out), "--steps", "2"))
    grpo.main(command(data, "--out", str(out), "--steps", "2"))
    weights = [(out / name / "model.safetensors").read_bytes() for name in ("final", "checkpoint")]
    assert weights[0] == weights[1]


# --- bad input ------------------------------------------------------------------------------------


def refusal(capsys, arguments):
    capsys.readouterr()  # the bars of earlier runs, where the machine was slow
    with pytest.raises(SystemExit) as stop:
        grpo.main(arguments)
    assert stop.value.code == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]
    assert len(err) == 1, err
    return err[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "no/such/model"], "no/such/model"),
        (["--model", "./nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--samples-per-prompt", "1"], "--samples-per-prompt must be at least 2"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1"),
        (["--lr=-1e-6"], "--lr must be at least 0"),
        (["--lr", "nan"], "--lr must be at least 0"),
        (["--steps", "many"], "--steps"),
        (["--device", "bogus"], "--device"),
        (["--updates-per-step", "3"], "--updates-per-step"),
        (["--stepz", "3"], "--stepz"),
        (["--max-new-tokens", "256"], "context of 256"),
    ],
)
def test_bad_flags(capsys, data, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refusal(capsys, command(data, *more))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":6: not a JSON object"),
        ("[1]", ":6: not a JSON object"),
        ('{"answer": "1"}', ":6: no problem"),
        ('{"problem": "1+1"}', ":6: no answer"),
        ('{"problem": "1+1", "answer": ""}', ":6: no answer"),
        ('{"problem": "1+1", "answer": null, "reward_model": "rule"}', ":6: no answer"),
        ('{"problem": 5, "answer": "1"}', ":6: no problem"),
        ('{"prompt": [], "answer": "1"}', ":6: no problem"),
        ('{"prompt": ["4+5"], "answer": "1"}', ":6: no problem"),
        ("\xff", ":6: not a JSON object"),
        ('{"problem": "1+1", "answer": "\\\\frac{1}{"}', ":6: no answer"),
        ('{"problem": "1+1", "answer": "The sum is 2."}', ":6: no answer"),
        ('{"problem": "1+1", "answer": "Answer: 2"}', ":6: no answer"),
        ('{"problem": "1+1", "solution": "Hence $x = \\\\boxed 2$."}', ":6: no answer"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', ":6: no problem"),
        ('[["problem", "1+1"], ["answer", "2"]]', ":6: not a JSON object"),
    ],
)
def test_bad_lines(capsys, data, line, said):
    with open(data, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    assert f"{data}{said}" in refusal(capsys, command(data))


def test_all_answers_that_cannot_be_read_are_named_at_once(capsys, data):
    with open(data, "a") as file:
        file.write('{"problem": "1+1"}\n{"problem": "1+2", "answer": "3"}\n{"problem": "1+3"}\n')
    assert f"{data}:6, {data}:8: no answer" in refusal(capsys, command(data))


def test_an_empty_file(capsys, data):
    Path(data).write_text("")
    assert "data.jsonl" in refusal(capsys, command(data))


def test_another_run_in_out(capsys, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    once = command(data, "--out", str(out), "--steps", "1")
    grpo.main(once)
    said = refusal(capsys, [*once, "--lr", "0.5"])
    assert "lr was 0.0003" in said and "--overwrite" in said
    memory = ["--micro-batch", "3", "--rollout-batch", "5", "--checkpointing", "1", "--steps", "2"]
    grpo.main([*once, *memory])  # what a run needs that has met the limits of its card
    grpo.main([*once, "--steps", "2"])
    once = [*once, "--steps", "2"]
    source = (ROOT / "grpo.py").read_text()
    commented = source.replace("CLIP_LOW, CLIP_HIGH", "# a comment\nCLIP_LOW, CLIP_HIGH", 1)
    for text, edited in (
        (commented, False),
        (source.replace("0.28, 10.0", "0.3, 10.0"), 1),
    ):
        (tmp_path / "grpo.py").write_text(text)
        shutil.copytree(ROOT / "kernels", tmp_path / "kernels", dirs_exist_ok=True)
        monkeypatch.setattr(grpo, "__file__", str(tmp_path / "grpo.py"))
        if edited:
            assert "the code was edited" in refusal(capsys, once)
        else:
            grpo.main(once)
    (tmp_path / "grpo.py").write_text(commented)
    with (tmp_path / "kernels/reference.py").open("a") as kernel:
        kernel.write("CHUNK = 1\n")
    assert "the code was edited" in refusal(capsys, once)
    monkeypatch.undo()
    rows = Path(data).read_text()
    Path(data).write_text("".join(reversed(rows.splitlines(keepends=True))))
    assert "the data was edited" in refusal(capsys, once)
    Path(data).write_text(rows)
    grpo.main(once)
    grpo.main([*once, "--overwrite"])
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("ten years of work")
    for more in ([], ["--overwrite"]):
        said = refusal(capsys, command(data, "--out", str(stranger), *more))
        assert "give another --out" in said
    assert (stranger / "thesis.tex").exists()
    model = shutil.copytree(TEACHER, tmp_path / "model")
    other = command(data, "--model", str(model), "--out", str(tmp_path / "other"), "--steps", "1")
    grpo.main(other)
    shutil.copy(out / "final/model.safetensors", model)
    assert "the model was edited" in refusal(capsys, other)
    # A model's directory has a config.json, too.
    for more in ([], ["--overwrite"]):
        said = refusal(capsys, command(data, "--out", str(model), *more))
        assert "give another --out" in said
    assert (model / "model.safetensors").exists()
    for no_model in (out, tmp_path, ROOT / "tiny", "runs/nowhere/best"):
        said = refusal(capsys, command(data, "--model", str(no_model)))
        assert "holds no model; to use a run, give its best/ or final/" in said
    for file in model.glob("*token*"):
        file.unlink()
    said = refusal(capsys, command(data, "--model", str(model)))
    assert "is the tokenizer missing from the model?" in said


def test_ctrl_c_is_one_line(capsys, data, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "grade", stopped)
    said = refusal(capsys, command(data, "--out", str(tmp_path / "run")))
    assert said == "grpo.py: stopped; the same command with --out resumes"


def test_memory_that_runs_out_is_told_in_a_line(capsys, data, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(grpo, "score", full)
    said = refusal(capsys, command(data, "--out", str(tmp_path / "run")))
    section = said.split('"')[1]
    assert f"## {section}" in (ROOT / "README.md").read_text()


def test_a_gradient_that_is_not_finite_stops_the_run(capsys, data, tmp_path, monkeypatch):
    loss, calls = grpo.policy_loss, itertools.count()
    monkeypatch.setattr(
        grpo, "policy_loss", lambda *a: loss(*a) * (float("nan") if next(calls) == 1 else 1.0)
    )
    said = refusal(capsys, command(data, "--out", str(tmp_path / "run")))
    assert "step 2" in said and "not finite" in said
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint").parameters()
    assert all(bool(p.isfinite().all()) for p in weights)
    assert np.isfinite(lines_of(tmp_path / "run/metrics.jsonl")[-1]["grad_norm"])


def test_thinking_reaches_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ enable_thinking }} {{ messages[0].content }}"
    )
    for flags, prompt in ((), "False 4+5"), (("--thinking",), "True 4+5"):
        args, _ = grpo.parse_arguments(["--model", TEACHER, *flags])
        assert grpo.render("4+5", tokenizer, args)[0] == prompt


def test_what_is_logged_of_the_rewards(data, tmp_path, monkeypatch):
    rewards = [1.0] * 4 + [1.0, 0.0, 0.0, 0.0]
    monkeypatch.setattr(grpo, "validate", lambda *_: 0.0)
    monkeypatch.setattr(grpo, "grade", lambda t, ids, mask, golds: (golds, rewards))
    grpo.main(command(data, "--out", str(tmp_path / "run"), "--steps", "1"))
    (line,) = lines_of(tmp_path / "run/metrics.jsonl")
    assert (line["reward"], line["pass_rate"], line["zero_variance"]) == (5 / 8, 5 / 8, 1 / 2)
    assert line["grad_norm"] > 0
