"""token_logprob by the kernels of softmax_kl.py, which here have no q; defined in reference.py."""

import torch

from kernels.softmax_kl import BLOCK, LN2, LOG2E, backward_kernel, forward_kernel, lane_width


def logprob_forward(logp, entropy, lse, logits, ids, temperature):
    sizes = logits.shape[1], logits.stride(0), logits.stride(0)
    settings = *sizes, LOG2E / temperature, False, BLOCK, lane_width(sizes)
    tensors = entropy, lse, logits, logits, torch.ones_like(ids, dtype=torch.bool)
    forward_kernel[(len(ids),)](*tensors, *settings, num_warps=16)
    entropy.neg_()
    x_id = (logits.gather(1, ids[:, None])[:, 0] - lse[:, 0]) / temperature
    logp.copy_(x_id - lse[:, 1] * LN2.value)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, lse, temperature):
    sizes = logits.shape[1], grad.stride(0), logits.stride(0), logits.stride(0)
    settings = *sizes, LOG2E / temperature, "logprob", BLOCK
    tensors = grad, -g_entropy, -entropy, lse, logits, logits, g_logp, ids
    backward_kernel[(len(ids),)](*tensors, *settings, num_warps=16)
