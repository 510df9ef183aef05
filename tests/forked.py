"""Runs scripts as processes of their own, without the seconds that each Python takes to import.

A first Python imports what the scripts do; every process here is a fork of it that goes on as
`python script.py ...` would.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = multiprocessing.get_context("forkserver")
PYTHON.set_forkserver_preload(
    [
        "math_verify",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


def go_on(command, said, environment):
    """What such a process does first."""
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    sys.argv = [str(word) for word in command]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(command, said=os.devnull, **environment):
    """A process; what it says goes into a file."""
    process = PYTHON.Process(target=go_on, args=(command, said, environment), daemon=True)
    process.start()
    return process


def run(command, said=os.devnull, **environment):
    """Its exit status; -9 if it has not ended in two minutes."""
    process = start(command, said, **environment)
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode
