"""Feature diversity: how mutually dependent the hidden states are that a head reads (Lemma 3.1, equations 8 and 9).

The lemma's bound on the error under a shifted distribution has the term d / sigma_min(S), where S = E[x~ x~^T] is the
covariance of the d features, each with its mean taken off and divided by its standard deviation: their correlation
matrix. Features that follow from one another have sigma_min near 0. The lemma assumes a sum of one-dimensional
functions, matching marginals and pairwise Gaussian features, none of which holds for a language model; what is
measured here is its quantity, to be compared between models on one text.

sigma_min is an extreme of d numbers and hangs on single directions. The effective rank, exp of the entropy of the
spectrum (Roy and Vetterli 2007), is steadier: d for uncorrelated features, 1 where all are one.

Sampling alone spreads a spectrum: of independent features seen on n tokens the smallest singular value is near
(1 - sqrt(d / n))^2 (Marchenko and Pastur), and on n <= d tokens it is 0. Compare on the same tokens, and on many.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calsmooth.entropy_bound.bound import Array
from calsmooth.errors import CalsmoothError


@dataclass(frozen=True)
class FeatureDiversity:
    """The spectrum of the correlation matrix of `features` hidden dimensions over `tokens` tokens.

    smallest: sigma_min(S); None where there are not more tokens than features, which makes it 0 whatever they are.
    independent_smallest: what so many independent features would show on so many tokens.
    constant: dimensions without variance, which can't be normalised and are left out.
    eigenvalues: (features,), falling; they sum to `features`.
    """

    tokens: int
    features: int
    constant: int
    smallest: float | None
    independent_smallest: float | None
    effective_rank: float
    eigenvalues: Array


class RunningCovariance:
    """Mean and centred second moments of rows that arrive in pieces, in float64.

    Each piece is centred on its own mean and merged (Chan, Golub, LeVeque 1979), so that features with a large mean and
    a small variance, which hidden states have, keep their digits. D^2 float64 numbers, whatever the number of rows.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.moments = torch.zeros(features, features, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """rows: (n, D), any floating dtype and device."""
        x = rows.detach().cpu().double()
        n = len(x)
        if n == 0:
            return
        mean = x.mean(0)
        x = x - mean
        step = mean - self.mean
        total = self.count + n
        self.moments.addmm_(x.T, x)
        self.moments.addr_(step, step, alpha=self.count * n / total)
        self.mean += step * (n / total)
        self.count = total

    def diversity(self) -> FeatureDiversity:
        """The correlation matrix's spectrum.

        Raises:
            CalsmoothError: fewer than two rows, a value that isn't finite, or no feature that varies.
        """
        if self.count < 2:
            raise CalsmoothError("feature diversity needs at least two tokens; give a longer text")
        if not bool(self.moments.isfinite().all()):
            raise CalsmoothError("the model gave hidden states that are not finite; try --dtype float32")
        variance = self.moments.diagonal() / self.count
        # What rounding leaves of a constant isn't variance.
        varies = variance > (1e-14 * self.mean).square()
        d = int(varies.sum())
        if d == 0:
            raise CalsmoothError("the hidden states are the same for every token; there is no diversity to measure")
        scale = variance[varies].rsqrt()
        correlation = self.moments[varies][:, varies]  # a copy, worked on in place: D may be 8192
        correlation.mul_(scale).mul_(scale[:, None] / self.count)
        values = torch.linalg.eigvalsh(correlation).flip(0).clamp(min=0).numpy()
        share = values / values.sum()
        share = share[share > 0]
        enough = self.count > d
        return FeatureDiversity(
            tokens=self.count,
            features=d,
            constant=len(varies) - d,
            smallest=float(values[-1]) if enough else None,
            independent_smallest=float((1 - np.sqrt(d / self.count)) ** 2) if enough else None,
            effective_rank=float(np.exp(-np.sum(share * np.log(share)))),
            eigenvalues=values,
        )
