"""The label-smoothed cross-entropy of a language-model head, without the N x V logits.

`linear_cross_entropy` is the function to call, `linear_cross_entropy_reference` is its definition. Nothing here needs
transformers.
"""

from calsmooth.loss.functional import linear_cross_entropy
from calsmooth.loss.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
