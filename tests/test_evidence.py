"""tiny/evidence.py: its verdicts on made-up results, EVIDENCE.md against the records, a run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import bridge
from forked import run
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


def rows_of(text):
    """The rows of the tables that have a number, as {column: cell}."""
    found, head = [], None
    for line in text.splitlines():
        row = cells(line) if line.startswith("|") else None
        head = row and (head or row)
        if row and re.search(r"\d\.\d{3}", line):
            found.append(dict(zip(head, row, strict=True)))
    return found


def test_other_worlds_are_what_their_records_say(written):
    worlds = [json.loads(path.read_text()) for path in sorted(evidence.RECORDS.glob("world-*"))]
    assert len(worlds) >= 3 and all(world["code"] == worlds[0]["code"] for world in worlds)
    assert all(world["settings"] == written[1][0]["settings"] for world in worlds)
    expected = []
    for own in evidence.CLAIMS.values():
        for (_, text), verdict in zip(own, evidence.verdicts(worlds, own), strict=True):
            greedy = evidence.differences(worlds, text, "greedy")
            for i, (arm, other, mean, half, _) in enumerate(evidence.differences(worlds, text)):
                column = "forgets" if text.endswith("forgets") else "sampled"
                gaps = [w["arms"][arm][column] - w["arms"][other][column] for w in worlds]
                expected.append({
                    "compared": f"{arm} − {other}",
                    "difference": f"{mean:+.3f} ± {half:.3f}",
                    "greedy": "{2:+.3f} ± {3:.3f}".format(*greedy[i]) * (column == "sampled"),
                    "each world": ", ".join(f"{gap:+.3f}" for gap in gaps),
                    "verdict": "" if i else f"**{verdict}**",
                })  # fmt: skip
    section = written[0].partition("\n## Six other worlds")[2].partition("\n## ")[0]
    assert rows_of(section) == expected


def test_controls_are_what_their_records_say(written):
    seeds = [json.loads((evidence.RECORDS / f"seed-{n}.json").read_text()) for n in range(24, 30)]
    controls = json.loads((evidence.RECORDS / "controls.json").read_text())
    for seed, control in zip(seeds, controls, strict=True):
        assert seed["seed"] == control["seed"]
        seed["arms"] |= control["arms"]
    rows = rows_of(written[0].partition("\n## What in PACED helps")[2].partition("\n## ")[0])
    assert len(rows) == 6
    for row in rows:
        text, columns = row["compared"].replace("−", ">"), ("sampled", "paper", "greedy")
        found = [evidence.differences(seeds, text, column)[0] for column in columns]
        assert [*row.values()][1:] == [f"{mean:+.3f} ± {half:.3f}" for *_, mean, half, _ in found]


def test_readme_says_what_evidence_says(written):
    section = (ROOT / "README.md").read_text().partition("## What it shows")[2]
    rows, known = rows_of(section.partition("\n## ")[0]), rows_of(written[0])
    assert len(rows) > 20
    twenty = [json.loads((evidence.RECORDS / f"seed-{n}.json").read_text()) for n in range(10, 30)]
    by_all = {}
    for own in evidence.CLAIMS.values():
        by_all |= zip((claim for claim, _ in own), evidence.verdicts(twenty, own), strict=True)
    assert sum("all twenty" in row for row in rows) == 18
    for row in rows:
        if "all twenty" in row:
            assert row.pop("all twenty") == by_all.get(row["claim"], "")
        assert any(row.items() <= other.items() for other in known), row


def test_what_is_measured_of_a_model(tmp_path, monkeypatch):
    def run(out, script, *flags):
        out.mkdir(parents=True)
        paper = "--temperature 0.7 --top-p 0.8 --top-k 20" in " ".join(map(str, flags))
        metrics = {"avg@8": {"mean": 0.7 if paper else 1.0}, "greedy": {"mean": 0.5}}
        (out / "results.json").write_text(json.dumps({"metrics": metrics}))
        return out

    for name, value in ("run", run), ("ARMS", {}), ("RECORDS", tmp_path):
        monkeypatch.setattr(evidence, name, value)
    evidence.run_seed(100, tmp_path / "runs")
    student = json.loads((tmp_path / "seed-100.json").read_text())["arms"]["student"]
    assert (student["sampled"], student["paper"], student["greedy"]) == (1.0, 0.7, 0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny/student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/student")
    texts = (ROOT / "tiny/heldout.txt").read_text().splitlines()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        sums = [float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in rows]
    tokens = sum(ids.shape[1] - 1 for ids in rows)
    assert evidence.heldout_loss(ROOT / "tiny/student") == pytest.approx(sum(sums) / tokens, 1e-4)


def test_a_smoke_run_of_two_updates(tmp_path, monkeypatch):
    """One arm of each kind; a second call finds all done.

    Only paced.py is started as evidence.py does it, since many Pythons take long to start.
    """
    arms = {arm: evidence.ARMS[arm] for arm in ("no-opd", "self-paced")}
    monkeypatch.setattr(evidence, "ARMS", arms)
    monkeypatch.setattr(evidence, "CLAIMS", {"one": [("gains", "self-paced > student")]})
    few = "--teacher-rl-steps 1 --fkl-steps 1 --opd-steps 1 --student-rl-steps 1".split()
    few = {"bridge.py": few, "paced.py": "--steps 2 --pass-rollouts 2".split(), "eval_math.py": []}
    as_is, val = evidence.run, tmp_path / "val.jsonl"
    lines = (ROOT / "tiny/val.jsonl").read_text().splitlines(keepends=True)
    val.write_text("".join(lines[:9]))

    def run_few(out, script, *flags):
        command = [str(word) for word in (script, *flags, *few[script], "--out", out)]
        if script == "paced.py":
            as_is(out, script, *flags, *few[script])
        elif script == "bridge.py":
            bridge.main(command[1:])
        else:
            assert run(command) == 0
        return out

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bridge, "launch", lambda command: run(command[1:]))
    monkeypatch.setattr(evidence, "run", run_few)
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


def test_tuning_reads_the_validation_file_and_arms_has_the_best(monkeypatch):
    tried, read = {arm: [] for arm in evidence.ARMS}, set()
    monkeypatch.setattr(evidence, "train", lambda a, flags, *_: tried[a].append(flags) or (0, 0))
    monkeypatch.setattr(evidence, "evaluate", lambda m, data, *_: read.add(data) or (0.5, 0.5))
    evidence.tune_seed(100)
    assert read == {"tiny/val.jsonl"} and {len(own) for own in tried.values()} == {3}
    rows = [cells(line) for line in (ROOT / "tiny/TUNING.md").read_text().splitlines()]
    rows = {row[0]: row[1:] for row in rows if row[0] in evidence.ARMS}
    assert rows.keys() == evidence.ARMS.keys()
    for arm, (words, *scores) in rows.items():
        factor = evidence.GRID[["**" in score for score in scores].index(True)]
        words = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
        rates = {flag for flag in words if flag.endswith("lr")}
        for flag in rates - set(evidence.DENSE) or rates:
            assert evidence.ARMS[arm][1][flag] == pytest.approx(float(words[flag]) * factor), arm
