"""Every script as on a GPU, without one: no tensor of the GPU meets one of the CPU.

What is sent to the pretended GPU, made there, or computed from what is there, is marked; in truth
it stays on the CPU, where autocast computes in bf16 as it would there. The kernels are the
reference's. Processes on GPUs (FSDP2, nccl) are not pretended.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import eval_math
import fkl_warmup
import grpo
import kernels
import opd
import paced

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SOURCES = (Path(grpo.__file__).parent, Path(kernels.__file__).parent)
CUDNN = []  # whether its attention was wanted, by each run
CHOSEN = []  # which GPU each run took
INDEXING = "__getitem__", "__setitem__"
MOVING = "to", "cpu", "copy_", "__set__", "_has_compatible_shallow_copy_type"  # and Module.to


class PretendedGPU(TorchFunctionMode):
    """Marks what would be there, and remembers where it met what would not."""

    def __init__(self):
        super().__init__()
        self.there, self.steps, self.met = WeakTensorKeyDictionary(), 0, set()

    def among(self, arguments):
        """The tensors of the GPU, and those of the CPU that are no mere numbers."""
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if x not in self.there and x.dim() > 0]
        return [x for x in tensors if x in self.there], here

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        there, here = self.among((args, kwargs))
        if name == "__get__" and there and function.__self__ is torch.Tensor.device:
            return GPU
        asked = [kwargs.get("device"), *(args[1:] if name == "to" else ())]
        asked = [torch.device(x) for x in asked if isinstance(x, str | torch.device)]
        if asked and asked[0].type == "cuda":
            kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
            args = [CPU if isinstance(x, str | torch.device) else x for x in args]
        elif name == "cpu":
            asked = [CPU]

        if name in INDEXING:  # of a tensor of the GPU also by one of the CPU, not the reverse
            at_home, index, values = args[0] in self.there, args[1], self.among(args[2:])
            wrong = values[at_home] or (not at_home and any(x.dim() for x in self.among(index)[0]))
            there = [args[0]] if at_home else []
        else:
            wrong = there and here and name not in MOVING
        if wrong:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in SOURCES]
            self.met.add(f"{name}: {frames[-1].filename}:{frames[-1].lineno}")
        self.steps += bool(there)
        result = function(*args, **kwargs)
        if name == "__set__" and self.among(args[1:])[0]:  # parameter.data = ...
            self.there[args[0]] = True
        if asked and result is not None and any(result is x for x in args):
            result = result.clone()  # another tensor, on the other device
        if asked[0].type == "cuda" if asked else there:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.there[tensor] = True
        return result


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch believes in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", CHOSEN.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", CUDNN.append)
    CUDNN.clear()
    CHOSEN.clear()
    for name in ("triton_kl", "triton_logprob"):
        monkeypatch.setattr(kernels, name, kernels.reference)
    for script in (grpo, opd, fkl_warmup, paced, eval_math):
        monkeypatch.setattr(script, "autocast", bfloat16, raising=script is not eval_math)
    return PretendedGPU()


def bfloat16(model):
    return torch.autocast("cpu", torch.bfloat16)


SMALL = ["--device=cuda", "--prompts-per-step=4", "--max-new-tokens=8"]


@pytest.mark.parametrize(
    "script, flags",
    [
        (grpo, ["--samples-per-prompt=2", "--updates-per-step=2", "--checkpointing=1"]),
        (opd, []),
        (opd, ["--estimator=sampled"]),
        (fkl_warmup, []),
        (paced, ["--refresh-every=1"]),
        (paced, ["--self", "--schedule=fkl"]),
    ],
)
def test_training(script, flags, gpu, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1+2", "answer": "3"}\n' * 8, encoding="utf-8")
    flags = [*SMALL, *flags, f"--data={problems}", f"--val-data={problems}"]
    with gpu:
        script.main([*flags, "--steps=1", f"--out={tmp_path / 'run'}"])
        script.main([*flags, "--steps=2", f"--out={tmp_path / 'run'}"])  # resumed
        script.main([*flags, "--steps=1", "--show"])
        if script is fkl_warmup:
            flags += [f"--rollouts={tmp_path / 'run/rollouts.jsonl'}"]
            script.main([*flags, "--steps=1", f"--out={tmp_path / 'replay'}"])
    assert gpu.steps > 1000 and not gpu.met and set(CUDNN) == {False} and set(CHOSEN) == {3}


def test_evaluation(gpu, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1+2", "answer": "3"}\n' * 8, encoding="utf-8")
    flags = ["--model=tiny/teacher", f"--data={problems}", "--device=cuda", "--max-new-tokens=8"]
    flags += ["--top-k=5", "--top-p=0.9"]
    with gpu:
        eval_math.main([*flags, f"--out={tmp_path / 'eval'}"])
    assert gpu.steps > 1000 and not gpu.met and set(CUDNN) == {False} and set(CHOSEN) == {3}
