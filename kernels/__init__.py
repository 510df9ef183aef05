"""The fused softmax-KL and the token log-probability, forward and backward: what scripts import.

reference.py defines both in plain torch and serves the CPU; softmax_kl.py and logprob.py are the
Triton kernels and serve CUDA. What the two share is here: the checks and the ties to autograd.
"""

import importlib
import os
import sys
import types

import torch
from torch.autograd.function import once_differentiable

from kernels import reference

__all__ = ["softmax_kl", "token_logprob"]


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
    mask = student_logits.new_ones(tokens, dtype=torch.bool) if mask is None else mask
    require(mask.shape == tokens, "mask is not one per token", logits | {"mask": mask})
    p, q = as_rows(student_logits), as_rows(teacher_logits)
    if direction == "forward":
        p, q = q, p
    mask, of_p = mask.reshape(-1) != 0, direction == "reverse"
    return SoftmaxKL.apply(p, q, mask, of_p, temperature, inplace_backward).view(tokens)


def token_logprob(logits, ids, temperature=1.0, inplace_backward=False):
    """(log-probability of ids, entropy), both per token and in fp32, of logits (..., V), ids (...).

    A token whose two incoming gradients are 0 is left out as in softmax_kl, as is inplace_backward.
    """
    shapes = {"logits": logits, "ids": ids}
    require(ids.shape == logits.shape[:-1], "ids are not one per token of logits", shapes)
    require(logits.is_floating_point(), f"logits are {logits.dtype}, not floats", shapes)
    known = ((ids >= 0) & (ids < logits.shape[-1])).all()
    if ids.is_cuda:
        # To raise here, every call would wait for the GPU. It fails there, as indexing does.
        torch._assert_async(known, "ids are not all in [0, V)")
    else:
        require(known, "ids are not all in [0, V)", shapes)
    rows = as_rows(logits), ids.reshape(-1).long()
    logp, entropy = TokenLogprob.apply(*rows, temperature, inplace_backward)
    return logp.view(ids.shape), entropy.view(ids.shape)


class SoftmaxKL(torch.autograd.Function):
    """KL(p‖q) of rows of logits; the student is p (of_p, the reverse KL) or q (the forward KL)."""

    @staticmethod
    def forward(ctx, p, q, mask, of_p, temperature, inplace):
        kl, lse = implementation("softmax_kl", p).kl_forward(p, q, mask, temperature)
        ctx.save_for_backward(p, q, mask, kl, lse)
        ctx.settings = of_p, temperature, inplace
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl):
        p, q, mask, kl, lse = ctx.saved_tensors
        of_p, temperature, inplace = ctx.settings
        grad = gradient_buffer(p if of_p else q, inplace)
        # A row of scale 0 is not read, and its gradient is 0.
        scale = grad_kl.where(mask & (kl != torch.inf), 0) / temperature
        backward = implementation("softmax_kl", p).kl_backward
        backward(grad, scale, p, q, kl, lse, temperature, of_p)
        return grad if of_p else None, None if of_p else grad, None, None, None, None


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, temperature, inplace):
        forward = implementation("logprob", logits).logprob_forward
        logp, entropy, lse = forward(logits, ids, temperature)
        ctx.save_for_backward(logits, ids, entropy, lse)
        ctx.settings = temperature, inplace
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, ids, entropy, lse = ctx.saved_tensors
        temperature, inplace = ctx.settings
        grad = gradient_buffer(logits, inplace)
        scales = grad_logp / temperature, grad_entropy / temperature
        backward = implementation("logprob", logits).logprob_backward
        backward(grad, *scales, logits, ids, entropy, lse, temperature)
        return grad, None, None, None


def gradient_buffer(logits, inplace):
    if inplace:  # autograd does not see Triton write: the new version makes it refuse these logits
        torch.autograd.graph.increment_version(logits)
    return logits.detach() if inplace else torch.empty_like(logits)


def as_rows(logits):
    """(..., V) as (rows, V). A slice [..., :V] of a wider head stays a view; [:, :-1] is a copy."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def require(fine, problem, tensors):
    if not fine:
        shapes = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in tensors.items())
        raise ValueError(f"{problem}: {shapes}")


def implementation(name, logits):
    """Triton on CUDA, or interpreted, for tests; imported at first use, since it may be absent."""
    if logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.import_module(f"kernels.{name}")
    return reference


class Package(types.ModuleType):
    """Keeps kernels.softmax_kl the function, where importing softmax_kl.py would put the module."""

    def __setattr__(self, name, value):
        if not (name == "softmax_kl" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
