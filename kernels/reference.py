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
the KL or entropy, and computes everything else again, a few rows at a time.
"""

import torch

CHUNK = 1 << 17  # logits at once, at least a row: bounds the memory, and stays in the cache


def kl_forward(kl, lse, student, teacher, mask, direction, temperature):
    """Writes the KL of each row of logits (rows, V) whose mask is not 0; no log-sum-exps."""
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    for rows in chunks(mask, student):
        log_p, log_q = log_softmax(p, rows, temperature), log_softmax(q, rows, temperature)
        kl[rows] = weighted(log_p.exp(), log_p.sub_(log_q))[1]


def kl_backward(grad, scale, student, teacher, mask, kl, lse, direction, temperature):
    """Writes scale · τ ∂KL/∂z into grad, for the student's z; 0 where the scale is."""
    grad.index_fill_(0, (scale == 0).nonzero()[:, 0], 0)
    for rows in chunks(scale != 0, student):
        if direction == "reverse":
            log_s, log_t = (log_softmax(z, rows, temperature) for z in (student, teacher))
            s = log_s.exp()
            dz, _ = weighted(s, log_s.sub_(log_t).sub_(kl[rows, None]))
        else:
            s = log_softmax(student, rows, temperature, torch.softmax)  # spares an exp
            dz = s - log_softmax(teacher, rows, temperature, torch.softmax)
        grad[rows] = balanced(dz, s).mul_(scale[rows, None])


def logprob_forward(logp, entropy, lse, logits, ids, temperature):
    """Writes log p[id] and the entropy of each row of logits (rows, V); no log-sum-exps."""
    for rows in chunks(torch.ones_like(ids, dtype=torch.bool), logits):
        log_p = log_softmax(logits, rows, temperature)
        logp[rows] = log_p.gather(-1, ids[rows, None])[:, 0]
        entropy[rows] = -weighted(log_p.exp(), log_p)[1]


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, lse, temperature):
    """Writes τ (g_logp · ∂log p[id]/∂z + g_entropy · ∂H/∂z) into grad; 0 where both g are."""
    live = (g_logp != 0) | (g_entropy != 0)
    grad.index_fill_(0, (~live).nonzero()[:, 0], 0)
    for rows in chunks(live, logits):
        log_p, g_one = log_softmax(logits, rows, temperature), g_logp[rows, None]
        p = log_p.exp()
        x = log_p.add_(entropy[rows, None]).mul_(-g_entropy[rows, None]).sub_(g_one)
        dz, _ = weighted(p, x)
        grad[rows] = balanced(dz.scatter_add_(-1, ids[rows, None], g_one), p)


def log_softmax(logits, rows, temperature, function=torch.log_softmax):
    """Of these rows of logits / τ, in fp32; or another function of them, the softmax."""
    chunk = logits[rows] if isinstance(rows, slice) else logits.index_select(0, rows)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1:  # centred before they are divided: an offset would cost them digits
        chunk = chunk.log_softmax(-1, dtype=dtype).div_(temperature)
    return function(chunk, -1, dtype=dtype)


def weighted(p, x):
    """p · x and its sum a row; 0 where p is 0 and x infinite, a guard so slow that it waits."""
    product = p * x
    total = product.sum(-1)
    if total.isnan().any():
        product = p * x.masked_fill(p == 0, 0)
        total = product.sum(-1)
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
