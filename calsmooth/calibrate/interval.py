"""How sure a fitted temperature is: a likelihood-ratio interval that holds where no temperature is the truth as well.

The interval holds every inverse temperature b = 1/T whose likelihood ratio to the best one is small,

    2 (NLL(b) - NLL(best)) <= t^2 max(1, J / H),

with NLL summed over the questions, H the curvature that the model expects at the best b (mean variance of the logits
under their own softmax), J the variance that the questions' derivatives really have, and t the quantile of Student's
distribution. Where softmax(b z) is the truth, J = H and this is the classical interval. Where it isn't (a preference
for a letter, questions of several sharpnesses) the derivatives scatter more than the model says, and the ratio is
scaled accordingly (Kent 1982). It is never scaled down, because J is poorly known from few questions.

In b, not in T, because the negative log-likelihood is convex in b and goes on smoothly through b = 0, which is
T = infinity: uniform probabilities. Not by the bootstrap, which covers less: `tests/calibrate/test_coverage.py`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.calibrate.temperature import LOWEST
from calsmooth.metrics import Array, log_softmax, negative_log_likelihood

LEVEL = 0.95


@dataclass(frozen=True)
class TemperatureInterval:
    """The temperatures that the questions leave possible.

    low, high: 0 and infinity where they leave them open. Both are infinity where not even T = infinity is far enough:
        then the choices that the logits favour are right less often than others.
    likelihood_ratio: of the best temperature to T = infinity, that is to uniform probabilities, already divided by
        max(1, J / H). critical: what it must exceed to tell the two apart.
    """

    low: float
    high: float
    likelihood_ratio: float
    critical: float

    @property
    def identified(self) -> bool:
        """Whether T = infinity is excluded, so that the logits say something about the answers."""
        return self.high < math.inf

    def holds(self, temperature: float) -> bool:
        return self.low <= temperature <= self.high


def temperature_interval(logits: ArrayLike, labels: ArrayLike, level: float = LEVEL) -> TemperatureInterval:
    """The likelihood-ratio interval of the temperature that `fit_temperature` fits.

    logits: (N, K) log-probabilities or logits; -inf where a question lacks a choice. labels: (N,), N >= 2.

    Raises:
        ValueError: shapes that don't fit, labels outside the choices, or fewer than two questions.
    """
    z, k = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    negative_log_likelihood(z, k)  # checks the shapes and labels
    if len(k) < 2:
        raise ValueError("an interval needs at least two questions")
    present = np.isfinite(z)
    z = np.where(present, z - z.max(axis=1, keepdims=True), 0.0)
    rows = np.arange(len(k))

    def logprobs(inverse: float) -> Array:
        return log_softmax(np.where(present, inverse * z, -np.inf))

    def loss(inverse: float) -> float:
        return -float(logprobs(inverse)[rows, k].sum())

    def derivatives(inverse: float) -> tuple[Array, Array]:
        """(N,) first and second derivatives of each question's loss."""
        p = np.exp(logprobs(inverse))
        mean = (p * z).sum(axis=1)
        return mean - z[rows, k], (p * z**2).sum(axis=1) - mean**2

    bound = 1 / LOWEST
    low, high = -bound, bound
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if derivatives(middle)[0].sum() < 0 else (low, middle)
    best = (low + high) / 2
    first, second = derivatives(best)
    expected, seen = float(second.mean()), float(first.var(ddof=1))
    misfit = max(1.0, seen / expected) if expected > 0 else 1.0
    critical = student_quantile((1 + level) / 2, len(k) - 1) ** 2
    least = loss(best)

    def ratio(inverse: float) -> float:
        return 2 * (loss(inverse) - least) / misfit

    def end(outermost: float) -> float:
        if ratio(outermost) <= critical:
            return math.copysign(math.inf, outermost)
        inside, outside = best, outermost
        while (middle := (inside + outside) / 2) not in (inside, outside):
            inside, outside = (middle, outside) if ratio(middle) <= critical else (inside, middle)
        return inside

    lowest, highest = end(-bound), end(bound)
    return TemperatureInterval(
        low=1 / highest if highest > 0 else math.inf,
        high=1 / lowest if lowest > 0 else math.inf,
        likelihood_ratio=max(ratio(0.0), 0.0),
        critical=critical,
    )


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by its expansion about the normal one (Abramowitz and Stegun 26.7.5).

    To three digits at the 97.5 % point from 5 degrees of freedom on.
    """
    x, v = NormalDist().inv_cdf(probability), float(freedom)
    terms = (
        x,
        (x**3 + x) / (4 * v),
        (5 * x**5 + 16 * x**3 + 3 * x) / (96 * v**2),
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * v**3),
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * v**4),
    )
    return sum(terms)
