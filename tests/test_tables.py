"""What tables and sentences say of a summary."""

import numpy as np

from calsmooth import metrics
from calsmooth.tables import METRICS, ece_sentence, metric_text


def summary(sharpen):
    generator = np.random.default_rng(0)
    truth = metrics.log_softmax(generator.normal(size=(500, 4)) * 1.5)
    gold = (generator.random((500, 1)) > np.exp(truth).cumsum(axis=1)).sum(axis=1).clip(max=3)
    return metrics.summarize(truth * sharpen, gold, resamples=50)


def test_the_sentence_on_ece_has_its_numbers():
    calibrated, sure = summary(1.0), summary(3.0)
    assert ece_sentence(calibrated).startswith(f"ECE {calibrated['ece']:.3f}, corrected for sampling")
    assert "(95 % interval 0.000 to" in ece_sentence(calibrated)
    assert ece_sentence(calibrated).endswith(f"in {calibrated['ece_p_value']:.0%} of samples".replace("%", " %"))
    assert ece_sentence(sure).endswith("at least as much as here in at most 0.1 % of samples")


def test_the_interval_of_ece_stands_beside_the_value_that_it_is_about():
    found, by_key = summary(3.0), {metric.key: metric for metric in METRICS}
    low, high = found["ece_interval"]
    assert metric_text(found, by_key["ece"], interval=True) == f"{found['ece']:.3f}"
    corrected = f"{found['ece_corrected']:.3f} ({low:.3f} to {high:.3f})"
    assert metric_text(found, by_key["ece_corrected"], interval=True) == corrected
    assert metric_text({}, by_key["ece_corrected"], interval=True) == "-"
