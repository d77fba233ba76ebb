"""Whether a recalibration is worth applying: paired differences on the held-out questions, and one sentence.

A temperature is worth applying if the questions that it was fitted on tell it apart from infinity (else the
probabilities can't be told from uninformative ones) and from 1 (else there is nothing to mend), and if it lowers the
negative log-likelihood on the questions that it wasn't fitted on. Any other method is if it lowers that, and to less
than that of uniform probabilities.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calsmooth.calibrate.interval import LEVEL, TemperatureInterval, student_quantile
from calsmooth.calibrate.split import SMALLEST_PART
from calsmooth.metrics import Array, brier_scores, infer_ece_difference, negative_log_likelihoods, top_choice

RESAMPLES = 2000
BLOCK = 2_000_000
"""Values that the bootstrap draws at once."""


class Difference(NamedTuple):
    """After minus before, with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """apply: whether the recalibration is worth applying. sentence: that, and why, in words."""

    apply: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- paired differences ----------------------------------------------------------------------------------------------


def paired_difference(before: Array, after: Array, seed: int = 0, level: float = LEVEL) -> Difference:
    """Mean of after - before over questions, with its studentised bootstrap interval over questions (Efron 1979).

    before, after: (N,), one value a question, N >= 2. What both share, such as hard questions, drops out. Studentised,
    because on few questions a percentile interval of a skewed mean is too short.
    """
    change = after - before
    n = len(change)
    mean, error = float(change.mean()), float(change.std(ddof=1)) / math.sqrt(n)
    # Equal changes differ by rounding only, which has no spread worth resampling.
    if error <= 1e-12 * max(1.0, float(np.abs(change).max())):
        return Difference(mean, mean, mean)
    generator = np.random.default_rng(seed)
    studentised: list[Array] = []
    at_once = max(BLOCK // n, 1)
    for start in range(0, RESAMPLES, at_once):
        drawn = change[generator.integers(0, n, (min(at_once, RESAMPLES - start), n))]
        # A draw of one question only has no spread of its own.
        spread = np.maximum(drawn.std(axis=1, ddof=1) / math.sqrt(n), 1e-3 * error)
        studentised.append((drawn.mean(axis=1) - mean) / spread)
    lower, upper = np.quantile(np.concatenate(studentised), [(1 - level) / 2, (1 + level) / 2])
    return Difference(mean, mean - float(upper) * error, mean - float(lower) * error)


def differences(before: Array, after: Array, gold: Array, bins: int = 15, seed: int = 0) -> dict[str, Difference]:
    """After minus before of NLL, ECE and Brier score, each with its interval.

    before, after: (N, K) log-probabilities over the choices; gold: (N,) right choices. NLL and Brier score are means
    over questions. ECE isn't, and is biased; `metrics.infer_ece_difference` takes care of both, so that its value isn't
    the difference of the two ECEs of the sample.
    """
    p, q = np.exp(before), np.exp(after)
    nll = negative_log_likelihoods(before, gold), negative_log_likelihoods(after, gold)
    return {
        "nll": paired_difference(*nll, seed),
        "ece": Difference(*infer_ece_difference(top_choice(p, gold), top_choice(q, gold), bins, seed=seed)),
        "brier": paired_difference(brier_scores(p, gold), brier_scores(q, gold), seed),
    }


def difference_to_uniform(logprobs: Array, gold: Array, seed: int = 0) -> Difference:
    """Negative log-likelihood minus that of equal probabilities for the choices that each question has."""
    uniform = np.log(np.isfinite(logprobs).sum(axis=1))
    return paired_difference(uniform, negative_log_likelihoods(logprobs, gold), seed)


def tasks_made_worse(task: NDArray[np.str_], before: Array, after: Array, gold: Array) -> list[str]:
    """Tasks whose own negative log-likelihood rises, in order; `task` (N,) names each question's.

    A one-sided t-test of each task with at least 10 questions, at 2.5 % shared among all of them (Bonferroni): of many
    tasks some seem worse by chance.
    """
    change = negative_log_likelihoods(after, gold) - negative_log_likelihoods(before, gold)
    names = [name for name in dict.fromkeys(task.tolist()) if (task == name).sum() >= SMALLEST_PART]
    worse = []
    for name in names:
        own = change[task == name]
        critical = student_quantile(1 - (1 - LEVEL) / 2 / len(names), len(own) - 1)
        if own.mean() > critical * own.std(ddof=1) / math.sqrt(len(own)):
            worse.append(name)
    return worse


# --- the verdict -----------------------------------------------------------------------------------------------------


def judge_temperature(
    temperature: float, interval: TemperatureInterval, note: str | None, n_fit: int, nll: Difference, n_report: int
) -> Verdict:
    """The verdict on a temperature.

    note: why there is no best temperature, where there is none. nll: its difference on the `n_report` questions that
    were held out.
    """
    fitted_on = f"fitted on {n_fit:,} questions"
    t = f"T = {temperature_text(temperature)} ({interval_text(interval.low, interval.high)})"
    if interval.low == np.inf:
        return Verdict(
            False,
            f"Worse than chance: the choices that the model finds likelier are right less often ({fitted_on}), which "
            f"no temperature mends; don't apply it.",
        )
    if note is not None and interval.identified:
        return Verdict(False, f"Don't apply it: there is no best temperature ({fitted_on}): {note}.")
    if not interval.identified:
        return Verdict(
            False,
            f"Can't be told from chance with {n_fit:,} questions: T isn't identified "
            f"({interval_text(interval.low, interval.high)}), for the model's answers may carry no information that a "
            f"temperature could scale; don't apply it.",
        )
    if interval.holds(1.0):
        return Verdict(False, f"{t} can't be told from 1 with {n_fit:,} questions; don't apply it.")
    return _judge_difference(t, nll, n_report)


def judge_method(method: str, nll: Difference, to_uniform: Difference, n_report: int) -> Verdict:
    """The verdict on a recalibration by any other method.

    to_uniform: its negative log-likelihood minus that of uniform probabilities, on the `n_report` held-out questions.
    """
    if to_uniform.high >= 0:
        return Verdict(
            False,
            f"Can't be told from chance: after {method}, NLL on {n_report:,} held-out questions isn't clearly below "
            f"that of uniform probabilities (difference {difference_text(to_uniform)}); don't apply it.",
        )
    return _judge_difference(method, nll, n_report)


def _judge_difference(what: str, nll: Difference, n_report: int) -> Verdict:
    held_out = f"{n_report:,} held-out questions"
    if nll.high < 0:
        fall = Difference(-nll.value, -nll.high, -nll.low)
        return Verdict(True, f"Apply it: {what} lowers NLL by {difference_text(fall)} on {held_out}.")
    if nll.low > 0:
        return Verdict(False, f"Don't apply it: {what} raises NLL by {difference_text(nll)} on {held_out}.")
    return Verdict(
        False,
        f"Don't apply it: {what} changes NLL by {difference_text(nll)} on {held_out}, which can't be told from 0.",
    )


# --- words -----------------------------------------------------------------------------------------------------------


def temperature_text(temperature: float) -> str:
    """Three digits, or "infinity"."""
    if temperature == np.inf:
        return "infinity"
    return f"{temperature:,.0f}" if temperature >= 1000 else f"{temperature:.3g}"


def interval_text(low: float | None, high: float | None) -> str:
    """The two ends; None, JSON's stand-in, is infinity."""
    ends = [np.inf if end is None else end for end in (low, high)]
    return "beyond infinity" if ends[0] == np.inf else " to ".join(map(temperature_text, ends))


def difference_text(difference: Difference) -> str:
    """The difference and its interval, in as many decimals as its size asks for."""
    largest = max(map(abs, difference))
    decimals = 3 if largest >= 0.01 or largest == 0 else min(2 - math.floor(math.log10(largest)), 12)
    value, low, high = (f"{x + 0.0:.{decimals}f}" for x in difference)
    return f"{value} ({low} to {high})"
