"""Two gloo processes do what one does: gradients, metrics, checkpoints; and what ends them.

Run as a script this file is such a process: it runs one of the scripts on rollouts that follow from
the prompt alone, so that any number of processes learns from the same texts, and keeps the
gradients. Where torchrun itself is not at stake two forks stand in for it, since it starts slowly.
"""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from forked import run, start

ROOT = Path(__file__).parent.parent
SCRIPTS = ["grpo", "fkl_warmup", "opd", "paced"]
RANK = int(os.environ.get("RANK", 0))
# Five prompts on two processes, three and two, in parts of two rows: uneven everywhere.
SMALL = "--prompts-per-step 5 --samples-per-prompt 2 --micro-batch 2 --max-new-tokens 16 --lr 1e-5"
SMALL += " --val-every 2 --save-every 2 --device cpu"
MORE = {"paced": ["--schedule", "rkl-fkl", "--refresh-every", "2"], "opd": [], "fkl_warmup": []}


def fixed_rollout(model, prompts, group, rng, args):
    """Completions of mixed lengths that follow from the prompt."""
    rows = []
    for prompt in prompts:
        for g in range(group):
            draw = np.random.default_rng([*prompt, g])
            row = torch.tensor(draw.integers(4, 20, size=draw.integers(2, 16)))
            rows.append(torch.cat([torch.tensor([4 + g % 2]), row]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1)
    return ids.clamp(min=0), ids >= 0, (ids >= 0).sum(1) > 12


def fixed_grade(tokenizer, completion_ids, mask, golds):
    """One right, one wrong in every group."""
    rewards = [float(row[0] % 2) for row in completion_ids]
    return [tokenizer.decode(ids[keep]) for ids, keep in zip(completion_ids, mask)], rewards  # noqa: B905


def uneven_grade(tokenizer, completion_ids, mask, golds):
    """Of the eight of a problem from one to seven are right: rates, and so weights, differ."""
    texts, _ = fixed_grade(tokenizer, completion_ids, mask, golds)
    return texts, [float(i % 8 < 1 + int(gold) % 7) for i, gold in enumerate(golds)]


def as_on_gpus(script):
    """FSDP2, autocast and the teacher in bf16. No token is decoded through FSDP2's hooks."""
    decode = script.decode

    def spy(model, *rest):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        return decode(model, *rest)

    script.decode = spy
    policy, load = script.MixedPrecisionPolicy, getattr(script, "load_teacher", None)

    def in_bf16(param_dtype, reduce_dtype):
        assert reduce_dtype == torch.float32
        return policy(torch.bfloat16, reduce_dtype)

    script.MixedPrecisionPolicy = in_bf16
    script.autocast = lambda model: torch.autocast("cpu", torch.bfloat16)
    script.load_teacher = lambda *args: load(*args).bfloat16()


def run_fixed(name, arguments, gradients, fault=""):
    """A script's main on fixed rollouts; the whole gradient of every update into a file."""
    script, found = importlib.import_module(name), []
    clip, calls = script.clip_grad_norm_, []
    if fault == "bf16":
        as_on_gpus(script)

    def spy(parameters, norm):
        parameters = list(parameters)
        whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in parameters]
        found.append(torch.cat([grad.flatten().clone() for grad in whole]))
        return clip(parameters, norm)

    def rollout(*args):
        calls.append(1)
        if fault == "killed" and RANK == 1 and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "bf16":  # decodes in it, for the errors alone
            originals["rollout"](*args)
        return fixed_rollout(*args)

    originals = {key: getattr(script, key, None) for key in ("rollout", "grade", "clip_grad_norm_")}
    script.rollout, script.clip_grad_norm_ = rollout, spy
    script.grade = uneven_grade if name == "paced" else fixed_grade
    if fault == "no data" and RANK == 1:
        arguments = [*arguments, "--data", "gone.jsonl"]
    try:
        script.main(arguments)
    finally:
        for key, original in originals.items():
            setattr(script, key, original)
    if RANK == 0:
        torch.save(found, gradients)


def arguments_of(name, out, steps=3):
    models = ["--model", "tiny/student"] if name == "grpo" else ["--student", "tiny/student"]
    models += [] if name == "grpo" else ["--teacher", "tiny/teacher"]
    data = ["--data", "tiny/train.jsonl", "--val-data", str(out.parent / "val.jsonl")]
    return [
        *models,
        *data,
        *SMALL.split(),
        *MORE.get(name, []),
        "--steps",
        str(steps),
        "--out",
        str(out),
    ]


def two(*command):
    """Two processes, as torchrun would start them; what they have said."""
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, rank) for rank in "01"]
        processes = [
            start(command, log, RANK=log.name, LOCAL_RANK=log.name, **world) for log in logs
        ]
        for process in processes:
            process.join(120)
            process.kill()
        said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [0, 0], said
    return said


def two_fixed(name, arguments, gradients, fault=""):
    return two(__file__, name, gradients, fault, *arguments)


def torchrun(name, arguments, gradients, fault=""):
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2"]
    command += [__file__, name, str(gradients), fault, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def lines_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def close(one, other, relative):
    """The same keys and nulls, and numbers that differ by a rounding error."""
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for a, b in zip(one, other, strict=True):
        for key in a:
            assert a[key] == (b[key] if a[key] is None else pytest.approx(b[key], rel=relative)), (
                key
            )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: (directory of one process, of two, gradients of one, of two)}"""
    folder, made = tmp_path_factory.mktemp("processes"), {}
    lines = (ROOT / "tiny/val.jsonl").read_text().splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(lines[:7]))
    old = os.getcwd()
    os.chdir(ROOT)
    for name in SCRIPTS:
        paths = [folder / f"{name}-{n}" for n in (1, 2)]
        run_fixed(name, arguments_of(name, paths[0]), folder / f"{name}-1.pt")
        said = two_fixed(name, arguments_of(name, paths[1]), folder / f"{name}-2.pt")
        gradients = [torch.load(folder / f"{name}-{n}.pt", weights_only=True) for n in (1, 2)]
        made[name] = (*paths, *gradients, said)
    yield made
    os.chdir(old)


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_have_the_gradient_of_one(name, runs):
    one, two = runs[name][2:4]
    assert len(one) == len(two) == 3
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        # Later steps start from weights that have gone through Adam, which divides small by small.
        assert float((a - b).norm() / a.norm()) < (1e-5 if step == 0 else 1e-3), step
    assert float(one[0].norm()) > 1e-3


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_compute_in_bf16_as_on_gpus(name, runs, tmp_path):
    """The same gradient, but for rounding; weights, gradients and files stay fp32."""
    (tmp_path / "val.jsonl").write_bytes((runs[name][0].parent / "val.jsonl").read_bytes())
    two_fixed(name, arguments_of(name, tmp_path / "run", 1), tmp_path / "g.pt", "bf16")
    exact, (gradient,) = runs[name][2][0], torch.load(tmp_path / "g.pt", weights_only=True)
    assert 1e-3 < float((gradient - exact).norm() / exact.norm()) < 0.15
    assert gradient.dtype == torch.float32
    with safe_open(tmp_path / "run/final/model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float32}  # noqa: SIM118


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_log_the_metrics_of_one(name, runs):
    close(*(lines_of(path / "metrics.jsonl") for path in runs[name][:2]), 1e-3)
    if name == "fkl_warmup":
        texts = [
            sorted(line["completion"] for line in lines_of(path / "rollouts.jsonl"))
            for path in runs[name][:2]
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 30


@pytest.mark.parametrize("name", SCRIPTS)
def test_rank_0_writes_one_ordinary_model_and_talks_alone(name, runs):
    one, other, _, _, said = runs[name]
    for folder in ("best", "final", "checkpoint"):
        models = [AutoModelForCausalLM.from_pretrained(path / folder) for path in (one, other)]
        assert type(models[0]) is type(models[1])
        sizes = [(path / folder / "model.safetensors").stat().st_size for path in (one, other)]
        assert sizes[0] == sizes[1]  # a tied weight stands there once
        states = [model.state_dict() for model in models]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert torch.allclose(states[0][key], states[1][key], atol=1e-4), key
        assert [p.name for p in sorted((one / folder).iterdir())] == [
            p.name for p in sorted((other / folder).iterdir())
        ]
    assert said.count("settings:") == 1 and "3/3" in said


@pytest.mark.parametrize("name", ["grpo", "paced"])
def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way_round(name, runs, tmp_path):
    (tmp_path / "val.jsonl").write_bytes((runs[name][0].parent / "val.jsonl").read_bytes())
    run_fixed(name, arguments_of(name, tmp_path / "whole", 4), tmp_path / "whole.pt")
    for first in (1, 2):
        out = tmp_path / f"{first}"
        if first == 1:
            run_fixed(name, arguments_of(name, out, 2), tmp_path / "a.pt")
            two_fixed(name, arguments_of(name, out, 4), tmp_path / "b.pt")
        else:
            two_fixed(name, arguments_of(name, out, 2), tmp_path / "a.pt")
            run_fixed(name, arguments_of(name, out, 4), tmp_path / "b.pt")
        assert len(torch.load(tmp_path / "b.pt", weights_only=True)) == 2
        # paced.py's schedule turns at half of the steps: 4 here, as in the whole run, from step 2.
        close(*(lines_of(p / "metrics.jsonl")[2:] for p in (out, tmp_path / "whole")), 1e-3)
        states = [
            torch.load(path / "checkpoint/optimizer.pt", weights_only=True)["state"]
            for path in (out, tmp_path / "whole")
        ]
        assert states[0].keys() == states[1].keys()
        for key, state in states[1].items():
            assert float(states[0][key]["step"]) == float(state["step"]) == 4
            apart = (states[0][key]["exp_avg"] - state["exp_avg"]).norm()
            # The first two steps of paced.py were those of a run of two, which turned after one.
            assert name == "paced" or apart < 0.01 * state["exp_avg"].norm(), key


def test_a_rollout_of_two_processes_has_the_weights_of_the_step_before(runs, tmp_path):
    """They are gathered for it, and must not be those that an earlier rollout gathered."""
    val = runs["opd"][0].parent / "val.jsonl"
    for steps in ("1", "2"):
        more = ["--data", "tiny/train.jsonl", "--val-data", val, "--lr", "1e-2"]
        more += ["--warmup-steps", "0", "--val-every", "1", "--steps", steps]
        two("opd.py", *SMALL.split(), *more, "--out", tmp_path / steps)
    args, context = opd.parse_arguments(["--device", "cpu", "--max-new-tokens", "16"])
    tokenizer = AutoTokenizer.from_pretrained("tiny/student")
    problems = opd.load_problems("tiny/train.jsonl", tokenizer, args, context)
    order = np.random.default_rng([0, 0]).permutation(len(problems))[5:10:2]  # step 2, rank 0
    prompts, texts = [problems[i]["ids"] for i in order], {}
    for name, path in ("before", "tiny/student"), ("after", tmp_path / "1/final"):
        model, rng = AutoModelForCausalLM.from_pretrained(path), np.random.default_rng([0, 2, 1, 0])
        ids, mask, _ = opd.rollout(model, prompts, 2, rng, args)
        texts[name] = [tokenizer.decode(ids[i][mask[i]]) for i in range(0, 6, 2)]
    lines = [line for line in lines_of(tmp_path / "2/samples.jsonl") if line["step"] == 2]
    assert [line["completion"] for line in lines] == texts["after"] != texts["before"]


def test_processes_draw_different_texts(tmp_path):
    """For the same problem, which all have."""
    (tmp_path / "data.jsonl").write_text('{"problem": "37+8+5+2+1+7"}\n' * 8)
    more = ["--prompts-per-step", "8", "--steps", "1", "--out", tmp_path / "run"]
    more += ["--data", tmp_path / "data.jsonl", "--val-data", tmp_path / "data.jsonl"]
    two("fkl_warmup.py", *SMALL.split(), *more)
    texts = [line["completion"] for line in lines_of(tmp_path / "run/rollouts.jsonl")]
    assert len(texts) == 16 and texts[:8] != texts[8:]


def test_a_killed_rank_ends_the_job_and_leaves_a_whole_checkpoint(runs, tmp_path):
    (tmp_path / "val.jsonl").write_bytes((runs["opd"][0].parent / "val.jsonl").read_bytes())
    arguments, began = arguments_of("opd", tmp_path / "run", 9), time.monotonic()
    done = torchrun("opd", arguments, tmp_path / "a.pt", "killed")
    assert time.monotonic() - began < 60 and done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert not (tmp_path / "run/final").exists()
    done = torchrun("opd", arguments, tmp_path / "b.pt")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl")] == [*range(1, 10)]
    assert len(torch.load(tmp_path / "b.pt", weights_only=True)) == 7  # from step 2 on


def told(done):
    """The lines of stderr that a script, not torchrun, has written."""
    return [line for line in done.stderr.splitlines() if re.match(r"(grpo|eval_math)\.py:", line)]


def test_what_ends_a_job_is_one_line(runs, tmp_path):
    (tmp_path / "val.jsonl").write_bytes((runs["grpo"][0].parent / "val.jsonl").read_bytes())
    arguments = arguments_of("grpo", tmp_path / "run")
    done = torchrun("grpo", [*arguments, "--prompts-per-step", "1"], tmp_path / "a.pt")
    assert len(told(done)) == 1 and "--prompts-per-step" in told(done)[0]
    done = torchrun("grpo", arguments, tmp_path / "a.pt", "no data")
    assert told(done) == [
        "grpo.py: tiny/train.jsonl is there for some processes only, not for rank 1"
    ]
    assert done.returncode != 0 and not (tmp_path / "run/best").exists()


@pytest.mark.parametrize("name", [*SCRIPTS, "eval_math"])
def test_a_port_in_use_is_one_line(name, tmp_path):
    """Of processes that something else than torchrun has started; torchrun would say it itself."""
    with socket.create_server(("", 0)) as server:
        port = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        command = [f"{name}.py", "--device", "cpu", "--out", tmp_path / "run"]
        assert run(command, tmp_path / "said", RANK="0", WORLD_SIZE="2", **port) == 2
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(f"{name}.py: ") and "address already in use" in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_peak_memory_does_not_grow_with_the_number_of_rollouts(name, runs, tmp_path):
    """Unbounded, 1,024 completions would take 100 MB more to sample and 3 GB more to score."""
    (tmp_path / "val.jsonl").write_bytes((runs[name][0].parent / "val.jsonl").read_bytes())
    peaks = []
    for prompts in ("16", "128"):
        bounds = ["--samples-per-prompt", "8", "--rollout-batch", "16", "--micro-batch", "4"]
        more = [
            "--data",
            "tiny/pool.jsonl",
            "--max-new-tokens",
            "72",
            "--prompts-per-step",
            prompts,
            *bounds,
        ]
        # By a small process: a child's peak begins with that of who started it.
        command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, f"{name}.py"]
        command += [*arguments_of(name, tmp_path / prompts, 1), *more]
        command += ["--weights", "uniform"] if name == "paced" else []  # no rates for the pool
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(float(re.search(r"peak memory: ([\d.]+) GB", done.stdout)[1]))
    assert peaks[1] <= peaks[0] + 0.03


def test_two_processes_evaluate_to_the_same_bytes(runs, tmp_path):
    import eval_math

    data = str(runs["grpo"][0].parent / "val.jsonl")
    arguments = ["--data", data, "--n", "2", "--rollout-batch", "4", "--device", "cpu"]
    eval_math.main([*arguments, "--out", str(tmp_path / "1")])
    two("eval_math.py", *arguments, "--out", tmp_path / "2")
    for name in ("samples.jsonl", "results.json", "config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_an_update_has_the_same_rollouts_on_two_processes(tmp_path, monkeypatch):
    """Also where a process's share of them ends within a problem."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "val.jsonl").write_text("".join((ROOT / "tiny/val.jsonl").open().readlines()[:7]))
    more = ["--prompts-per-step", "6", "--updates-per-step", "2", "--lr", "1e-9"]
    paths = [tmp_path / f"{n}.pt" for n in (1, 2)]
    run_fixed("grpo", [*arguments_of("grpo", tmp_path / "1", 1), *more], paths[0])
    two_fixed("grpo", [*arguments_of("grpo", tmp_path / "2", 1), *more], paths[1])
    for a, b in zip(*(torch.load(path, weights_only=True) for path in paths), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


if __name__ == "__main__":
    name, gradients, fault, *arguments = sys.argv[1:]
    run_fixed(name, arguments, gradients, fault)
