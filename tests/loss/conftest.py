"""What several of the loss's tests compare with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calsmooth.loss import tail


@pytest.fixture
def filtered_in_full() -> Callable[..., tuple[Tensor, ...]]:
    """`mode="filtered"` as `calsmooth.loss.tail` says, with every logit, in float64."""

    def gradients(
        E: Tensor,  # (N, D)
        C: Tensor,  # (V, D)
        y: Tensor,  # (N,)
        weights: Tensor,  # (N,) each token's share of the result
        *,
        filter_eps: float,
        bias: Tensor | None = None,
        label_smoothing: float = 0.0,
        smoothing_prior: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dE, dC, dbias and the kept mass."""
        E, C, V, beta = E.detach().double(), C.detach().double(), len(C), label_smoothing
        z = E @ C.T
        z = (z if bias is None else z + bias.detach().double()) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        slope = torch.ones_like(z) if softcap is None else 1 - (z / softcap) ** 2
        p, onehot = z.softmax(1), torch.nn.functional.one_hot(y.clamp(min=0), V)
        keep = (p >= filter_eps) | (onehot > 0)
        sampled, stands_for = tail.sample_tokens(y >= 0, y)
        shape = (p * ~keep)[sampled].sum(0)
        shape = shape / shape.sum().clamp(min=1e-300)
        mass, left = (p * ~keep).sum(1, keepdim=True), (shape * ~keep).sum(1, keepdim=True)
        height = torch.where(left > tail.LEAST_SHARE, mass / left, 0.0)
        smoothing = beta * (1.0 / V if smoothing_prior is None else smoothing_prior.double())
        weight = 1.0 + 2.0 * z_loss * z.logsumexp(1, keepdim=True)
        exact = (weight * p - (1.0 - beta) * onehot - smoothing) * slope
        replaced = torch.where(keep, exact, weight * height * shape - smoothing)
        if softcap is None:  # as the exact gradient's
            assert replaced[y >= 0].sum(1).sub(exact[y >= 0].sum(1)).abs().max() < 1e-9
        tokens = (weights.double() * scale).unsqueeze(1)
        for_head = replaced.index_add(0, sampled, (exact - replaced)[sampled] * float(stands_for)) * tokens
        kept_mass = torch.where(y >= 0, 1.0 - mass.squeeze(1), 1.0)
        return (replaced * tokens) @ C, for_head.T @ E, for_head.sum(0), kept_mass

    return gradients
