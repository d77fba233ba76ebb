"""What training changes about a model's logits and dropout: --logit-temperature, --logit-softcap, --dropout.

The paper's section 4 (remark 4.4): a temperature or a softcap moves how confident a head can get, and so where label
smoothing acts. A softcap goes into the configuration of the architectures that have one. A temperature is no part of a
Hugging Face model: it is trained beside the weights, and at the end folded into the head, or, where the head is the
embedding too, into the norm before it, of which the logits are a linear function. That this architecture allows it is
tried out before training.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calsmooth.errors import UsageError
from calsmooth.heads import final_hidden_states, find_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SOFTCAP = "final_logit_softcapping"
NOT_TRAINED = ("classifier", "summary")
"""Parts of the names of dropouts that no causal language model has in its forward pass."""

FOLD_TOLERANCE = 1e-4


def set_softcap(config: "PreTrainedConfig", softcap: float) -> None:
    """Write the softcap (0: none) into a model's configuration, before the model is made.

    Raises:
        UsageError: this architecture's configuration has no softcap.
    """
    text = config.get_text_config(decoder=True)
    if not hasattr(text, SOFTCAP):
        raise UsageError(
            f"--logit-softcap {softcap:g}: the configuration of {config.model_type} can't hold a softcap, so that the "
            "saved model would score differently elsewhere; leave it out, or take a model that can (Gemma 2, Gemma 3)"
        )
    setattr(text, SOFTCAP, softcap or None)


def set_dropout(config: "PreTrainedConfig", dropout: float) -> list[str]:
    """Write the dropout into a model's configuration, before the model is made; the names of what was set.

    Raises:
        UsageError: this architecture has none.
    """
    text = config.get_text_config(decoder=True)
    names = [
        name
        for name, value in text.to_dict().items()
        if (name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate")) and isinstance(value, int | float))
        and not isinstance(value, bool)
        and not any(part in name for part in NOT_TRAINED)
    ]
    if not names:
        raise UsageError(f"--dropout {dropout:g}: {config.model_type} has no dropout; leave it out")
    for name in names:
        setattr(text, name, dropout)
    return sorted(names)


def check_temperature(model: "PreTrainedModel", batch: dict[str, Tensor], temperature: float) -> None:
    """Can the saved model hold the temperature? Tried out on a few tokens; the model is left as it was.

    Raises:
        UsageError: it can't.
    """
    before = _logits(model, batch)
    undo = fold_temperature(model, temperature)
    try:
        after = _logits(model, batch)
    finally:
        undo()
    expected = before / temperature
    difference = float((after - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    # "not <=" so that NaN is refused.
    if not difference <= FOLD_TOLERANCE:
        raise UsageError(
            f"--logit-temperature {temperature:g}: {type(model).__name__} can't hold a temperature in its head or its "
            f"last norm (its logits would be off by {difference:.0e}); leave it out"
        )


@torch.no_grad()
def fold_temperature(model: "PreTrainedModel", temperature: float) -> Callable[[], None]:
    """Change the model so that its logits are what they were, divided by the temperature; returns what undoes it.

    Raises:
        UsageError: the head is tied to the embedding, and no norm lies before it.
    """
    head: Any = model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    softcap = getattr(text, SOFTCAP, None)
    offset = 0.0
    scaled: Any = head
    if head.weight is model.get_input_embeddings().weight:
        scaled = _last_norm(model, head.in_features, temperature)
        offset = _offset(scaled)
    parameters = [p for p in (scaled.weight, getattr(scaled, "bias", None)) if isinstance(p, Tensor)]
    values = [p.clone() for p in parameters]
    scaled.weight.copy_((scaled.weight + offset) / temperature - offset)
    for bias in parameters[1:]:
        bias.div_(temperature)
    if softcap:
        setattr(text, SOFTCAP, softcap / temperature)

    @torch.no_grad()
    def undo() -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        if softcap:
            setattr(text, SOFTCAP, softcap)

    return undo


def _last_norm(model: "PreTrainedModel", hidden: int, temperature: float) -> nn.Module:
    """The last module with nothing but a (hidden,) weight, and perhaps a bias."""
    for module in reversed(list(model.base_model.modules())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (hidden,):
            return module
    raise UsageError(
        f"--logit-temperature {temperature:g}: {type(model).__name__} ties its head to its embedding and has no norm "
        "before it that could hold a temperature; leave it out"
    )


def _offset(norm: nn.Module) -> float:
    """0 where the norm multiplies by its weight, 1 where it multiplies by 1 + weight, as Gemma's do."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    bias = getattr(norm, "bias", None)
    value = weight.clone()
    weight.zero_()
    ramp = torch.linspace(-1.0, 1.0, len(weight), device=weight.device, dtype=weight.dtype)
    silent = norm(ramp) if bias is None else norm(ramp) - bias
    weight.copy_(value)
    return 0.0 if bool((silent == 0).all()) else 1.0


@torch.no_grad()
def _logits(model: "PreTrainedModel", batch: dict[str, Tensor]) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        head = find_head(model)
        return head.logits(
            final_hidden_states(model, head, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        )
    finally:
        for module, mode in modes.items():
            module.training = mode
