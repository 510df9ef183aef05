"""What the kernels compute, in plain torch: the definition, and the path where there is no CUDA.

With x = z / τ for the logits z of one token, and log p = x − logsumexp(x):
    KL(p‖q) = Σ p (log p − log q)          reverse KL: p is the student; forward KL: q is
    ∂KL/∂z_p = p (log p − log q − KL) / τ  the gradient of the reverse KL
    ∂KL/∂z_q = (q − p) / τ                 the gradient of the forward KL
    ∂log p[id]/∂z = (1[id] − p) / τ,       H = −Σ p log p,  ∂H/∂z = −p (log p + H) / τ

Online, in one pass (Triton), with m the largest x so far: S = Σ e^(x − m) for p and q, and
D = Σ e^(x_p − m_p) d, where d = (x_p − m_p) − (x_q − m_q) is centred. If the maxima grow by Δ:
S ← S e^(−Δ) and D ← (D + S_p (Δ_q − Δ_p)) e^(−Δ_p). In the end KL = D/S_p − log S_p + log S_q.

Autograd would keep several fp32 copies of the logits. Here the backward needs the logits alone and
a few numbers per token, and computes everything else again, a few rows at a time.
"""

import torch

CHUNK = 1 << 18  # logits at once, at least a row: bounds the memory, and stays in the cache


def kl_forward(p, q, mask, temperature):
    """KL(p‖q) of each row of logits (rows, V), 0 where the mask is; and the log-sum-exps."""
    dtype = torch.promote_types(p.dtype, torch.float32)  # float64 stays float64
    kl = torch.zeros(mask.shape, dtype=dtype, device=p.device)
    # A log-sum-exp in two parts, m and log S: their sum would lose digits to an offset of 1e4.
    lse = torch.zeros(len(kl), 4, dtype=dtype, device=p.device)
    for rows in chunks(mask, p):
        p_max, q_max = p[rows].amax(-1), q[rows].amax(-1)
        x_p, x_q = centred(p[rows], p_max, temperature), centred(q[rows], q_max, temperature)
        p_exp = x_p.exp()
        p_sum, q_sum = p_exp.sum(-1), x_q.exp().sum(-1)
        d_sum = weighted(p_exp, x_p.sub_(x_q)).sum(-1)
        kl[rows] = d_sum / p_sum - p_sum.log() + q_sum.log()
        lse[rows] = torch.stack([p_max.to(dtype), p_sum.log(), q_max.to(dtype), q_sum.log()], -1)
    return kl, lse


def kl_backward(grad, scale, p, q, kl, lse, temperature, of_p):
    """Writes scale · τ ∂KL/∂z into grad, where z are the logits of p, or else of q."""
    grad.index_fill_(0, (scale == 0).nonzero()[:, 0], 0)
    for rows in chunks(scale != 0, p):
        p_max, p_log, q_max, q_log = lse[rows].unbind(-1)
        log_p = centred(p[rows], p_max, temperature).sub_(p_log[:, None])
        log_q = centred(q[rows], q_max, temperature).sub_(q_log[:, None])
        if of_p:
            dz = weighted(log_p.exp(), log_p.sub_(log_q).sub_(kl[rows, None]))
        else:
            dz = log_q.exp_().sub_(log_p.exp_())
        grad[rows] = dz.mul_(scale[rows, None])


def logprob_forward(logits, ids, temperature):
    """log p[id] and the entropy of each row of logits (rows, V); and the log-sum-exp."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp, entropy = torch.empty(2, len(ids), dtype=dtype, device=logits.device)
    lse = torch.empty(len(ids), 2, dtype=dtype, device=logits.device)
    for rows in chunks(torch.ones_like(ids, dtype=torch.bool), logits):
        z_max = logits[rows].amax(-1)
        x = centred(logits[rows], z_max, temperature)
        x_exp = x.exp()
        total = x_exp.sum(-1)
        logp[rows] = x.gather(-1, ids[rows, None])[:, 0] - total.log()
        entropy[rows] = total.log() - weighted(x_exp, x).sum(-1) / total
        lse[rows] = torch.stack([z_max.to(dtype), total.log()], -1)
    return logp, entropy, lse


def logprob_backward(grad, logp_scale, entropy_scale, logits, ids, entropy, lse, temperature):
    """Writes τ (logp_scale · ∂log p[id]/∂z + entropy_scale · ∂H/∂z) into grad."""
    live = (logp_scale != 0) | (entropy_scale != 0)
    grad.index_fill_(0, (~live).nonzero()[:, 0], 0)
    for rows in chunks(live, logits):
        z_max, log_sum = lse[rows].unbind(-1)
        log_p = centred(logits[rows], z_max, temperature).sub_(log_sum[:, None])
        p = log_p.exp()
        g_logp, g_entropy = logp_scale[rows, None], entropy_scale[rows, None]
        dz = weighted(p, log_p.add_(entropy[rows, None]).mul_(-g_entropy).sub_(g_logp))
        grad[rows] = dz.scatter_add_(-1, ids[rows, None], g_logp)


def centred(logits, largest, temperature):
    """x − m. The difference comes first: it is exact, so that no offset of the logits does harm."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - largest[:, None]).mul_(1 / temperature)


def weighted(p, x):
    """p · x, but 0 where p is 0 and x infinite: a guard so slow that it waits to be needed."""
    product = p * x
    return p * x.masked_fill(p == 0, 0) if product.sum().isnan() else product


def chunks(live, logits):
    """Indices of the live rows, a few at a time; slices if all are live, as they copy nothing."""
    n = max(1, CHUNK // logits.shape[-1])
    if live.all():
        return [slice(i, i + n) for i in range(0, len(live), n)]
    return live.nonzero()[:, 0].split(n)
