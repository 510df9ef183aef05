"""token_logprob by the kernels of softmax_kl.py, which here have no q; defined in reference.py."""

import torch

from kernels.softmax_kl import BLOCK, LN2, LOG2E, backward_kernel, forward_kernel, lane_width


def logprob_forward(logp, entropy, stats, logits, ids, temperature):
    sizes = logits.shape[1], logits.stride(0), logits.stride(0)
    settings = *sizes, LOG2E / temperature, False, BLOCK, lane_width(sizes)
    q, mask = logits, torch.ones_like(ids, dtype=torch.bool)  # q is not read
    forward_kernel[(len(ids),)](entropy, stats, logits, q, mask, *settings, num_warps=16)
    entropy.neg_()
    x_id = (logits.gather(1, ids[:, None])[:, 0] - stats[:, 0]) / temperature
    logp.copy_(x_id - stats[:, 1] * LN2.value)


def logprob_backward(grad, g_logp, g_entropy, logits, ids, logp, entropy, stats, temperature):
    sizes = logits.shape[1], grad.stride(0), logits.stride(0), logits.stride(0)
    settings = *sizes, LOG2E / temperature, "logprob", BLOCK
    q, tensors = logits, (grad, -g_entropy, -entropy, stats, logits)
    backward_kernel[(len(ids),)](*tensors, q, g_logp, ids, *settings, num_warps=16)
