"""Temperature scaling: the one number that the choices' logits are divided by before the softmax (Guo et al. 2017).

The negative log-likelihood is convex in the inverse temperature b = 1/T, and its derivative

    mean over questions of (sum_k p_k z_k - z_right),   p = softmax(b z)

never falls as b grows. So the best b is where the derivative crosses zero, and bisection on log b finds it to the last
digits, from any start, without a step size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.metrics import Array, log_softmax, negative_log_likelihood

LOWEST, HIGHEST = 1e-3, 1e4
"""Temperatures outside of this range mean that there is no best one."""


@dataclass(frozen=True)
class TemperatureFit:
    """`note` says why the temperature is a bound and no optimum; None where it is the optimum."""

    temperature: float
    nll: float
    note: str | None = None


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> TemperatureFit:
    """argmin over T of the negative log-likelihood of softmax(logits / T), to a relative 1e-12.

    logits: (N, K) log-probabilities or logits, any constant per question added; -inf where a question lacks a choice.
    labels: (N,) indices of the right choices.

    Raises:
        ValueError: shapes that don't fit, labels outside the choices, or a right choice that is -inf.
    """
    z = np.asarray(logits, dtype=np.float64)
    k = np.asarray(labels, dtype=np.int64)
    negative_log_likelihood(z, k)  # checks the shapes and labels
    z = z - z.max(axis=1, keepdims=True)
    right = z[np.arange(len(k)), k]
    if not np.isfinite(right).all():
        raise ValueError("the right choice of a question has probability 0, which no temperature can mend")

    def fit(temperature: float, note: str | None = None) -> TemperatureFit:
        return TemperatureFit(temperature, negative_log_likelihood(log_softmax(z, temperature), k), note)

    if not (z[np.isfinite(z)] < 0).any():
        return fit(1.0, "every question gives all its choices the same probability, so that no temperature matters")
    if _slope(z, right, 1 / LOWEST) <= 0:
        return fit(
            LOWEST, f"every answer is right, so that a lower temperature is always better; it was held at {LOWEST:g}"
        )
    if _slope(z, right, 1 / HIGHEST) >= 0:
        return fit(
            HIGHEST,
            "the probabilities carry no information about the answers, so that a higher temperature is always better; "
            f"it was held at {HIGHEST:g}",
        )
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    while high - low > 1e-13:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _slope(z, right, float(np.exp(middle))) < 0 else (low, middle)
    return fit(float(np.exp(-(low + high) / 2)))


def _slope(z: Array, right: Array, inverse: float) -> float:
    """Derivative of the negative log-likelihood by the inverse temperature."""
    p = np.exp(log_softmax(z * inverse))
    return float(np.mean(np.sum(p * np.where(np.isfinite(z), z, 0.0), axis=1) - right))
