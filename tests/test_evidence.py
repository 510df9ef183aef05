"""tiny/evidence.py: its verdicts on made-up results, EVIDENCE.md against the records, a run."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tiny import evidence

ROOT = Path(__file__).parent.parent

PAIR = [("a claim", "a > b")]


def seeds_of(gaps, greedy=None):
    """Seeds in which arm a is ahead of b by these gaps."""
    greedy, even = gaps if greedy is None else greedy, {"sampled": 0.5, "greedy": 0.5}
    return [
        {"seed": i, "arms": {"a": {"sampled": 0.5 + g, "greedy": 0.5 + h}, "b": even}}
        for i, (g, h) in enumerate(zip(gaps, greedy, strict=True))
    ]


def test_t_against_known_quantiles():
    for freedom, t in {2: 4.302653, 4: 2.776445, 9: 2.262157, 30: 2.042272}.items():
        assert evidence.tail(t, freedom) == pytest.approx(0.05, abs=2e-5)
    assert evidence.tail(0.0, 4) == pytest.approx(1.0)


def test_paired_difference_by_hand():
    mean, half, p = evidence.difference(seeds_of([0.1, 0.2, 0.3]), ("a", "b"), "sampled")
    error = 0.1 / np.sqrt(3)
    assert (mean, half) == pytest.approx((0.2, 4.302653 * error), rel=1e-4)
    assert p == pytest.approx(evidence.tail(0.2 / error, 2))


def test_holm_by_hand():
    assert evidence.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm([0.9, 0.01]) == pytest.approx([0.9, 0.02])


@pytest.mark.parametrize(
    ("gaps", "greedy", "verdict"),
    [
        ([0.10, 0.11, 0.12, 0.11, 0.10], None, "shown"),
        ([0.10, -0.11, 0.12, -0.11, 0.10], None, "not shown"),
        ([-0.10, -0.11, -0.12, -0.11, -0.10], None, "contradicted"),
        ([0.10, 0.11, 0.12, 0.11, 0.10], [-0.1, -0.11, -0.1, -0.12, -0.1], "sharpening only"),
        ([0.10, 0.11, 0.12, 0.11, 0.10], [-0.1, 0.11, -0.1, 0.12, -0.1], "shown"),
        ([0.10, 0.11], None, "too few seeds"),
    ],
)
def test_verdicts(gaps, greedy, verdict):
    assert evidence.verdicts(seeds_of(gaps, greedy), PAIR) == [verdict]


def test_a_claim_of_two_comparisons_needs_both_and_falls_by_one():
    seeds = seeds_of([0.10, 0.11, 0.12, 0.11, 0.10])
    for value, verdict in ((0.3, "shown"), (0.6, "not shown"), (0.9, "contradicted")):
        for i, seed in enumerate(seeds):
            wide = 0.3 * (-1) ** i if verdict == "not shown" else 0.01 * i
            seed["arms"]["c"] = {"sampled": value + wide, "greedy": 0.5}
        assert evidence.verdicts(seeds, [("both", "a > b, a > c")]) == [verdict]


def test_verdicts_are_adjusted_for_their_number():
    seeds = seeds_of([0.05, 0.15, 0.02, 0.12, 0.10])  # p between 1 % and 5 %
    assert 0.01 < evidence.difference(seeds, ("a", "b"), "sampled")[2] < 0.05
    assert evidence.verdicts(seeds, PAIR) == ["shown"]
    assert evidence.verdicts(seeds, PAIR * 5) == ["not shown"] * 5


def test_less_forgetting_is_ahead():
    assert evidence.comparisons("u > p: forgets") == ([("u", "p")], "forgets")


def test_claims_name_arms_that_are_run():
    known = {"student", *evidence.ARMS}
    texts = [text for claims in evidence.CLAIMS.values() for _, text in claims]
    assert (
        set(itertools.chain(*itertools.chain(*(evidence.comparisons(t)[0] for t in texts))))
        <= known
    )
    assert [len(claims) for claims in evidence.CLAIMS.values()] == [5, 5, 1]


def test_comments_and_docstrings_are_no_other_code(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    hashes = []
    for text in ('"""a"""\nx = 1\n', '"""b"""\nx = 1  # one\n', '"""b"""\nx = 2\n'):
        (tmp_path / "grpo.py").write_text(text)
        hashes.append(evidence.code_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_evidence_is_what_the_records_say():
    records = sorted((ROOT / "tiny/evidence").glob("seed-*.json"))
    seeds = [json.loads(path.read_text()) for path in records]
    if not seeds:
        pytest.skip("no seed has been run")
    assert len({seed["code"] for seed in seeds}) == 1
    assert (ROOT / "tiny/EVIDENCE.md").read_text() == evidence.evidence(seeds)


def test_a_smoke_run_of_two_updates(tmp_path, monkeypatch):
    """One arm of each kind; a second call finds all done."""
    arms = {arm: evidence.ARMS[arm] for arm in ("no-opd", "self paced")}
    monkeypatch.setattr(evidence, "ARMS", arms)
    monkeypatch.setattr(evidence, "CLAIMS", {"one": [("gains", "self paced > student")]})
    few = "--teacher-rl-steps 1 --fkl-steps 1 --opd-steps 1 --student-rl-steps 1".split()
    few = {"bridge.py": few, "paced.py": "--steps 2 --pass-rollouts 2".split(), "eval_math.py": []}
    run, val = evidence.run, tmp_path / "val.jsonl"
    lines = (ROOT / "tiny/val.jsonl").read_text().splitlines(keepends=True)
    val.write_text("".join(lines[:9]))
    monkeypatch.setattr(
        evidence, "run", lambda c, out, script, *flags: run(c, out, script, *flags, *few[script])
    )
    for _ in range(2):
        evidence.run_seed(100, tmp_path / "runs", str(val), tmp_path / "results")
        monkeypatch.setattr(evidence, "run", None)  # the second time nothing runs
    record = json.loads((tmp_path / "results/seed-100.json").read_text())
    assert set(record["arms"]) == {"student", "no-opd", "self paced"}
    assert record["arms"]["no-opd"]["updates"] == 3 and record["arms"]["no-opd"]["labels"] == 32
    assert record["arms"]["student"]["forgets"] == 0.0
    assert any("bridge.py" in command for command in record["commands"])
    text = evidence.evidence([record, record | {"seed": 101}])
    assert "too few seeds" in text and "seeds 100 101" in text
    evidence.draw([record], tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 5000
