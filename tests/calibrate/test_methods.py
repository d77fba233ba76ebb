"""Vector scaling, isotonic regression and histogram binning against implementations that this project did not write."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.calibrate.binning import TIE_BREAK, fit_histogram, fit_isotonic
from calsmooth.calibrate.temperature import fit_temperature
from calsmooth.calibrate.vector import fit_vector
from calsmooth.errors import CalsmoothError
from calsmooth.metrics import accuracy, expected_calibration_error, log_softmax, negative_log_likelihood, top_choice

FITTERS = {"vector": fit_vector, "isotonic": fit_isotonic, "histogram": fit_histogram}


def biased(n=1500, k=4, seed=0):
    """A model that is too sure and likes its first choice: (log-probabilities, labels drawn from the truth)."""
    generator = np.random.default_rng(seed)
    truth = log_softmax(generator.normal(size=(n, k)) * 1.5)
    labels = (generator.random((n, 1)) > np.exp(truth).cumsum(axis=1)).sum(axis=1).clip(max=k - 1)
    return log_softmax(2.5 * truth + 1.5 * (np.arange(k) == 0)), labels


@pytest.mark.parametrize("fitter", FITTERS.values(), ids=FITTERS)
def test_probabilities_stay_probabilities_and_get_better_on_other_questions(fitter):
    fit = fitter(*biased(seed=1))
    logprobs, labels = biased(seed=2)
    after = fit.apply(logprobs)
    assert np.exp(after).sum(axis=1) == pytest.approx(1.0, abs=1e-12)
    assert negative_log_likelihood(after, labels) < negative_log_likelihood(logprobs, labels)
    before, calibrated = (expected_calibration_error(*top_choice(np.exp(lp), labels)) for lp in (logprobs, after))
    assert calibrated < before / 2


def test_vector_matches_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    logprobs, labels = biased(k=2)
    # Of two choices only the difference counts, and that is what a logistic regression fits.
    oracle = linear_model.LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cg")
    oracle.fit(logprobs, labels)
    expected = oracle.predict_proba(logprobs)
    assert np.exp(fit_vector(logprobs, labels).apply(logprobs)) == pytest.approx(expected, abs=2e-4)


def test_vector_finds_what_made_the_bias_and_beats_any_temperature():
    logprobs, labels = biased(20_000)
    fit = fit_vector(logprobs, labels)
    assert fit.parameters["scale"] == pytest.approx([0.4] * 4, abs=0.04)
    bias = np.array(fit.parameters["bias"])
    assert bias - bias[1] == pytest.approx([-0.6, 0, 0, 0], abs=0.1)
    assert negative_log_likelihood(fit.apply(logprobs), labels) < fit_temperature(logprobs, labels).nll - 0.01
    assert accuracy(fit.apply(logprobs), labels) > accuracy(logprobs, labels)


def test_vector_stays_bounded_where_the_data_leave_it_open():
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(60, 3)))
    fit = fit_vector(logprobs, logprobs.argmax(axis=1))  # separable
    assert np.isfinite(fit.parameters["scale"]).all()
    never = np.hstack([logprobs, np.full((60, 1), -np.inf)])  # a choice that no question has
    unseen = fit_vector(never, np.arange(60) % 3)
    assert np.isfinite(unseen.parameters["bias"]).all()
    assert np.isneginf(unseen.apply(never)[:, 3]).all()


def test_isotonic_matches_scikit_learn_before_renormalising():
    isotonic = pytest.importorskip("sklearn.isotonic")
    logprobs, labels = biased()
    p, right = np.exp(logprobs), np.eye(4)[labels]
    floor = 1 / (p.size + 1)
    oracle = isotonic.IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip").fit(
        p.ravel(), right.ravel()
    )
    other = np.exp(biased(seed=5)[0])
    mapped = oracle.predict(other.ravel()).reshape(other.shape) + TIE_BREAK * other
    expected = mapped / mapped.sum(axis=1, keepdims=True)
    assert np.exp(fit_isotonic(logprobs, labels).apply(np.log(other))) == pytest.approx(expected, abs=1e-12)


def test_histogram_matches_scipy_before_renormalising():
    stats = pytest.importorskip("scipy.stats")
    logprobs, labels = biased()
    p, right = np.exp(logprobs).ravel(), np.eye(4)[labels].ravel()
    fit = fit_histogram(logprobs, labels, 10)
    oracle = stats.binned_statistic(p, right, bins=np.quantile(p, np.arange(11) / 10))
    assert fit.parameters["edges"] == pytest.approx(oracle.bin_edges[1:-1])
    assert fit.parameters["calibrated"] == pytest.approx(oracle.statistic.clip(1 / (p.size + 1)))


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_isotonic_never_changes_the_answer(seed, k):
    fit = fit_isotonic(*biased(80, k, seed))
    logprobs, _ = biased(80, k, seed + 1)
    assert np.array_equal(fit.apply(logprobs).argmax(axis=1), logprobs.argmax(axis=1))


@pytest.mark.parametrize("fitter", FITTERS.values(), ids=FITTERS)
def test_ragged_questions_and_extreme_probabilities(fitter):
    logprobs, labels = biased(200, 3)
    ragged = np.hstack([logprobs, np.full((200, 1), -np.inf)])
    ragged[::2, 3] = -800.0  # stated as good as never: the exponential is 0
    labels = np.where(np.arange(200) == 0, 3, labels)
    after = fitter(log_softmax(ragged), labels).apply(log_softmax(ragged))
    assert np.isneginf(after[1::2, 3]).all()
    assert np.isfinite(negative_log_likelihood(after, labels))
    constant = fitter(np.full((30, 2), np.log(0.5)), np.arange(30) % 2)
    assert np.exp(constant.apply(np.full((1, 2), np.log(0.5)))) == pytest.approx(0.5)


@pytest.mark.parametrize(("fitter", "package"), [(fit_vector, "scipy.optimize"), (fit_isotonic, "sklearn.isotonic")])
def test_without_its_package_a_method_says_how_to_get_it(fitter, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CalsmoothError, match=r"run pip install 'calsmooth\[calibrate\]', or use --method temperature"):
        fitter(*biased(20))
