"""The output head of a causal language model, whatever its architecture: its linear layer, and what follows it.

What an architecture does between head and softmax comes down to two numbers, a scale and a softcap, read from its
configuration. Whoever relies on that checks it against the model's own logits, on real data.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from calsmooth.errors import CalsmoothError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """What the architecture does to the head's output: softcap * tanh(scale * logits / softcap)."""

    scale: float
    softcap: float | None


def logit_transform(model: "PreTrainedModel") -> LogitTransform:
    """Scale and softcap from the model's configuration (Cohere, Granite, Falcon-H1, Gemma 2 and kin)."""
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for name, inverse in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1.0 / float(value) if inverse else float(value)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if softcap is None else float(softcap))


def linear_head(model: "PreTrainedModel") -> nn.Linear:
    """The head itself, a plain linear layer over the decoder that `model.base_model` is.

    Raises:
        CalsmoothError: the model has no separate decoder or no linear head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = "no output head" if head is None else f"a head of type {type(head).__name__}"
        raise CalsmoothError(f"{type(model).__name__} has {kind}; expected a plain linear language-model head")
    if model.base_model is model:
        raise CalsmoothError(f"{type(model).__name__} has no decoder of its own under a head; expected a causal LM")
    return head
