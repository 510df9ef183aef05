"""tiny/evidence.py: its verdicts on made-up results, EVIDENCE.md against the records, a run."""

import json
import re
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


@pytest.mark.parametrize(("n", "t95"), [(3, 4.302653), (5, 2.776445), (31, 2.042272)])
def test_paired_difference_against_known_quantiles(n, t95):
    gaps = np.random.default_rng(n).normal(0.1, 0.1, n)
    error = gaps.std(ddof=1) / np.sqrt(n)
    gaps += t95 * error - gaps.mean()  # just significant
    ((arm, other, mean, half, p),) = evidence.differences(seeds_of(gaps), "a > b")
    assert (arm, other) == ("a", "b")
    assert (mean, half, p) == pytest.approx((t95 * error, t95 * error, 0.05), rel=2e-4)


def test_a_claim_compares_all_that_should_be_ahead_with_all_others():
    seeds = seeds_of([0.1, 0.2, 0.3])
    for seed in seeds:
        seed["arms"] |= {"c": {"sampled": 0.0, "greedy": 1.0}, "d": {"sampled": 0.1, "greedy": 1.0}}
    found = evidence.differences(seeds, "a, b > c, d")
    assert [part[:2] for part in found] == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert [part[2] for part in found] == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert evidence.differences(seeds, "a > c: sampled", "greedy")[0][2] == pytest.approx(-0.3)
    assert evidence.differences(seeds, "a > c: greedy")[0][2] == pytest.approx(-0.3)


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
        assert evidence.verdicts(seeds, [("both", "a > b, c")]) == [verdict]


def test_verdicts_are_adjusted_for_their_number():
    seeds = seeds_of([0.05, 0.15, 0.02, 0.12, 0.10])  # p between 1 % and 5 %
    assert 0.01 < evidence.differences(seeds, "a > b")[0][4] < 0.05
    assert evidence.verdicts(seeds, PAIR) == ["shown"]
    assert evidence.verdicts(seeds, PAIR * 5) == ["not shown"] * 5


def test_what_a_model_forgets_is_not_sharpening():
    seeds = seeds_of([0.10, 0.11, 0.12, 0.11, 0.10], [-0.1, -0.11, -0.1, -0.12, -0.1])
    for seed in seeds:
        for arm in seed["arms"].values():
            arm["forgets"] = arm["sampled"]
    assert evidence.verdicts(seeds, [("less", "a > b: forgets")]) == ["shown"]


def test_claims_name_arms_that_are_run():
    texts = [text for claims in evidence.CLAIMS.values() for _, text in claims]
    arms = {arm for text in texts for arm in re.split(", | > ", text.partition(": ")[0])}
    assert arms <= {"student", *evidence.ARMS}
    assert [len(claims) for claims in evidence.CLAIMS.values()] == [5, 5, 2]


def test_comments_and_docstrings_are_no_other_code(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/make_tiny.py").write_text("")
    hashes = []
    for text in ('"""a"""\nx = 1\n', '"""b"""\nx = 1  # one\n', '"""b"""\nx = 2\n'):
        (tmp_path / "grpo.py").write_text(text)
        hashes.append(evidence.origin()["code"])
    assert hashes[0] == hashes[1] != hashes[2]


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


@pytest.fixture
def written():
    """EVIDENCE.md, and the records of the seeds that it names."""
    text = (ROOT / "tiny/EVIDENCE.md").read_text()
    numbers = re.search(r"--seeds ([\d ]+)`", text)[1].split()
    return text, [json.loads((evidence.RECORDS / f"seed-{n}.json").read_text()) for n in numbers]


def test_evidence_is_what_the_records_say(written):
    text, seeds = written
    assert len(seeds) >= 3 and all(
        seed["arms"].keys() == {"student", *evidence.ARMS} for seed in seeds
    )
    assert all(seed["code"] == seeds[0]["code"] for seed in seeds)
    assert all(seed["settings"] == seeds[0]["settings"] for seed in seeds)
    assert text == evidence.evidence(seeds)


def test_readme_says_what_evidence_says(written):
    section = (
        (ROOT / "README.md").read_text().partition("## What it shows")[2].partition("\n## ")[0]
    )
    rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    rows = [row for row in rows if any(re.search(r"\d\.\d{3}", cell) for cell in row)]
    known = [set(cells(line)) for line in written[0].splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        assert any(set(row) <= cells for cells in known), row


def test_a_smoke_run_of_two_updates(tmp_path, monkeypatch):
    """One arm of each kind; a second call finds all done."""
    arms = {arm: evidence.ARMS[arm] for arm in ("no-opd", "self-paced")}
    monkeypatch.setattr(evidence, "ARMS", arms)
    monkeypatch.setattr(evidence, "CLAIMS", {"one": [("gains", "self-paced > student")]})
    few = "--teacher-rl-steps 1 --fkl-steps 1 --opd-steps 1 --student-rl-steps 1".split()
    few = {"bridge.py": few, "paced.py": "--steps 2 --pass-rollouts 2".split(), "eval_math.py": []}
    run, val = evidence.run, tmp_path / "val.jsonl"
    lines = (ROOT / "tiny/val.jsonl").read_text().splitlines(keepends=True)
    val.write_text("".join(lines[:9]))
    monkeypatch.setattr(
        evidence, "run", lambda out, script, *flags: run(out, script, *flags, *few[script])
    )
    monkeypatch.setattr(evidence, "RECORDS", tmp_path)
    (tmp_path / "why.md").write_text("Why.")
    for _ in range(2):
        evidence.run_seed(100, tmp_path / "runs", str(val))
        monkeypatch.setattr(evidence, "run", None)  # the second time nothing runs
    record = json.loads((tmp_path / "seed-100.json").read_text())
    assert set(record["arms"]) == {"student", "no-opd", "self-paced"}
    assert record["arms"]["no-opd"]["updates"] == 3 and record["arms"]["no-opd"]["labels"] == 32
    assert record["arms"]["student"]["forgets"] == 0.0
    text = evidence.evidence([record, record | {"seed": 101}])
    assert "too few seeds" in text and "seeds 100 101" in text and text.endswith("Why.")
    evidence.draw([record], tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 5000
