"""What the scripts share is written in each, the same to the byte; what differs stays small.

A mend that lands in one file only fails here: copy the section, then run this file.
"""

import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("grpo.py", "fkl_warmup.py", "opd.py", "paced.py")
# Whole sections that are the same, byte for byte. Elsewhere every function of the same name is, but
# for those that are the algorithm.
COMMON = ("processes", "problems", "rollout", "scoring", "checkpoint")
SAME = {
    ("grpo.py", "opd.py"): COMMON,
    ("fkl_warmup.py", "opd.py"): (*COMMON, "teacher"),
    ("paced.py", "opd.py"): (*COMMON, "teacher"),
    ("paced.py", "grpo.py"): ("grading",),
}
OWN = {"parse_arguments", "train", "validate", "both_logits", "distil_loss"}
# Lines outside the docstring that may differ: the larger of added and removed, without comments.
BUDGET = {
    ("fkl_warmup.py", "opd.py"): 50,
    ("grpo.py", "opd.py"): 130,
    ("paced.py", "opd.py"): 160,
}


def sections(name):
    """{title: text} of a script, split at its banners."""
    parts = re.split(r"^# --- (\w+) -+\n", (ROOT / name).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code_lines(name):
    """The lines of a script without its docstring, blank lines and comments."""
    text = (ROOT / name).read_text()
    docstring = ast.parse(text).body[0]
    lines = text.splitlines()[docstring.end_lineno :]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def changed(one, other):
    opcodes = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    removed = sum(i2 - i1 for tag, i1, i2, _, _ in opcodes if tag != "equal")
    added = sum(j2 - j1 for tag, _, _, j1, j2 in opcodes if tag != "equal")
    return max(removed, added)


@pytest.mark.parametrize("pair", SAME, ids="/".join)
def test_shared_sections_are_the_same(pair):
    one, other = map(sections, pair)
    for title in SAME[pair]:
        assert one[title] == other[title], f"section {title!r} differs between {pair}"


def functions(name):
    """{name: source} of the functions and classes of a script."""
    text = (ROOT / name).read_text()
    nodes = [node for node in ast.parse(text).body if hasattr(node, "name")]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize("pair", list(itertools.combinations(SCRIPTS, 2)), ids="/".join)
def test_functions_of_the_same_name_are_the_same(pair):
    one, other = map(functions, pair)
    common = set(one) & set(other) - OWN
    assert len(common) > 10
    for name in sorted(common):
        assert one[name] == other[name], f"{name}() differs between {pair}"


@pytest.mark.parametrize("pair", BUDGET, ids="/".join)
def test_siblings_differ_in_few_lines(pair):
    assert changed(*map(code_lines, pair)) <= BUDGET[pair]


def test_eval_math_grades_and_decodes_as_grpo_does():
    one, other = functions("grpo.py"), functions("eval_math.py")
    grading = {"last_boxed", "parse_answer", "read_answers", "same_answer"}
    for name in grading | {
        "fail",
        "start_processes",
        "gather",
        "render",
        "load_problems",
        "KVLayer",
        "pad_left",
        "decode",
    }:
        assert one[name] == other[name], f"{name}() differs"
    constants = [
        sections(name)["grading"].partition("def last_boxed")[0]
        for name in ("grpo.py", "eval_math.py")
    ]
    assert constants[0] == constants[1]


@pytest.mark.parametrize("name", ["SUFFIX", "CACHE"])
def test_constants_are_the_same(name):
    texts = [(ROOT / script).read_text() for script in (*SCRIPTS, "eval_math.py")]
    assert len({re.search(rf"^{name} = .*$", text, re.MULTILINE)[0] for text in texts}) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "eval_math.py"])
def test_threads_are_told_how_to_wait_before_torch_starts_them(script):
    """Beside another program on its cores a step would take fifty times as long."""
    before, _, after = (ROOT / script).read_text().partition('"GOMP_SPINCOUNT", "10000"')
    assert "import torch\n" in after and not re.search("^(import|from) (torch|numpy)", before, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_writes_its_gradient_over_the_logits(script):
    calls = re.findall(r"= (?:softmax_kl|token_logprob)\(.*", (ROOT / script).read_text())
    for call in calls:
        of_the_gradient = "teacher_logits" not in call and "keep)" not in call
        assert ("inplace_backward=True" in call) == of_the_gradient, call
