"""The Triton kernels of token_logprob: a program per token, one pass over its logits each way.

reference.py defines what they compute and has the mathematics; base 2 as in softmax_kl.py.
"""

import triton
import triton.language as tl

from kernels.softmax_kl import BLOCK, LN2, LOG2E


def logprob_forward(logp, entropy, lse, logits, ids, temperature):
    settings = logits.shape[1], logits.stride(0), LOG2E / temperature, BLOCK
    forward_kernel[(len(ids),)](logp, entropy, lse, logits, ids, *settings, num_warps=16)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, lse, temperature):
    settings = logits.shape[1], grad.stride(0), logits.stride(0), LOG2E / temperature, BLOCK
    tensors = grad, g_logp, g_entropy, logits, ids, entropy, lse
    backward_kernel[(len(ids),)](*tensors, *settings, num_warps=16)


@triton.jit
def forward_kernel(
    logp_ptr, entropy_ptr, lse_ptr, z_ptr, ids_ptr, V, stride, beta, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # row · stride goes beyond 2³¹
    z_max = -1e30  # not −inf: −inf − (−inf) is no number
    s_sum = tl.zeros([BLOCK], tl.float32)  # Σ 2^(x − m), one sum for each lane until the end
    x_sum = tl.zeros([BLOCK], tl.float32)  # Σ 2^(x − m) (x − m)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        z_old, z_max = z_max, tl.maximum(z_max, tl.max(z, 0))
        shift, x = (z_old - z_max) * beta, (z - z_max) * beta
        scale, x_exp = tl.exp2(shift), tl.exp2(x)
        x_sum = (x_sum + s_sum * shift) * scale + tl.where(x_exp == 0, 0.0, x_exp * x)
        s_sum = s_sum * scale + x_exp
    total = tl.sum(s_sum, 0)
    z_id = tl.load(z_ptr + row * stride + tl.load(ids_ptr + row)).to(tl.float32)
    tl.store(logp_ptr + row, ((z_id - z_max) * beta - tl.log2(total)) * LN2)
    tl.store(entropy_ptr + row, (tl.log2(total) - tl.sum(x_sum, 0) / total) * LN2)
    tl.store(lse_ptr + 4 * row, z_max)  # in two parts, as in softmax_kl.py
    tl.store(lse_ptr + 4 * row + 1, tl.log2(total))


@triton.jit
def backward_kernel(
    grad_ptr, g_logp_ptr, g_entropy_ptr, z_ptr, ids_ptr, entropy_ptr, lse_ptr, V,
    grad_stride, stride, beta, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g_logp, g_entropy = tl.load(g_logp_ptr + row), tl.load(g_entropy_ptr + row)
    token, entropy = tl.load(ids_ptr + row), tl.load(entropy_ptr + row)
    z_max, log_sum = tl.load(lse_ptr + 4 * row), tl.load(lse_ptr + 4 * row + 1)
    end = tl.where((g_logp == 0) & (g_entropy == 0), 0, V)  # such a row is not read
    top = tl.full([BLOCK], V, tl.int32)  # as in softmax_kl.py
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + v, mask=v < end, other=float("-inf")).to(tl.float32)
        log_p = (z - z_max) * beta - log_sum
        p = tl.exp2(log_p)
        is_top = p > 0.75
        dz = tl.where(p == 0, 0.0, p * (-g_logp - g_entropy * (log_p * LN2 + entropy)))
        dz = tl.where(end == 0, 0.0, dz + tl.where(v == token, g_logp, 0.0))
        tl.store(grad_ptr + row * grad_stride + v, dz, mask=(v < V) & ~is_top)
        top = tl.where(is_top, v, top)
        rest += tl.where(is_top, 0.0, dz)
    tl.store(grad_ptr + row * grad_stride + top, -tl.sum(rest, 0), mask=top < V)
