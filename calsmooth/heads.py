"""Where a causal language model turns its hidden states into logits, whatever its architecture.

Every causal model of transformers ends in one linear head, and what it does to that head's output comes down to three
things: a factor, a softcap, and how many of the columns it keeps. The names under which configurations hold them
don't mean the same everywhere (`logits_scaling` divides in Granite, multiplies in HyperCLOVA X, and acts before the
head in MiniCPM), so they aren't read but measured: `find_head` lets the model's own forward run on a ramp in the place
of the head's output, and looks at what comes out. What lies between decoder and head (a projection, a factor) is
nobody's business either: hidden states are taken where the model hands them to its head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calsmooth.errors import CalsmoothError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments of multi-modal models: 0 is text."""

TINY, HUGE = 2.0**-20, 2.0**40
"""Ramps on which any tanh is still its slope, and already its limit. Powers of two, so that no digit is lost."""


@dataclass(frozen=True)
class Head:
    """The model's logits are softcap * tanh(scale * (hidden_states @ weight.T + bias) / softcap), (..., vocabulary).

    Without a softcap they are scale * (hidden_states @ weight.T + bias).
    """

    module: nn.Linear
    scale: float
    softcap: float | None
    vocabulary: int  # columns that the logits have; the head may have more rows, as padding
    _places: tuple[tuple[nn.Module, str], ...] = field(repr=False, compare=False)  # (parent, name) of the module

    @property
    def weight(self) -> Tensor:
        """(vocabulary, D), a view of the module's own parameter: gradients reach it, a tied one stays tied."""
        weight = self.module.weight
        return weight if len(weight) == self.vocabulary else weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """(vocabulary,), or None; added before the scale."""
        bias = self.module.bias
        return bias if bias is None or len(bias) == self.vocabulary else bias[: self.vocabulary]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary), as the model itself makes them."""
        logits = nn.functional.linear(hidden_states, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: "PreTrainedModel") -> Head:
    """The head of a loaded model, its scale and its softcap, by one forward pass over three tokens.

    The model is left as it was: no mode, gradient or random number is touched.

    Raises:
        CalsmoothError: the model has no plain linear head, makes its logits without calling it, or does something
            else to them; the message says what.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise CalsmoothError(f"{name} is an encoder-decoder; expected a decoder-only causal language model")
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        kind = "no output head" if module is None else f"a head of type {type(module).__name__}"
        raise CalsmoothError(f"{name} has {kind}; expected a plain linear language-model head")
    places = tuple((m, n) for m in model.modules() for n, child in m.named_children() if child is module)
    ramps = _ramps(len(module.weight), model.device)
    logits = _logits_from(model, module, places, ramps)
    if logits.dim() != 3 or logits.shape[:2] != ramps.shape[:2] or logits.shape[2] > ramps.shape[2]:
        raise CalsmoothError(f"{name} makes logits {tuple(logits.shape)} of its head's {tuple(ramps.shape)}")
    return _measured(name, module, places, ramps, logits.float())


def final_hidden_states(model: "PreTrainedModel", head: Head, **inputs: Any) -> Tensor:
    """(B, T, D): what the model hands to its head for these inputs (input_ids, attention_mask, ...); no logits exist.

    The head isn't called, so that its own hooks (FSDP's, DeepSpeed's) fire when it really is.
    """
    return run_without_head(model, head, **inputs)[0]


def run_without_head(model: "PreTrainedModel", head: Head, **inputs: Any) -> tuple[Tensor, Any]:
    """As `final_hidden_states`, and the model's whole output, whose logits mean nothing."""
    with _intercepted(head.module, head._places) as given:
        # Past the instance's own `forward`, in whose place someone may have put what calls this.
        outputs = type(model).forward(model, **({"use_cache": False} | _as_text(model, inputs) | inputs))
    return given.hidden_states, outputs


def _as_text(model: "PreTrainedModel", inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Some multi-modal models (Gemma 3, in older versions) want to be told in training that no token is an image's."""
    if not model.training or getattr(model.config, "vision_config", None) is None:
        return {}
    known = inspect.signature(type(model).forward).parameters
    return {name: torch.zeros_like(inputs["input_ids"]) for name in TOKEN_TYPES if name in known}


def _ramps(columns: int, device: torch.device) -> Tensor:
    """(1, 3, columns): both signs and many sizes, far below, around and far above where a softcap bites."""
    mantissa = torch.linspace(1.0, 2.0, columns, device=device)
    mantissa[1::2] *= -1
    exponents = torch.arange(columns, device=device) % 13 - 4.0  # 1/16 to 256
    return torch.stack([mantissa * TINY, mantissa * exponents.exp2(), mantissa * HUGE])[None]


def _logits_from(
    model: "PreTrainedModel", module: nn.Linear, places: tuple[tuple[nn.Module, str], ...], ramps: Tensor
) -> Tensor:
    """What the model's own forward makes of `ramps` in the place of its head's output."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    # Any token that isn't one of a modality's placeholders does.
    ids = torch.arange(ramps.shape[1], device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
            _intercepted(module, places, ramps) as given,
        ):
            outputs = type(model).forward(model, **inputs)
    finally:
        for m, mode in modes.items():
            m.training = mode
    if given.calls != 1:
        raise CalsmoothError(
            f"{type(model).__name__} calls its output head {given.calls} times in a forward pass; expected once"
        )
    return outputs.logits


def _measured(
    name: str, module: nn.Linear, places: tuple[tuple[nn.Module, str], ...], ramps: Tensor, logits: Tensor
) -> Head:
    """The scale from the slope at 0, the softcap from the limit, and whether they explain every logit."""
    vocabulary = logits.shape[2]
    small, _, large = (logits / ramps[..., :vocabulary])[0]
    scale = float(small.median())
    flat = bool((large.abs() < 1e-3 * abs(scale)).all())
    softcap = float(logits[0, 2].abs().max()) if flat else None
    head = Head(module, scale, softcap, vocabulary, places)
    expected = ramps[..., :vocabulary] * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    # "not <=" so that NaN is wrong.
    wrong = ~((logits - expected).abs() <= 1e-5 * expected.abs() + 1e-30).all(1)[0] | (scale <= 0)
    if wrong.any():
        tokens = wrong.nonzero().flatten().tolist()
        which = "all tokens" if len(tokens) == vocabulary else f"{len(tokens):,} tokens (the first is {tokens[0]})"
        raise CalsmoothError(f"{name} does to the logits of {which} what is neither a factor nor a softcap")
    return head


class _Intercept(nn.Module):
    """Stands in the head's place: takes the hidden states, gives something of a logit's shape."""

    def __init__(self, module: nn.Linear, answer: Tensor | None) -> None:
        super().__init__()
        self._answer, self._real = answer, (module,)  # in a tuple: not a child of this one
        self.calls = 0
        self._given: Tensor | None = None

    @property
    def weight(self) -> Tensor:  # whose dtype some models look at
        return self._real[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self._real[0].bias

    @property
    def hidden_states(self) -> Tensor:
        if self._given is None:
            raise CalsmoothError("the model made its logits without calling its output head")
        return self._given

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        self._given = hidden_states
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1) if self._answer is None else self._answer.clone()


@contextmanager
def _intercepted(
    module: nn.Linear, places: tuple[tuple[nn.Module, str], ...], answer: Tensor | None = None
) -> Iterator[_Intercept]:
    intercept = _Intercept(module, answer)
    for parent, name in places:
        parent._modules[name] = intercept
    try:
        yield intercept
    finally:
        for parent, name in places:
            parent._modules[name] = module
