"""Each metric beside an implementation that this project did not write.

`python tests/test_metrics_oracles.py` prints them side by side, at the paper's three numbers of questions, and what the
original MMLU script's RMS gives on perfectly calibrated data; pytest asserts the same on smaller samples.
"""

import importlib
import importlib.util
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest

from calsmooth import metrics

QUESTIONS = {"MMLU": 14_042, "HellaSwag": 10_042, "ARC-Easy": 2_376}


@dataclass(frozen=True)
class Sample:
    """Probabilities (N, K), right choices, and what `top_choice` makes of them."""

    p: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def simulate(n, k=4, seed=0, sharpen=1.0):
    """Labels drawn from the true probabilities; `sharpen` > 1 then makes the stated ones over-confident."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, k)) * 1.5
    truth = np.exp(metrics.log_softmax(logits))
    labels = (generator.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=k - 1)
    p = np.exp(metrics.log_softmax(logits * sharpen))
    return Sample(p, labels, *metrics.top_choice(p, labels))


def marginal(s, scheme, **settings):
    from calibration import lower_bound_scaling_ce, utils

    binning = {"width": utils.get_equal_prob_bins, "mass": utils.get_equal_bins, "blocks": blocks_of_100}[scheme]
    return lower_bound_scaling_ce(s.p, s.labels, debias=False, binning_scheme=binning, **settings)


def blocks_of_100(confidence, num_bins):
    """Upper edges of Hendrycks's blocks, the last of which takes the remainder, in the package's own form."""
    ordered = np.sort(confidence)
    starts = np.arange(1, num_bins) * 100
    return [*((ordered[starts - 1] + ordered[starts]) / 2), 1.0]


def netcal_ece(s):
    # With two classes netcal wants the probability of the second alone, which is another confidence.
    args = (s.p, s.labels) if s.p.shape[1] > 2 else (s.confidence, s.correct)
    return importlib.import_module("netcal.metrics").ECE(15).measure(*args)


def torchmetrics_mce(s):
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, labels = torch.tensor(s.p), torch.tensor(s.labels)
    return float(multiclass_calibration_error(p, labels, num_classes=p.shape[1], n_bins=15, norm="max"))


def sklearn(name):
    return getattr(importlib.import_module("sklearn.metrics"), name)


# (metric, ours, package, its own, how near they must be and why not nearer)
ORACLES = [
    ("ECE, equal width", lambda s: metrics.expected_calibration_error(s.confidence, s.correct), "calibration",
     lambda s: importlib.import_module("calibration").get_ece(s.p, s.labels, num_bins=15), 1e-9),
    ("ECE, equal width", lambda s: metrics.expected_calibration_error(s.confidence, s.correct), "netcal",
     netcal_ece, 1e-9),
    ("ECE, equal mass", lambda s: metrics.expected_calibration_error(s.confidence, s.correct, scheme="equal_mass"),
     "calibration", lambda s: importlib.import_module("calibration").get_ece_em(s.p, s.labels, num_bins=15), 1e-9),
    ("RMS, adaptive bins", lambda s: metrics.rms_calibration_error(s.confidence, s.correct), "calibration",
     lambda s: marginal(s, "blocks", p=2, num_bins=len(s.labels) // 100, mode="top-label"), 1e-9),
    ("SCE", lambda s: metrics.static_calibration_error(s.p, s.labels), "calibration",
     lambda s: marginal(s, "width", p=1, num_bins=15, mode="marginal"), 1e-9),
    ("ACE", lambda s: metrics.adaptive_calibration_error(s.p, s.labels), "calibration",
     lambda s: marginal(s, "mass", p=1, num_bins=15, mode="marginal"), 1e-9),
    ("Brier", lambda s: metrics.brier_score(s.p, s.labels), "sklearn",
     lambda s: sum(sklearn("brier_score_loss")(s.labels == c, s.p[:, c]) for c in range(s.p.shape[1])), 1e-9),
    ("NLL", lambda s: metrics.negative_log_likelihood(np.log(s.p), s.labels), "sklearn",
     lambda s: sklearn("log_loss")(s.labels, s.p), 1e-9),
    ("AUROC", lambda s: metrics.auroc(s.confidence, s.correct), "sklearn",
     lambda s: sklearn("roc_auc_score")(s.correct, s.confidence), 1e-9),
    ("accuracy", lambda s: metrics.accuracy(s.p, s.labels), "sklearn",
     lambda s: sklearn("accuracy_score")(s.labels, s.p.argmax(axis=1)), 1e-9),
    # torchmetrics accumulates in float32.
    ("MCE", lambda s: metrics.maximum_calibration_error(s.confidence, s.correct), "torchmetrics",
     torchmetrics_mce, 1e-6),
    # relplot knows the width to 1/1024 only and counts the ends of its mesh of about 200 points in full; that ours is
    # the fixed point of the definition is another test.
    ("smECE", lambda s: metrics.smooth_calibration_error(s.confidence, s.correct), "relplot",
     lambda s: float(importlib.import_module("relplot").smECE(s.confidence, s.correct)), 3e-3),
]  # fmt: skip

CASES = [(2000, 4, 0, 2.0), (1000, 2, 1, 0.5), (371, 5, 2, 3.0), (700, 3, 3, 1.0)]


@pytest.mark.parametrize(
    ("name", "ours", "package", "oracle", "near"), ORACLES, ids=[f"{o[0]}-{o[2]}" for o in ORACLES]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_metric_matches(case, name, ours, package, oracle, near):
    pytest.importorskip(package)
    n, k, seed, sharpen = case
    sample = simulate(n, k, seed, sharpen)
    assert ours(sample) == pytest.approx(oracle(sample), abs=near)


def test_bootstrap_interval_matches_scipy():
    stats = pytest.importorskip("scipy.stats")
    s = simulate(400, sharpen=2.0)
    ours = metrics.bootstrap_interval(metrics.expected_calibration_error, s.confidence, s.correct, resamples=1500)
    theirs = stats.bootstrap(
        (s.confidence, s.correct), metrics.expected_calibration_error, paired=True, vectorized=False, n_resamples=1500,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # Two draws of 1500: the ends are known to a few percent of the width.
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.1 * (ours[1] - ours[0]))


def fixed(n, lowest, power):
    """(confidence, correct) by a formula without a random generator, so that numbers made of them stay what they are.

    Confidences spread evenly from `lowest` to 1; an answer of confidence p is right about p^power of the time.
    """
    i = np.arange(1, n + 1)
    confidence = lowest + (1 - lowest) * (i * 0.6180339887498949 % 1)
    return confidence, (i * 0.7548776662466927 % 1 < confidence**power).astype(np.float64)


# What rmsce of calib_tools.py (github.com/hendrycks/test) gave on `fixed(n, lowest, power)`.
HENDRYCKS = [
    (2500, 0.25, 1.5, 0.08997378383375963),
    (1234, 0.25, 0.6, 0.10714301873561462),
    (950, 0.05, 1.0, 0.06656205206101816),
    (700, 0.6, 2.0, 0.25236113057787307),
    (60, 0.3, 1.0, 0.15262398372295538),
]


@pytest.mark.parametrize(("n", "lowest", "power", "expected"), HENDRYCKS)
def test_legacy_rms_is_what_the_original_script_gave(n, lowest, power, expected):
    assert metrics.rms_ce_hendrycks_test(*fixed(n, lowest, power)) == pytest.approx(expected, abs=1e-12)


def test_legacy_rms_is_what_the_original_script_gives(external_data):
    path = external_data / "hendrycks_calibration" / "calib_tools.py"
    if not path.is_file():
        pytest.skip(f"{path}: not there")
    spec = importlib.util.spec_from_file_location("calib_tools", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def check(confidence, correct):
        # As its test_calibration.py calls it: a vector of confidences, and the answers as integers.
        theirs = script.rmsce(correct.astype(int), confidence)
        assert metrics.rms_ce_hendrycks_test(confidence, correct) == pytest.approx(theirs, abs=1e-12)

    for n, lowest, power, _ in HENDRYCKS:
        check(*fixed(n, lowest, power))
    for n, k, seed, sharpen in [*CASES, (14_042, 4, 4, 0.1), (99, 4, 5, 1.0), (100, 2, 6, 1.0)]:
        s = simulate(n, k, seed, sharpen)
        check(s.confidence, s.correct)
    check(np.repeat([0.25, 0.5, 0.75, 1.0], 60), np.tile([0.0, 1.0], 120))  # ties, and the middle itself


def legacy_floor(n, seeds=20):
    """The original MMLU script's RMS of perfectly calibrated data: mean and standard deviation over the seeds."""
    values = []
    for seed in range(seeds):
        s = simulate(n, seed=seed)
        values.append(metrics.rms_ce_hendrycks_test(s.confidence, s.correct))
    return float(np.mean(values)), float(np.std(values))


def main():
    warnings.simplefilter("ignore")
    for task, n in QUESTIONS.items():
        sample = simulate(n, sharpen=2.0)
        print(f"\n{task}: {n:,} questions of 4 choices, over-confident")
        print(f"{'metric':20}{'calsmooth':>22}{'other':>22}{'difference':>12}  package")
        for name, ours, package, oracle, _ in ORACLES:
            one, other = ours(sample), oracle(sample)
            print(f"{name:20}{one:22.16f}{other:22.16f}{one - other:12.1e}  {package}")
    print("\nRMS as the original MMLU script computes it, on perfectly calibrated data (20 samples)")
    for task, n in QUESTIONS.items():
        mean, deviation = legacy_floor(n)
        s = simulate(n)
        true = metrics.rms_calibration_error(s.confidence, s.correct)
        print(f"{task:12}{n:8,}  {mean:.3f} +- {deviation:.3f}   (a true RMS over blocks of 100: {true:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
