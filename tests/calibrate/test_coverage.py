"""How often the intervals and verdicts are right, by simulation. Slow: `pytest -m slow tests/calibrate`.

`python tests/calibrate/test_coverage.py` prints the table of coverages.
"""

from functools import cache

import numpy as np
import pytest

from calsmooth.calibrate.binning import fit_isotonic
from calsmooth.calibrate.interval import temperature_interval
from calsmooth.calibrate.temperature import HIGHEST, fit_temperature
from calsmooth.calibrate.verdict import judge_temperature, paired_difference
from calsmooth.metrics import log_softmax, negative_log_likelihoods

pytestmark = pytest.mark.slow

REPETITIONS = 400
"""Which know a coverage of 95 % to within 2.2 points (two standard errors)."""


def _normal(scale, temperature):
    """Logits, and what their probabilities are in truth: those of logits / temperature."""

    def draw(generator, n):
        logits = generator.normal(size=(n, 4)) * scale
        return log_softmax(logits), log_softmax(logits / temperature)

    return draw


def _preference(generator, n):
    """No temperature is the truth: the model likes its first choice."""
    truth = log_softmax(generator.normal(size=(n, 4)) * 1.5)
    return log_softmax(2.5 * truth + 1.5 * (np.arange(4) == 0)), truth


def _mixture(generator, n):
    """No temperature is the truth: half of the questions need 1, the others 8."""
    logits = generator.normal(size=(n, 4)) * 2
    return log_softmax(logits), log_softmax(logits / np.where(generator.random((n, 1)) < 0.5, 1.0, 8.0))


def _lengths(generator, n):
    """No temperature is the truth: sums over texts of lengths that differ much, as of cloze endings."""
    truth = generator.normal(size=(n, 4))
    length = np.exp(generator.normal(size=(n, 1)) * 0.8 + 1)
    return log_softmax((truth + generator.normal(size=(n, 4)) * 1.2) * 2 * length), log_softmax(1.2 * truth)


SCENARIOS = {
    "too flat (T = 0.5)": _normal(2.0, 0.5),
    "calibrated (T = 1)": _normal(2.0, 1.0),
    "too sure (T = 2)": _normal(2.0, 2.0),
    "chance (T = infinity)": _normal(1.0, np.inf),
    "prefers a letter": _preference,
    "two sharpnesses": _mixture,
    "cloze-like": _lengths,
}
LEAST = dict.fromkeys(SCENARIOS, 0.92) | {"cloze-like": 0.88}
"""Least coverage expected of a 95 % interval. Cloze-like derivatives are so skewed that a few questions decide."""


def labelled(draw, generator, n):
    """(log-probabilities (n, 4), labels (n,) drawn from the truth)."""
    logprobs, truth = draw(generator, n)
    cumulative = np.exp(truth).cumsum(axis=1)
    return logprobs, (generator.random((n, 1)) > cumulative).sum(axis=1).clip(max=3)


@cache
def best_inverse(draw):
    """1/T that fits the population best; 0 at chance."""
    fit = fit_temperature(*labelled(draw, np.random.default_rng(99), 200_000))
    return 0.0 if fit.temperature > 50 else 1 / fit.temperature


def temperature_coverage(draw, n, repetitions=REPETITIONS, seed=0):
    generator, target = np.random.default_rng(seed), best_inverse(draw)
    held = 0
    for _ in range(repetitions):
        interval = temperature_interval(*labelled(draw, generator, n))
        held += interval.holds(np.inf if target == 0 else 1 / target)
    return held / repetitions


def bootstrap_coverage(draw, n, repetitions=100, resamples=100, seed=0):
    """Of the percentile bootstrap of T, which refits on resampled questions."""
    generator, target = np.random.default_rng(seed), best_inverse(draw)
    held = 0
    for _ in range(repetitions):
        logprobs, labels = labelled(draw, generator, n)
        draws = (generator.integers(0, n, n) for _ in range(resamples))
        inverse = [1 / fit_temperature(logprobs[i], labels[i]).temperature for i in draws]
        low, high = np.quantile(inverse, [0.025, 0.975])
        # At chance no fit reaches 0: it is held at the highest temperature.
        held += low <= max(target, 1.01 / HIGHEST) <= high
    return held / repetitions


def difference_coverage(draw, n, method="temperature", folds=1, repetitions=REPETITIONS, seed=0):
    """Of (studentised, percentile) intervals of the held-out NLL difference, given the fits of a calibration.

    folds: 1 for one fit on n questions, reported on n others; else n questions in so many folds.
    """
    generator = np.random.default_rng(seed)
    population, answers = labelled(draw, np.random.default_rng(98), 40_000)
    held = np.zeros(2)

    def fit(logprobs, labels):
        if method == "isotonic":
            return fit_isotonic(logprobs, labels).apply
        temperature = fit_temperature(logprobs, labels).temperature
        return lambda lp: log_softmax(lp, temperature)

    for _ in range(repetitions):
        logprobs, labels = labelled(draw, generator, n)
        if folds == 1:
            applied = [fit(logprobs, labels)]
            parts = [labelled(draw, generator, n)]
        else:
            fold = np.arange(n) % folds
            applied = [fit(logprobs[fold != f], labels[fold != f]) for f in range(folds)]
            parts = [(logprobs[fold == f], labels[fold == f]) for f in range(folds)]
        before = np.concatenate([negative_log_likelihoods(lp, k) for lp, k in parts])
        after = np.concatenate([negative_log_likelihoods(a(lp), k) for a, (lp, k) in zip(applied, parts, strict=True)])
        true = np.mean([np.mean(negative_log_likelihoods(a(population), answers)) for a in applied])
        true -= np.mean(negative_log_likelihoods(population, answers))
        found = paired_difference(before, after)
        means = (after - before)[generator.integers(0, n, (1000, n))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        held += (found.low <= true <= found.high, low <= true <= high)
    return tuple(held / repetitions)


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_temperatures_interval_covers(name, n):
    assert LEAST[name] <= temperature_coverage(SCENARIOS[name], n) <= 0.995


@pytest.mark.parametrize("name", ["too flat (T = 0.5)", "calibrated (T = 1)"])
def test_the_bootstrap_covers_less(name):
    assert bootstrap_coverage(SCENARIOS[name], 20) < temperature_coverage(SCENARIOS[name], 20, 100) - 0.05


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("name", ["calibrated (T = 1)", "too sure (T = 2)", "prefers a letter"])
def test_the_held_out_difference_covers(name, folds):
    studentised, percentile = difference_coverage(SCENARIOS[name], 50, folds=folds, repetitions=200)
    # Folds share their questions, of which no interval over questions knows: it covers less.
    assert studentised >= (0.9 if folds == 1 else 0.78)
    assert studentised >= percentile - 0.02


def apply_rate(draw, n, folds=1, repetitions=REPETITIONS):
    """Share of verdicts to apply the temperature: fitted on n questions and held out on n others, or n in folds."""
    generator, applied = np.random.default_rng(0), 0
    for _ in range(repetitions):
        logprobs, labels = labelled(draw, generator, n)
        fit, interval = fit_temperature(logprobs, labels), temperature_interval(logprobs, labels)
        if folds == 1:
            held_out, answers = labelled(draw, generator, n)
            temperatures = np.full((n, 1), fit.temperature)
        else:
            held_out, answers, fold = logprobs, labels, np.arange(n) % folds
            by_fold = [fit_temperature(logprobs[fold != f], labels[fold != f]).temperature for f in range(folds)]
            temperatures = np.array(by_fold)[fold][:, None]
        after = negative_log_likelihoods(log_softmax(held_out / temperatures), answers)
        nll = paired_difference(negative_log_likelihoods(held_out, answers), after)
        applied += judge_temperature(fit.temperature, interval, fit.note, n, nll, n).apply
    return applied / repetitions


@pytest.mark.parametrize("folds", [1, 5])
def test_a_calibrated_model_and_chance_are_seldom_to_be_scaled(folds):
    assert apply_rate(SCENARIOS["calibrated (T = 1)"], 100, folds) <= 0.05
    assert apply_rate(SCENARIOS["chance (T = infinity)"], 100, folds) <= 0.05


@pytest.mark.parametrize("folds", [1, 5])
def test_a_model_that_is_too_sure_is_mostly_to_be_scaled(folds):
    assert apply_rate(SCENARIOS["too sure (T = 2)"], 200, folds) >= 0.85


def _percent(*shares):
    return " / ".join(f"{100 * share:.0f}" for share in shares)


if __name__ == "__main__":
    print("Coverage of the 95 % interval of T, percent; n = 10, 20, 50, 200; the bootstrap at n = 20")
    for name, draw in SCENARIOS.items():
        ours = (temperature_coverage(draw, n) for n in (10, 20, 50, 200))
        print(f"{name:22} {_percent(*ours):20} {_percent(bootstrap_coverage(draw, 20))}", flush=True)
    print("Of the held-out NLL difference, studentised / percentile; n = 10, 20, 50, 200; then 5 folds, n = 50, 200")
    for name, draw in SCENARIOS.items():
        one_fit = [_percent(*difference_coverage(draw, n)) for n in (10, 20, 50, 200)]
        folded = [_percent(*difference_coverage(draw, n, folds=5)) for n in (50, 200)]
        print(f"{name:22} {'   '.join(one_fit)}      {'   '.join(folded)}", flush=True)
    print("Verdicts to apply the temperature, percent; n = 50, 200 fitted and as many held out; 5 folds of 50, 200")
    for name, draw in SCENARIOS.items():
        rates = [_percent(apply_rate(draw, n, folds)) for folds in (1, 5) for n in (50, 200)]
        print(f"{name:22} {'   '.join(rates)}", flush=True)
