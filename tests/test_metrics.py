"""Metrics against their written definitions, and properties that any of them must have.

test_metrics_oracles.py has them beside implementations that this project did not write.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth import metrics


def simulate(n: int, k: int = 4, seed: int = 0, sharpen: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels drawn from them; `sharpen` > 1 then makes the stated probabilities over-confident."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, k)) * 1.5
    truth = np.exp(metrics.log_softmax(logits))
    labels = (generator.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)
    return np.exp(metrics.log_softmax(logits * sharpen)), labels


CASES = [(2000, 4, 0, 2.0), (1000, 2, 1, 0.5), (300, 5, 2, 3.0), (700, 3, 3, 1.0)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    n, k, seed, sharpen = request.param
    probabilities, labels = simulate(n, k, seed, sharpen)
    return probabilities, labels, *metrics.top_choice(probabilities, labels)


# --- definitions, written out ----------------------------------------------------------------------------------------


def test_smooth_ece_is_the_fixed_point_of_its_definition(case):
    _, _, confidence, correct = case
    sigma = metrics.smooth_calibration_error(confidence, correct)
    t = (np.arange(2000) + 0.5) / 2000
    # The reflected Gaussian, by its mirror images.
    images = [confidence + 2 * i for i in range(-2, 3)] + [2 * i - confidence for i in range(-2, 3)]
    kernel = sum(np.exp(-0.5 * ((t[:, None] - x) / sigma) ** 2) for x in images) / (sigma * np.sqrt(2 * np.pi))
    assert np.abs(kernel @ (correct - confidence)).mean() / len(correct) == pytest.approx(sigma, abs=2e-5)


def test_rms_of_a_length_that_100_does_not_divide():
    confidence, correct = metrics.top_choice(*simulate(271))
    order = np.argsort(confidence)
    blocks = [order[:100], order[100:]]
    expected = np.sqrt(sum(len(b) / 271 * (correct[b].mean() - confidence[b].mean()) ** 2 for b in blocks))
    assert metrics.rms_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_legacy_rms_by_its_written_formula():
    confidence, correct = metrics.top_choice(*simulate(400, sharpen=2.0))
    # The more probable of "this answer is right" and "it is wrong".
    stated, happened = np.maximum(confidence, 1 - confidence), np.where(confidence > 0.5, correct, 1 - correct)
    assert (confidence <= 0.5).mean() > 0.02
    blocks = np.argsort(stated).reshape(4, 100)
    errors = [(100 / 400 * (happened[b].mean() - stated[b].mean())) ** 2 for b in blocks]
    assert metrics.rms_ce_hendrycks_test(confidence, correct) == pytest.approx(np.sqrt(np.sqrt(sum(errors))), abs=1e-12)


@pytest.mark.parametrize(("n", "floor"), [(14042, 0.063), (10042, 0.068), (2376, 0.094)])
def test_legacy_rms_of_perfectly_calibrated_data_is_far_from_zero(n, floor):
    values = [metrics.rms_ce_hendrycks_test(*metrics.top_choice(*simulate(n, seed=seed))) for seed in range(5)]
    assert np.mean(values) == pytest.approx(floor, abs=0.006)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_zero_and_one_have_a_bin():
    bins = metrics.reliability_bins([0.0, 1.0], [0, 1])
    assert len(bins.count) == 15
    assert bins.count[0] == 1
    assert bins.count[-1] == 1
    assert metrics.expected_calibration_error([0.0, 1.0], [0, 1]) == 0.0
    assert metrics.expected_calibration_error([0.0, 1.0], [1, 0]) == 1.0


def test_a_bin_edge_belongs_to_the_bin_above():
    assert metrics.reliability_bins([0.5], [1], bins=2).count.tolist() == [0, 1]
    assert metrics.reliability_bins([0.25, 0.5, 0.75], [1, 1, 1], bins=4).count.tolist() == [0, 1, 1, 1]


def test_one_question():
    result = metrics.summarize([[np.log(0.75), np.log(0.25)]], [0])
    assert result["ece"] == pytest.approx(0.25)
    assert result["rms_ce"] == pytest.approx(0.25)
    assert result["rms_ce_hendrycks_test"] == pytest.approx(0.5)  # the root is taken twice
    assert result["brier"] == pytest.approx(0.125)
    assert result["auroc"] is None


def test_summary_has_the_documented_fields():
    p, k = simulate(150)
    result = metrics.summarize(np.log(p * 0.8), k, resamples=20)
    documented = (
        "n accuracy ece rms_ce rms_ce_hendrycks_test mce sce ace brier nll mean_confidence auroc choice_mass "
        "accuracy_interval ece_interval"
    )
    assert set(documented.split()) <= set(result)
    assert result["choice_mass"] == pytest.approx(0.8)
    assert result["n"] == 150
    assert result["accuracy_interval"][0] <= result["accuracy"] <= result["accuracy_interval"][1]


def test_temperature_divides_the_renormalised_logits():
    p, k = simulate(200)
    warm = metrics.summarize(np.log(p) - 3.0, k, temperature=2.0)
    by_hand = np.sqrt(p) / np.sqrt(p).sum(axis=1, keepdims=True)
    assert warm["nll"] == pytest.approx(metrics.negative_log_likelihood(np.log(by_hand), k), abs=1e-12)
    assert warm["accuracy"] == metrics.accuracy(p, k)


def test_missing_choices_are_left_out_of_their_class():
    p, k = simulate(120, k=3)
    ragged = [list(np.log(row)) for row in p] + [[np.log(0.6), np.log(0.4)]] * 30
    gold = [*k, *[0] * 30]
    result = metrics.summarize(ragged, gold)
    padded = np.vstack([p, np.tile([0.6, 0.4, 0.0], (30, 1))])
    classes = [metrics.expected_calibration_error(padded[:, c], np.array(gold) == c) * 150 for c in range(2)] + [
        metrics.expected_calibration_error(p[:, 2], k == 2) * 120
    ]
    assert result["sce"] == pytest.approx(sum(classes) / 420, abs=1e-12)


def test_bootstrap_interval_covers_and_clusters_widen_it():
    generator = np.random.default_rng(1)
    group = np.repeat(np.arange(50), 40)
    values = generator.normal(size=50)[group] + 0.1 * generator.normal(size=2000)
    narrow = metrics.bootstrap_interval(np.mean, values, resamples=300)
    wide = metrics.bootstrap_interval(np.mean, values, resamples=300, clusters=group)
    assert narrow[0] < values.mean() < narrow[1]
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert np.array_equal(narrow, metrics.bootstrap_interval(np.mean, values, resamples=300))
    standard_error = values.std() / np.sqrt(2000)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_ece_if_calibrated_is_what_calibrated_data_shows():
    confidence, _ = metrics.top_choice(*simulate(400))
    expected = metrics.ece_if_calibrated(confidence)
    seen = [metrics.expected_calibration_error(*metrics.top_choice(*simulate(400, seed=s))) for s in range(30)]
    assert expected == pytest.approx(np.mean(seen), rel=0.15)
    over = metrics.top_choice(*simulate(400, sharpen=3.0))
    assert metrics.expected_calibration_error(*over) > 2 * metrics.ece_if_calibrated(over[0])


@pytest.mark.parametrize("wrong", [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([-0.1], [1]), ([float("nan")], [1])])
def test_wrong_input_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected|confidences"):
        metrics.expected_calibration_error(*wrong)


def test_labels_outside_the_choices_are_refused():
    with pytest.raises(ValueError, match="labels must be from 0 to 1"):
        metrics.brier_score([[0.5, 0.5]], [2])


# --- properties ------------------------------------------------------------------------------------------------------

# Few distinct values, so that ties are common, and both ends of the range.
confidences = st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 0.5, 0.50001, 0.7, 0.9, 1.0])
answers = st.lists(st.tuples(confidences, st.integers(0, 1)), min_size=1, max_size=260)
TOP_METRICS = [
    metrics.expected_calibration_error,
    lambda p, y: metrics.expected_calibration_error(p, y, scheme="equal_mass"),
    metrics.maximum_calibration_error,
    metrics.rms_calibration_error,
    metrics.rms_ce_hendrycks_test,
    metrics.smooth_calibration_error,
]


@given(answers, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_never_matters_and_values_stay_in_range(rows, random):
    shuffled = random.sample(rows, len(rows))
    for metric in TOP_METRICS:
        value = metric(*np.array(rows).T)
        assert -1e-12 <= value <= 1 + 1e-12
        assert metric(*np.array(shuffled).T) == pytest.approx(value, abs=1e-9)


@given(answers)
@settings(max_examples=60, deadline=None)
def test_known_orders_between_metrics(rows):
    p, y = np.array(rows).T
    ece = metrics.expected_calibration_error(p, y)
    assert abs(p.mean() - y.mean()) - 1e-12 <= ece <= metrics.maximum_calibration_error(p, y) + 1e-12
    bins = metrics.reliability_bins(p, y, scheme="equal_mass")
    assert bins.count.sum() == len(p)
    assert bins.count.max() - bins.count.min() <= 1


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_one_class_always_right(k, n, seed):
    p, _ = simulate(n, k, seed)
    labels = np.zeros(n, dtype=int)
    result = metrics.summarize(np.log(p), labels)
    assert all(np.isfinite(v) for v in result.values() if v is not None)
    certain = metrics.summarize(np.log(np.eye(k)[labels] * (1 - 1e-15) + 1e-300), labels)
    assert max(certain[name] for name in ("ece", "rms_ce", "mce", "sce", "ace", "brier", "nll")) < 1e-12
    assert certain["auroc"] is None


@pytest.mark.parametrize("metric", [TOP_METRICS[0], TOP_METRICS[1], TOP_METRICS[5]])
def test_calibrated_data_tends_to_zero(metric):
    small, large = (
        np.mean([metric(*metrics.top_choice(*simulate(n, seed=seed))) for seed in range(4)]) for n in (500, 50_000)
    )
    assert large < 0.04
    assert large < small / 2


def test_rms_of_calibrated_data_has_the_floor_that_its_docstring_names():
    confidence, correct = metrics.top_choice(*simulate(50_000))
    floor = np.sqrt(np.mean(confidence * (1 - confidence)) / 100)
    assert metrics.rms_calibration_error(confidence, correct) == pytest.approx(floor, rel=0.1)
