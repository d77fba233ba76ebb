"""The temperature's interval against SciPy, against brute force, and at the ends of what can be fitted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.calibrate.interval import student_quantile, temperature_interval
from calsmooth.calibrate.temperature import fit_temperature
from calsmooth.metrics import log_softmax


def simulate(n=400, k=4, temperature=1.7, seed=0):
    """Logits whose true probabilities are softmax(logits / temperature), and labels drawn from these."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, k)) * 2
    p = np.exp(log_softmax(logits, temperature))
    return logits, (generator.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)


def losses(logits, labels, inverse):
    return -log_softmax(inverse * logits)[np.arange(len(labels)), labels]


@pytest.mark.parametrize("freedom", [5, 9, 19, 99, 14_041])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975, 0.99])
def test_student_quantile_matches_scipy(freedom, probability):
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_ends_are_where_the_scaled_likelihood_ratio_reaches_the_critical_value(seed):
    logits, labels = simulate(seed=seed, temperature=0.5 + seed)
    interval = temperature_interval(logits, labels)
    best = 1 / fit_temperature(logits, labels).temperature
    assert interval.low < 1 / best < interval.high
    # The derivatives by differences, so that no formula is shared with the implementation.
    step = 1e-4
    up, here, down = (losses(logits, labels, best + d) for d in (step, 0.0, -step))
    seen, expected = ((up - down) / (2 * step)).var(ddof=1), ((up - 2 * here + down) / step**2).mean()
    scale = max(1.0, seen / expected)
    for end in (interval.low, interval.high):
        ratio = 2 * (losses(logits, labels, 1 / end).sum() - here.sum()) / scale
        assert ratio == pytest.approx(interval.critical, rel=1e-4)
    uniform = 2 * (len(labels) * np.log(4) - here.sum()) / scale
    assert interval.likelihood_ratio == pytest.approx(uniform, rel=1e-4)


@given(st.integers(0, 10**6), st.floats(0.05, 20.0), st.floats(-30, 30))
@settings(max_examples=20, deadline=None)
def test_it_scales_with_the_logits_and_not_with_shifts_or_order(seed, scale, shift):
    logits, labels = simulate(60, seed=seed)
    base = temperature_interval(logits, labels)
    order = np.random.default_rng(seed).permutation(60)
    other = temperature_interval((scale * logits + shift)[order], labels[order])
    if base.identified and base.low > 0.02 and other.low > 0.02:
        assert (other.low, other.high) == pytest.approx((scale * base.low, scale * base.high), rel=1e-5)


def test_more_questions_make_it_narrower_and_misfit_makes_it_wider():
    few, many = (temperature_interval(*simulate(n)) for n in (100, 10_000))
    assert many.high - many.low < (few.high - few.low) / 5
    logits, labels = simulate(2000)
    plain = temperature_interval(logits, labels)
    generator = np.random.default_rng(1)
    sharp = generator.random(2000) < 0.5  # half of the questions are meant eight times as sharply as the other half
    mixed = np.where(sharp[:, None], 8 * logits, logits)
    wider = temperature_interval(mixed, labels)
    assert (wider.high - wider.low) / fit_temperature(mixed, labels).temperature > (plain.high - plain.low) / 1.7


def test_missing_choices_do_not_count():
    logits, labels = simulate(300, k=3)
    padded = np.hstack([logits, np.full((300, 1), -np.inf)])
    assert temperature_interval(padded, labels) == temperature_interval(logits, labels)


def test_answers_without_information_leave_it_open_to_infinity():
    logits, _ = simulate(300)
    labels = np.random.default_rng(7).integers(0, 4, 300)
    interval = temperature_interval(logits, labels)
    assert interval.high == np.inf
    assert not interval.identified
    assert interval.likelihood_ratio < interval.critical


def test_misleading_answers_are_beyond_infinity():
    interval = temperature_interval(np.tile([2.0, 0.0], (60, 1)), np.arange(60) % 5 > 0)
    assert (interval.low, interval.high) == (np.inf, np.inf)
    assert not interval.identified


def test_right_answers_alone_leave_it_open_to_zero():
    interval = temperature_interval(np.tile([2.0, 0.0, 1.0], (30, 1)), np.zeros(30, dtype=int))
    assert interval.low == 0.0
    # Of 30 right answers in a row the likelihood at T is (1 + e^(-1/T) + e^(-2/T))^-30, and at 0 it is 1.
    ratio = 60 * np.log(1 + np.exp(-1 / interval.high) + np.exp(-2 / interval.high))
    assert ratio == pytest.approx(interval.critical)


def test_constant_answers_leave_everything_open():
    interval = temperature_interval(np.full((30, 4), -1.3), np.arange(30) % 4)
    assert (interval.low, interval.high, interval.likelihood_ratio) == (0.0, np.inf, 0.0)


def test_one_question_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        temperature_interval([[0.0, -1.0]], [0])
