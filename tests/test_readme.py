"""The README and the scripts say the same: equations, and where they stand."""

import ast
import re
from pathlib import Path

import pytest

from forked import run

ROOT = Path(__file__).parent.parent
SCRIPTS = ["grpo.py", "fkl_warmup.py", "opd.py", "paced.py", "eval_math.py"]
README = (ROOT / "README.md").read_text()
TABLE = set(re.findall(r"`(\w+\.py)`, \*(\w+)\*, Eq\. (\d)", README))


def equations(name):
    """Those that the docstring states; and those that a line computes, with their section."""
    text = (ROOT / name).read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    stated = set(re.findall(r"^  Eq\. (\d)  \S", docstring, re.MULTILINE))
    parts = re.split(r"^# --- (\w+) -+\n", text, flags=re.MULTILINE)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    computed = {
        (title, n) for title, part in sections for n in re.findall(r"  # Eq\. (\d)$", part, re.M)
    }
    return stated, computed


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_equation_stands_in_the_docstring_behind_a_line_and_in_the_table(name):
    stated, computed = equations(name)
    assert stated == {str(n + 1) for n in range(len(stated))} and len(stated) >= 2
    assert {n for _, n in computed} == stated
    assert {(section, n) for script, section, n in TABLE if script == name} == computed


def test_the_table_names_no_other_script():
    assert {script for script, _, _ in TABLE} == set(SCRIPTS)


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"`((?:tests/|tiny/)?\w+\.(?:py|txt|jsonl))`", README))
    made = {"metrics.jsonl", "samples.jsonl"}  # of a run
    assert {path for path in named - made if not (ROOT / path).exists()} == set()
    assert {path.name for path in ROOT.glob("*.py")} <= named


EXERCISES = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "tests/exercises.md").read_text(), re.M | re.S
)


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """The last line of what each check says of the scripts as they are, nothing if it passes."""
    folder = tmp_path_factory.mktemp("checks")
    checks = [folder / f"{number}.py" for number in range(1, len(EXERCISES) + 1)]
    for path, check in zip(checks, EXERCISES, strict=True):
        path.write_text(check)
        run([path], f"{path}.said", CUDA_VISIBLE_DEVICES="")
    said = [Path(f"{path}.said").read_text().splitlines() for path in checks]
    return [lines[-1] if lines else "" for lines in said]


@pytest.mark.parametrize("number", range(1, 11))
def test_an_exercise_that_nobody_has_solved_fails_its_check(number, endings):
    """For its own reason: the first nine by an assertion, the last by a script's one line."""
    assert len(EXERCISES) == 10
    assert endings[number - 1].startswith("AssertionError: " if number < 10 else "opd.py: ")
