"""What a reliability diagram comes to in one sentence: over-confident, under-confident, or not to be told from
calibrated. Computed from the bins alone, so that stored results can be judged, too.
"""

from dataclasses import dataclass

import numpy as np

from calsmooth.plots import Reliability

Z = 1.959963984540054
"""Of a two-sided 95 % interval of the normal distribution."""
DRAWS = 2000


@dataclass(frozen=True)
class Verdict:
    """over_confidence: mean confidence minus accuracy, with its 95 % interval (low, high).

    ece_limit: calibrated answers with these confidences stay below this ECE in 99 of 100 samples of this size: a
    second question after that of the interval, so asked more strictly, for both to accuse calibrated answers seldom.
    """

    panel: Reliability
    over_confidence: float
    low: float
    high: float
    ece_limit: float

    @property
    def kind(self) -> str:
        """`over` or `under`, where the interval leaves 0 out; `mixed`, where only the ECE is too large; `calibrated`,
        where neither speaks against calibration."""
        if self.low > 0:
            return "over"
        if self.high < 0:
            return "under"
        return "mixed" if self.panel.ece > self.ece_limit else "calibrated"

    def short(self) -> str:
        """As `words`, without levels: for several models side by side."""
        words = self.words()
        return words[: words.index(":")].replace("95 % interval ", "")

    def words(self) -> str:
        """A sentence without its subject, which is the model on a task. Points are hundredths."""
        panel = self.panel
        digits = 1 if self.high - self.low < 0.04 else 0
        points = [100 * value for value in (self.over_confidence, self.low, self.high)]
        levels = f"mean confidence {panel.mean_confidence:.{digits}%}, accuracy {panel.accuracy:.{digits}%}"
        levels = levels.replace("%", " %")
        if self.kind in ("over", "under"):
            value, low, high = points if self.kind == "over" else [-points[0], -points[2], -points[1]]
            return (
                f"{self.kind}-confident by {value:.{digits}f} points "
                f"(95 % interval {low:.{digits}f} to {high:.{digits}f}): {levels}"
            )
        value, low, high = points
        difference = f"a difference of {value:+.{digits}f} points ({low:+.{digits}f} to {high:+.{digits}f})"
        if self.kind == "mixed":
            return (
                f"calibrated on average, not bin by bin: {levels}, {difference}, but an ECE of {panel.ece:.3f}, where "
                f"calibrated answers stay below {self.ece_limit:.3f} in 99 of 100 such samples"
            )
        return (
            f"can't be told from calibrated: {levels}, {difference}; calibrated answers show an ECE of up to "
            f"{self.ece_limit:.3f} in 99 of 100 such samples, and this is {panel.ece:.3f}"
        )


def judge(panel: Reliability, seed: int = 0) -> Verdict:
    """The verdict on a panel. Within a bin confidences are taken to be equal to their mean.

    The interval of the over-confidence is normal, its variance that of confidence minus correctness; both it and the
    limit of the ECE are widened by the panel's design effect.
    """
    b = panel.bins
    filled = b.count > 0
    count, accuracy, confidence = b.count[filled], b.accuracy[filled], np.clip(b.confidence[filled], 0.0, 1.0)
    weight = count / count.sum()
    mean = float(weight @ (confidence - accuracy))
    variance = float(weight @ ((confidence - accuracy) ** 2 + accuracy * (1 - accuracy))) - mean**2
    reach = Z * float(np.sqrt(max(variance, 0.0) * panel.design_effect / panel.n))
    generator = np.random.default_rng(seed)
    seen = generator.binomial(count, confidence, size=(DRAWS, len(count))) / count
    errors = np.sqrt(panel.design_effect) * np.abs(seen - confidence) @ weight
    return Verdict(panel, mean, mean - reach, mean + reach, float(np.quantile(errors, 0.99)))
