"""A temperature folded into a model: what to change so that its logits are what they were, divided by T.

Where the temperature goes in, so that it reaches the logits and nothing else (tied embeddings must stay as they are):

1. the weight, and bias, of the norm whose output the head reads; where a norm multiplies by 1 + weight, as Gemma's, the
   weight becomes (1 + weight) / T - 1;
2. where that norm has no weight, the head's own, if it isn't tied to the embeddings;
3. besides, a bias of the head, and a softcap c, which the configuration holds: c tanh(z / c) / T is the same as
   (c / T) tanh((z / T) / (c / T)).

Which of these a model has is seen by running it, not read off names. Whoever folds compares the logits afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calsmooth.errors import CalsmoothError
from calsmooth.heads import Head, find_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fold:
    """New values by parameter name (of the loaded model) and by configuration key, with dots between levels."""

    tensors: Mapping[str, Callable[[Tensor], Tensor]]
    settings: Mapping[str, float]


def plan_fold(model: "PreTrainedModel", temperature: float) -> Fold:
    """What to change so that the model's logits are divided by the temperature.

    Raises:
        CalsmoothError: nothing can be changed without changing more than that; the message says why.
    """
    head = find_head(model)
    tensors: dict[str, Callable[[Tensor], Tensor]] = {}

    def divide(parameter: Tensor) -> None:
        tensors[_name_of(model, parameter)] = lambda stored: stored / temperature

    norm = _final_norm(model, head)
    if norm is not None:
        for name, parameter in norm.named_parameters(recurse=False):
            if name == "weight" and _adds_one(norm):
                tensors[_name_of(model, parameter)] = lambda stored: (1 + stored) / temperature - 1
            else:
                divide(parameter)
    elif head.module.weight is model.get_input_embeddings().weight:
        raise CalsmoothError(
            f"{type(model).__name__} has no weight on the norm before its head, and its head is tied to the "
            f"embeddings, so that no weight divides the logits and nothing else; divide them by {temperature:.4g} when "
            f"sampling instead"
        )
    else:
        divide(head.module.weight)
    if head.module.bias is not None:
        divide(head.module.bias)
    return Fold(tensors, _softcap_settings(model, head, temperature))


def _final_norm(model: "PreTrainedModel", head: Head) -> "nn.Module | None":
    """The module with a weight for each channel whose very output the head reads."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    read: list[Tensor] = []

    def note_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    width = head.module.in_features
    hooks = [
        module.register_forward_hook(note_output)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.shape == (width,)
    ]
    hooks.append(head.module.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0])))
    try:
        sample_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    same = (m for m, output in reversed(outputs) if output.shape == read[-1].shape and torch.equal(output, read[-1]))
    return next(same, None)


def _adds_one(norm: nn.Module) -> bool:
    """Whether a weight of 0 passes the input on, as where a norm multiplies by 1 + weight."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None, None]
    stored = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        bias = getattr(norm, "bias", None)
        passed = norm(x) if bias is None else norm(x) - bias
        weight.copy_(stored)
    return bool(passed.abs().max() > 0)


def _softcap_settings(model: "PreTrainedModel", head: Head, temperature: float) -> dict[str, float]:
    """The configuration's keys, with dots between levels, that hold the softcap, and their new value."""
    if head.softcap is None:
        return {}
    places = [
        place for place, value in _numbers(model.config.to_dict()) if "cap" in place and _near(value, head.softcap)
    ]
    # The attention's cap may have the same value; the one of the logits says so.
    places = [place for place in places if "logit" in place and "attn" not in place] or places
    if len(places) != 1:
        raise CalsmoothError(
            f"{type(model).__name__} caps its logits at {head.softcap:g}, and its configuration has no single "
            f"setting of that value to divide by the temperature"
        )
    return {places[0]: head.softcap / temperature}


def _numbers(config: Mapping[str, Any], above: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{above}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((above + key, float(value)))
    return found


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * abs(b)


def set_setting(config: dict[str, Any], place: str, value: float) -> None:
    """Write a value into a configuration's plain form; dots in `place` lead from level to level."""
    *above, key = place.split(".")
    for name in above:
        config = config.setdefault(name, {})
    config[key] = value


def _name_of(model: nn.Module, parameter: Tensor) -> str:
    return next(name for name, candidate in model.named_parameters() if candidate is parameter)


@torch.no_grad()
def sample_logits(model: "PreTrainedModel") -> Tensor:
    """(2, 16, V) logits, float32, of the same arbitrary tokens each time."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    tokens = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float().cpu()
