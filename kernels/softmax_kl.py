"""The Triton kernels: a program per token, one pass over its logits each way.

reference.py defines what they compute and has the mathematics of the online form: S, D and Δ are
_sum, d_sum and _delta here. Logits are not divided by τ, and the base is 2: each exponent contains
beta = log₂e / τ, since exp2 is one instruction on the GPU and exp is five, enough to make the
forward wait for arithmetic rather than for memory.

They serve token_logprob (logprob.py), too. With log q = 0 everywhere, which is no distribution but
fits the formula, KL is −H: without HAS_Q, and in the KIND "logprob", q is neither read nor needed.
"""

import math

import triton
import triton.language as tl

BLOCK = 4096  # logits of p, and of q, that a program works on at once
LOG2E, LN2 = math.log2(math.e), tl.constexpr(math.log(2))


def kl_forward(kl, stats, student, teacher, mask, direction, temperature):
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    sizes = p.shape[1], p.stride(0), q.stride(0)
    settings = *sizes, LOG2E / temperature, True, BLOCK, lane_width(sizes)
    forward_kernel[(len(kl),)](kl, stats, p, q, mask, *settings, num_warps=16)


def kl_backward(grad, scale, student, teacher, mask, kl, stats, direction, temperature):
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    sizes = p.shape[1], grad.stride(0), p.stride(0), q.stride(0)
    settings = *sizes, LOG2E / temperature, direction, BLOCK
    g = ids = kl  # not read
    backward_kernel[(len(kl),)](grad, scale, kl, stats, p, q, g, ids, *settings, num_warps=16)


def lane_width(sizes):
    """Logits that a thread loads at once: 16 bytes of bf16, where 16 divides V and the strides."""
    return 1 if any(size % 16 for size in sizes) else 8


@triton.jit
def moved(p_sum, d_sum, p_delta, q_delta, beta):
    """The sums of a lane after its maxima have grown by the deltas."""
    scale = tl.exp2(-p_delta * beta)
    # where: a probability of 0 counts for nothing, even against an infinite difference.
    return p_sum * scale, tl.where(scale == 0, 0.0, (d_sum + p_sum * (q_delta - p_delta)) * scale)


@triton.jit
def forward_kernel(
    kl_ptr, stats_ptr, p_ptr, q_ptr, mask_ptr, V, p_stride, q_stride, beta,
    HAS_Q: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row · stride can exceed 2³¹
    if tl.load(mask_ptr + row) == 0:
        return
    # Each lane, WIDTH logits of a block, has maxima and sums of its own: no thread waits.
    lane, zero = tl.arange(0, BLOCK // WIDTH), tl.zeros([BLOCK // WIDTH], tl.float32)
    p_max, q_max = zero - 1e30, zero - 1e30  # not −inf: −inf − (−inf) is NaN
    p_sum, q_sum, d_sum, q_delta = zero, zero, zero, zero
    for start in range(0, V, BLOCK):
        v = start + WIDTH * lane[:, None] + tl.arange(0, WIDTH)
        p = tl.load(p_ptr + row * p_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        p_old, p_max = p_max, tl.maximum(p_max, tl.max(p, 1))
        p -= p_max[:, None]  # still logits (as is q), less their maximum
        p_exp, d = tl.exp2(p * beta), p
        if HAS_Q:
            q = tl.load(q_ptr + row * q_stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
            q_old, q_max = q_max, tl.maximum(q_max, tl.max(q, 1))
            q -= q_max[:, None]
            d, q_delta = p - q, q_max - q_old
            q_sum = q_sum * tl.exp2(-q_delta * beta) + tl.sum(tl.exp2(q * beta), 1)
        p_sum, d_sum = moved(p_sum, d_sum, p_max - p_old, q_delta, beta)
        p_sum += tl.sum(p_exp, 1)
        d_sum += tl.sum(p_exp * tl.where(p_exp == 0, 0.0, d), 1)
    p_top, q_top = tl.max(p_max, 0), tl.max(q_max, 0)
    p_sum, d_sum = moved(p_sum, d_sum, p_top - p_max, q_top - q_max, beta)
    p_total, q_total = tl.sum(p_sum, 0), tl.sum(q_sum * tl.exp2((q_max - q_top) * beta), 0)
    p_log, q_log = tl.log2(p_total), tl.log2(q_total) if HAS_Q else 0.0
    tl.store(kl_ptr + row, (tl.sum(d_sum, 0) / p_total * beta - (p_log - q_log)) * LN2)
    # A log-sum-exp in two parts: their sum would lose digits to an offset of 1e4.
    tl.store(stats_ptr + 4 * row, p_top)
    tl.store(stats_ptr + 4 * row + 1, p_log)
    tl.store(stats_ptr + 4 * row + 2, q_top)
    tl.store(stats_ptr + 4 * row + 3, q_log)


@triton.jit
def backward_kernel(
    grad_ptr, scale_ptr, kl_ptr, stats_ptr, p_ptr, q_ptr, g_ptr, ids_ptr, V, grad_stride, p_stride,
    q_stride, beta, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale, kl = tl.load(scale_ptr + row), tl.load(kl_ptr + row)
    p_max, p_log = tl.load(stats_ptr + 4 * row), tl.load(stats_ptr + 4 * row + 1)
    q_max, q_log = tl.load(stats_ptr + 4 * row + 2), tl.load(stats_ptr + 4 * row + 3)
    dead, g, token = scale == 0, 0.0, -1
    if KIND == "logprob":  # incoming gradients: scale for kl (here −H), g for log p[id]
        g, token = tl.load(g_ptr + row), tl.load(ids_ptr + row)
        dead = dead & (g == 0)
    end = tl.where(dead, 0, V)  # a dead row is not read
    top, rest = tl.full([BLOCK], V, tl.int32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        p = tl.load(p_ptr + row * p_stride + v, mask=v < end, other=float("-inf")).to(tl.float32)
        p -= p_max
        x = p * beta - p_log  # log₂ p; with q, log₂ p − log₂ q
        if KIND != "logprob":
            q = tl.load(q_ptr + row * q_stride + v, mask=v < end, other=float("-inf"))
            q = q.to(tl.float32) - q_max
            x = (p - q) * beta - (p_log - q_log)  # a difference of logarithms would lose digits
        if KIND == "forward":
            s = tl.exp2(q * beta - q_log)  # the student's probability
            dz = scale * (s - tl.exp2(p * beta - p_log))
        else:
            s = tl.exp2(p * beta - p_log)
            dz = tl.where(s == 0, 0.0, s * (scale * (x * LN2 - kl) - g))
            dz += tl.where(v == token, g, 0.0)
        dz = tl.where(dead, 0.0, dz)
        tl.store(grad_ptr + row * grad_stride + v, dz, mask=v < V)
        top, rest = tl.where(s > 0.75, v, top), rest + tl.where(s > 0.75, 0.0, dz)
    # A row sums to 0. Where s is almost 1, dz is mostly rounding; minus the sum of the rest is not.
    place = grad_ptr + row * grad_stride + tl.min(top, 0)
    tl.debug_barrier()  # another thread may have written there
    tl.store(place, -tl.sum(rest, 0), mask=tl.min(top, 0) < V)
