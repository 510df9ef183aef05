"""What the kernels compute, in plain torch: the definition, and the path where there is no CUDA.

With x = z / τ for the logits z of one token, and log p = x − logsumexp(x):
    KL(p‖q) = Σ p (log p − log q)          the student is p in the reverse KL, q in the forward
    ∂KL/∂z_p = p (log p − log q − KL) / τ  the gradient of the reverse KL
    ∂KL/∂z_q = (q − p) / τ                 the gradient of the forward KL
    ∂log p[id]/∂z = (1[id] − p) / τ,       H = −Σ p log p,  ∂H/∂z = −p (log p + H) / τ

Online, in one pass (Triton), with m the largest x so far: S = Σ e^(x − m) for p and q, and
D = Σ e^(x_p − m_p) d, where d = (x_p − m_p) − (x_q − m_q) is centred. If the maxima grow by Δ:
S ← S e^(−Δ) and D ← (D + S_p (Δ_q − Δ_p)) e^(−Δ_p). In the end KL = D/S_p − log S_p + log S_q.
For the backward, log p − log q = d − (log S_p − log S_q): the difference of two rounded logarithms
would lose the digits of a small KL.

Autograd would keep several fp32 copies of the logits. Here the backward needs only the logits and a
few numbers per row, and recomputes everything else, a few rows at a time.
"""

import math

import torch

CHUNK = 1 << 17  # logits at a time, but at least a row: bounds memory and fits in the cache


def kl_forward(kl, stats, student, teacher, mask, direction, temperature):
    """Writes KL, max z_p, S_p, max z_q, S_q of each row (rows, V) whose mask is not 0."""
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    for rows in chunks(mask, student):
        x_p, p_max = centred(p, rows, temperature)
        x_q, q_max = centred(q, rows, temperature)
        d = x_p - x_q
        p_exp, q_exp = fast_exp_(x_p), fast_exp_(x_q)
        p_sum, q_sum = p_exp.sum(-1, keepdim=True), q_exp.sum(-1, keepdim=True)
        kl[rows] = (weigh(d, p_exp) / p_sum - (p_sum / q_sum).log())[:, 0]
        stats[rows] = torch.cat([p_max, p_sum, q_max, q_sum], -1)


def kl_backward(grad, scale, student, teacher, mask, kl, stats, direction, temperature):
    """Writes scale · τ ∂KL/∂z into grad, for the student's z; 0 where the scale is 0."""
    grad.index_fill_(0, (scale == 0).nonzero()[:, 0], 0)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    for rows in chunks(scale != 0, student):
        p_max, p_sum, q_max, q_sum = stats[rows].split(1, -1)
        x_p, _ = centred(p, rows, temperature, p_max)
        x_q, _ = centred(q, rows, temperature, q_max)
        if direction == "reverse":
            dz = (x_p - x_q).sub_((p_sum / q_sum).log() + kl[rows, None])
            s_exp, s_sum = fast_exp_(x_p), p_sum
            weigh(dz, s_exp)
        else:
            s_exp, s_sum = x_q.exp_(), q_sum  # exact, as near-equal terms mostly cancel below
            dz = s_exp.addcmul(x_p.exp_(), q_sum / p_sum, value=-1)
        grad[rows] = balanced(dz, s_exp, s_sum, scale[rows, None]).to(grad.dtype)


def logprob_forward(logp, entropy, stats, logits, ids, temperature):
    """Writes log p[id], the entropy, and max z and S of each row of logits (rows, V)."""
    for rows in chunks(torch.ones_like(ids, dtype=torch.bool), logits):
        x, z_max = centred(logits, rows, temperature)
        x_exp, x_id = fast_exp_(x.clone()), x.gather(-1, ids[rows, None])
        x_sum = x_exp.sum(-1, keepdim=True)
        logp[rows] = (x_id - x_sum.log())[:, 0]
        entropy[rows] = (x_sum.log() - weigh(x, x_exp) / x_sum)[:, 0]
        stats[rows, :2] = torch.cat([z_max, x_sum], -1)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, stats, temperature):
    """Writes τ (g_logp · ∂log p[id]/∂z + g_entropy · ∂H/∂z) into grad; 0 where both g are 0."""
    live = (g_logp != 0) | (g_entropy != 0)
    grad.index_fill_(0, (~live).nonzero()[:, 0], 0)
    for rows in chunks(live, logits):
        z_max, x_sum = stats[rows, :2].split(1, -1)
        one, h = g_logp[rows, None], g_entropy[rows, None]
        x, _ = centred(logits, rows, temperature, z_max)
        dz = torch.addcmul(h * (x_sum.log() - entropy[rows, None]) - one, x, h, value=-1)
        x_exp = fast_exp_(x)
        weigh(dz, x_exp)
        dz.scatter_add_(-1, ids[rows, None], one * x_sum)
        grad[rows] = balanced(dz, x_exp, x_sum, 1).to(grad.dtype)


def centred(logits, rows, temperature, z_max=None):
    """x − max x of these rows, in fp32, and max z; τ divides last, since an offset costs digits."""
    z = logits[rows] if isinstance(rows, slice) else logits.index_select(0, rows)
    if z_max is None:
        z_max = z.amax(-1, keepdim=True).to(torch.promote_types(z.dtype, torch.float32))
    x = z - z_max
    return (x if temperature == 1 else x.div_(temperature)), z_max


def fast_exp_(x):
    """e^x, with an error of 1e-7 |x| or so; on some processors torch.exp takes twice as long."""
    return x.mul_(1 / math.log(2)).exp2_()


def weigh(x, p):
    """Turns x into p · x, 0 where p is 0 and x infinite, and returns the sum of each row."""
    total = x.mul_(p).sum(-1, keepdim=True)
    if total.isnan().any():  # such an x is rare, and looking for it is slow
        total = x.masked_fill_(p == 0, 0).sum(-1, keepdim=True)
    return total


def balanced(dz, s_exp, s_sum, scale):
    """scale · dz / S, where dz and s_exp are S times the gradient and the student's softmax.

    Dividing by S here takes one number per row, not per logit. A row of the gradient sums to 0:
    the excess, mostly rounding where s is almost 1, is taken off in proportion to s.
    """
    dz.addcmul_(s_exp, dz.sum(-1, keepdim=True) / s_sum, value=-1)
    return dz.mul_(scale / s_sum)


def chunks(live, logits):
    """Indices of the live rows, a few at a time; slices if all are live, as they copy nothing."""
    n = max(1, CHUNK // logits.shape[-1])
    if live.all():
        return [slice(i, i + n) for i in range(0, len(live), n)]
    return live.nonzero()[:, 0].split(n)
