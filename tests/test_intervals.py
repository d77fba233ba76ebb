"""Intervals of calibration metrics: against numpy and the plain bootstrap, and whether they hold the truth.

The coverage in full (minutes): `pytest -m slow tests/test_intervals.py`.
"""

import importlib.util
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth import intervals, metrics

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "interval_coverage.py"


@pytest.fixture(scope="module")
def simulation():
    """The script that prints the tables of docs/intervals.md."""
    spec = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(n, sharpen, seed, k=4):
    """(confidence, correct): `sharpen` 1 is calibrated, above it over-confident."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, k)) * 1.5
    truth = np.exp(metrics.log_softmax(logits))
    labels = (generator.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)
    return metrics.top_choice(np.exp(metrics.log_softmax(logits * sharpen)), labels)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_mean_intervals_are_the_bootstraps_of_the_mean():
    generator = np.random.default_rng(0)
    values, clusters = generator.normal(size=(300, 2)), generator.integers(0, 40, 300)
    for groups in (None, clusters):
        ends = intervals.mean_intervals(values, clusters=groups, resamples=200)
        for column, pair in zip(values.T, ends, strict=True):
            assert pair == pytest.approx(metrics.bootstrap_interval(np.mean, column, resamples=200, clusters=groups))


def test_noise_has_the_covariance_of_the_mean():
    values = np.random.default_rng(0).normal(size=(400, 3)) @ np.array([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 2]])
    mean, noise = intervals.mean_and_noise(*intervals.cluster_sums(values), np.zeros(3), draws=20_000)
    assert mean == pytest.approx(values.mean(axis=0), abs=1e-12)
    assert np.cov(noise.T) == pytest.approx(np.cov(values.T) / 400, abs=4e-4)
    # Ten copies of every row, named as such, say no more than one; unnamed they seem to.
    copies, names = np.repeat(values, 10, axis=0), np.repeat(np.arange(400), 10)
    named, unnamed = (
        intervals.mean_and_noise(*intervals.cluster_sums(copies, groups), np.zeros(3))[1].std(axis=0)
        for groups in (names, None)
    )
    assert named == pytest.approx(noise.std(axis=0), rel=0.05)
    assert unnamed == pytest.approx(named / np.sqrt(10), rel=0.01)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.integers(0, 1)), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_the_estimate_lies_in_the_interval_whatever_the_data(rows):
    p, y = np.array(rows).T
    found = metrics.infer_ece(p, y, draws=100)
    assert found.observed == pytest.approx(metrics.expected_calibration_error(p, y), abs=1e-12)
    assert 0 <= found.low <= found.corrected <= found.high
    assert 0 < found.p_value <= 1
    summary = metrics.summarize_top(p, y, resamples=20)
    assert all(np.isfinite(value).all() for value in summary.values() if value is not None)
    assert summary["ece_corrected"] <= summary["ece_interval"][1] <= 1


def test_a_bin_whose_answers_are_all_right_is_not_known_exactly():
    found = metrics.infer_ece(np.full(20, 0.9), np.ones(20))
    assert found.low == 0
    # As far from 18 as 20 right answers are 16 and fewer.
    as_far = 0.9**20 + sum(comb(20, k) * 0.9**k * 0.1 ** (20 - k) for k in range(17))
    assert found.p_value == pytest.approx(as_far, abs=0.04)
    assert found.high > found.observed


# --- whether they hold the truth -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharpen", "truth"), [(1.0, 0.0), (1.3, 0.0647)])
def test_the_interval_holds_the_true_ece(sharpen, truth):
    """The percentile bootstrap holds it in no repetition of the first, and in 60 % of those of the second."""
    found = [metrics.infer_ece(*answers(400, sharpen, seed), draws=300) for seed in range(40)]
    assert sum(one.low <= truth <= one.high for one in found) >= 36
    assert np.mean([one.high - one.low for one in found]) < 0.12
    seen, corrected = (np.mean([getattr(one, name) for one in found]) for name in ("observed", "corrected"))
    assert abs(corrected - truth) < abs(seen - truth)


def test_calibration_is_rejected_as_often_as_the_level_says():
    samples = [answers(300, 1.0, seed) for seed in range(150)]
    p_values = np.array([metrics.against_calibrated(*sample, draws=200)["ece_p_value"] for sample in samples])
    assert 1 <= np.sum(p_values <= 0.05) <= 15
    assert p_values.mean() == pytest.approx(0.5, abs=0.08)
    assert metrics.against_calibrated(*answers(300, 2.0, 0))["ece_p_value"] < 0.01


def test_a_difference_holds_the_true_one_where_one_model_is_calibrated():
    """The percentile bootstrap holds it in 18 % of the repetitions: it takes the calibrated model's noise for error."""
    truth, held = 0.160, 0
    for seed in range(30):
        first, second = answers(400, 1.0, seed), answers(400, 2.0, seed)
        estimate, low, high = metrics.infer_ece_difference(first, second)
        assert low <= estimate <= high
        held += low <= truth <= high
    assert held >= 26


def test_a_run_does_not_differ_from_itself():
    one = answers(300, 1.5, 0)
    estimate, low, high = metrics.infer_ece_difference(one, one)
    assert estimate == 0
    assert low <= 0 <= high
    assert high - low < 0.05
    with pytest.raises(ValueError, match="the same questions"):
        metrics.infer_ece_difference(one, answers(200, 1.5, 0))
    with pytest.raises(ValueError, match="one cluster"):
        metrics.infer_ece_difference(one, one, clusters=np.zeros(300))


def test_one_cluster_tells_nothing():
    assert metrics.infer_ece([0.9, 0.8], [1, 0], clusters=[3, 3]).high == 1


@pytest.mark.slow
def test_coverage_of_every_generator(simulation):
    for name, (world, model) in simulation.GENERATORS.items():
        rows = list(simulation.one_model(world, model, 500, 200))
        found = simulation.coverage(rows, simulation.true_ece(world, model))
        assert found["calsmooth"] >= 0.90, name
        if name in ("calibrated", "slightly over-confident"):
            assert found["bootstrap"] < 0.1, name


@pytest.mark.slow
def test_coverage_of_every_pair(simulation):
    for name, (first, second) in simulation.PAIRS.items():
        truth = simulation.true_ece(simulation.World(), second) - simulation.true_ece(simulation.World(), first)
        found = simulation.coverage(list(simulation.two_models(first, second, 500, 200)), truth)
        assert found["calsmooth"] >= 0.90, name


@pytest.mark.parametrize(("n", "confidence"), [(100, 0.5), (20, 0.25)])
def test_a_sample_that_shows_no_error_at_all_has_an_interval_like_its_neighbours(n: int, confidence: float) -> None:
    """Exactly as many right as the confidence says, once to the last digit and once nearly."""
    correct = np.zeros(n)
    correct[: int(n * confidence)] = 1
    none, little = (metrics.infer_ece(np.full(n, c), correct) for c in (confidence, confidence + 1e-3))
    assert none.observed == 0
    assert none.low == none.corrected == 0
    assert none.high > none.if_zero
    assert none.high == pytest.approx(little.high, rel=0.2)


def test_nothing_is_left_of_an_error_that_half_of_all_calibrated_samples_exceed() -> None:
    right = metrics.infer_ece(np.full(10, 0.93), np.ones(10))
    assert right.p_value > 0.5
    assert right.corrected == 0


def test_the_same_answers_differ_by_exactly_0() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 0.9, 40)
    correct = (generator.random(40) < confidence).astype(float)
    assert metrics.infer_ece_difference((confidence, correct), (confidence, correct)) == (0.0, 0.0, 0.0)
