"""Log-probabilities of continuations, every token run once.

The requests of a group (a subject) begin alike, with their solved examples: that prefix is run once and its keys and
values are reused. Then each request's own context is run, longest first and batched; the log-probabilities of all first
tokens are read off its last position. Only continuations of more than one token need a second step, which goes on from
their context's keys and values.

Batches are padded on the right, where causal attention never looks, and the padding is masked for what follows, so that
neither padding nor batch size changes a result beyond rounding. What can't be shared for a model (`cache_sharing`) is
run in full instead.

What a batch goes on from is read and copied for one layer at a time only (`_Behind`): memory holds each prefix once.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.batches import Batches, Size, is_out_of_memory
from calsmooth.evaluate.readout import Readout
from calsmooth.evaluate.requests import Request, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH_SHARING = 16
"""Shortest shared prefix, in tokens, that is worth a forward of its own."""


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
class _Ask:
    """The log-probability of `token` after token `position` of a row, which counts towards a choice of a request."""

    position: int
    token: int
    request: int
    choice: int


@dataclass(frozen=True)
class _Row:
    """A sequence to run and what to read off it."""

    tokens: list[int]
    asks: list[_Ask]
    parent: int = 0  # the row of the past that it goes on from


@dataclass(frozen=True)
class _Past:
    """Keys and values of B sequences. `mask` (B, S) is 0 at padding, `length` (B,) counts what isn't."""

    layers: list[tuple[Tensor, Tensor]]  # (B, heads, S, head size) each
    mask: Tensor
    length: Tensor
    padded: bool


_Found = tuple[_Ask, float]


class Scorer:
    """Scores requests with one model.

    batch_size: sequences run at once; None chooses by free memory. reuse: False runs everything in full, for
    comparison. `sharing`, `readout.fallback` and `batches.halvings` say what isn't as it usually is.
    """

    def __init__(self, model: "PreTrainedModel", *, batch_size: int | None = None, reuse: bool = True) -> None:
        self.model = model
        self.readout = Readout(model)
        self.batches = Batches(model, batch_size)
        self.cache_argument = cache_argument(model)
        self.sharing = cache_sharing(model) if reuse else Sharing(False, False, "reuse was switched off (--no-reuse)")
        self.tokens_run = 0
        """Tokens fed to the model so far, padding left out."""

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], advance: Callable[..., None] = lambda *_: None) -> list[list[float]]:
        """For each request of a group, the natural-log probability of each of its continuations.

        advance: called with the number of requests that have just been finished.

        Raises:
            CalsmoothError: one sequence alone is too much for the memory, or a probability isn't a number.
        """
        scores = [[0.0] * len(request.continuations) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: -requests[i].length())
        try:
            for found, finished in self._found(order, requests):
                for ask, logprob in found:
                    scores[ask.request][ask.choice] += logprob
                advance(finished)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest = requests[order[0]].length()
            raise CalsmoothError(
                f"not enough memory for a single sequence of {longest:,} tokens; give a smaller --max-length, --dtype "
                f"bfloat16, or another --device"
            ) from error
        return scores

    def _found(self, order: list[int], requests: Sequence[Request]) -> Iterator[tuple[list[_Found], int]]:
        """Batch by batch: log-probabilities, and how many requests have all of theirs by now."""
        prefix = shared_prefix(requests) if self.sharing.prefix and len(requests) > 1 else []
        skip = len(prefix) if len(prefix) >= WORTH_SHARING else 0
        past = self._forward([_Row(prefix, [])], None, keep=True)[1] if skip else None
        if self.sharing.contexts:
            for batch, found in self.batches.run(
                order,
                lambda i: Size(requests[i].length() - skip, skip, kept=max(map(len, requests[i].continuations)) > 1),
                lambda batch: self._score_in_two_steps(batch, requests, skip, past),
            ):
                yield found, len(batch)
            return
        rows = [row for i in order for row in _whole_rows(i, requests[i], skip)]
        rows.sort(key=lambda row: -len(row.tokens))
        waiting = Counter(ask.request for row in rows for ask in row.asks)
        for _, (found, _) in self.batches.run(
            rows, lambda row: Size(len(row.tokens), skip), lambda batch: self._forward(batch, past)
        ):
            waiting.subtract(ask.request for ask, _ in found)
            yield found, sum(waiting[i] == 0 for i in {ask.request for ask, _ in found})

    def _score_in_two_steps(
        self, batch: list[int], requests: Sequence[Request], skip: int, past: _Past | None
    ) -> list[_Found]:
        """The contexts' own tokens first, then what follows in continuations of more than one token."""
        firsts, rest = [], []
        for parent, i in enumerate(batch):
            own = requests[i].context[skip:]
            asks = []
            for k, continuation in enumerate(requests[i].continuations):
                scored = requests[i].scored(k)
                asks += [_Ask(len(own) - 1, continuation[0], i, k)] if 0 in scored else []
                if len(continuation) > 1:
                    later = [_Ask(j - 1, continuation[j], i, k) for j in scored if j > 0]
                    rest.append(_Row(continuation[:-1], later, parent))
            firsts.append(_Row(own, asks))
        found, contexts = self._forward(firsts, past, keep=bool(rest))
        if contexts is not None:
            rest.sort(key=lambda row: -len(row.tokens))
            seen = contexts.mask.shape[1]
            for _, (more, _) in self.batches.run(
                rest, lambda row: Size(len(row.tokens), seen), lambda rows: self._forward(rows, contexts)
            ):
                found += more
        return found

    def _forward(self, rows: list[_Row], past: _Past | None, keep: bool = False) -> tuple[list[_Found], _Past | None]:
        """One forward: what the rows ask for and, with `keep`, the keys and values of past and rows together."""
        device = self.model.device
        lengths = torch.tensor([len(row.tokens) for row in rows])
        width = int(lengths.max())
        tokens = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows]).to(device)
        positions = torch.arange(width)
        mask = (positions < lengths[:, None]).long().to(device)
        padded = bool((lengths < width).any())
        length, positions = lengths.to(device), positions.to(device).expand(len(rows), width)
        inputs: dict[str, Any] = {"input_ids": tokens}
        cache: DynamicCache | None = None
        if past is not None:
            parents = torch.tensor([row.parent for row in rows], device=device)
            mask = torch.cat([past.mask[parents], mask], dim=1)
            positions = positions + past.length[parents, None]
            length = length + past.length[parents]
            cache = _cache_behind(past, parents, keep)
        elif keep:
            cache = DynamicCache()
        if cache is not None and self.cache_argument is not None:
            inputs |= {self.cache_argument: cache, "use_cache": True}
        if past is not None and past.padded:
            inputs |= {"attention_mask": mask, "position_ids": positions}
        else:
            # No padding lies before anything that is asked, so that nothing needs to know of it; and masking what is a
            # sliding window behind its text would leave it nothing at all to attend to, which is NaN.
            inputs["attention_mask"] = torch.ones_like(mask)
        found = self._read(rows, inputs)
        self.tokens_run += int(lengths.sum())
        if not keep or cache is None:
            return found, None
        kept: list[Any] = cache.layers  # of keys and values, or `sharing` had not allowed it
        layers = [(layer.keys, layer.values) for layer in kept]
        return found, _Past(layers, mask, length, padded or (past is not None and past.padded))

    def _read(self, rows: list[_Row], inputs: dict[str, Any]) -> list[_Found]:
        """Run the model and read what the rows ask for."""
        asks = [(r, ask) for r, row in enumerate(rows) for ask in row.asks]
        places = {place: n for n, place in enumerate(dict.fromkeys((r, ask.position) for r, ask in asks))}
        device = inputs["input_ids"].device
        at = torch.tensor([places[r, ask.position] for r, ask in asks], dtype=torch.long, device=device)
        token = torch.tensor([ask.token for _, ask in asks], dtype=torch.long, device=device)
        wanted = torch.tensor(list(places), dtype=torch.long, device=device).view(-1, 2)
        values = self.readout.logprobs(inputs, wanted[:, 0], wanted[:, 1], at, token).double()
        if not bool(values.isfinite().all()):
            raise CalsmoothError("the model gave a probability that is not a number; try --dtype float32")
        return [(ask, value) for (_, ask), value in zip(asks, values.tolist(), strict=True)]


class _Behind(DynamicLayer):
    """One layer's keys and values that rows go on from, read and never grown: no copy of it outlives the layer."""

    def __init__(self, keys: Tensor, values: Tensor, parents: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # whose shape tells the model how much lies behind
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._behind = (keys, values, parents)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values, parents = self._behind
        return (
            torch.cat([_rows_of(keys, parents), key_states], dim=-2),
            torch.cat([_rows_of(values, parents), value_states], dim=-2),
        )


def _cache_behind(past: _Past, parents: Tensor, keep: bool) -> DynamicCache:
    """A cache that goes on from the given rows of the past, and with `keep` grows; the past itself stays as it is."""
    cache = DynamicCache()
    if not keep:
        cache.layers = [_Behind(keys, values, parents) for keys, values in past.layers]
        return cache
    for number, (keys, values) in enumerate(past.layers):
        cache.update(_rows_of(keys, parents), _rows_of(values, parents), number)
    return cache


def _rows_of(tensor: Tensor, parents: Tensor) -> Tensor:
    return tensor.expand(len(parents), -1, -1, -1) if len(tensor) == 1 else tensor[parents]


def _whole_rows(index: int, request: Request, skip: int) -> list[_Row]:
    """Context and continuation in one sequence each, or a single one where every continuation is one token."""
    own = request.context[skip:]
    last = len(own) - 1
    if all(len(c) == 1 for c in request.continuations):
        return [_Row(own, [_Ask(last, c[0], index, k) for k, c in enumerate(request.continuations)])]
    return [
        _Row(own + c[:-1], [_Ask(last + j, c[j], index, k) for j in request.scored(k)])
        for k, c in enumerate(request.continuations)
    ]
