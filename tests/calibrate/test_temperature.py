"""The temperature against brute force and against an implementation that this project did not write."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.calibrate.temperature import HIGHEST, LOWEST, fit_temperature
from calsmooth.metrics import log_softmax, negative_log_likelihood


def simulate(n=400, k=4, temperature=1.7, seed=0):
    """Logits whose true probabilities are softmax(logits / temperature), and labels drawn from these."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, k)) * 2
    p = np.exp(log_softmax(logits, temperature))
    return logits, (generator.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)


def nll(logits, labels, temperature):
    return negative_log_likelihood(log_softmax(logits, temperature), labels)


@pytest.mark.parametrize("truth", [0.3, 1.0, 1.7, 25.0])
def test_the_true_temperature_is_found(truth):
    fit = fit_temperature(*simulate(20_000, temperature=truth))
    assert fit.temperature == pytest.approx(truth, rel=0.1)
    assert fit.note is None


@pytest.mark.parametrize("seed", range(4))
def test_matches_scipy(seed):
    optimize = pytest.importorskip("scipy.optimize")
    logits, labels = simulate(seed=seed, temperature=0.5 + seed)
    found = optimize.minimize_scalar(
        lambda x: nll(logits, labels, np.exp(x)), bounds=(-7, 7), method="bounded", options={"xatol": 1e-12}
    )
    fit = fit_temperature(logits, labels)
    # A minimum is known from values to half the digits only; ours comes from the derivative.
    assert fit.temperature == pytest.approx(float(np.exp(found.x)), rel=1e-6)
    assert fit.nll <= found.fun + 1e-14


def test_matches_netcal():
    scaling = pytest.importorskip("netcal.scaling")
    logits, labels = simulate(2000)
    model = scaling.TemperatureScaling()
    model.fit(np.exp(log_softmax(logits)), labels)
    # netcal calls 1/T the temperature, and stops its optimiser early.
    assert fit_temperature(logits, labels).temperature == pytest.approx(1 / float(model.temperature[0]), rel=5e-3)


@given(st.integers(0, 10**6), st.floats(0.05, 50.0), st.floats(-30, 30))
@settings(max_examples=30, deadline=None)
def test_scale_shift_and_order(seed, scale, shift):
    logits, labels = simulate(60, seed=seed)
    base = fit_temperature(logits, labels)
    if base.note is not None:
        return
    shifted = fit_temperature(scale * logits + shift, labels)
    assert shifted.temperature == pytest.approx(scale * base.temperature, rel=1e-9)
    order = np.random.default_rng(seed).permutation(60)
    assert fit_temperature(logits[order], labels[order]).temperature == pytest.approx(base.temperature, rel=1e-9)
    assert base.nll <= nll(logits, labels, base.temperature * 1.01)
    assert base.nll <= nll(logits, labels, base.temperature / 1.01)


def test_missing_choices_do_not_count():
    logits, labels = simulate(300, k=3)
    padded = np.hstack([logits, np.full((300, 1), -np.inf)])
    assert fit_temperature(padded, labels).temperature == pytest.approx(
        fit_temperature(logits, labels).temperature, rel=1e-12
    )


def test_separable_data_is_held_at_the_lower_bound():
    fit = fit_temperature(np.tile([2.0, 0.0, 1.0], (30, 1)), np.zeros(30, dtype=int))
    assert fit.temperature == LOWEST
    assert "every answer is right" in fit.note


def test_misleading_data_is_held_at_the_upper_bound():
    fit = fit_temperature(np.tile([2.0, 0.0], (30, 1)), np.ones(30, dtype=int))
    assert fit.temperature == HIGHEST
    assert "no information" in fit.note
    assert np.isfinite(fit.nll)


def test_constant_data_leaves_the_temperature_alone():
    fit = fit_temperature(np.full((30, 4), -1.3), np.arange(30) % 4)
    assert fit.temperature == 1.0
    assert fit.nll == pytest.approx(np.log(4))
    assert "no temperature matters" in fit.note


def test_extreme_logits_stay_finite():
    logits, labels = simulate(200)
    fit = fit_temperature(logits * 1e3, labels)
    assert fit.temperature == pytest.approx(1e3 * fit_temperature(logits, labels).temperature, rel=1e-9)
    assert np.isfinite(fit.nll)


def test_a_right_choice_of_probability_zero_is_refused():
    with pytest.raises(ValueError, match="no temperature can mend"):
        fit_temperature([[0.0, -np.inf], [0.0, -1.0]], [1, 0])
