"""Keys and values of sequences that others go on from, and what of them a model lets us reuse.

A past holds its own tokens once and points to what lies before them: prefixes that many contexts go on from, contexts
that their continuations go on from. It is put together for the rows of a forward one layer at a time, while that layer
runs.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sharing:
    """What of the key/value cache a model lets us reuse.

    prefix: sequences that go on without a gap. contexts: also sequences with masked padding in between. reason: why
    not.
    """

    prefix: bool
    contexts: bool
    reason: str = ""


def cache_argument(model: "PreTrainedModel") -> str | None:
    """What the model's forward calls its key/value cache: `cache` since transformers 5.24, `past_key_values` before."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def cache_sharing(model: "PreTrainedModel") -> Sharing:
    """Which reuse gives the same results as running everything in full.

    With plain attention, all of it. A sliding window counts masked padding as well, so there only gap-free reuse, with
    a cache that keeps every key (the model's mask applies the window). Anything else, such as a recurrent state, none.
    """
    accepted = inspect.signature(model.forward).parameters
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if cache_argument(model) is None or getattr(model, "_is_stateful", False):
        return Sharing(False, False, "it keeps a running state instead of a key/value cache")
    if kinds <= {DynamicLayer}:
        return Sharing(True, True) if "position_ids" in accepted else Sharing(True, False, "it counts positions itself")
    if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not getattr(config, "attention_chunk_size", None):
        return Sharing(True, False, "its sliding window would count padding")
    return Sharing(False, False, "its cache isn't plain keys and values in every layer")


@dataclass(frozen=True)
class Past:
    """B sequences of S tokens in all, on the device, what says how to read them on the CPU.

    layers: keys and values of their own tokens, (B, heads, own, head size) each. mask: (B, S), 0 at padding. length:
    (B,), what isn't padding. padded: whether any is. before: what the sequences go on from, and (B,) which of its rows.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    length: Tensor
    padded: bool
    before: "tuple[Past, Tensor] | None" = None

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def cache(self, rows: Tensor, keep: bool) -> DynamicCache:
        """A cache for a forward whose sequences go on from the given rows (R,); the past stays as it is.

        keep: the new tokens' keys and values are wanted afterwards (`own_layers`).
        """
        pieces = []
        past: Past | None = self
        while past is not None:
            pieces.append((past.layers, rows))
            past, rows = (past.before[0], past.before[1][rows]) if past.before else (None, rows)
        cache = DynamicCache()
        cache.layers = [
            _Behind([(*layers[number], rows) for layers, rows in reversed(pieces)], self.width, keep)
            for number in range(len(self.layers))
        ]
        return cache


def own_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """What a forward added to its cache: one that `Past.cache` made to be kept, or one that was empty."""
    layers: list[Any] = cache.layers  # of keys and values, or `Sharing` had not allowed it
    return [layer.own() if isinstance(layer, _Behind) else (layer.keys, layer.values) for layer in layers]


class _Behind(DynamicLayer):
    """One layer's keys and values that rows go on from, read and never grown: no copy of it outlives the layer."""

    def __init__(self, pieces: list[tuple[Tensor, Tensor, Tensor]], width: int, keep: bool) -> None:
        super().__init__()
        self.keys, self.values, _ = pieces[0]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self._own: list[tuple[Tensor, Tensor]] = []
        self._pieces, self._width, self._keep = pieces, width, keep

    def own(self) -> tuple[Tensor, Tensor]:
        return self._own[0]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """How much lies behind."""
        return self._width

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._keep:  # as copies: a model may hand out views of something larger
            self._own = [(key_states.clone(), value_states.clone())]
        return (
            torch.cat([*(_rows_of(keys, rows) for keys, _, rows in self._pieces), key_states], dim=-2),
            torch.cat([*(_rows_of(values, rows) for _, values, rows in self._pieces), value_states], dim=-2),
        )


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.expand(len(rows), -1, -1, -1) if len(tensor) == 1 else tensor[rows]
