"""eval_math.py: metrics against enumeration, the grader against a table, a run and its kills."""

import collections
import itertools
import json
import math
import random
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_math
from forked import start

ROOT = Path(__file__).parent.parent
STUDENT = str(ROOT / "tiny/student")
TERMS = {"4+5": 2, "7+7": 2, "37+8+5": 3, "91+2+2": 3, "12+3+4+9": 4, "8+1": 2, "5+5+5": 3}


def add(problem):
    return str(sum(map(int, problem.split("+"))))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": p, "answer": add(p), "terms": t} for p, t in TERMS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(data, *more):
    """A run of a second: 7 problems of 5 rows in batches of 6."""
    small = "--n 4 --max-new-tokens 24 --rollout-batch 6 --device cpu".split()
    return ["--model", STUDENT, "--data", data, *small, *more]


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sample(answer, right, tokens=1, clipped=False):
    return {"answer": answer, "right": right, "tokens": tokens, "clipped": clipped}


def test_completions_that_are_cut_are_warned_of(tmp_path, data, capsys):
    eval_math.main(command(data, "--max-new-tokens", "1", "--out", str(tmp_path / "run")))
    assert "over half of the completions are cut" in capsys.readouterr().out


# --- metrics --------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """As measure() has it, of n samples that c right ones stand in front of."""
    drawn = [sample("5", i < c) for i in range(n)]
    return eval_math.measure([sample("6", False), *drawn], [k])[f"pass@{k}"]


def test_pass_at_k_against_enumeration():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share), (n, c, k)


def test_pass_at_k_is_unbiased_where_first_k_of_n_is_noisy():
    """Its expectation over c ~ Binomial(n, p) is 1 - (1 - p)^k."""
    n, p = 16, 0.1
    for k in (1, 2, 4, 8, 16):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ("1/2 0.5 \\frac12 3 3", 1),  # three forms of the right answer outvote two of a wrong one
        ("1/2 0.5 3 3 3.0", 0),
        ("7 3/4 0.75 \\frac34 1/2 0.5", 0),  # forms of a wrong answer vote together as well
        ("1/2 \\frac{1}{2} 3 3", 1 / 2),
        ("1/2 3 4 5", 1 / 4),
        ("- - - 1/2", 1),  # no box is no vote
        ("- - - -", 0),
        ("3 3 4 -", 0),
        ("3 4 3 0.5 1/2 3.0", 0),
    ],
)
def test_majority(votes, share):
    for order in (votes.split(), votes.split()[::-1]):
        texts = [None if text == "-" else text for text in order]
        samples = [sample(t, t is not None and eval_math.same_answer("1/2", t)) for t in texts]
        for greedy in (sample("1/2", True), sample("3", False)):  # has no vote
            assert eval_math.measure([greedy, *samples], [])[f"maj@{len(texts)}"] == share


def test_wrong_answers_vote_together_whichever_is_read_first():
    """math-verify takes 3+2=5 for 5, but not 5 for 3+2=5."""
    votes = ["5", "3+2=5", "7"]
    assert [eval_math.same_answer(*pair) for pair in (votes[:2], votes[1::-1])].count(True) == 1
    for order in itertools.permutations(votes):
        samples = [sample(text, text == "7") for text in order]
        assert eval_math.measure([samples[0], *samples], [])["maj@3"] == 0


def test_costly_votes_are_compared_as_texts(monkeypatch):
    """Each pair of them would take a second or two, and sixteen votes are 120 pairs."""
    monkeypatch.setattr(eval_math.math_verify, "verify", lambda *_, **__: pytest.fail("computed"))
    towers = [f"9^{{9^{{9^{{{i}}}}}}}" for i in range(3)]
    samples = [sample(text, False) for text in [*towers, towers[0], "5"]]
    assert eval_math.same_vote(towers[0], towers[0]) and not eval_math.same_vote("5", towers[0])
    assert eval_math.measure([samples[0], *samples], [])["maj@5"] == 0


def test_every_number_of_the_table():
    right, wrong, none = sample("5", True, 3), sample("6", False, 5, True), sample(None, False, 9)
    problems = [[right, right, right, right, wrong], [wrong, wrong, wrong, none, right]]
    rows = [eval_math.measure(samples, [1, 2, 4]) for samples in problems]
    wanted = {
        "avg@4": [3 / 4, 1 / 4],
        "greedy": [1, 0],
        "pass@1": [3 / 4, 1 / 4],
        "pass@2": [1, 1 / 2],
        "pass@4": [1, 1],
        "maj@4": [1, 0],
        "length": [(3 * 3 + 5) / 4, (5 + 5 + 9 + 3) / 4],
        "clipped": [1 / 4, 2 / 4],
        "no box": [0, 1 / 4],
    }
    for row in rows:
        assert list(row) == list(wanted)
    for name, column in wanted.items():
        assert [row[name] for row in rows] == column, name


def interval(values, **options):
    return eval_math.intervals([{"x": value} for value in values], **options)["x"]


def test_the_interval_covers_the_truth_95_times_in_100():
    """Problems of unequal difficulty, eight samples each; the truth is the mean difficulty."""
    rng, covered, runs = np.random.default_rng(0), 0, 1000
    for _ in range(runs):
        difficulty = rng.beta(1, 2, size=100)
        number = interval(rng.binomial(8, difficulty) / 8, resamples=500)
        covered += number["low"] <= 1 / 3 <= number["high"]
    assert 0.92 <= covered / runs <= 0.98
    width = {len(v): interval(v) for v in (np.arange(50) % 2.0, np.arange(5000) % 2.0)}
    for size, number in width.items():  # and is as wide as theory says
        assert number["high"] - number["low"] == pytest.approx(2 * 1.96 * 0.5 / size**0.5, rel=0.1)


def test_intervals_keep_numbers_apart():
    numbers = eval_math.intervals([{"x": 0.0, "y": 5.0}, {"x": 1.0, "y": 5.0}])
    assert numbers["x"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert numbers["y"] == {"mean": 5.0, "low": 5.0, "high": 5.0}


def test_few_problems_are_warned_of(tmp_path, capsys):
    for count, warned in (49, True), (50, False):
        results_of(tmp_path, [[True, True]] * count)
        assert ("so few problems" in capsys.readouterr().out) == warned


def results_of(tmp_path, problems, k=None):
    """results.json of these problems, each a list of verdicts, the greedy one's first."""
    lines = [
        {"index": i, "where": f"d:{number}", **sample("5", right)}
        for number, verdicts in enumerate(problems, 1)
        for i, right in enumerate(verdicts)
    ]
    args = types.SimpleNamespace(k=k, plot=False)
    eval_math.report(tmp_path, lines, args, {})
    return json.loads((tmp_path / "results.json").read_text())


def test_which_k(tmp_path):
    def ks(n, k=None):
        metrics = results_of(tmp_path, [[True] * (n + 1)] * 2, k)["metrics"]
        return [int(name[5:]) for name in metrics if name.startswith("pass@")]

    assert ks(1) == [1]
    assert ks(8) == [1, 2, 4, 8]
    assert ks(12) == [1, 2, 4, 8, 12]
    assert ks(12, [3, 1]) == [1, 3]
    for k in ([13], [0], [1, 13]):
        with pytest.raises(SystemExit):
            ks(12, k)


def test_strata_in_their_order(tmp_path):
    lines = []
    rows = [(None, True), (10, True), (9, False), (10, False), (2, True)]
    for number, (level, right) in enumerate(rows):
        for index in (0, 1):
            place = {"index": index, "where": f"d:{number + 1}"}
            place |= {"level": level} if level else {}  # the first row has none
            lines.append(place | sample("5", right))
    eval_math.report(tmp_path, lines, types.SimpleNamespace(k=None, plot=False), {})
    by = json.loads((tmp_path / "results.json").read_text())["by"]
    assert list(by) == ["level"] and list(by["level"]) == ["2", "9", "10", "None"]
    means = {name: (row["problems"], row["avg@1"]["mean"]) for name, row in by["level"].items()}
    assert means == {"2": (1, 1.0), "9": (1, 0.0), "10": (2, 0.5), "None": (1, 1.0)}


# --- grading --------------------------------------------------------------------------------------

M = "\\begin{pmatrix} %s \\end{pmatrix}"
CASES = [  # (gold, answer, verdict)
    # numbers
    ("50", "50", True), ("50", "050", True), ("50", "51", False), ("50", "", False),
    ("5", "-5", False), ("5", "\\pm 5", False), ("5", "5.0", True), ("5", "5.01", False),
    ("0", "-0", True), ("0", "0.0000001", False), ("1000000", "1000001", False),
    ("1,000", "1000", True), ("10,\\!080", "10080", True), ("1{,}000", "1,000", True),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100", True), ("12", "1 2", False), ("5", "0,5", False),
    ("100", "10^2", True), ("1024", "2^{10}", True), ("62", "6^2", False), ("36", "6^2", True),
    ("0.001", "10^{-3}", True), ("3 \\times 10^8", "300000000", True), ("120", "5!", True),
    ("2^{2009}", "2^{2009}", True), ("2^{2009}", "2^{2008}", False),
    ("5", "4+1", True), ("14", "2 \\times 7", True), ("14", "27", False), ("8", "+8", True),
    ("5", "$5$", True), ("5", "\\textbf{5}", True), ("5", "(5)", True), ("5", "\\text{.}", False),
    ("100", "1e2", False), ("5", "five", False), ("1", "x", False), ("\\infty", "-\\infty", False),
    # fractions, mixed numbers, decimals
    ("\\frac{1}{2}", "0.5", True), ("\\frac{1}{2}", "\\dfrac12", True), ("1/2", ".5", True),
    ("\\frac{1}{2}", "\\frac{2}{4}", True), ("\\frac{1}{2}", "\\frac{1}{3}", False),
    ("\\frac{1}{2}", "-\\frac{1}{2}", False), ("-\\frac{1}{2}", "\\frac{-1}{2}", True),
    ("\\frac{1}{3}", "0.33", False), ("\\frac{1}{3}", "0.333", False),
    ("\\frac{1}{3}", "0.3333333", True), ("\\frac{2}{3}", "0.67", False),
    ("137 \\frac{1}{2}", "137.5", True), ("4\\frac{2}{3}", "\\frac{14}{3}", True),
    ("4\\frac{2}{3}", "\\frac{8}{3}", False), ("-1\\frac12", "-1.5", True),
    ("18.90", "18.9", True), ("\\frac{a}{b}", "\\frac{b}{a}", False),
    # pi, roots, functions
    ("\\pi", "3.14", False), ("\\pi", "3.14159265", True), ("2\\pi", "6.28", False),
    ("4\\pi", "4", False), ("\\frac{\\pi}{2}", "\\pi/2", True), ("\\pi r^2", "\\pi r^2", True),
    ("\\sqrt{8}", "2\\sqrt{2}", True), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}", True),
    ("\\sqrt{2}", "1.41", False), ("\\sqrt{2}", "\\sqrt{3}", False), ("3", "\\log_2 8", True),
    ("1", "\\cos 0", True), ("\\sin x", "\\cos x", False),
    # units, degrees, money, percent
    ("5\\text{ cm}", "5", True), ("5", "5\\text{ meters}", True),
    ("5.4 \\text{ cents}", "5.4", True),
    ("15\\mbox{ cm}^2", "15\\text{ cm}^2", True), ("15", "15\\text{ cm}^2", True),
    ("5\\text{ cm}", "6\\text{ cm}", False), ("18^\\circ", "18", True),
    ("90^\\circ", "45^\\circ", False),
    ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}^\\circ", True),
    ("\\$32,\\!348", "32348", True), ("32", "\\$32", True), ("\\$18.90", "18.90", True),
    ("50\\%", "50", True), ("50", "50\\%", True), ("50\\%", "0.5", True),
    ("\\frac14", "25\\%", True),
    ("50\\%", "5\\%", False), ("20\\%", "25\\%", False), ("15", "0.15", False),
    ("7.5", "0.075", False),
    # text
    ("\\text{Evelyn}", "\\text{Evelyn}", True), ("\\text{Evelyn}", "Evelyn", True),
    ("\\text{Evelyn}", "\\text{Bob}", False), ("\\text{east}", "\\text{West}", False),
    ("\\text{even}", "\\text{odd}", False), ("\\text{ellipse}", "\\text{hyperbola}", False),
    ("\\text{(C)}", "C", True), ("\\text{(C)}", "\\text{C}", True), ("\\text{(C)}", "D", False),
    ("A", "B", False), ("\\text{Yes}", "\\text{No}", False),
    ("\\text{True}", "\\text{False}", False),
    ("\\text{New York}", "New York", True), ("\\text{Tuesday}", "\\text{Thursday}", False),
    # sets, tuples, intervals
    ("\\{1,2\\}", "\\{2,1\\}", True), ("\\{1,2\\}", "\\{1,3\\}", False),
    ("\\{1,2\\}", "\\{1\\}", False),
    ("1,-2", "-2,1", True), ("1,-2", "\\{-2, 1\\}", True), ("1,-2", "1", False),
    ("1", "1,2", False),
    ("3, 5, 7", "3,5,7", True), ("15", "15\\text{ or }16", False), ("1,2", "12", False),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}", True),
    ("1,-2", "x=1 \\text{ or } x=-2", True),
    ("(6,31,-1)", "(6, 31, -1)", True), ("(6,31,-1)", "(31,6,-1)", False),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)", True), ("(3,4)", "(4,3)", False),
    ("(1,2]", "(1,2]", True), ("(1,2]", "(1,2)", False), ("[0,1]", "[0,2]", False),
    ("[0,1]", "\\{0,1\\}", False), ("[1,2)", "\\left[1,2\\right)", True),
    ("(-\\infty,3]", "(-\\infty,3)", False),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)", True),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty,2]\\cup[3,\\infty)", False),
    ("x \\in [-2,7]", "[-2,7]", True), ("x \\le 5", "(-\\infty,5]", True),
    ("x \\le 5", "x < 5", False),
    # matrices
    (M % "1 & 2 \\\\ 3 & 4", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", True),
    (M % "1 & 2 \\\\ 3 & 4", M % "1 & 3 \\\\ 2 & 4", False), (M % "1 \\\\ 2", M % "1 & 2", False),
    (M % "-1/3 \\\\ 2/3", M % "-\\frac13 \\\\ \\frac23", True),
    (M % "1 & 0 \\\\ 0 & 1", "1", False),
    # algebra
    ("x^2+2x+1", "(x+1)^2", True), ("x^2+2x+1", "x^2+2x", False), ("p - q", "q-p", False),
    ("x=5", "5", True), ("5", "x=6", False), ("y = 2x + 3", "2x-y+3=0", True), ("12x", "12", False),
    ("y = 2x + 3", "y = 2x - 3", False), ("3x+4y=0", "3x-4y=0", False), ("x+y", "y+x", True),
    ("6 - 5i", "6-5i", True), ("3+4i", "3-4i", False), ("x_1", "x_2", False), ("x>2", "x<2", False),
    # screened, because it could cost a second: only the same text counts
    ("5", "9^{9^{9^9}}", False), ("9^{9^{9^9}}", "9^{9^{9^9}}", True), ("720", "(3!)!", False),
    # which no power beside a power, or short binomial, is, nor what the gold answer is like
    ("10", "\\binom{5}{2}", True), ("x^2 + y^2", "x^2+y^2", True), ("x^2 + y^2", "x^2+y^3", False),
    ("2^{10} \\cdot 3^5", "2^{10}\\cdot3^5", True), ("10^{2024} - 1", "10^{2024}-1", True),
    ("(n-1)!", "(n - 1)!", True), ("\\frac{a^2}{b^2}", "\\dfrac{a^2}{b^2}", True),
    # math-verify is lenient here, and so are we: what a person would have to ask back about
    ("\\text{Evelyn}", "\\text{evelyn}", True), ("2516_8", "2516", True),
    ("3:4", "\\frac{3}{4}", True),
    ("9\\text{ hours}", "9\\text{ minutes}", True), ("(1,2)", "\\{1,2\\}", True),
    ("1", "1\\%", True),
]  # fmt: skip
CASES += [
    ("0", "1\\,000", False),  # math-verify alone would read 1 * 0
    ("1000", "1\\,000", True),
    ("\\frac{3}{2}", "2 1/2", False),  # ... (2 + 1)/2
    ("\\frac{5}{2}", "2 1/2", True),
    ("5", "5.", True),
    ("7.5\\%", "7.5", False),  # math-verify takes 50\\% for 50, but this it does not
    ("18", "18 dollars", True),  # ... d * o * l * l * a * r * s
    ("60", "60 people.", True),
    ("60", "60°", True),
    ("5", "5 or 6", False),
    ("7", "7 x", False),
    ("12", "12 \\pi", False),
    ("5", "5 million", True),  # a unit like any other, as \\text{ million} is
    ("36", "36 km/h", False),
    ("\\frac{1 \\pm \\sqrt{5}}{2}", "\\frac{1\\pm\\sqrt{5}}{2}", True),  # ... nothing at all
    ("\\frac{1 \\pm \\sqrt{5}}{2}", "\\frac{1+\\sqrt5}{2}, \\frac{1-\\sqrt5}{2}", True),
    ("\\frac{1 \\pm \\sqrt{5}}{2}", "\\frac{1+\\sqrt5}{2}", False),
    ("e^{1/4}", "e^{0.25}", True),
]


def test_the_table_is_large_enough():
    verdicts = collections.Counter(verdict for _, _, verdict in CASES)
    assert len({case[:2] for case in CASES}) == len(CASES)
    assert min(verdicts.values()) >= 60


@pytest.mark.parametrize(("gold", "answer", "verdict"), CASES)
def test_the_verdict(gold, answer, verdict):
    assert eval_math.judge(gold, f"so \\boxed{{{answer}}}.")["right"] is verdict


@pytest.mark.parametrize(
    ("gold", "completion", "answer", "right", "grader"),
    [
        ("5", "it is 5", None, False, "no box"),
        ("5", "\\boxed{4} no, \\boxed{ 5 }", "5", True, "text"),
        ("5", "\\boxed{05}", "05", True, "integer"),
        ("5", "\\boxed{6}", "6", False, "integer"),
        ("5", "\\boxed{\\frac{10}{2}}", "\\frac{10}{2}", True, "math-verify"),
        ("5", "\\boxed{2^{2^2}}", "2^{2^2}", False, "screen"),
        ("5", "\\boxed{5+" + "0" * 300 + "}", "5+" + "0" * 300, False, "screen"),
    ],
)
def test_the_audit_says_what_decided(gold, completion, answer, right, grader):
    judged = {"answer": answer, "right": right, "grader": grader}
    assert eval_math.judge(gold, completion) == judged


HOSTILE = [
    *(f"9^{{9^{{9^{{{i}}}}}}}" for i in range(12)),
    *(f"{i}^{i}^{i}^{i}" for i in range(2, 10)),
    *(f"{i}{i}99999!" for i in range(1, 9)),
    *(f"(({i}9!)!)!" for i in range(1, 7)),
    *(f"(10^{{999}})^{{99{i}}}" for i in range(6)),
    *("{" * depth + "}" * depth for depth in (10, 100, 10**4, 10**5)),
    *("\\frac{1}{" * depth + "2" + "}" * depth for depth in (3, 30, 300, 10**4)),
    *("(" * depth + "1" + ")" * depth for depth in (20, 100, 10**5)),
    *("\\sqrt{" * depth + "2" + "}" * depth for depth in (5, 20, 10**4)),
    *("".join(map(chr, range(1, 32))) * times for times in (1, 5, 1000)),
    *("7" * size for size in (31, 200, 10**4, 10**6)),
    *("x" * size for size in (31, 200, 10**6)),
    *("1,2;" * size for size in (10, 60, 10**5)),
    *(f"\\sum_{{k=1}}^{{10^{{{i}}}}} \\frac{{1}}{{k^{i}}}" for i in range(3, 9)),
    *(f"\\int_0^{{{i}}} e^{{x^2}} \\sin(x^{i}) dx" for i in range(2, 7)),
    *(f"\\prod_{{k=1}}^{{10^{i}}} (x + k)" for i in range(2, 6)),
    *(f"(x+y+z)^{{{i}00}}" for i in range(1, 4)),
    *(f"\\begin{{pmatrix}} 1 & 2 \\\\ 3 & 4 \\end{{pmatrix}}^{{{i}00}}" for i in range(1, 6)),
    "__import__('os').system('touch pwned')",
    "\\text{__import__('os').system('touch pwned')}",
    "$__import__('pathlib').Path('pwned').touch()$",
    "\\operatorname{exec}(open('pwned','w'))",
    "\\write18{touch pwned}",
    "~ 2+3 ",
    "~ (9-8)*5+1 ",
    "\\input{/etc/passwd}",
    "lambda: open('pwned', 'w')",
    "\ud800", "\u202e5", "\x00", "5\x005", "NaN", "nan", "\\frac{0}{0}", "1/0", "\\infty",
    "-\\infty", "zoo", "True", "None", "\\", "\\\\", "%", "&", "#", "_", "^", "^^^^", "$", "=",
]  # fmt: skip


def test_a_hundred_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated = []  # by Python, which is what sympy's parse_expr comes down to
    monkeypatch.setattr("math_verify.parser.parse_expr", lambda text, **_: evaluated.append(text))
    assert len(HOSTILE) >= 100
    began = time.monotonic()
    judged = [eval_math.judge("5", f"\\boxed{{{answer}}}") for answer in HOSTILE]
    json.dumps(judged)
    assert not any(verdict["right"] for verdict in judged) and not evaluated
    assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())


# --- sampling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture(scope="module")
def problems(tokenizer):
    prompts = {p: tokenizer(f"<|user|>{p}<|assistant|>")["input_ids"] for p in TERMS}
    rest = {"where": "d.jsonl:1", "row": {}}
    return [{"ids": ids, "answer": add(p), **rest} for p, ids in prompts.items()]


def settings(**changes):
    usual = {"seed": 0, "max_new_tokens": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return types.SimpleNamespace(**usual | changes)


def texts_of(drawn):
    return [(line["completion"], line["tokens"]) for line in drawn]


def frequencies(logits, temperature, top_k, top_p, draws=40_000):
    noise = torch.from_numpy(np.random.default_rng(0).random(draws))
    rows = torch.tensor(logits).expand(draws, len(logits))
    chosen = eval_math.choose(rows, (temperature, top_k, top_p), noise)
    return torch.bincount(chosen, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (1, 1.0, [3]),
        (9, 1.0, [0, 1, 2, 3]),  # more than there are tokens
        (0, 0.41, [1, 3]),  # 0.4 does not reach it, 0.7 does
        (0, 0.4, [3]),
        (0, 0.75, [1, 2, 3]),
        (0, 1e-3, [3]),
        (2, 0.6, [1, 3]),  # of these two the first has 0.57
        (2, 0.5, [3]),
    ],
)
def test_choose_follows_the_filtered_softmax(top_k, top_p, kept):
    p = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.0])
    wanted = torch.zeros(5)
    wanted[kept] = p[kept] / p[kept].sum()
    found = frequencies(p.log().tolist(), 1.0, top_k, top_p)
    assert torch.allclose(found, wanted, atol=0.01)
    assert (found[wanted == 0] == 0).all()


def test_choose_divides_by_the_temperature_and_takes_the_extremes_of_the_noise():
    logits = [2.0, 1.0, 0.0]
    wanted = (torch.tensor(logits) / 0.7).softmax(-1)
    assert torch.allclose(frequencies(logits, 0.7, 0, 1.0), wanted, atol=0.01)
    rows = torch.tensor([[1.0, 2.0, -float("inf"), 0.0]]).expand(2, 4)
    noise = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert eval_math.choose(rows, (1.0, 0, 1.0), noise).tolist() == [1, 3]
    assert eval_math.choose(rows, (1.0, 20, 0.8), noise).tolist() == [1, 0]
    diverged = torch.full((2, 4), float("nan"))  # a model that is lost answers nonsense
    assert set(eval_math.choose(diverged, (1.0, 20, 0.8), noise).tolist()) <= {0, 1, 2, 3}


def test_index_0_is_greedy_whatever_the_sampling(student, tokenizer, problems):
    rows = [(number, 0) for number in range(len(problems))]
    noisy = settings(temperature=5.0, top_p=0.9)
    drawn = eval_math.draw(student, tokenizer, problems, rows, noisy)
    for problem, ours in zip(problems, texts_of(drawn), strict=True):
        ids = torch.tensor([problem["ids"]])
        theirs = student.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )
        theirs = theirs[0, ids.shape[1] :].tolist()
        assert ours == (tokenizer.decode(theirs, skip_special_tokens=True), len(theirs))


def test_a_sample_follows_from_seed_problem_and_index_alone(student, tokenizer, problems):
    def draw(rows, **changes):
        lines = list(eval_math.draw(student, tokenizer, problems, rows, settings(**changes)))
        assert [(line["problem"], line["index"]) for line in lines] == rows
        return texts_of(lines)

    rows = list(itertools.product(range(len(problems)), range(4)))
    whole = dict(zip(rows, draw(rows), strict=True))
    for part in (rows[5:7], rows[-1:], random.Random(0).sample(rows[8:12], 4)):
        part = sorted(part)
        assert draw(part) == [whole[row] for row in part]
    drawn = [{whole[i, index] for index in (1, 2, 3)} for i in range(len(problems))]
    assert max(map(len, drawn)) > 1
    other = draw(rows, seed=1)
    assert other != list(whole.values())
    assert other[::4] == list(whole.values())[::4]  # the greedy ones


# --- a run on disk --------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(tmp_path, data, capsys):
    out = tmp_path / "run"
    eval_math.main(command(data, "--out", str(out)))
    printed = capsys.readouterr().out
    for promised in (f"--out {out}", "<|user|>4+5", "avg@4", "pass@2", "maj@4", "terms", "no box"):
        assert promised in printed
    for stratum in ("2", "3", "4"):
        assert f"avg@4, terms {stratum}  " in printed
    lines = lines_of(out / "samples.jsonl")
    assert [(line["problem"], line["index"]) for line in lines] == list(
        itertools.product(range(7), range(5))
    )
    assert [line["gold"] for line in lines[::5]] == [add(p) for p in TERMS]
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["temperature"] == 1.0 and results["n"] == 4
    for line in lines:
        assert line["right"] is eval_math.judge(line["gold"], line["completion"])["right"]
    drawn = [line["right"] for line in lines if line["index"] > 0]
    assert results["metrics"]["avg@4"]["mean"] == pytest.approx(np.mean(drawn))
    assert results["metrics"]["greedy"]["mean"] == np.mean([line["right"] for line in lines[::5]])
    by = results["by"]["terms"]
    assert {name: numbers["problems"] for name, numbers in by.items()} == {"2": 3, "3": 3, "4": 1}
    rights = [line["right"] for line in lines if line["terms"] == 3 and line["index"] > 0]
    assert by["3"]["avg@4"]["mean"] == pytest.approx(np.mean(rights))
    assert results["each"][6]["where"] == f"{data}:7"
    # Done: the same command samples nothing and says the same.
    before = (out / "samples.jsonl").read_bytes()
    eval_math.main(command(data, "--out", str(out)))
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "samples.jsonl").read_bytes() == before


def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(tmp_path, data, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    eval_math.main(command(data, "--out", str(whole)))
    content = (whole / "samples.jsonl").read_bytes()
    results = (whole / "results.json").read_bytes()
    shutil.copytree(whole, cut)
    drawn, draw = [], eval_math.draw
    monkeypatch.setattr(eval_math, "draw", lambda *a: drawn.append(a[3][0]) or draw(*a))
    for at in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        (cut / "samples.jsonl").write_bytes(content[:at])
        (cut / "results.json").unlink()
        drawn.clear()
        eval_math.main(command(data, "--out", str(cut)))
        assert (cut / "samples.jsonl").read_bytes() == content
        assert (cut / "results.json").read_bytes() == results
        left = content[:at].count(b"\n")  # batches that lack something are drawn, and no others
        start = 36 if left == 35 else left // 6 * 6
        assert drawn == [divmod(row, 5) for row in range(start, 35, 6)]


def test_sigkill_at_a_random_moment_changes_no_byte(tmp_path, data):
    rows = [{"problem": f"{a}+{b}", "answer": str(a + b)} for a in range(1, 41) for b in (3, 8)]
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    path, arguments = killed / "samples.jsonl", command(data, "--out", str(killed))
    process = start(["eval_math.py", *arguments])
    while process.is_alive() and not (path.exists() and path.stat().st_size > 0):
        time.sleep(0.002)
    time.sleep(0.1 * random.random())
    process.kill()
    process.join()
    assert not (killed / "results.json").exists() and path.stat().st_size > 0
    eval_math.main(arguments)
    eval_math.main(command(data, "--out", str(whole)))
    for name in ("samples.jsonl", "results.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_an_evaluation_goes_on_with_smaller_batches(tmp_path, data):
    """As one must after it ran out of memory."""
    path, arguments = tmp_path / "run/samples.jsonl", command(data, "--out", str(tmp_path / "run"))
    eval_math.main(arguments)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:7]))
    eval_math.main([*arguments, "--rollout-batch", "4"])
    assert path.read_text() == whole


def test_regrade_needs_no_model_and_says_the_same(tmp_path, data, monkeypatch, capsys):
    out = tmp_path / "run"
    eval_math.main(command(data, "--out", str(out)))
    results, path = json.loads((out / "results.json").read_text()), out / "samples.jsonl"
    (out / "results.json").unlink()
    content = path.read_bytes()
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(eval_math, name, None)
    eval_math.main(["--regrade", str(path)])
    assert json.loads((out / "results.json").read_text()) == results
    assert "0 of 35 verdicts changed" in capsys.readouterr().out
    # Another judge, a file that was cut within a problem, and alone in its directory.
    lines = lines_of(path)
    alone = tmp_path / "alone/samples.jsonl"
    alone.parent.mkdir()
    alone.write_text("".join(json.dumps(line | {"gold": "999"}) + "\n" for line in lines[:-2]))
    eval_math.main(["--regrade", str(alone), "--k", "3"])
    printed = capsys.readouterr().out
    assert f"{sum(line['right'] for line in lines[:-2])} of 33 verdicts changed" in printed
    assert "6 problems: " in printed and "pass@3" in printed  # the last is not whole
    assert len(json.loads((tmp_path / "alone/results.json").read_text())["each"]) == 6
    assert "--k must be from 1 to 4" in refusal(capsys, ["--regrade", str(path), "--k", "5"])
    assert path.read_bytes() == content


def pair_of_runs(tmp_path, one, other):
    """Two results.json about the same problems, from rows of avg, greedy and maj."""
    for name, rows in ("a", one), ("b", other):
        each = [
            {"avg": avg, "greedy": greedy, "maj": maj, "where": f"d.jsonl:{i}"}
            for i, (avg, greedy, maj) in enumerate(rows, 1)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"data": "x", "each": each}))
    return ["--compare", str(tmp_path / "a"), str(tmp_path / "b")]


def test_compare_is_paired(tmp_path, capsys):
    # Problems differ by much, the runs by a tenth each time: the paired interval has no width.
    one = [(i / 10, 0.0, 0.5) for i in range(10)]
    other = [(i / 10 + 0.1, 1.0, 0.5) for i in range(10)]
    one[2], other[2] = (0.2, 0.0, 0.0), (0.3, 1.0, 1.0)
    one[4], other[4] = (0.4, 0.0, 0.0), (0.5, 1.0, 0.5)  # a tie has not won yet
    one[7], other[7] = (0.7, 0.0, 1.0), (0.8, 1.0, 0.5)
    eval_math.main(pair_of_runs(tmp_path, one, other))
    printed = capsys.readouterr().out
    assert "avg         +0.100 (+0.100 to +0.100)" in printed
    assert "greedy      +1.000 (+1.000 to +1.000)" in printed
    assert "d.jsonl:3 became right by majority; avg 0.20 -> 0.30" in printed
    assert "d.jsonl:8 became wrong by majority; avg 0.70 -> 0.80" in printed
    assert printed.count("d.jsonl") == 2
    assert printed.index("d.jsonl:8") < printed.index("avg         +0.100")  # in sight


def test_compare_of_two_runs(tmp_path, data, capsys):
    shutil.copytree(STUDENT, tmp_path / "plain")  # the same weights, asked in another way
    (tmp_path / "plain/chat_template.jinja").unlink()
    eval_math.main(command(data, "--out", str(tmp_path / "a")))
    plain = ["--model", str(tmp_path / "plain"), "--temperature", "0.7", "--top-k", "2"]
    eval_math.main(command(data, "--out", str(tmp_path / "b"), *plain))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["data"] == configs[1]["data"] and configs[0]["model"] != configs[1]["model"]
    capsys.readouterr()
    eval_math.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    printed = capsys.readouterr().out
    assert "7 problems" in printed and "greedy" in printed
    assert "not made alike: temperature 1.0 and 0.7\nnot made alike: top_k 0 and 2\n" in printed


def test_the_picture(tmp_path, data, monkeypatch, capsys):
    plot = command(data, "--out", str(tmp_path / "run"), "--plot")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.pyplot", None)
        assert "matplotlib" in refusal(capsys, plot)
    assert (tmp_path / "run/results.json").exists()  # no picture, but no number lost
    pytest.importorskip("matplotlib").use("Agg")
    eval_math.main(plot)
    assert (tmp_path / "run/results.png").read_bytes().startswith(b"\x89PNG")


def test_without_out_every_run_is_a_new_one(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for second in "56":
        monkeypatch.setattr(eval_math.time, "strftime", lambda form, s=second: f"runs/eval-{s}")
        eval_math.main(command(data))
    assert len(list((tmp_path / "runs").glob("eval-*/results.json"))) == 2
    assert "File exists: 'runs/eval-6'" in refusal(capsys, command(data))  # in the same second


def test_presets():
    tiny, _ = eval_math.parse_arguments(["--model", STUDENT])
    assert (tiny.data, tiny.n, tiny.temperature) == ("tiny/test.jsonl", 8, 1.0)
    assert (tiny.top_p, tiny.top_k, tiny.max_new_tokens) == (1.0, 0, 72)
    paper, _ = eval_math.parse_arguments(["--model", STUDENT, "--preset", "paper", "--n", "3"])
    assert (paper.temperature, paper.top_p, paper.top_k, paper.n) == (0.7, 0.8, 20, 3)
    assert "\\boxed{}" in paper.prompt_suffix and paper.max_new_tokens == 8192


# --- bad input ------------------------------------------------------------------------------------


def refusal(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        eval_math.main(arguments)
    assert stop.value.code == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]
    assert len(err) == 1, err
    return err[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--k", "1", "8"], "--k 8: pass@k needs a k from 1 to --n, which is 4"),
        (["--k", "0"], "--k 0"),
        (["--n", "0"], "--n must be at least 1"),
        (["--top-p", "0"], "--top-p must be at least"),
        (["--temperature", "nan"], "--temperature must be at least"),
        (["--max-new-tokens", "250"], "of 256 tokens: drop it, or lower --max-new-tokens"),
        (["--model", "./nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--regrade", "nowhere/samples.jsonl"], "nowhere/samples.jsonl"),
        (["--compare", "nowhere", "nowhere"], "nowhere/results.json"),
        (["--compare", "nowhere"], "--compare"),
        (["--samples", "3"], "--samples"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_bad_flags(capsys, data, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refusal(capsys, command(data, *more))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"answer": "1"}', '{"problem": "1+1"}'])
def test_bad_lines(capsys, data, line):
    with open(data, "a") as file:
        file.write(line + "\n")
    assert f"{data}:8: " in refusal(capsys, command(data))


def test_samples_of_another_model_or_data_set(capsys, data, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    shutil.copytree(STUDENT, tmp_path / "model")
    mine = command(data, "--model", str(tmp_path / "model"), "--out", out)
    eval_math.main(mine)
    assert "n was 4" in refusal(capsys, [*mine, "--n", "5"])
    trained = AutoModelForCausalLM.from_pretrained(STUDENT)
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1 + 1e-4)
    trained.save_pretrained(tmp_path / "model")
    assert "another model" in refusal(capsys, mine)  # under the same name
    shutil.copytree(STUDENT, tmp_path / "model", dirs_exist_ok=True)
    rows = Path(data).read_text()
    Path(data).write_text(rows.replace('"9"', '"10"', 1))
    assert "another data" in refusal(capsys, mine)
    Path(data).write_text(rows)
    edited = tmp_path / "eval_math.py"
    edited.write_text((ROOT / "eval_math.py").read_text().replace("> 256", "> 255"))
    with monkeypatch.context() as patch:
        patch.setattr(eval_math, "__file__", str(edited))
        assert "another code" in refusal(capsys, mine)
    eval_math.main(mine)
    (tmp_path / "killed").mkdir()  # before its config.json was whole
    (tmp_path / "killed/config.new").write_text("{")
    eval_math.main(command(data, "--out", str(tmp_path / "killed")))
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger/thesis.tex").write_text("ten years of work")
    said = refusal(capsys, command(data, "--out", str(tmp_path / "stranger")))
    assert "give another --out" in said


def test_compare_of_different_problems_and_regrade_of_something_else(capsys, data, tmp_path):
    arguments = pair_of_runs(tmp_path, [(1, 1, 1)], [(1, 1, 1)])
    eval_math.main(arguments)
    path = tmp_path / "b/results.json"
    path.write_text(path.read_text().replace('"x"', '"y"'))
    assert "not known to be about the same problems" in refusal(capsys, arguments)
    for run in "ab":  # made without a config.json, which has the data's hash
        path = tmp_path / run / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": None}))
    assert "not known to be about the same problems" in refusal(capsys, arguments)
    assert f"{data}:1: not a line of a samples.jsonl" in refusal(capsys, ["--regrade", data])
    Path(data).write_text("")
    assert "0 problems with all 0 samples" in refusal(capsys, ["--regrade", data])
    assert "data.jsonl" in refusal(capsys, command(data))


class Offline:
    """Stands for a client without network."""

    def __getattr__(self, name):
        def call(*args, **kwargs):
            raise ConnectionError("no route to host")

        return call


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("math500", "huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"),
        ("aime25", "huggingface.co/datasets/math-ai/aime25/resolve/main/test.jsonl"),
        ("aime24", "Qwen2.5-Math/main/evaluation/data/aime24/test.jsonl"),
        ("gsm8k", "Qwen2.5-Math/main/evaluation/data/gsm8k/test.jsonl"),
    ],
)
def test_a_benchmark_without_network(capsys, monkeypatch, name, url):
    monkeypatch.setitem(sys.modules, "datasets", Offline())
    monkeypatch.setattr(eval_math, "hf_hub_download", Offline().download)
    with pytest.raises(SystemExit) as stop:
        eval_math.fetch(name)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"{name}: no network or `datasets`" in said and url in said and "--data" in said
    assert len(said.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "datasets", None)
    if name in ("aime24", "gsm8k"):
        with pytest.raises(SystemExit):
            eval_math.fetch(name)
        assert url in capsys.readouterr().err


def test_the_benchmarks_and_the_forms_of_their_answers(tmp_path, monkeypatch):
    rows = {
        "math500": {"problem": "p", "solution": "\\boxed{4}", "answer": "5", "level": 2},
        "aime25": {"problem": "p", "answer": "025", "id": "0"},
        "aime24": {"id": 60, "problem": "p", "solution": "so \\boxed{204}", "year": "2024"},
        "gsm8k": {"question": "p", "answer": "<<1+1=2>>\n#### 2"},
    }
    asked = []

    def hf_hub_download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        path = tmp_path / file
        path.write_text(json.dumps(rows["math500" if "MATH" in repo else "aime25"]) + "\n")
        return str(path)

    def load_dataset(repo, name, split):
        asked.append((repo, name, split))
        return [rows["gsm8k" if "gsm8k" in repo else "aime24"]]

    monkeypatch.setattr(eval_math, "hf_hub_download", hf_hub_download)
    hub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    answers = {}
    for name in rows:
        ((where, row),) = eval_math.read_rows(name)
        problem = {"where": where, "row": row}
        eval_math.read_answers([problem])
        answers[where] = problem["answer"]
    assert answers == {"math500:1": "5", "aime25:1": "025", "aime24:1": "204", "gsm8k:1": "2"}
    assert asked == [
        ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset"),
        ("math-ai/aime25", "test.jsonl", "dataset"),
        ("HuggingFaceH4/aime_2024", "default", "train"),
        ("openai/gsm8k", "main", "test"),
    ]
