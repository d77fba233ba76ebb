"""What the measurement of a head says about label smoothing: can it be over-confident, is it, and how much of that.

Smoothing pulls confidence down and never up (Remark 4.3), so that of a calibration error it can address the
over-confident bins at most. Everything here is arithmetic on `Measurement`; what it takes for granted is `ASSUMPTIONS`.
"""

from dataclasses import dataclass

import numpy as np

from calsmooth.entropy_bound.frontier import smoothing_confidence, smoothing_entropy, smoothing_frontier
from calsmooth.entropy_bound.measure import Measurement
from calsmooth.metrics import ece_if_calibrated, reliability_bins

ASSUMPTIONS = (
    "Assumes that the text is like the data to come, that its next token is the right one, and that smoothing lowers "
    "confidence and does nothing else. It is about next tokens: calibration on questions is `calsmooth evaluate`'s "
    "matter, and training changes the head that was measured. One temperature may do as much (`calsmooth calibrate`)."
)


@dataclass(frozen=True)
class Calibration:
    """Of the top token on the text. over + under = ece; sampling: the ECE to expect of a calibrated model here."""

    n: int
    accuracy: float
    confidence: float
    ece: float
    over: float
    under: float
    sampling: float


@dataclass(frozen=True)
class Advice:
    """One smoothing weight held against one model.

    frontier: below it smoothing acts as none (`smoothing_frontier`); 0 where it underflows.
    excess: H* - floor in nats: over-confidence that the theorem leaves room for; negative where the floor is above H*.
    can_reach: share of the probed tokens that the head can give more than smoothing's confidence.
    above: share of the predictions on the text whose confidence is above smoothing's.
    addressable: how much of the ECE smoothing could take away at most.
    verdict: one sentence.
    """

    beta: float
    confidence: float
    entropy: float
    frontier: float
    excess: float
    can_reach: float
    above: float
    addressable: float
    verdict: str


def calibration(m: Measurement, bins: int = 15) -> Calibration:
    """Expected calibration error of the next-token predictions, split by sign."""
    confidence, correct = m.tokens.confidence, m.tokens.correct
    b = reliability_bins(confidence, correct, bins)
    signed = np.nan_to_num(b.confidence - b.accuracy) * b.weights()
    return Calibration(
        n=len(m.tokens),
        accuracy=float(correct.mean()),
        confidence=float(confidence.mean()),
        ece=float(np.abs(signed).sum()),
        over=float(signed.clip(min=0).sum()),
        under=float((-signed).clip(min=0).sum()),
        sampling=ece_if_calibrated(confidence, bins),
    )


def advise(m: Measurement, beta: float, c: Calibration) -> Advice:
    """Hold smoothing with this weight against what was measured."""
    vocab = m.reach.vocab
    largest = float(m.tokens.norm.max())
    # The tightest floor that holds for every prediction of this text, and so the least room for over-confidence.
    floor = max(float(m.reach.floor(largest)), float(m.reach.floor(largest, centred=True)))
    radius = min(float(m.reach.radius(largest)), float(m.reach.radius(largest, centred=True)))
    wanted = float(smoothing_confidence(vocab, beta))
    entropy = float(smoothing_entropy(vocab, beta))
    within_reach = floor <= entropy
    # Half of what sampling makes of a calibrated model's ECE lies on the over-confident side.
    noticeable = c.over > c.sampling
    addressable = c.over if within_reach else 0.0
    return Advice(
        beta=beta,
        confidence=wanted,
        entropy=entropy,
        frontier=float(smoothing_frontier(vocab, 1, radius)),
        excess=entropy - floor,
        can_reach=float((m.peaks.probability > wanted).mean()),
        above=float((m.tokens.confidence > wanted).mean()),
        addressable=addressable,
        verdict=_verdict(within_reach, noticeable, c, beta, float((m.peaks.probability > wanted).mean())),
    )


def _verdict(within_reach: bool, noticeable: bool, c: Calibration, beta: float, can_reach: float) -> str:
    if not within_reach:
        return (
            f"The head can't be over-confident: its floor lies above what beta = {beta:g} asks for, where smoothing "
            f"has the same optimum as none."
        )
    can = (
        "The head can be over-confident"
        if can_reach > 0
        else "The theorem doesn't keep the head from over-confidence, though no probed token got there"
    )
    if not noticeable:
        return (
            f"{can}, but isn't on this text: over-confidence makes {c.over:.3f} of its ECE, and sampling alone up to "
            f"{c.sampling:.3f}. Smoothing has nothing to take away here, and could only make it less confident."
        )
    return f"{can}, and is on this text: smoothing could take away at most {c.over:.3f} of its ECE of {c.ece:.3f}."
