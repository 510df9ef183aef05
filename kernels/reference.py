"""What the kernels compute, in plain torch: the definition, and the path where there is no CUDA.

With x = z / τ for the logits z of one token, and log p = x − logsumexp(x):
    KL(p‖q) = Σ p (log p − log q)          reverse KL: p is the student; forward KL: q is
    ∂KL/∂z_p = p (log p − log q − KL) / τ  the gradient of the reverse KL
    ∂KL/∂z_q = (q − p) / τ                 the gradient of the forward KL
    ∂log p[id]/∂z = (1[id] − p) / τ,       H = −Σ p log p,  ∂H/∂z = −p (log p + H) / τ

Online, in one pass (Triton), with m the largest x so far: S = Σ e^(x − m) for p and q, and
D = Σ e^(x_p − m_p) d, where d = (x_p − m_p) − (x_q − m_q) is centred. If the maxima grow by Δ:
S ← S e^(−Δ) and D ← (D + S_p (Δ_q − Δ_p)) e^(−Δ_p). In the end KL = D/S_p − log S_p + log S_q.
For the backward, log p − log q = d − (log S_p − log S_q): the difference of two logarithms that are
rounded would lose the digits of a small KL.

Autograd would keep several fp32 copies of the logits. Here the backward needs the logits alone and
a few numbers per row, and computes everything else again, a few rows at a time.
"""

import torch

CHUNK = 1 << 17  # logits at once, at least a row: bounds the memory, and stays in the cache


def kl_forward(kl, lse, student, teacher, mask, direction, temperature):
    """Writes KL, max z_p, log S_p, max z_q, log S_q of each row (rows, V) whose mask is not 0."""
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    for rows in chunks(mask, student):
        x_p, p_max = centred(p, rows, temperature)
        x_q, q_max = centred(q, rows, temperature)
        p_exp = x_p.exp()
        _, d_sum = weighted(p_exp, x_p.sub_(x_q))
        p_sum, q_sum = p_exp.sum(-1, keepdim=True), x_q.exp_().sum(-1, keepdim=True)
        kl[rows] = (d_sum / p_sum - (p_sum.log() - q_sum.log()))[:, 0]
        lse[rows] = torch.cat([p_max, p_sum.log(), q_max, q_sum.log()], -1)


def kl_backward(grad, scale, student, teacher, mask, kl, lse, direction, temperature):
    """Writes scale · τ ∂KL/∂z into grad, for the student's z; 0 where the scale is."""
    grad.index_fill_(0, (scale == 0).nonzero()[:, 0], 0)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    for rows in chunks(scale != 0, student):
        p_max, p_log, q_max, q_log = lse[rows].split(1, -1)
        x_p, _ = centred(p, rows, temperature, p_max)
        x_q, _ = centred(q, rows, temperature, q_max)
        if direction == "reverse":
            x = (x_p - x_q).sub_(p_log - q_log).sub_(kl[rows, None])
            s = x_p.sub_(p_log).exp_()
            dz, _ = weighted(s, x)
        else:
            s = x_q.sub_(q_log).exp_()
            dz = s - x_p.sub_(p_log).exp_()
        grad[rows] = balanced(dz, s).mul_(scale[rows, None]).to(grad.dtype)


def logprob_forward(logp, entropy, lse, logits, ids, temperature):
    """Writes log p[id], the entropy, and max z and log S of each row of logits (rows, V)."""
    for rows in chunks(torch.ones_like(ids, dtype=torch.bool), logits):
        x, z_max = centred(logits, rows, temperature)
        x_exp = x.exp()
        x_id, total = x.gather(-1, ids[rows, None]), x_exp.sum(-1, keepdim=True)
        logp[rows] = (x_id - total.log())[:, 0]
        entropy[rows] = (total.log() - weighted(x_exp, x)[1] / total)[:, 0]
        lse[rows, :2] = torch.cat([z_max, total.log()], -1)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, lse, temperature):
    """Writes τ (g_logp · ∂log p[id]/∂z + g_entropy · ∂H/∂z) into grad; 0 where both g are."""
    live = (g_logp != 0) | (g_entropy != 0)
    grad.index_fill_(0, (~live).nonzero()[:, 0], 0)
    for rows in chunks(live, logits):
        z_max, log_sum = lse[rows, :2].split(1, -1)
        log_p = centred(logits, rows, temperature, z_max)[0].sub_(log_sum)
        p, g_one = log_p.exp(), g_logp[rows, None]
        x = log_p.add_(entropy[rows, None]).mul_(-g_entropy[rows, None]).sub_(g_one)
        dz, _ = weighted(p, x)
        dz = balanced(dz.scatter_add_(-1, ids[rows, None], g_one), p)
        grad[rows] = dz.to(grad.dtype)


def centred(logits, rows, temperature, z_max=None):
    """x − max x of these rows, in fp32, and max z; divided by τ last, as an offset costs digits."""
    z = logits[rows] if isinstance(rows, slice) else logits.index_select(0, rows)
    if z_max is None:
        z_max = z.amax(-1, keepdim=True).to(torch.promote_types(z.dtype, torch.float32))
    x = z - z_max
    return (x if temperature == 1 else x.div_(temperature)), z_max


def weighted(p, x):
    """p · x and its sum a row; 0 where p is 0 and x infinite, a guard so slow that it waits."""
    product = p * x
    total = product.sum(-1, keepdim=True)
    if total.isnan().any():
        product = p * x.masked_fill(p == 0, 0)
        total = product.sum(-1, keepdim=True)
    return product, total


def balanced(dz, p):
    """A row of the gradient sums to 0. Where p is almost 1, its rounding is most of that sum."""
    return dz.addcmul_(p, dz.sum(-1, keepdim=True), value=-1)


def chunks(live, logits):
    """Indices of the live rows, a few at a time; slices if all are live, as they copy nothing."""
    n = max(1, CHUNK // logits.shape[-1])
    if live.all():
        return [slice(i, i + n) for i in range(0, len(live), n)]
    return live.nonzero()[:, 0].split(n)
