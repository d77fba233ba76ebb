"""Isotonic regression and histogram binning: what a stated probability has really been worth.

Both are fitted one-vs-rest on all choices of all questions pooled, so that ragged questions and the arbitrary places of
cloze endings need no care, and K times as many points are there as questions (Zhang, Kailkhura and Han 2020 call the
isotonic one IRM). A question's mapped probabilities are renormalised.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.calibrate.fit import Fit
from calsmooth.errors import CalsmoothError
from calsmooth.metrics import Array

TIE_BREAK = 1e-6
"""Share of the stated probability that is added to the mapped one, so that choices on one step keep their order."""


def fit_isotonic(logits: ArrayLike, labels: ArrayLike) -> Fit:
    """The rising map from stated to seen probability that fits best in squared error (Zadrozny and Elkan 2002).

    logits: (N, K) log-probabilities over the choices; -inf where a question lacks a choice. labels: (N,).
    Being monotone, it never changes which choice is the most probable.

    Raises:
        CalsmoothError: scikit-learn isn't installed.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError:
        raise CalsmoothError(
            "--method isotonic: needs scikit-learn; run pip install 'calsmooth[calibrate]', or use --method temperature"
        ) from None
    stated, right = _pooled(logits, labels)
    floor = _floor(stated)
    model = IsotonicRegression(y_min=floor, y_max=1 - floor).fit(stated, right)
    knots, worth = model.X_thresholds_, model.y_thresholds_
    parameters = {"stated": knots.tolist(), "calibrated": worth.tolist()}
    return Fit(_mapped(lambda p: np.interp(p, knots, worth)), parameters)


def fit_histogram(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> Fit:
    """The share of right choices in each of `bins` bins of equal count (Zadrozny and Elkan 2001).

    logits, labels: as `fit_isotonic`. Fewer bins where many probabilities are equal.
    """
    stated, right = _pooled(logits, labels)
    edges = np.unique(np.quantile(stated, np.arange(1, bins) / bins))
    index = np.digitize(stated, edges)
    count = np.bincount(index, minlength=len(edges) + 1)
    # The lowest edge may be the lowest value itself: nothing lies below it.
    share = np.bincount(index, right, len(edges) + 1) / np.maximum(count, 1)
    floor = _floor(stated)
    worth = np.clip(share, floor, 1 - floor)
    parameters = {"edges": edges.tolist(), "calibrated": worth.tolist()}
    return Fit(_mapped(lambda p: worth[np.digitize(p, edges)]), parameters)


def _pooled(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """(M,) stated probabilities of all choices that there are, and (M,) whether each was right."""
    z, k = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    present = np.isfinite(z)
    right = np.zeros(z.shape)
    right[np.arange(len(k)), k] = 1.0
    return np.exp(z[present]), right[present]


def _floor(stated: Array) -> float:
    """Never saw it isn't never: what M points can't tell from 0, so that no log-likelihood is infinite."""
    return 1.0 / (len(stated) + 1)


def _mapped(worth: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def apply(logprobs: Array) -> Array:
        stated = np.exp(logprobs)
        mapped = np.where(np.isfinite(logprobs), worth(stated) + TIE_BREAK * stated, 0.0)
        with np.errstate(divide="ignore"):
            return np.log(mapped / mapped.sum(axis=1, keepdims=True))

    return apply
