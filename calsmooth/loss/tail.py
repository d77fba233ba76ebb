"""What `mode="filtered"` puts in the place of the softmax entries that it leaves out, and why.

Of token i the entries K_i are kept: those that reach `filter_eps`, and the target's. The others, its tail, hold the
mass M_i, and are replaced by one distribution q for all tokens, scaled so that nothing is lost:

    p_iv  ~  d_i q_v  for v outside K_i,     d_i = M_i / (1 - sum of q over K_i)

q is the mean tail of a sample of tokens. This costs no product over all tokens: a token's tail is rank one in every
gradient. But a replacement that is the same for all tokens has no restoring force where tokens differ. An entry whose
probability is too low after some tokens, and too high after others, isn't told: its gradient is right on average over
the tokens only, while whatever else moves the head drives it further away. Trained so, held-out loss ends several
percent above the exact mode's, and with entries left out, or replaced by their mean, it runs away without bound.

So the head's gradient of the sampled tokens is put right, weighted up by the number of tokens that each stands for:

    dC_v += n / s  sum over the sample of w_i (p_iv - d_i q_v) E_i     for v outside K_i

Over the batches this is the exact gradient of the head on average, whichever q is (but for q's own dependence on the
sample, which falls with its size): what is left is noise, far below that of the tokens themselves. The hidden states'
gradient stays rank one in the tail.

Where the tokens' mean replaced mass is above MOST_REPLACED the gradients are exact instead.

The sample is systematic: n tokens in s runs of equal length, one of each, at a place in it that depends on the targets.
So it is spread over the batch, differs from batch to batch, and is the same for the same inputs.
"""

import torch
from torch import Tensor

SAMPLE = 128
"""Tokens in the sample. Their logits exist as a whole; the noise falls with the square root."""

LEAST_SHARE = 1e-6
"""Where q has less than this outside K_i, there is nothing of it to scale: d_i is 0."""

MOST_REPLACED = 0.5
"""The largest mean replaced mass. A softmax that is nearly flat has no few entries that matter: where more of it
would be replaced, the gradients are exact."""

GOLDEN = 0.6180339887498949
"""Its multiples are spread evenly modulo 1: places in the runs that fit no period of the batch."""


def sample_tokens(
    has_target: Tensor,  # (N,) bool
    targets: Tensor,  # (N,) integers
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sampled tokens' indices (s,) int64, and how many tokens each stands for: n / s, a scalar on the device.

    Only tokens with a target are sampled, some of them twice where there are fewer than `size` (SAMPLE). With no such
    token at all the indices mean nothing, and each stands for 0.
    """
    N, device = len(targets), targets.device
    size = min(SAMPLE if size is None else size, N)
    ranks = has_target.cumsum(0)
    n = ranks[-1]
    seed = torch.where(has_target, targets, 0).sum(dtype=torch.int64) % 65536
    runs = torch.arange(size, dtype=torch.float64, device=device)
    places = (runs * GOLDEN + seed.double() / 65536.0) % 1.0
    rank = ((runs + places) * (n.double() / size)).long().clamp(max=N - 1)
    rank = torch.minimum(rank, (n - 1).clamp(min=0))
    indices = torch.searchsorted(ranks, rank + 1).clamp(max=N - 1)
    return indices, n.float() / size
