"""tiny/snr_probe.py: its numbers against brute force and planted signals, its gradients, a run."""

import copy
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import paced
from tiny import snr_probe

MODELS = [str(Path(__file__).parent.parent / "tiny" / name) for name in ("student", "teacher")]
FLAGS = ["--student", MODELS[0], "--teacher", MODELS[1]]


def vectors(n, snr, seed=0, size=4000):
    g = np.random.default_rng(seed).normal(size=(n, size)) / size**0.5
    g[:, 0] += snr  # the noise has length 1
    return g


def test_snr_and_cosine_are_those_of_brute_force():
    g = vectors(7, 1.0, size=5)
    gram, length = g @ g.T, np.linalg.norm(g, axis=1)
    found = snr_probe.measure_bin(gram, np.random.default_rng(0))
    noise = np.sqrt((np.linalg.norm(g - g.mean(0), axis=1) ** 2).mean())
    assert found["defined"] == pytest.approx(np.linalg.norm(g.mean(0)) / noise)
    # A resample that holds problem 0 twice and problem 4 thrice, pair after pair.
    again = snr_probe.measure(gram, np.array([[2, 0, 1, 0, 3, 1, 0]]))
    whole = found["snr"], found["cosine"]
    for (snr, cosine), drawn in ((whole, [*range(7)]), (again, [0, 0, 2, 4, 4, 4, 5])):
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        signal, power = np.mean([gram[pair] for pair in pairs]), gram.diagonal()[drawn].mean()
        assert snr[0] == pytest.approx(np.sqrt(signal / (power - signal)))
        cosines = [gram[i, j] / length[i] / length[j] for i, j in pairs]
        assert cosine[0] == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize("n", [8, 40, 300])
@pytest.mark.parametrize("planted", [0.0, 0.3, 1.0])
def test_a_planted_snr_is_found_whatever_the_size_of_the_bin(n, planted):
    g = vectors(n, planted)
    found = snr_probe.measure_bin(g @ g.T, np.random.default_rng(0))
    assert found["snr"][0] == pytest.approx(planted, abs=0.06)
    low, high = snr_probe.band(found["snr"])
    assert low - 0.02 <= planted <= high + 0.02 and high - low < 0.15
    assert planted or found["defined"] == pytest.approx(found["pure"], rel=0.05)
    assert planted or high < found["pure"] / 2


def bins_with(snr):
    p = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.55, 0.7, 0.8, 0.95, 1])
    return [dict(p=x, n=10 + i, snr=np.array([snr(x)] * 3)) for i, x in enumerate(p)]


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 0.5), (0.5, 3)])
def test_the_slopes_of_a_kernel_are_its_own(a, b):
    args = types.SimpleNamespace(alpha=a, beta=b)
    for _, kernel, values in snr_probe.end_slopes(bins_with(lambda p: p**a * (1 - p) ** b), args):
        assert values == pytest.approx([kernel] * 3)
    powers = bins_with(lambda p: p**a if p < 0.5 else 7 * (1 - p) ** b)
    for exponent, end in zip((a, b), snr_probe.end_slopes(powers, args), strict=True):
        assert end[2] == pytest.approx([exponent] * 3, abs=0.01)
    assert np.isnan([end[1] for end in snr_probe.end_slopes(powers[:2], args)]).all()


def test_both_ends_are_bins_of_their_own():
    names = [snr_probe.NAMES[i] for i in snr_probe.bin_of(np.array([0, 1, 2, 33, 63, 64]) / 64)]
    assert names == ["0", "(0, 1/32]", "(0, 1/32]", "(1/2, 5/8]", "(31/32, 1)", "1"]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_gradient_is_that_of_the_problems_loss_by_hand(direction):
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in MODELS)
    args = paced.parse_arguments([*FLAGS, "--device", "cpu", "--max-new-tokens", "40"])[0]
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    prompts = [paced.render(text, tokenizer, args)[1] for text in ("37+8+5", "9+4")]
    problems = [{"ids": ids, "teacher_ids": ids} for ids in prompts]
    more = student, teacher, problems, direction, 6, np.random.default_rng(5), args
    rows = snr_probe.problem_gradients(*more)
    sampled = paced.sample(*more[:5], np.random.default_rng(5), args)
    for i, prompt in enumerate(map(torch.tensor, prompts)):
        loss = 0.0
        for ids, keep in zip(*(column[6 * i : 6 * i + 6] for column in sampled[:2]), strict=True):
            text = torch.cat([prompt, ids[keep]])[None, :-1]
            own, theirs = (m(text).logits[0, len(prompt) - 1 :] for m in (student, teacher))
            own, theirs = own.log_softmax(-1), theirs.detach().log_softmax(-1)
            p, q = (theirs, own) if direction == "forward" else (own, theirs)
            loss = loss + (p.exp() * (p - q)).sum() / 6
        expected = torch.autograd.grad(loss, list(student.parameters()))
        expected = torch.cat([g.flatten() for g in expected])
        assert (rows[i] - expected).norm() < 1e-4 * expected.norm()


def test_a_run_writes_table_and_picture_and_never_reuses_noise(tmp_path, monkeypatch, capsys):
    data, out, noise, rollout = tmp_path / "data.jsonl", tmp_path / "out", [], paced.rollout
    rows = [{"problem": f"{n}*{n + 1}", "answer": str(n * n + n)} for n in range(31, 47)]
    rows += [{"problem": f"{n}+3", "answer": str(n + 3)} for n in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def spy(model, prompts, group, rng, args):
        noise.append((group, *copy.deepcopy(rng).random(3)))
        return rollout(model, prompts, group, rng, args)

    monkeypatch.setattr(paced, "rollout", spy)
    command = [*FLAGS, "--data", str(data), "--out", str(out), "--grad-rollouts", "4"]
    snr_probe.main(command)
    assert [group for group, *_ in noise] == [64, 4, 4]
    assert len({draw for _, *draws in noise for draw in draws}) == 9
    text, saved = (out / "snr.md").read_text(), np.load(out / "snr.npz")
    never = saved["pass_rate"] == 0
    gram = saved["reverse"][np.ix_(never, never)]
    snr = (gram.mean() / (gram.diagonal().mean() - gram.mean())) ** 0.5
    cells = text.split("### reverse")[1].split("| 0 | ")[1].split(" | ")
    assert cells[0] == str(never.sum()) and cells[3] == f"{snr:.3f}"
    assert (out / "snr.png").read_bytes().startswith(b"\x89PNG") and text in capsys.readouterr().out
    wrong = {"holds something": "", "at least 64": "--pass-rollouts=8", "nowhere": "--data=nowhere"}
    for message, flag in (wrong | {"same model": f"--teacher={MODELS[0]}"}).items():
        with pytest.raises(SystemExit, match="2"):
            snr_probe.main([*command, *[flag, f"--out={tmp_path / 'new'}"] * bool(flag)])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
