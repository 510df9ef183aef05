"""The fused softmax-KL and the token log-probability, forward and backward: what scripts import.

reference.py defines both in plain torch and serves the CPU; softmax_kl.py and logprob.py run the
Triton kernels and serve CUDA. What both paths share is here: the checks and the link to autograd.
"""

import os

import torch
from torch.autograd.function import once_differentiable

from kernels import reference

# First, since importing softmax_kl.py binds its name here; the function below then rebinds it.
try:
    from kernels import logprob as triton_logprob
    from kernels import softmax_kl as triton_kl
except ImportError:  # no Triton, as on macOS
    triton_logprob = triton_kl = reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # for tests; Triton read it above, too


def softmax_kl(
    student_logits, teacher_logits, direction, temperature=1.0, mask=None, inplace_backward=False
):
    """Per token of logits (..., V), in fp32: KL(teacher‖student) if direction is "forward",
    KL(student‖teacher) if it is "reverse".

    A token whose mask is 0 has KL 0. Its gradient is 0, and so is that of a token whose KL is +inf
    or whose incoming gradient is 0, whatever the logits hold, NaN included. inplace_backward writes
    the gradient over the student's logits; any other backward that needs those logits then raises.
    """
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    tokens = student_logits.shape[:-1]
    require(student_logits.shape == teacher_logits.shape, "teacher_logits differ in shape", logits)
    for name, tensor in logits.items():
        require(tensor.is_floating_point(), f"{name} are {tensor.dtype}, not floats", logits)
    require(not teacher_logits.requires_grad, "teacher_logits require grad, use no_grad()", logits)
    require(direction in ("forward", "reverse"), f"direction is {direction!r}", logits)
    mask = student_logits.new_ones(tokens, dtype=torch.bool) if mask is None else mask.bool()
    require(mask.shape == tokens, "mask is not one per token", logits | {"mask": mask})
    module = triton_kl if student_logits.is_cuda or INTERPRETED else reference
    rows = as_rows(student_logits), as_rows(teacher_logits), mask.reshape(-1).contiguous()
    settings = inplace_backward, direction, temperature
    (kl,) = Fused.apply(module.kl_forward, module.kl_backward, 1, settings, *rows)
    # The same values, but where masked or infinite, no gradient flows back.
    return kl.where(rows[2] & (kl != torch.inf), kl.detach()).view(tokens)


def token_logprob(logits, ids, temperature=1.0, inplace_backward=False):
    """(log-probability of ids, entropy), both per token and in fp32, of logits (..., V), ids (...).

    As in softmax_kl: inplace_backward, and gradient 0 for a token whose incoming ones are both 0.
    """
    shapes = {"logits": logits, "ids": ids}
    require(ids.shape == logits.shape[:-1], "ids are not one per token of logits", shapes)
    require(logits.is_floating_point(), f"logits are {logits.dtype}, not floats", shapes)
    # On a GPU this waits for all that was launched before: the price of a readable error.
    known = ((ids >= 0) & (ids < logits.shape[-1])).all()
    require(known, "ids are not all in [0, V)", shapes)
    module = triton_logprob if logits.is_cuda or INTERPRETED else reference
    rows = as_rows(logits), ids.reshape(-1).contiguous().long()
    settings = inplace_backward, temperature
    outputs = Fused.apply(module.logprob_forward, module.logprob_backward, 2, settings, *rows)
    return tuple(output.view(ids.shape) for output in outputs)


class Fused(torch.autograd.Function):
    """Ties a forward and a backward to autograd; the first of the rows is what gets a gradient."""

    @staticmethod
    def forward(ctx, forward, backward, count, settings, *rows):
        wide = rows[0].dtype == torch.float64 and not rows[0].is_cuda  # Triton's are fp32
        dtype = torch.float64 if wide else torch.float32
        outputs = tuple(rows[0].new_zeros(len(rows[0]), dtype=dtype) for _ in range(count))
        stats = rows[0].new_empty(len(rows[0]), 4, dtype=dtype)
        with torch.cuda.device_of(rows[0]):  # where Triton launches; autograd sets it in backward
            forward(*outputs, stats, *rows, *settings[1:])
        ctx.save_for_backward(*rows, *outputs, stats)
        ctx.function, ctx.settings = backward, settings
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved, (inplace, *settings) = ctx.saved_tensors, ctx.settings
        if inplace:  # autograd cannot see Triton write: this makes it refuse what needs the logits
            torch.autograd.graph.increment_version(saved[0])
        grad = saved[0].detach() if inplace else torch.empty_like(saved[0])
        ctx.function(grad, *(g / settings[-1] for g in grads), *saved, *settings)
        return None, None, None, None, grad, *[None] * (len(ctx.needs_input_grad) - 5)


def as_rows(logits):
    """(..., V) as (rows, V). A slice [..., :V] of a wider head stays a view; [:, :-1] is a copy."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def require(fine, problem, tensors):
    if not fine:
        shapes = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in tensors.items())
        raise ValueError(f"{problem}: {shapes}")
