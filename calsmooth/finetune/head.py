"""Plugs the fused loss into a Hugging Face causal language model, whatever its architecture.

The instance is patched, not the class, and before any wrapper sees it:

    model(input_ids, ..., labels=...)
      -> the model's own forward runs, up to what it hands to its head
      -> the positions that have a target are picked out
      -> the head *module* is called with them and the targets, and returns their summed loss

Because the head stays the module that it was, the hooks of FSDP and DeepSpeed fire and a tied weight stays tied; the
logits never exist. What the architecture does to its logits is measured by `calsmooth.heads`, and
`calsmooth.finetune.probe` checks on real data that nothing was missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from calsmooth.heads import Head, find_head, run_without_head
from calsmooth.loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


@contextmanager
def fused_loss(model: "PreTrainedModel", beta: float) -> Iterator[Head]:
    """Within the block, `model(..., labels=labels).loss` is the label-smoothed loss summed over the target tokens.

    labels: (B, T), -100 where nothing is to be learned; shifted here, as in every causal model of transformers.

    Raises:
        CalsmoothError: the model has no plain linear head, or does to its logits what can't be told to the loss.
    """
    head = find_head(model)

    def head_forward(self: nn.Linear, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return nn.Linear.forward(self, hidden_states)
        return linear_cross_entropy(
            hidden_states,
            head.weight,
            targets,
            bias=head.bias,
            label_smoothing=beta,
            reduction="sum",
            softcap=head.softcap,
            scale=head.scale,
        )

    def model_forward(self: "PreTrainedModel", *, labels: Tensor, **inputs: Any) -> CausalLMOutput:
        hidden_states, outputs = run_without_head(self, head, **inputs)  # (B, T, D)
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        loss = head.module(hidden_states[:, :-1][wanted], targets=targets[wanted])
        balance = balance_loss(self, outputs)
        if balance is not None:
            loss = loss + balance * wanted.sum()
        return CausalLMOutput(loss=loss)

    head.module.forward = MethodType(head_forward, head.module)  # type: ignore[method-assign]
    model.forward = MethodType(model_forward, model)
    try:
        yield head
    finally:
        del head.module.forward, model.forward


def balance_loss(model: "PreTrainedModel", outputs: Any) -> Tensor | None:
    """What a mixture of experts adds a token to its loss, where its configuration says output_router_logits."""
    balance = getattr(outputs, "aux_loss", None)
    if not isinstance(balance, Tensor):
        return None
    return balance * model.config.get_text_config(decoder=True).router_aux_loss_coef
