"""Log-probabilities of continuations, every token run once.

The requests of a group (a subject) begin alike, with their solved examples: that prefix is run once and its keys and
values are reused. Then each request's own context is run, longest first and batched; the log-probabilities of all first
tokens are read off its last position. Only continuations of more than one token need a second step, which goes on from
their context's keys and values.

Batches are padded on the right, where causal attention never looks, and the padding is masked for what follows, so that
neither padding nor batch size changes a result beyond rounding. What can't be shared for a model (`cache_sharing`) is
run in full instead.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.logits import wanted_logits
from calsmooth.evaluate.requests import Request, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

T = TypeVar("T")

BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Tokens of a batch, what it attends to in the cache included, where no batch size is given."""
WORTH_SHARING = 16
"""Shortest shared prefix, in tokens, that is worth a forward of its own."""


@dataclass(frozen=True)
class Sharing:
    """What of the key/value cache a model lets us reuse.

    prefix: sequences that go on without a gap. contexts: also sequences with masked padding in between.
    """

    prefix: bool
    contexts: bool
    reason: str = ""


def cache_sharing(model: "PreTrainedModel") -> Sharing:
    """Which reuse gives the same results as running everything in full.

    With plain attention, all of it. A sliding window counts masked padding as well, so there only gap-free reuse, with
    a cache that keeps every key (the model's mask applies the window). Anything else, such as a recurrent state, none.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    accepted = inspect.signature(model.forward).parameters
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if "past_key_values" not in accepted or getattr(model, "_is_stateful", False):
        return Sharing(False, False, "it keeps a running state instead of a key/value cache")
    if kinds <= {DynamicLayer}:
        return Sharing(True, "position_ids" in accepted)
    if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not getattr(config, "attention_chunk_size", None):
        return Sharing(True, False)
    return Sharing(False, False, "its cache isn't plain keys and values in every layer")


@dataclass(frozen=True)
class _Row:
    """A sequence to run and what to read off it: (position, token, request, choice) for each log-probability."""

    tokens: list[int]
    asks: list[tuple[int, int, int, int]]
    parent: int = 0  # the row of the past that it goes on from


@dataclass(frozen=True)
class _Past:
    """Keys and values of B sequences. `mask` (B, S) is 0 at padding, `length` (B,) counts what isn't."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor
    length: torch.Tensor


class Scorer:
    """Scores requests with one model.

    batch_size: sequences run at once; None chooses by length. reuse: False runs everything in full, for comparison.
    """

    def __init__(self, model: "PreTrainedModel", *, batch_size: int | None = None, reuse: bool = True) -> None:
        self.model = model
        self.batch_size = batch_size
        self.sharing = cache_sharing(model) if reuse else Sharing(False, False, "it was switched off")
        self.tokens_run = 0
        """Tokens fed to the model so far, padding left out."""

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], advance: Callable[..., None] = lambda *_: None) -> list[list[float]]:
        """For each request of a group, the natural-log probability of each of its continuations.

        advance: called with the number of requests that have just been finished.
        """
        scores = [[0.0] * len(request.continuations) for request in requests]
        prefix = shared_prefix(requests) if self.sharing.prefix and len(requests) > 1 else []
        past = None
        if len(prefix) >= WORTH_SHARING:
            past = self._run([_Row(prefix, [])], None, scores, keep=True)
        skip = len(prefix) if past is not None else 0
        order = sorted(range(len(requests)), key=lambda i: -requests[i].length())
        if self.sharing.contexts:
            for chosen in self._batches(order, lambda i: requests[i].length()):
                self._score_in_two_steps(chosen, requests, skip, past, scores)
                advance(len(chosen))
            return scores
        rows = [row for i in order for row in _whole_rows(i, requests[i], skip)]
        rows.sort(key=lambda row: -len(row.tokens))
        for batch in self._batches(rows, lambda row: skip + len(row.tokens)):
            self._run(batch, past, scores)
            # A request is finished with its last choice.
            advance(sum(1 for row in batch if row.asks[-1][3] == len(scores[row.asks[-1][2]]) - 1))
        return scores

    def _score_in_two_steps(
        self, batch: list[int], requests: Sequence[Request], skip: int, past: _Past | None, scores: list[list[float]]
    ) -> None:
        rows = []
        for i in batch:
            own, continuations = requests[i].context[skip:], requests[i].continuations
            firsts = [(len(own) - 1, c[0], i, k) for k, c in enumerate(continuations) if 0 in requests[i].scored(k)]
            rows.append(_Row(own, firsts))
        rest = [
            _Row(c[:-1], [(j - 1, c[j], i, k) for j in requests[i].scored(k) if j > 0], parent)
            for parent, i in enumerate(batch)
            for k, c in enumerate(requests[i].continuations)
            if len(c) > 1
        ]
        past = self._run(rows, past, scores, keep=bool(rest))
        if rest:
            assert past is not None
            width = past.mask.shape[1]
            rest.sort(key=lambda row: -len(row.tokens))
            for part in self._batches(rest, lambda row: width + len(row.tokens)):
                self._run(part, past, scores)

    def _batches(self, items: Sequence[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        """Consecutive batches of items that come longest first."""
        budget = BATCH_TOKENS.get(self.model.device.type, BATCH_TOKENS["cpu"])
        start = 0
        while start < len(items):
            size = self.batch_size or max(budget // length(items[start]), 1)
            yield list(items[start : start + size])
            start += size

    def _run(self, rows: list[_Row], past: _Past | None, scores: list[list[float]], keep: bool = False) -> _Past | None:
        """One forward: adds what the rows ask for to `scores`; with `keep` returns the keys and values, extended."""
        device = self.model.device
        width = max(len(row.tokens) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            tokens[r, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[r, : len(row.tokens)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        length = mask.sum(dim=1)
        positions = torch.arange(width, device=device).expand(len(rows), width)
        cache = None
        if past is not None:
            parents = torch.tensor([row.parent for row in rows], device=device)
            cache = _cache_of(past, parents)
            mask = torch.cat([past.mask[parents], mask], dim=1)
            positions = positions + past.length[parents, None]
            length = length + past.length[parents]
        elif keep:
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache()
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self.sharing.contexts:
            inputs["position_ids"] = positions
        else:
            # Nothing goes on behind the padding, so nothing needs to know of it; and masking it would leave the padding
            # that lies a sliding window behind its text nothing at all to attend to, which is NaN.
            inputs["attention_mask"] = torch.ones_like(mask)
        self._read(rows, inputs, scores)
        self.tokens_run += sum(len(row.tokens) for row in rows)
        if not keep or cache is None:
            return None
        return _Past([(keys, values) for keys, values, *_ in cache], mask, length)

    def _read(self, rows: list[_Row], inputs: dict[str, Any], scores: list[list[float]]) -> None:
        """Run the model and add the log-probabilities that the rows ask for."""
        asks = [(r, *ask) for r, row in enumerate(rows) for ask in row.asks]
        places = list(dict.fromkeys((r, position) for r, position, *_ in asks)) or [(0, 0)]
        index = {place: n for n, place in enumerate(places)}
        at = torch.tensor([index[r, position] for r, position, *_ in asks], dtype=torch.long)
        token = torch.tensor([ask[2] for ask in asks], dtype=torch.long)
        found = torch.zeros(len(asks), dtype=torch.float64)
        device = inputs["input_ids"].device
        wanted_rows, wanted_positions = torch.tensor(places, device=device).T
        for start, logits in wanted_logits(self.model, inputs, wanted_rows, wanted_positions):
            here = ((at >= start) & (at < start + len(logits))).nonzero()[:, 0]
            local = (at[here] - start).to(device)
            value = logits[local, token[here].to(device)] - logits.logsumexp(dim=-1)[local]
            found[here] = value.cpu().double()
        if not bool(found.isfinite().all()):
            raise CalsmoothError("the model gave a probability that is not a number; try --dtype float32")
        for (_, _, _, request, choice), logprob in zip(asks, found.tolist(), strict=True):
            scores[request][choice] += logprob


def _whole_rows(index: int, request: Request, skip: int) -> list[_Row]:
    """Context and continuation in one sequence each, or a single one where every continuation is one token."""
    own = request.context[skip:]
    last = len(own) - 1
    if all(len(c) == 1 for c in request.continuations):
        return [_Row(own, [(last, c[0], index, k) for k, c in enumerate(request.continuations)])]
    return [
        _Row(own + c[:-1], [(last + j, c[j], index, k) for j in request.scored(k)])
        for k, c in enumerate(request.continuations)
    ]


def _cache_of(past: _Past, parents: torch.Tensor) -> "DynamicCache":
    """A cache that goes on from the given rows of the past; the past itself stays as it is."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(past.layers):
        if len(keys) == 1:
            cache.update(keys.expand(len(parents), -1, -1, -1), values.expand(len(parents), -1, -1, -1), number)
        else:
            cache.update(keys[parents], values[parents], number)
    return cache
