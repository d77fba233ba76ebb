"""The label-smoothed cross-entropy of a language-model head, without the N x V logits.

`linear_cross_entropy` is the function to call, `linear_cross_entropy_reference` is its definition;
`token_statistics` gives each token's log-probability, confidence and entropy for calibration. Nothing here needs
transformers.
"""

from calsmooth.loss.functional import linear_cross_entropy
from calsmooth.loss.reference import linear_cross_entropy_reference
from calsmooth.loss.statistics import TokenStatistics, token_statistics

__all__ = ["TokenStatistics", "linear_cross_entropy", "linear_cross_entropy_reference", "token_statistics"]
