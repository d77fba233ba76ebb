"""Theorem 4.2: the least entropy that a head of hidden size D over a vocabulary V can give its predictions.

The logits u = C h of a head with largest singular value sigma_C, for hidden states with |h_i| <= sigma_h, lie in a
ball of radius r = rho sqrt(D), rho = sigma_C sigma_h (Lemma 4.1). Among all logits in that ball the least entropy
belongs to one logit above |V| - 1 equal ones (equation 36), which differ by x = r sqrt(V / (V - 1)). Everything here
is said in terms of x and of the log-odds against the top token,

    t = log(V - 1) - x
    top probability   1 / (1 + e^t)
    entropy           log(1 + e^t) + x / (1 + e^-t)

which is equation 14 with (V - 1) gamma = e^t, and overflows nowhere. Equation 37 of the paper's appendix, which claims
to be the same, drops the factor sqrt(D) in two of its three exponents; equation 14 is the entropy of equation 36.

What changes the floor:

* A temperature T divides the logits, and so rho: T > 1 raises the floor, T < 1 lowers it (Remark 4.4).
* A softcap, z = t tanh(u / t), can only raise entropies, never lower them. It keeps the logits' order and shrinks every
  difference, so softmax(u) / softmax(z) grows with u: softmax(u) majorises softmax(z), and has the smaller entropy. For
  a given rho the floor below therefore holds with a softcap too, and is no longer reached. (Section 4 of the paper says
  the opposite, that softcapping reduces the bound. A capped model may well learn larger raw logits, and so a larger
  rho, than it would have without.)

Functions take numbers or arrays that broadcast, and return float64. Entropies are in nats.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calsmooth.errors import UsageError

Array = NDArray[np.float64]

SMALLEST_MEASURED = 1e-37
"""Nats: a smaller entropy can't be told from 0 where it was measured in float32. The bounds here go on to 1e-308."""


def logit_norm_bound(sigma_c: ArrayLike, sigma_h: ArrayLike, hidden: ArrayLike) -> Array:
    """Lemma 4.1: ||C h||_2 <= sigma_C sigma_h sqrt(D) where ||C||_2 = sigma_C and every |h_i| <= sigma_h."""
    return np.asarray(sigma_c, float) * np.asarray(sigma_h, float) * np.sqrt(np.asarray(hidden, float))


def entropy_bound(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """The least attainable entropy in nats (Theorem 4.2, equation 14).

    log V at rho = 0, falling to 0 as rho sqrt(D) grows. The relative error is a few float64 roundings where the bound
    is of the order of log V, and of the order of x * 1e-16 where it is tiny, as the rounding of x itself imposes; where
    the bound is below 1e-308 it is 0.

    Args:
        vocab: |V|, at least 2.
        hidden: D, at least 1.
        rho: sigma_C sigma_h, finite and at least 0.

    Raises:
        UsageError: an argument is outside its range.
    """
    V, x = logit_gap(vocab, hidden, rho)
    t = np.log(V - 1) - x
    # Below, e^t is the odds of anything but the top token; above, they are turned over so that neither overflows.
    odds = np.exp(-np.abs(t))
    peaked = np.log1p(odds) + x * odds / (1 + odds)
    flat = np.log(V - 1) + np.log1p(odds) - x * odds / (1 + odds)
    return np.where(t < 0, peaked, flat)


def log_entropy_bound(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """The natural logarithm of `entropy_bound`, also where that underflows: real heads have floors such as 1e-9000."""
    V, x = logit_gap(vocab, hidden, rho)
    t = np.log(V - 1) - x
    far = t < -600  # there the bound is e^t (1 + x) to float64
    near = np.where(far, 1.0, entropy_bound(vocab, hidden, rho))
    return np.where(far, t + np.log1p(x), np.log(near))


def entropy_bound_asymptote(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """What the bound tends to once rho sqrt(D) is well above log V: (V - 1) (1 + x) e^-x, in nats.

    The paper's Omega(V e^(-rho sqrt(D))) with its constant: linear in the vocabulary, exponential in sqrt(D). Not a
    bound below log V, where it exceeds the true value by any factor.
    """
    V, x = logit_gap(vocab, hidden, rho)
    return (1 + x) * np.exp(np.log(V - 1) - x)


def normalized_entropy_gap(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """(log V - bound) / log V: 0 where only the uniform prediction is attainable, 1 where certainty is (Figure 4).

    Computed as the divergence of the least-entropy prediction from the uniform one, so that it keeps its relative
    accuracy where it is tiny and a difference of two entropies would be rounding noise.
    """
    V, x = logit_gap(vocab, hidden, rho)
    top = _top_probability(V, x)
    # Probabilities relative to 1/V, minus 1: of the top token, and of each of the others.
    above = -np.expm1(-x) * top * (V - 1)
    below = np.expm1(-x) * top
    divergence = (_divergence_term(above) + (V - 1) * _divergence_term(below)) / V
    return divergence / np.log(V)


def max_probability(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """The largest attainable probability of a single token: that of the least-entropy logits (equation 36)."""
    return _top_probability(*logit_gap(vocab, hidden, rho))


def least_entropy_logits(vocab: int, hidden: int, rho: float) -> Array:
    """(V,) the logits of equation 36: one token's above all others', norm rho sqrt(D), sum 0."""
    V, _ = logit_gap(vocab, hidden, rho)
    radius = rho * np.sqrt(float(hidden))
    logits = np.full(int(V), -radius * np.sqrt(1 / (V * (V - 1))))
    logits[0] = radius * np.sqrt(1 - 1 / V)
    return logits


def rho_for_probability(vocab: ArrayLike, hidden: ArrayLike, probability: ArrayLike) -> Array:
    """The least rho with which a token can reach this probability; the inverse of `max_probability`.

    A temperature of rho / rho_for_probability(...) brings a head of known rho down to that confidence.

    Raises:
        UsageError: the probability is not from 1/V up to, and without, 1.
    """
    V, D = checked_sizes(vocab, hidden)
    p = np.asarray(probability, float)
    require(np.all((p >= 1 / V) & (p < 1)), "probability must be at least 1/vocab and below 1", probability)
    gap = np.log(V - 1) + np.log(p) - np.log1p(-p)
    return np.maximum(gap, 0.0) * np.sqrt((V - 1) / V / D)


def rho_for_entropy(vocab: ArrayLike, hidden: ArrayLike, entropy: ArrayLike) -> Array:
    """The rho at which the floor lies at this entropy (nats): no smaller one attains it; inverse of `entropy_bound`.

    Raises:
        UsageError: the entropy is not above 0 and at most log V.
    """
    V, D = checked_sizes(vocab, hidden)
    target = np.asarray(entropy, float)
    require(np.all((target > 0) & (target <= np.log(V))), "entropy must be above 0 and at most log(vocab)", entropy)
    V, D, target = np.broadcast_arrays(V, D, target)
    # The bound falls with x. At the upper end it has underflowed to 0; halving ends at neighbouring floats.
    low, high = np.zeros(V.shape), np.log(V) + 760.0
    for _ in range(80):
        middle = (low + high) / 2
        reached = entropy_bound(V, 1, middle * np.sqrt((V - 1) / V)) <= target
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high * np.sqrt((V - 1) / V / D)


def logit_gap(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> tuple[Array, Array]:
    """V, and x: how far the top logit of equation 36 stands above the others."""
    V, D = checked_sizes(vocab, hidden)
    r = np.asarray(rho, float)
    require(np.all(np.isfinite(r) & (r >= 0)), "rho must be finite and at least 0", rho)
    return V, r * np.sqrt(D * (V / (V - 1)))


def checked_sizes(vocab: ArrayLike, hidden: ArrayLike) -> tuple[Array, Array]:
    V, D = np.asarray(vocab, float), np.asarray(hidden, float)
    require(np.all(np.isfinite(V) & (V >= 2)), "vocab must be at least 2", vocab)
    require(np.all(np.isfinite(D) & (D >= 1)), "hidden must be at least 1", hidden)
    return V, D


def require(condition: Any, message: str, value: Any) -> None:
    if not condition:
        raise UsageError(f"{message}, got {value}")


def _top_probability(V: Array, x: Array) -> Array:
    return 1 / (1 + (V - 1) * np.exp(-x))


def _divergence_term(u: Array) -> Array:
    """(1 + u) log(1 + u) - u for u >= -1, without cancellation near 0."""
    u = np.asarray(u, float)
    small = np.where(np.abs(u) < 0.25, u, 0.0)
    # sum over k >= 2 of (-u)^k / (k (k - 1)); 28 terms reach float64 at |u| = 1/4.
    series = np.zeros_like(small)
    for k in range(29, 1, -1):
        series = 1 / (k * (k - 1)) - small * series
    large = np.where(np.abs(u) < 0.25, 1.0, np.maximum(1 + u, np.finfo(float).tiny))
    return np.where(np.abs(u) < 0.25, small**2 * series, large * np.log(large) - u)
