"""Intervals of calibration metrics: of means, and of the binned calibration error, which no plain bootstrap covers.

With m_b the mean over all questions of (correct - confidence) in bin b and 0 elsewhere, ECE = sum_b |m_b|. The m_b are
means and so about normal, with a covariance that the data tells; the absolute values turn their noise into a bias. A
percentile bootstrap adds that bias a second time: its interval never holds the 0 of a calibrated model.

`absolute_sum` therefore inverts a test. It asks which true errors would make the observed one neither too large nor too
small, along the errors in which every bin's |m_b| is t of its standard errors smaller than observed (or larger, t < 0),
but never below 0. docs/intervals.md has the coverage that this reaches, and examples/benchmarks/interval_coverage.py
measures it.

Numpy only, and nothing of ours: `calsmooth.metrics` makes the arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DRAWS = 2000
"""Of the normal distribution, common to all true errors that are tried."""
LUCKIEST = 0.1
"""Of samples with theta = 0: the upper end is at least that of one that shows less than all but this share."""
FARTHEST = 6.0
"""Standard errors by which a bin's true gap may exceed the observed one."""


@dataclass(frozen=True)
class AbsoluteSum:
    """What data says about theta = sum_b |true m_b|.

    observed: sum_b |m_b| of the data, whose expectation is above theta.
    corrected: the theta at which half of all samples would show more than `observed` (median-unbiased); 0 where even
        theta = 0 would show more.
    low, high: the interval of theta. `low` is 0 where the test of theta = 0 isn't rejected.
    if_zero: the mean of `observed` over samples with theta = 0.
    p_value: the share of such samples that show as much as `observed`.
    """

    observed: float
    corrected: float
    low: float
    high: float
    if_zero: float
    p_value: float


def cluster_sums(values: ArrayLike, clusters: ArrayLike | None = None) -> tuple[Array, Array]:
    """((C, M) sums over each cluster's rows, (C,) numbers of its rows) of values (N, M).

    clusters: (N,) names of groups whose rows aren't independent of each other (the tokens of one response); None for
    rows that are.
    """
    rows = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return rows, np.ones(len(rows))
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(group).astype(np.float64)
    return np.stack([np.bincount(group, column) for column in rows.T], axis=1), counts


def mean_intervals(
    values: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Array:
    """(M, 2) percentile bootstrap intervals of the column means of values (N, M).

    All columns are resampled together, whole clusters where `clusters` (N,) names them.
    """
    sums, counts = cluster_sums(values, clusters)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, sums.shape[1]))
    for row in means:
        drawn = generator.integers(0, len(sums), len(sums))
        row[:] = sums[drawn].sum(axis=0) / counts[drawn].sum()
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def mean_and_noise(
    sums: Array, counts: Array, extra_variance: Array, draws: int = DRAWS, seed: int = 0
) -> tuple[Array, Array]:
    """((M,) means, (draws, M) draws of their sampling error) of clusters' sums (C, M) and sizes (C,).

    The error is normal with the clusters' covariance (the linearised one of a ratio, as clusters differ in size) and
    `extra_variance` (M,) added: what a bin in which all outcomes are alike would otherwise seem not to have.
    """
    clusters, total = len(sums), counts.sum()
    mean = sums.sum(axis=0) / total
    deviations = (sums - mean * counts[:, None]) / total
    covariance = deviations.T @ deviations * (clusters / max(clusters - 1, 1)) + np.diag(extra_variance)
    scale, directions = np.linalg.eigh(covariance)
    normal = np.random.default_rng(seed).normal(size=(draws, len(mean)))
    return mean, normal @ (directions * np.sqrt(np.maximum(scale, 0.0))).T


def absolute_sum(mean: Array, noise: Array, if_zero: Array | None = None, level: float = 0.95) -> AbsoluteSum:
    """Estimate, interval and test of theta = sum_b |true m_b|, from m (M,) and draws (D, M) of its sampling error.

    if_zero: draws of the observed sum where theta = 0, if they are known better than through the noise.

    Where the observed sum is small even for theta = 0, the level of the upper end's test is multiplied by the share of
    samples with theta = 0 that show less (as CLs does, Read 2002), so that a lucky sample gives no empty interval. A
    sum that hardly any such sample undercuts, 0 itself above all, counts for the upper end as one that few do.
    """
    observed = float(np.abs(mean).sum())
    errors = noise.std(axis=0)
    null = np.abs(noise).sum(axis=1) if if_zero is None else if_zero
    p = p_value(observed, null)
    tail = (1 - level) / 2

    # A gap of exactly 0 may be one of either sign.
    signs = np.where(mean < 0, -1.0, 1.0)

    def true_gaps(t: float) -> Array:
        return signs * np.maximum(np.abs(mean) - t * errors, 0.0)

    nothing_left = float((np.abs(mean) / np.maximum(errors, 1e-300)).max(initial=0.0, where=errors > 0))

    def error_at(quantile: float, seen: float = observed) -> float:
        """The theta of which `seen` is that quantile of what samples show."""

        def shown(t: float) -> float:
            return float(np.quantile(np.abs(true_gaps(t) + noise).sum(axis=1), quantile))

        t = _falling_root(lambda t: shown(t) - seen, -FARTHEST, nothing_left)
        return float(np.abs(true_gaps(t)).sum())

    low = 0.0 if p > tail else error_at(1 - tail)
    from_noise = np.abs(noise).sum(axis=1)
    seen = max(observed, float(np.quantile(from_noise, LUCKIEST)))
    high = error_at(tail * float(np.mean(from_noise <= seen)), seen)
    corrected = 0.0 if p > 0.5 else error_at(0.5)
    return AbsoluteSum(
        observed=observed,
        corrected=min(max(corrected, low), max(high, low)),
        low=low,
        high=max(high, low),
        if_zero=float(null.mean()),
        p_value=p,
    )


def p_value(observed: float, null: Array) -> float:
    """The share of draws of the null hypothesis, the data counted as one of them, that are at least `observed`."""
    return float((1 + np.count_nonzero(null >= observed - 1e-12)) / (1 + len(null)))


def difference(first: AbsoluteSum, second: AbsoluteSum, correlation: float) -> tuple[float, float, float]:
    """(estimate, low, high) of theta of the second less theta of the first.

    correlation: of the two observed sums over samples (`correlation_of_sums`).

    Each one's interval is put together with the other's by the distances of their ends from a centre and the
    correlation (Zou 2007, MOVER), so that what an interval knows about its end at 0 is kept. The centre is the
    corrected value, and 0 where theta = 0 isn't rejected: there the corrected value is still too large on average, and
    intervals around it hold the truth less often.
    """

    def reach(of_second: float, of_first: float) -> float:
        return float(np.sqrt(max(of_second**2 + of_first**2 - 2 * correlation * of_second * of_first, 0.0)))

    one, other = (estimate.corrected if estimate.low > 0 else 0.0 for estimate in (first, second))
    low = other - one - reach(other - second.low, first.high - one)
    high = other - one + reach(second.high - other, one - first.low)
    estimate = second.corrected - first.corrected
    return estimate, min(low, estimate), max(high, estimate)


def correlation_of_sums(mean: Array, noise: Array, size: int) -> float:
    """Of sum_b |m_b| over the first `size` entries of m, and over the others; 0 where one of them can't vary."""
    seen = np.abs(mean + noise)
    sums = seen[:, :size].sum(axis=1), seen[:, size:].sum(axis=1)
    deviations = sums[0] - sums[0].mean(), sums[1] - sums[1].mean()
    spread = np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    return float((deviations[0] * deviations[1]).sum() / spread) if spread > 0 else 0.0


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, from above; `high` itself where it is positive up to there."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return high
