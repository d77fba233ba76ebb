"""The one sentence: right about data whose calibration is known."""

import numpy as np
import pytest

from calsmooth.plots import prepare_reliability
from calsmooth.verdict import judge


def drawn(n, seed, shift=0.0):
    """Confidences, and outcomes that are right with the confidence minus `shift`."""
    generator = np.random.default_rng(seed)
    confidence = generator.beta(3, 1.5, n)
    return confidence, (generator.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)


def test_the_interval_is_that_of_the_single_answers():
    for shift in (0.0, 0.14, -0.1):
        confidence, correct = drawn(3000, 0, shift)
        gap = confidence - correct
        reach = 1.96 * gap.std() / np.sqrt(len(gap))
        verdict = judge(prepare_reliability(confidence, correct))
        assert verdict.over_confidence == pytest.approx(gap.mean(), abs=1e-12)
        assert (verdict.low, verdict.high) == pytest.approx((gap.mean() - reach, gap.mean() + reach), abs=0.03 * reach)


def test_over_and_under_confidence_in_words():
    over = judge(prepare_reliability(*drawn(3000, 1, 0.14)))
    assert over.kind == "over"
    assert over.words().startswith("over-confident by 1")
    assert "95 % interval" in over.words()
    under = judge(prepare_reliability(*drawn(3000, 1, -0.1)))
    assert under.kind == "under"
    low, high = (float(part) for part in under.words().split("interval ")[1].split(")")[0].split(" to "))
    assert 0 < low < high
    assert under.short().endswith(")")


def test_errors_that_cancel_are_seen():
    confidence = np.repeat([0.5, 0.9], 1000)
    correct = np.concatenate([np.arange(1000) < 650, np.arange(1000) < 750]).astype(float)
    verdict = judge(prepare_reliability(confidence, correct))
    assert verdict.kind == "mixed"
    assert "not bin by bin" in verdict.words()


def test_calibrated_data_is_rarely_accused():
    kinds = [judge(prepare_reliability(*drawn(400, seed))).kind for seed in range(300)]
    # A test of 5 % and one of 1 %: at most 6 % of accusations, and 4 standard errors.
    assert kinds.count("calibrated") / 300 > 0.94 - 4 * np.sqrt(0.06 * 0.94 / 300)
    assert kinds.count("over") + kinds.count("under") < 300 * 0.05 + 4 * np.sqrt(300 * 0.05)
