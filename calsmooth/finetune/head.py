"""Plugs the fused loss into a Hugging Face causal language model, whatever its architecture.

The instance is patched, not the class, and before any wrapper sees it:

    model(input_ids, ..., labels=...)
      -> the decoder, called through the model's own `base_model`, gives hidden states
      -> the positions that have a target are picked out
      -> the head *module* is called with them and the targets, and returns their summed loss

Because the head stays the module that it was, the hooks of FSDP and DeepSpeed fire and a tied weight stays tied; the
logits never exist. What an architecture does between head and loss comes down to two numbers, a scale and a softcap,
read from its configuration; `calsmooth.finetune.probe` checks on real data that nothing was missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from calsmooth.errors import CalsmoothError
from calsmooth.loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


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


@contextmanager
def fused_loss(model: "PreTrainedModel", beta: float) -> Iterator[None]:
    """Within the block, `model(..., labels=labels).loss` is the label-smoothed loss summed over the target tokens.

    labels: (B, T), -100 where nothing is to be learned; shifted here, as in every causal model of transformers.

    Raises:
        CalsmoothError: the model has no separate decoder or no linear head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = "no output head" if head is None else f"a head of type {type(head).__name__}"
        raise CalsmoothError(f"{type(model).__name__} has {kind}; expected a plain linear language-model head")
    if model.base_model is model:
        raise CalsmoothError(f"{type(model).__name__} has no decoder of its own under a head; expected a causal LM")
    transform = logit_transform(model)

    def head_forward(self: nn.Linear, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return nn.Linear.forward(self, hidden_states)
        return linear_cross_entropy(
            hidden_states,
            self.weight,
            targets,
            bias=self.bias,
            label_smoothing=beta,
            reduction="sum",
            softcap=transform.softcap,
            scale=transform.scale,
        )

    def model_forward(self: "PreTrainedModel", *, labels: Tensor, **inputs: Any) -> CausalLMOutput:
        hidden_states = self.base_model(**inputs, use_cache=False)[0]  # (B, T, D)
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        loss = self.get_output_embeddings()(hidden_states[:, :-1][wanted], targets=targets[wanted])
        return CausalLMOutput(loss=loss)

    head.forward = MethodType(head_forward, head)  # type: ignore[method-assign]
    model.forward = MethodType(model_forward, model)
    try:
        yield
    finally:
        del head.forward, model.forward
