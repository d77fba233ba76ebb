"""Plugs the fused loss into a Hugging Face causal language model, whatever its architecture.

The instance is patched, not the class, and before any wrapper sees it:

    model(input_ids, ..., labels=...)
      -> the decoder, called through the model's own `base_model`, gives hidden states
      -> the positions that have a target are picked out
      -> the head *module* is called with them and the targets, and returns their summed loss

Because the head stays the module that it was, the hooks of FSDP and DeepSpeed fire and a tied weight stays tied; the
logits never exist. `calsmooth.heads` knows what an architecture does between head and loss;
`calsmooth.finetune.probe` checks on real data that nothing was missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from calsmooth.heads import linear_head, logit_transform
from calsmooth.loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


@contextmanager
def fused_loss(model: "PreTrainedModel", beta: float) -> Iterator[None]:
    """Within the block, `model(..., labels=labels).loss` is the label-smoothed loss summed over the target tokens.

    labels: (B, T), -100 where nothing is to be learned; shifted here, as in every causal model of transformers.

    Raises:
        CalsmoothError: the model has no separate decoder or no linear head.
    """
    head = linear_head(model)
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
