"""Plugs the fused loss into a Hugging Face causal language model, whatever its architecture.

The instance is patched, not the class, and before any wrapper sees it:

    model(input_ids, ..., labels=...)
      -> the model's own forward runs, up to what it hands to its head
      -> the positions that have a target are picked out
      -> the head *module* is called with them and the targets, and returns their summed loss

Because the head stays the module that it was, the hooks of FSDP and DeepSpeed fire and a tied weight stays tied; the
logits never exist. A head whose rows tensor parallelism has sharded keeps them so: `sharded_loss`. What the
architecture does to its logits is measured by `calsmooth.heads`, and `calsmooth.finetune.probe` checks on real data
that nothing was missed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.utils import ModelOutput

from calsmooth.errors import UsageError
from calsmooth.heads import Head, find_head, run_without_head
from calsmooth.loss import linear_cross_entropy, token_statistics
from calsmooth.loss.vocab_parallel import vocab_parallel_linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


@dataclass
class FusedOutput(ModelOutput):
    """What the model gives instead of logits."""

    loss: Tensor | None = None  # summed over the targets, over the divisor
    kept_mass: Tensor | None = None  # summed over the targets, with mode='filtered'
    statistics: Tensor | None = None  # (len(STATISTICS), targets), where they were asked for


STATISTICS = ("logprob", "confidence", "correct", "entropy", "logit_distance", "kept_mass")
"""Of a target's prediction: its log-probability, the top probability, 1 where the top token is the target, the
entropy, the mean logit distance (Definition 3.2 of the paper: the top logit minus the mean logit), and the
probability mass that the loss's gradient keeps (1 unless it is filtered)."""


@contextmanager
def fused_loss(
    model: "PreTrainedModel",
    beta: float,
    *,
    mode: str = "exact",
    temperature: float = 1.0,
    smoothing_prior: Tensor | None = None,
) -> Iterator[Head]:
    """Within the block, `model(..., labels=labels).loss` is the label-smoothed loss summed over the target tokens.

    Without labels the model does what it does outside of the block. A copy or a pickle of it made inside can't be used.
    With `measure=True` as well, the model gives `statistics` instead of a loss, with `divisor=` the loss divided by
    that, which costs less than dividing it afterwards. labels: (B, T), -100 where nothing is to be learned; shifted
    here, as in every causal model of transformers. mode: of the loss's gradients (see `linear_cross_entropy`).
    temperature: the logits, softcapped or not, are divided by it. smoothing_prior: (vocabulary,), the distribution
    that is smoothed towards; the uniform one if None.

    Raises:
        CalsmoothError: the model has no plain linear head, or does to its logits what can't be told to the loss.
    """
    head = find_head(model)
    if temperature != 1.0:
        # softcap * tanh(scale * x / softcap) / T, in the same form.
        softcap = None if head.softcap is None else head.softcap / temperature
        head = replace(head, scale=head.scale / temperature, softcap=softcap)

    def head_forward(
        self: nn.Linear,
        hidden_states: Tensor,
        targets: Tensor | None = None,
        measure: bool = False,
        divisor: float | Tensor | None = None,
    ) -> Tensor | FusedOutput:
        if targets is None:
            return nn.Linear.forward(self, hidden_states)
        if measure:
            return FusedOutput(statistics=measured(head, hidden_states, targets, mode))
        prior = None if smoothing_prior is None else smoothing_prior.to(hidden_states.device)
        if isinstance(self.weight, DTensor):
            return FusedOutput(loss=sharded_loss(head, hidden_states, targets, beta, mode, prior, divisor))
        kept = None
        if mode == "filtered":
            kept = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
        loss = linear_cross_entropy(
            hidden_states,
            head.weight,
            targets,
            bias=head.bias,
            label_smoothing=beta,
            smoothing_prior=prior,
            reduction="sum",
            divisor=divisor,
            softcap=head.softcap,
            scale=head.scale,
            mode=mode,
            kept_mass=kept,
        )
        return FusedOutput(loss=loss, kept_mass=None if kept is None else kept.sum())

    own_forward = model.forward

    def model_forward(
        self: "PreTrainedModel",
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        measure: bool = False,
        divisor: float | Tensor | None = None,
        **inputs: Any,
    ) -> FusedOutput:
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if labels is None:  # to generate, say: as if nothing were patched
            return own_forward(**inputs)
        hidden_states, outputs = run_without_head(self, head, **inputs)  # (B, T, D)
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        found = head.module(hidden_states[:, :-1][wanted], targets=targets[wanted], measure=measure, divisor=divisor)
        balance = None if measure else balance_loss(self, outputs)
        if balance is not None:
            found.loss = found.loss + balance * (wanted.sum() if divisor is None else wanted.sum() / divisor)
        return found

    with _in_place_of(head.module, head_forward), _in_place_of(model, model_forward):
        yield head


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The instance's forward is `forward`, for a while; one that tensor parallelism gave it comes back."""
    before = vars(module).get("forward")
    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def sharded_loss(
    head: Head,
    hidden_states: Tensor,
    targets: Tensor,
    beta: float,
    mode: str = "exact",
    smoothing_prior: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """The summed loss, over the divisor, where tensor parallelism has given every process some rows of the head.

    hidden_states, targets: (N, D) and (N,), the same on every process; so is the loss.

    Raises:
        UsageError: the head is sharded in another way, or not all of its rows are tokens, or the mode isn't 'exact'.
    """
    weight: Any = head.module.weight
    bias: Any = head.module.bias
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or placements != (Shard(0),) or len(weight) != head.vocabulary or mode != "exact":
        raise UsageError(
            f"a head of {len(weight)} rows, placed {placements} on {mesh}, with --loss-mode {mode}: expected rows "
            f"sharded over one dimension, {head.vocabulary} of them, and --loss-mode exact"
        )
    rows = -(-len(weight) // mesh.size())  # of each process but the last ones
    first = min(mesh.get_local_rank() * rows, len(weight))
    return vocab_parallel_linear_cross_entropy(
        hidden_states.to_local() if isinstance(hidden_states, DTensor) else hidden_states,
        weight.to_local(),
        targets,
        first=first,
        vocabulary=len(weight),
        group=mesh.get_group(),
        bias_shard=None if bias is None else bias.to_local(),
        label_smoothing=beta,
        smoothing_prior_shard=None if smoothing_prior is None else smoothing_prior[first : first + rows],
        reduction="sum",
        divisor=divisor,
        softcap=head.softcap,
        scale=head.scale,
    )


@torch.no_grad()
def measured(head: Head, hidden_states: Tensor, targets: Tensor, mode: str = "exact") -> Tensor:
    """(len(STATISTICS), N) of (N, D) hidden states and (N,) targets, in two walks over the vocabulary.

    What rounding leaves of a certain token's log-probability above 0 is 0: confidences are at most 1.
    """
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else None
    options: dict[str, Any] = {"bias": bias, "softcap": head.softcap, "scale": head.scale}
    found = token_statistics(hidden_states, weight, targets, **options)
    # With all the probability smoothed away, the loss is logsumexp - mean logit: the mean needs no walk of its own.
    kept = torch.ones(len(targets), dtype=torch.float32, device=targets.device)
    uniform = linear_cross_entropy(
        hidden_states,
        weight,
        targets,
        label_smoothing=1.0,
        reduction="none",
        mode=mode,
        kept_mass=kept,
        **options,
    )
    right, top_logprob = found.top_token == targets, found.top_logprob.clamp(max=0)
    return torch.stack(
        [
            torch.where(right, top_logprob, torch.minimum(found.target_logprob, top_logprob)),
            top_logprob.exp(),
            right.to(found.entropy.dtype),
            found.entropy,
            found.top_logprob + uniform,
            kept,
        ]
    )


def balance_loss(model: "PreTrainedModel", outputs: Any) -> Tensor | None:
    """What a mixture of experts adds a token to its loss, where its configuration says output_router_logits."""
    balance = getattr(outputs, "aux_loss", None)
    if not isinstance(balance, Tensor):
        return None
    return balance * model.config.get_text_config(decoder=True).router_aux_loss_coef
