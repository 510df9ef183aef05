"""The README and the scripts say the same: equations, and where they stand."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


RUN_ALL = """
import json, os, sys
import fkl_warmup, grpo, opd, paced  # once for all of them, because that takes seconds

for number, check in enumerate(json.load(sys.stdin), 1):
    if os.fork() == 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{sys.argv[1]}/{number}", "w")
        exec(check, {})
        sys.exit()
    os.wait()
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """The last line of what each check says of the scripts as they are, nothing if it passes."""
    folder = tmp_path_factory.mktemp("checks")
    command = [sys.executable, "-c", RUN_ALL, str(folder)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, input=json.dumps(EXERCISES), text=True, env=env, check=True)
    said = {int(path.name): path.read_text().strip() for path in folder.iterdir()}
    return {number: text.splitlines()[-1] if text else "" for number, text in said.items()}


@pytest.mark.parametrize("number", range(1, 11))
def test_an_exercise_that_nobody_has_solved_fails_its_check(number, endings):
    """For its own reason: the first nine by an assertion, the last by a script's one line."""
    assert len(EXERCISES) == 10
    assert endings[number].startswith("AssertionError: " if number < 10 else "opd.py: ")
