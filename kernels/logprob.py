"""The Triton kernels of token_logprob: a program per token, one pass over its logits each way.

reference.py defines what they compute and has the mathematics; base 2 and lanes as in
softmax_kl.py, whose sum over p (p − q) becomes that of the entropy with q = 0.
"""

import triton
import triton.language as tl

from kernels.softmax_kl import BLOCK, LN2, LOG2E, lane_width, moved


def logprob_forward(logp, entropy, lse, logits, ids, temperature):
    sizes = logits.shape[1], logits.stride(0)
    settings = *sizes, LOG2E / temperature, BLOCK, lane_width(sizes)
    forward_kernel[(len(ids),)](logp, entropy, lse, logits, ids, *settings, num_warps=16)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, lse, temperature):
    settings = logits.shape[1], grad.stride(0), logits.stride(0), LOG2E / temperature, BLOCK
    tensors = grad, g_logp, g_entropy, logits, ids, entropy, lse
    backward_kernel[(len(ids),)](*tensors, *settings, num_warps=16)


@triton.jit
def forward_kernel(
    logp_ptr, entropy_ptr, lse_ptr, z_ptr, ids_ptr, V, stride, beta,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row · stride goes beyond 2³¹
    lane, zero = tl.arange(0, BLOCK // WIDTH), tl.zeros([BLOCK // WIDTH], tl.float32)
    z_max, e_sum, x_sum = zero - 1e30, zero, zero  # the sums: Σ 2^(β x) and Σ 2^(β x) x
    for start in range(0, V, BLOCK):
        v = start + WIDTH * lane[:, None] + tl.arange(0, WIDTH)
        z = tl.load(z_ptr + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        z_old, z_max = z_max, tl.maximum(z_max, tl.max(z, 1))
        e_sum, _, x_sum = moved(e_sum, 0.0, x_sum, z_max - z_old, 0.0, beta)
        x = z - z_max[:, None]
        x_exp = tl.exp2(x * beta)
        e_sum += tl.sum(x_exp, 1)
        x_sum += tl.sum(x_exp * tl.where(x_exp == 0, 0.0, x), 1)
    top = tl.max(z_max, 0)
    e_sum, _, x_sum = moved(e_sum, 0.0, x_sum, top - z_max, 0.0, beta)
    total, z_id = tl.sum(e_sum, 0), tl.load(z_ptr + row * stride + tl.load(ids_ptr + row))
    tl.store(logp_ptr + row, ((z_id.to(tl.float32) - top) * beta - tl.log2(total)) * LN2)
    tl.store(entropy_ptr + row, (tl.log2(total) - tl.sum(x_sum, 0) / total * beta) * LN2)
    tl.store(lse_ptr + 4 * row, top)  # in two parts, as in softmax_kl.py
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
    top, rest = tl.full([BLOCK], V, tl.int32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + v, mask=v < end, other=float("-inf")).to(tl.float32)
        log_p = (z - z_max) * beta - log_sum
        p = tl.exp2(log_p)
        dz = tl.where(p == 0, 0.0, p * (-g_logp - g_entropy * (log_p * LN2 + entropy)))
        dz = tl.where(end == 0, 0.0, dz + tl.where(v == token, g_logp, 0.0))
        tl.store(grad_ptr + row * grad_stride + v, dz, mask=v < V)
        top, rest = tl.where(p > 0.75, v, top), rest + tl.where(p > 0.75, 0.0, dz)
    place = grad_ptr + row * grad_stride + tl.min(top, 0)  # as in softmax_kl.py
    tl.debug_barrier()
    tl.store(place, -tl.sum(rest, 0), mask=tl.min(top, 0) < V)
