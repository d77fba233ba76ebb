"""Calibration metrics: plain functions on arrays, float64 throughout, no model needed.

Two kinds of input recur:

- `confidence` (N,) in [0, 1] and `correct` (N,) of 0/1: the top choice's probability and whether it was right;
- `probabilities` (N, K) and `labels` (N,): the probability of each of K choices and the right one's index. Questions
  with fewer choices than K have probability 0 there and `present` (N, K) False.

Every metric depends on the questions only, never on their order: where equal-mass bins cut through tied confidences,
the tied questions share their mean outcome. A bin that holds nothing counts for nothing.

All functions raise ValueError for empty input or shapes that don't fit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calsmooth import intervals

Array = NDArray[np.float64]
Scheme = Literal["equal_width", "equal_mass"]


@dataclass(frozen=True)
class Bins:
    """Confidence bins, low to high. `accuracy` and `confidence` are the means inside a bin, NaN where it is empty."""

    lower: Array
    upper: Array
    count: NDArray[np.int64]
    accuracy: Array
    confidence: Array

    def gaps(self) -> Array:
        """|accuracy - confidence| of each bin, 0 where it is empty."""
        return np.nan_to_num(np.abs(self.accuracy - self.confidence))

    def weights(self) -> Array:
        """Each bin's share of the questions."""
        return self.count / self.count.sum()


# --- one number per set of top choices -------------------------------------------------------------------------------


def reliability_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, scheme: Scheme = "equal_width") -> Bins:
    """Group by confidence, into `bins` intervals of equal width or of equal count.

    Equal width: bin floor(p * bins), the last for p = 1, so that 0 and 1 both have a place. Equal mass: sorted by
    confidence and cut into `bins` runs whose lengths differ by at most one (fewer bins when there are fewer points).
    """
    p, y = _pairs(confidence, correct)
    if scheme == "equal_width":
        index = np.minimum((p * bins).astype(np.int64), bins - 1)
        edges = np.arange(bins + 1) / bins
        count, accuracy, mean = _bin_means(index, p, y, bins)
        return Bins(edges[:-1], edges[1:], count, accuracy, mean)
    if scheme != "equal_mass":
        raise ValueError(f"scheme must be 'equal_width' or 'equal_mass', got {scheme!r}")
    sizes = [len(part) for part in np.array_split(np.arange(len(p)), min(bins, len(p)))]
    return _runs(p, y, sizes)


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, scheme: Scheme = "equal_width"
) -> float:
    """ECE = sum_b n_b/N |acc_b - conf_b| (Naeini et al. 2015; equation 2 of the paper)."""
    b = reliability_bins(confidence, correct, bins, scheme)
    return float(np.sum(b.weights() * b.gaps()))


def maximum_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, scheme: Scheme = "equal_width"
) -> float:
    """MCE: the largest |acc_b - conf_b| of a bin that holds anything (Naeini et al. 2015)."""
    return float(reliability_bins(confidence, correct, bins, scheme).gaps().max())


def rms_calibration_error(confidence: ArrayLike, correct: ArrayLike, block: int = 100) -> float:
    """RMS calibration error with adaptive bins: sqrt(sum_b n_b/N (acc_b - conf_b)^2) (Hendrycks et al. 2019).

    Sorted by confidence and cut into blocks of `block`; the last, most confident block takes the remainder, and is
    counted (the loop that the literature copies leaves it out). Fewer than `block` points are one block. Since blocks
    don't grow with N, perfectly calibrated data scores about sqrt(mean(conf (1 - conf)) / block), some 0.04, not 0.
    """
    p, y = _pairs(confidence, correct)
    blocks = max(len(p) // block, 1)
    b = _runs(p, y, [block] * (blocks - 1) + [len(p) - block * (blocks - 1)])
    return float(np.sqrt(np.sum(b.weights() * b.gaps() ** 2)))


def rms_ce_hendrycks_test(confidence: ArrayLike, correct: ArrayLike, block: int = 100) -> float:
    """What the calibration script beside the original MMLU evaluation calls RMS: to compare with published tables.

    That script (github.com/hendrycks/test, calib_tools.py) takes the confidence for the probability of one of two
    classes and judges the more probable one: a question with confidence p <= 0.5 enters as (1 - p, 1 - correct), as if
    the model had betted against its own answer. Then it is (sum_b (n_b/N (acc_b - conf_b))^2)^(1/4) over int(N/block)
    bins whose edges are quantiles: the weights are squared and the root is taken twice, so that perfectly calibrated
    data scores about 0.06 at N = 14,042 and the number can lie below ECE, which no root mean square can. Use
    `rms_calibration_error` for anything else.
    """
    p, y = _pairs(confidence, correct)
    unlikely = p <= 0.5
    p, y = np.where(unlikely, 1 - p, p), np.where(unlikely, 1 - y, y)
    blocks = len(p) // block
    starts = np.minimum(np.round(np.linspace(0, len(p), blocks, endpoint=False)).astype(np.int64), len(p) - 1)
    index = np.digitize(p, np.sort(p)[starts][1:])
    count, accuracy, mean = _bin_means(index, p, y, max(blocks, 1))
    gaps = np.nan_to_num(accuracy - mean)
    return float(np.sum((count / len(p) * gaps) ** 2) ** 0.25)


def smooth_calibration_error(confidence: ArrayLike, correct: ArrayLike, cells: int = 4000) -> float:
    """smECE (Blasiok and Nakkiran 2023): no bins, but residuals smoothed by a Gaussian reflected at 0 and 1.

    The width is the fixed point sigma = smECE_sigma. Confidences are placed on a grid of `cells` cells, which limits
    the precision to about 1/cells.
    """
    p, y = _pairs(confidence, correct)
    # A residual goes to its two neighbouring cell centres, in proportion to how near they are.
    place = np.clip(p * cells - 0.5, 0.0, cells - 1.0)
    left = np.minimum(place.astype(np.int64), cells - 2)
    share = place - left
    residual = (y - p) / len(p)
    mass = np.bincount(left, residual * (1 - share), cells) + np.bincount(left + 1, residual * share, cells)
    # Even extension makes the interval's reflected Gaussian a plain product in frequency space.
    spectrum = np.fft.rfft(np.concatenate([mass, mass[::-1]]))
    frequency = np.pi * np.arange(len(spectrum))

    def smoothed(sigma: float) -> float:
        return float(np.abs(np.fft.irfft(spectrum * np.exp(-0.5 * (frequency * sigma) ** 2))[:cells]).sum())

    low, high = 0.0, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if smoothed(middle) > middle else (low, middle)
    return (low + high) / 2


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """The chance that a right answer has the higher confidence than a wrong one, ties counting half.

    None where all answers are right or all are wrong.
    """
    p, y = _pairs(confidence, correct)
    right, wrong = y.sum(), len(y) - y.sum()
    if right == 0 or wrong == 0:
        return None
    _, tie, size = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie]
    return float((rank[y == 1].sum() - right * (right + 1) / 2) / (right * wrong))


def wilson_interval(rate: ArrayLike, count: ArrayLike) -> tuple[Array, Array]:
    """(low, high), the 95 % score interval of a rate that was seen in `count` independent trials (Wilson 1927).

    rate, count: of any one shape. Counts may be fractions (effective sample sizes); NaN where there are no trials.
    """
    p, n = np.asarray(rate, dtype=np.float64), np.asarray(count, dtype=np.float64)
    z2 = 1.959963984540054**2
    with np.errstate(divide="ignore", invalid="ignore"):
        center = (p + z2 / (2 * n)) / (1 + z2 / n)
        reach = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.maximum(center - reach, 0.0), np.minimum(center + reach, 1.0)


# --- all choices -----------------------------------------------------------------------------------------------------


def static_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15, present: ArrayLike | None = None
) -> float:
    """SCE (Nixon et al. 2019): one-vs-rest ECE of each class with equal-width bins, averaged over the classes.

    With `present` a class is judged on the questions that have it, and weighs as much as there are such questions; with
    every class present everywhere that is the plain mean.
    """
    return _class_wise(probabilities, labels, bins, present, "equal_width")


def adaptive_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15, present: ArrayLike | None = None
) -> float:
    """ACE (Nixon et al. 2019): as `static_calibration_error`, with equal-mass bins."""
    return _class_wise(probabilities, labels, bins, present, "equal_mass")


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over questions of sum_k (p_k - [k is right])^2, from 0 to 2 (Brier 1950)."""
    return float(brier_scores(probabilities, labels).mean())


def brier_scores(probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """(N,): each question's part of `brier_score`."""
    p, k = _rows(probabilities, labels)
    return np.sum(p**2, axis=1) - 2 * p[np.arange(len(k)), k] + 1


def negative_log_likelihood(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log p(right choice), in nats; takes logarithms (N, K), so that tiny probabilities keep their value."""
    return float(negative_log_likelihoods(log_probabilities, labels).mean())


def negative_log_likelihoods(log_probabilities: ArrayLike, labels: ArrayLike) -> Array:
    """(N,): each question's part of `negative_log_likelihood`."""
    lp, k = _rows(log_probabilities, labels)
    return -lp[np.arange(len(k)), k]


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of questions whose most probable choice is right; the first choice wins a tie. Logarithms do as well."""
    p, k = _rows(probabilities, labels)
    return float(np.mean(p.argmax(axis=1) == k))


def choice_mass(logprobs: Sequence[Sequence[float]] | ArrayLike) -> float:
    """Mean probability that all choices together had before renormalising: near 0 the model wasn't answering at all."""
    return float(np.mean(np.sum(np.exp(pad_choices(logprobs)), axis=1)))


# --- from predictions to a result ------------------------------------------------------------------------------------


def pad_choices(logprobs: Sequence[Sequence[float]] | ArrayLike) -> Array:
    """(N, K) array of log-probabilities; choices that a question doesn't have are -inf."""
    if isinstance(logprobs, np.ndarray):
        return np.atleast_2d(np.asarray(logprobs, dtype=np.float64))
    rows = [np.asarray(row, dtype=np.float64) for row in logprobs]  # type: ignore[union-attr]
    if not rows or min(len(row) for row in rows) == 0:
        raise ValueError("expected at least one question, each with at least one choice")
    padded = np.full((len(rows), max(len(row) for row in rows)), -np.inf)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def log_softmax(scores: ArrayLike, temperature: float = 1.0) -> Array:
    """Renormalised log-probabilities (N, K) over the choices, after division by the temperature; -inf stays -inf."""
    z = np.asarray(scores, dtype=np.float64) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def top_choice(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """(`confidence`, `correct`) of the most probable choice of each question; the first wins a tie."""
    p, k = _rows(probabilities, labels)
    return p.max(axis=1), (p.argmax(axis=1) == k).astype(np.float64)


def top_of(logprobs: Sequence[Sequence[float]] | ArrayLike, gold: ArrayLike) -> tuple[Array, Array]:
    """`top_choice` of predictions as they are stored: not renormalised, in rows that may differ in length."""
    return top_choice(np.exp(log_softmax(pad_choices(logprobs))), gold)


def summarize(
    logprobs: Sequence[Sequence[float]] | ArrayLike,
    gold: ArrayLike,
    *,
    bins: int = 15,
    temperature: float = 1.0,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric of a task, as results.json has it.

    logprobs: one row of natural-log probabilities a question, not renormalised; rows may differ in length.
    temperature: divides the renormalised logits before anything is measured; `choice_mass` is the model's own.
    resamples: above 0, adds what `summarize_top` adds then.
    """
    raw = pad_choices(logprobs)
    lp = log_softmax(raw, temperature)
    p, labels = np.exp(lp), np.asarray(gold, dtype=np.int64)
    confidence, correct = top_choice(p, labels)
    present = np.isfinite(raw)
    losses = {"brier": brier_scores(p, labels), "nll": negative_log_likelihoods(lp, labels)}
    return {
        **summarize_top(confidence, correct, bins=bins, resamples=resamples, seed=seed, losses=losses),
        "sce": static_calibration_error(p, labels, bins, present),
        "ace": adaptive_calibration_error(p, labels, bins, present),
        "choice_mass": choice_mass(raw),
    }


def summarize_top(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 15,
    resamples: int = 0,
    seed: int = 0,
    clusters: ArrayLike | None = None,
    losses: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """The metrics that need only the top choice, and the means of `losses` (N,), such as Brier scores, by their names.

    resamples: above 0, adds 95 % bootstrap intervals of the means (accuracy, overconfidence, losses) and what
        `infer_ece` says: `ece_corrected`, `ece_interval`, `ece_if_calibrated`, `ece_p_value`.
    clusters: see `bootstrap_interval`.
    """
    p, y = _pairs(confidence, correct)
    result: dict[str, Any] = {
        "n": len(p),
        "accuracy": float(y.mean()),
        "mean_confidence": float(p.mean()),
        "overconfidence": float(p.mean() - y.mean()),
        "ece": expected_calibration_error(p, y, bins),
        "ece_equal_mass": expected_calibration_error(p, y, bins, "equal_mass"),
        "smooth_ece": smooth_calibration_error(p, y),
        "mce": maximum_calibration_error(p, y, bins),
        "rms_ce": rms_calibration_error(p, y),
        "rms_ce_hendrycks_test": rms_ce_hendrycks_test(p, y),
        "auroc": auroc(p, y),
    }
    means = {"accuracy": y, "overconfidence": p - y} | {k: np.asarray(v, float) for k, v in (losses or {}).items()}
    result |= {name: float(values.mean()) for name, values in means.items() if name not in result}
    if resamples:
        columns = np.stack(list(means.values()), axis=1)
        ends = intervals.mean_intervals(columns, clusters=clusters, resamples=resamples, seed=seed)
        result |= {f"{name}_interval": pair for name, pair in zip(means, ends.tolist(), strict=True)}
        ece = infer_ece(p, y, bins, seed=seed, clusters=clusters)
        result |= {
            "ece_corrected": ece.corrected,
            "ece_interval": [ece.low, ece.high],
            "ece_if_calibrated": ece.if_zero,
            "ece_p_value": ece.p_value,
        }
    return result


def summarize_unnormalised(
    logprobs: Sequence[Sequence[float]] | ArrayLike,
    gold: ArrayLike,
    *,
    bins: int = 15,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """ECE and over-confidence of the top choice's probability as the model gave it, under its whole vocabulary.

    Renormalising over the choices takes away what the model gave to no choice: label smoothing, which spreads
    probability over the vocabulary, lowers this confidence and need not change the renormalised one. The same choice is
    at the top, so that accuracy is the same. Keys as in `summarize_top`, with `_unnormalised` before `_interval`.
    """
    raw = pad_choices(logprobs)
    _, correct = top_choice(raw, gold)
    confidence = np.exp(raw.max(axis=1))
    found = summarize_top(confidence, correct, bins=bins, resamples=resamples, seed=seed)
    names = ["mean_confidence", "overconfidence", "overconfidence_interval"]
    names += ["ece", "ece_interval", "ece_corrected", "ece_if_calibrated", "ece_p_value"]
    return {_unnormalised(name): found[name] for name in names if name in found}


def _unnormalised(name: str) -> str:
    stem = name.removesuffix("_interval")
    return f"{stem}_unnormalised{name.removeprefix(stem)}"


def against_calibrated(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, draws: int = 1000, seed: int = 0
) -> dict[str, float]:
    """`ece_if_calibrated` and `ece_p_value` alone: what `infer_ece` has of them, without the interval."""
    null = calibrated_eces(confidence, bins, draws, seed)
    seen = expected_calibration_error(confidence, correct, bins)
    return {"ece_if_calibrated": float(null.mean()), "ece_p_value": intervals.p_value(seen, null)}


def infer_ece(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    clusters: ArrayLike | None = None,
) -> intervals.AbsoluteSum:
    """What the data says about the true ECE, with bins of equal width: a corrected estimate, an interval and a test.

    ECE of finite data is above the true one, and never 0. `corrected` takes that off (median-unbiased); `low`, `high`
    hold the true ECE in about 95 % of samples (docs/intervals.md); `if_zero` is the ECE to expect of a calibrated model
    at this size, and `p_value` the share of samples of a calibrated model that show at least the ECE seen here.

    draws: of outcomes with the stated probabilities, for `if_zero` and `p_value`. `clusters` (N,) names the group of
    each element where elements aren't independent; the test is then that of the groups' covariance.
    """
    p, y = _pairs(confidence, correct)
    if clusters is None:
        return _infer(p, y, bins, level, seed, calibrated_eces(p, bins, draws, seed))
    return _infer(p, y, bins, level, seed, None, clusters)


def infer_ece_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    bins: int = 15,
    *,
    level: float = 0.95,
    seed: int = 0,
    clusters: ArrayLike | None = None,
) -> tuple[float, float, float]:
    """(estimate, low, high) of the true ECE of `second` less that of `first`, each (confidence, correct), paired.

    Element i of both is the same question. The estimate is the difference of the corrected values of `infer_ece`; the
    interval is put together from the two intervals and their correlation over the questions.
    """
    (p, y), (q, z) = _pairs(*first), _pairs(*second)
    if len(p) != len(q):
        raise ValueError(f"expected the same questions, got {len(p)} and {len(q)}")
    columns = np.hstack([_residuals(p, y, bins), _residuals(q, z, bins)])
    sums, counts = intervals.cluster_sums(columns, clusters)
    if len(sums) == 1:
        raise ValueError("one element, or one cluster, has no interval; expected two or more")
    if np.array_equal(p, q) and np.array_equal(y, z):
        return 0.0, 0.0, 0.0  # the same answers have one true error, whatever it is
    extra = np.concatenate([_extra_variance(p, bins), _extra_variance(q, bins)])
    together = intervals.mean_and_noise(sums, counts, extra, seed=seed)
    one = infer_ece(p, y, bins, level=level, seed=seed, clusters=clusters)
    other = infer_ece(q, z, bins, level=level, seed=seed, clusters=clusters)
    return intervals.difference(one, other, intervals.correlation_of_sums(*together, bins))


def calibrated_eces(confidence: ArrayLike, bins: int = 15, draws: int = 1000, seed: int = 0) -> Array:
    """(draws,) ECEs of these confidences with outcomes drawn as they say: what a calibrated model shows."""
    p = np.asarray(confidence, dtype=np.float64)
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    stated = np.bincount(index, p, bins)
    generator = np.random.default_rng(seed)
    right = (np.bincount(index[generator.random(len(p)) < p], minlength=bins) for _ in range(draws))
    return np.array([np.abs(hits - stated).sum() for hits in right]) / len(p)


def ece_if_calibrated(confidence: ArrayLike, bins: int = 15, draws: int = 200, seed: int = 0) -> float:
    """The ECE to expect of these confidences if each were exactly right: what the sample's size alone makes of it.

    The mean over `draws` of outcomes drawn with the stated probabilities.
    """
    return float(calibrated_eces(confidence, bins, draws, seed).mean())


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: ArrayLike,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: ArrayLike | None = None,
) -> Array:
    """(low, high) percentile bootstrap interval of `statistic(*arrays)`, resampling along the first axis.

    A statistic that returns M numbers gives an array (2, M). `clusters` (N,) names the group of each element, for data
    whose elements aren't independent (the tokens of one response): then whole groups are drawn.
    """
    data = [np.asarray(a) for a in arrays]
    n = len(data[0])
    if n == 0 or any(len(a) != n for a in data):
        raise ValueError("expected arrays of the same, positive length")
    generator = np.random.default_rng(seed)
    if clusters is None:
        draws = (generator.integers(0, n, n) for _ in range(resamples))
    else:
        _, group = np.unique(np.asarray(clusters), return_inverse=True)
        order = np.argsort(group, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(group))[:-1])
        draws = (
            np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
            for _ in range(resamples)
        )
    values = np.array([statistic(*(a[i] for a in data)) for i in draws], dtype=np.float64)
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


# --- shared steps ----------------------------------------------------------------------------------------------------


def _pairs(confidence: ArrayLike, correct: ArrayLike) -> tuple[Array, Array]:
    p, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or len(p) == 0:
        raise ValueError(f"expected two arrays of the same length N > 0, got shapes {p.shape} and {y.shape}")
    if not (np.isfinite(p).all() and p.min() >= 0):
        raise ValueError("confidences must be numbers from 0 to 1")
    if p.max() > 1 + 1e-6:
        raise ValueError(f"confidences must be at most 1, got {p.max()}")
    return np.minimum(p, 1.0), y


def _rows(values: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    p, k = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or k.shape != (len(p),) or len(p) == 0:
        raise ValueError(f"expected (N, K) values and N > 0 labels, got shapes {p.shape} and {k.shape}")
    k = k.astype(np.int64)
    if k.min() < 0 or k.max() >= p.shape[1]:
        raise ValueError(f"labels must be from 0 to {p.shape[1] - 1}, got {k.min()} to {k.max()}")
    return p, k


def _residuals(p: Array, y: Array, bins: int) -> Array:
    """(N, bins): correct - confidence in the bin of the confidence, 0 elsewhere. ECE is sum_b |column mean|."""
    residuals = np.zeros((len(p), bins))
    residuals[np.arange(len(p)), np.minimum((p * bins).astype(np.int64), bins - 1)] = y - p
    return residuals


def _extra_variance(p: Array, bins: int) -> Array:
    """(bins,): what one more question in each bin that isn't empty would add to the variance of its mean residual."""
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    mean = np.bincount(index, p, bins) / np.maximum(count, 1)
    return np.where(count > 0, mean * (1 - mean), 0.0) / len(p) ** 2


def _infer(
    p: Array,
    y: Array,
    bins: int,
    level: float,
    seed: int,
    if_calibrated: Array | None,
    clusters: ArrayLike | None = None,
) -> intervals.AbsoluteSum:
    sums, counts = intervals.cluster_sums(_residuals(p, y, bins), clusters)
    mean, noise = intervals.mean_and_noise(sums, counts, _extra_variance(p, bins), seed=seed)
    found = intervals.absolute_sum(mean, noise, if_calibrated, level)
    if len(sums) > 1:
        return replace(found, high=min(found.high, 1.0))
    return replace(found, low=0.0, high=1.0)  # one question, or one response, says nothing about others


def _bin_means(index: NDArray[np.int64], p: Array, y: Array, bins: int) -> tuple[NDArray[np.int64], Array, Array]:
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(index, y, bins) / count, np.bincount(index, p, bins) / count


def _runs(p: Array, y: Array, sizes: list[int]) -> Bins:
    """Bins of the given sizes over the sorted confidences."""
    _, tie, size = np.unique(p, return_inverse=True, return_counts=True)
    shared = (np.bincount(tie, y) / size)[tie]  # what a question of this confidence scores on average
    order = np.argsort(p, kind="stable")
    p, y = p[order], shared[order]
    ends = np.cumsum(sizes)
    index = np.repeat(np.arange(len(sizes)), sizes)
    count, accuracy, mean = _bin_means(index, p, y, len(sizes))
    return Bins(p[ends - sizes], p[ends - 1], count, accuracy, mean)


def _class_wise(
    probabilities: ArrayLike, labels: ArrayLike, bins: int, present: ArrayLike | None, scheme: Scheme
) -> float:
    p, k = _rows(probabilities, labels)
    mask = np.ones(p.shape, dtype=bool) if present is None else np.asarray(present, dtype=bool)
    if mask.shape != p.shape:
        raise ValueError(f"`present` must have the shape of the probabilities, {p.shape}, got {mask.shape}")
    total, weight = 0.0, 0
    for c in range(p.shape[1]):
        rows = mask[:, c]
        if rows.any():
            total += rows.sum() * expected_calibration_error(p[rows, c], k[rows] == c, bins, scheme)
            weight += int(rows.sum())
    return total / weight
