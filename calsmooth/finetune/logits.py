"""What training changes about a model's logits and dropout: --logit-temperature, --logit-softcap, --dropout.

The paper's section 4 (remark 4.4): a temperature or a softcap moves how confident a head can get, and so where label
smoothing acts. A softcap goes into the configuration of the architectures that have one. A temperature is no part of a
Hugging Face model: it is trained beside the weights, and at the end folded into them (`calsmooth.folding`). That this
architecture allows it is tried out before training.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.folding import plan_fold, sample_logits

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


def check_temperature(model: "PreTrainedModel", temperature: float) -> None:
    """Can the saved model hold the temperature? Tried out on a few tokens; the model is left as it was.

    Raises:
        UsageError: it can't.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        expected = sample_logits(model) / temperature
        undo = fold_temperature(model, temperature)
        try:
            difference = float((sample_logits(model) - expected).abs().max() / expected.abs().max())
        finally:
            undo()
    except CalsmoothError as error:
        raise UsageError(f"--logit-temperature {temperature:g}: {error}") from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    # "not <=" so that NaN is refused.
    if not difference <= FOLD_TOLERANCE:
        raise UsageError(
            f"--logit-temperature {temperature:g}: {type(model).__name__} can't hold a temperature in its last norm or "
            f"its head (its logits would be off by {difference:.0e} of the largest); leave it out"
        )


@torch.no_grad()
def fold_temperature(model: "PreTrainedModel", temperature: float) -> Callable[[], None]:
    """Change the model so that its logits are what they were, divided by the temperature; returns what undoes it.

    Raises:
        CalsmoothError: nothing in it can take the temperature.
    """
    fold = plan_fold(model, temperature)
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].clone() for name in fold.tensors}
    for name, change in fold.tensors.items():
        parameters[name].copy_(change(values[name].double()))
    settings = {place: _setting(model.config, place) for place in fold.settings}
    for place, value in fold.settings.items():
        _set_setting(model.config, place, value)

    @torch.no_grad()
    def undo() -> None:
        for name, value in values.items():
            parameters[name].copy_(value)
        for place, setting in settings.items():
            _set_setting(model.config, place, setting)

    return undo


def _setting(config: Any, place: str) -> Any:
    return functools.reduce(getattr, place.split("."), config)


def _set_setting(config: Any, place: str, value: Any) -> None:
    *above, key = place.split(".")
    setattr(functools.reduce(getattr, above, config), key, value)
