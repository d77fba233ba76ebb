"""Log-probabilities of continuations, every token run once, in as few forwards as there is memory for.

The requests of a group (a subject) begin alike, with their solved examples. Prefixes of about the same length are run
side by side, once each, and their keys and values reused: the contexts of all these groups are run together, longest
first, each going on from its group's prefix, and the log-probabilities of all first tokens are read off its last
position. Only continuations of more than one token need a third step, which goes on from their contexts.

Batches are padded on the right, where causal attention never looks, and the padding is masked for what follows, so that
neither padding nor batch size nor company changes a result beyond rounding. What can't be shared for a model
(`cache_sharing`), or isn't worth the forwards of its own, is run in full instead.

The host works ahead of a GPU: what is found stays on the device until all requests have been run.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.batches import Batches, Size, is_out_of_memory
from calsmooth.evaluate.past import Past, Sharing, cache_argument, cache_sharing, own_layers
from calsmooth.evaluate.readout import Readout, send
from calsmooth.evaluate.requests import Request, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH_SHARING = 16
"""Shortest shared prefix, in tokens, that is worth keeping."""
ALIKE = 0.5
"""How long each prefix of a lot is at least, beside the lot's longest: the rest is padding that its contexts see."""
FORWARDS = 2
"""More of them where a lot's prefixes are shared: one for the prefixes, one for contexts that others can't join."""


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
class _Group:
    """Requests, by index, whose contexts begin with the same tokens; the prefix is empty where it isn't shared."""

    members: list[int]
    prefix: list[int]

    def saved(self) -> int:
        return (len(self.members) - 1) * len(self.prefix)


@dataclass(frozen=True)
class _Rest:
    """What is left of a request behind its group's prefix, which is row `parent` of a past."""

    index: int
    request: Request
    skip: int
    parent: int

    @property
    def own(self) -> list[int]:
        return self.request.context[self.skip :]

    def size(self, behind: int) -> Size:
        """Of its longest sequence; contexts are kept where continuations go on from them."""
        return Size(self.request.length() - self.skip, behind, kept=max(map(len, self.request.continuations)) > 1)


_Found = tuple[list[_Ask], Tensor]
"""Asks and their log-probabilities, on the device."""


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
    def score(
        self,
        requests: Sequence[Request],
        advance: Callable[..., None] = lambda *_: None,
        groups: Sequence[list[int]] | None = None,
    ) -> list[list[float]]:
        """For each request, the natural-log probability of each of its continuations.

        advance: called with the number of requests that have just been finished (on a GPU, handed over to it). groups:
        of requests, by index, whose contexts are likely to begin alike, each request in one of them; None: all are one.

        Raises:
            CalsmoothError: one sequence alone is too much for the memory, or a probability isn't a number from 0 to 1.
        """
        found: list[_Found] = []
        try:
            for lot in self._lots(requests, [list(range(len(requests)))] if groups is None else groups):
                for more, finished in self._of_lot(lot, requests):
                    found += more
                    advance(finished)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest = max(request.length() for request in requests)
            raise CalsmoothError(
                f"not enough memory for a single sequence of {longest:,} tokens; give a smaller --max-length, --dtype "
                f"bfloat16, or another --device"
            ) from error
        scores = [[0.0] * len(request.continuations) for request in requests]
        # The one place that waits for the device.
        logprobs = torch.cat([values for _, values in found]).double().cpu() if found else torch.zeros(0)
        if not bool(logprobs.isfinite().all()):
            raise CalsmoothError("the model gave a probability that is not a number from 0 to 1; try --dtype float32")
        for ask, logprob in zip((ask for asks, _ in found for ask in asks), logprobs.tolist(), strict=True):
            scores[ask.request][ask.choice] += logprob
        return scores

    def _lots(self, requests: Sequence[Request], groups: Sequence[list[int]]) -> list[list[_Group]]:
        """Groups to run together: their prefixes are about as long as each other, or they share none.

        Where padding between prefix and context would count, they are exactly as long.
        """
        sharing: list[_Group] = []
        plain: list[_Group] = []
        for members in groups:
            prefix = shared_prefix([requests[i] for i in members]) if self.sharing.prefix and len(members) > 1 else []
            (sharing if len(prefix) >= WORTH_SHARING else plain).append(_Group(list(members), prefix))
        lots: list[list[_Group]] = []
        for group in sorted(sharing, key=lambda group: -len(group.prefix)):
            shortest = len(lots[-1][0].prefix) * (ALIKE if self.sharing.contexts else 1) if lots else 0
            if lots and len(group.prefix) >= shortest:
                lots[-1].append(group)
            else:
                lots.append([group])
        worth, other = [], plain
        for lot in lots:
            if sum(group.saved() for group in lot) >= FORWARDS * self.batches.call:
                worth.append(lot)
            else:
                other += lot
        everyone = [i for group in other for i in group.members]
        return [*worth, [_Group(everyone, [])]] if everyone else worth

    def _of_lot(self, lot: list[_Group], requests: Sequence[Request]) -> Iterator[tuple[list[_Found], int]]:
        """Batch by batch: log-probabilities, and how many requests have all of theirs by now."""
        if not lot[0].prefix:
            yield from self._behind(lot, None, requests)
            return
        for groups, past in self.batches.run(
            lot,
            lambda group: Size(len(group.prefix), kept=True),
            lambda groups: self._forward([_Row(group.prefix, []) for group in groups], None, keep=True)[1],
        ):
            yield from self._behind(groups, past, requests)
            del past  # before the next prefixes are run

    def _behind(
        self, groups: list[_Group], past: Past | None, requests: Sequence[Request]
    ) -> Iterator[tuple[list[_Found], int]]:
        """What is left of the groups' requests, each behind its group's row of the past."""
        behind = 0 if past is None else past.width
        rests = [_Rest(i, requests[i], len(g.prefix), row) for row, g in enumerate(groups) for i in g.members]
        if self.sharing.contexts:
            rests.sort(key=lambda rest: -rest.size(behind).new)
            for batch, found in self.batches.run(
                rests, lambda rest: rest.size(behind), lambda batch: self._in_two_steps(batch, past)
            ):
                yield found, len(batch)
            return
        # Each choice in full: a request is finished with the last of its rows.
        rows = [row for rest in rests for row in _whole_rows(rest)]
        rows.sort(key=lambda row: -len(row.tokens))
        waiting = Counter(ask.request for row in rows for ask in row.asks)
        for _, of_rows in self.batches.run(
            rows, lambda row: Size(len(row.tokens), behind), lambda batch: self._forward(batch, past)[0]
        ):
            asked = [ask.request for ask in of_rows[0]]
            waiting.subtract(asked)
            yield [of_rows], sum(waiting[i] == 0 for i in set(asked))

    def _in_two_steps(self, batch: list[_Rest], past: Past | None) -> list[_Found]:
        """The contexts' own tokens first, then what follows in continuations of more than one token."""
        firsts, later = [], []
        for number, rest in enumerate(batch):
            own, asks = rest.own, []
            for k, continuation in enumerate(rest.request.continuations):
                scored = rest.request.scored(k)
                asks += [_Ask(len(own) - 1, continuation[0], rest.index, k)] if 0 in scored else []
                if len(continuation) > 1:
                    more = [_Ask(j - 1, continuation[j], rest.index, k) for j in scored if j > 0]
                    later.append(_Row(continuation[:-1], more, number))
            firsts.append(_Row(own, asks, rest.parent))
        first, contexts = self._forward(firsts, past, keep=bool(later))
        found = [first]
        if contexts is not None:
            later.sort(key=lambda row: -len(row.tokens))
            seen = contexts.width
            for _, of_rows in self.batches.run(
                later, lambda row: Size(len(row.tokens), seen), lambda rows: self._forward(rows, contexts)[0]
            ):
                found.append(of_rows)
        return found

    def _forward(self, rows: list[_Row], past: Past | None, keep: bool = False) -> tuple[_Found, Past | None]:
        """One forward: what the rows ask for and, with `keep`, the keys and values of their tokens behind the past."""
        device = self.model.device
        lengths = torch.tensor([len(row.tokens) for row in rows])
        width = int(lengths.max())
        tokens = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows])
        positions = torch.arange(width).expand(len(rows), width)
        mask = (positions < lengths[:, None]).long()
        padded = bool((lengths < width).any())
        cache, before = DynamicCache() if keep else None, None
        fed = int(lengths.sum())
        if past is not None:
            parents = torch.tensor([row.parent for row in rows])
            mask = torch.cat([past.mask[parents], mask], dim=1)
            positions = positions + past.length[parents, None]
            lengths = lengths + past.length[parents]
            parents = send(parents, device)
            cache, before = past.cache(parents, keep), (past, parents)
        inputs: dict[str, Any] = {"input_ids": send(tokens, device)}
        if cache is not None and self.cache_argument is not None:
            inputs |= {self.cache_argument: cache, "use_cache": True}
        if past is not None and past.padded:
            inputs |= {"attention_mask": send(mask, device), "position_ids": send(positions, device)}
        else:
            # No padding lies before anything that is asked, so that nothing needs to know of it; and masking what is a
            # sliding window behind its text would leave it nothing at all to attend to, which is NaN.
            inputs["attention_mask"] = torch.ones(mask.shape, dtype=mask.dtype, device=device)
        found = self._read(rows, inputs)
        self.tokens_run += fed
        if not keep or cache is None:
            return found, None
        return found, Past(own_layers(cache), mask, lengths, padded or (past is not None and past.padded), before)

    def _read(self, rows: list[_Row], inputs: dict[str, Any]) -> _Found:
        """Run the model and read what the rows ask for."""
        asks = [(r, ask) for r, row in enumerate(rows) for ask in row.asks]
        places = {place: n for n, place in enumerate(dict.fromkeys((r, ask.position) for r, ask in asks))}
        at = torch.tensor([places[r, ask.position] for r, ask in asks], dtype=torch.long)
        token = torch.tensor([ask.token for _, ask in asks], dtype=torch.long)
        wanted = torch.tensor(list(places), dtype=torch.long).view(-1, 2)
        values = self.readout.logprobs(inputs, wanted[:, 0], wanted[:, 1], at, token)
        return [ask for _, ask in asks], values


def _whole_rows(rest: _Rest) -> list[_Row]:
    """Context and continuation in one sequence each, or a single one where every continuation is one token."""
    own, request, index, parent = rest.own, rest.request, rest.index, rest.parent
    last = len(own) - 1
    if all(len(c) == 1 for c in request.continuations):
        return [_Row(own, [_Ask(last, c[0], index, k) for k, c in enumerate(request.continuations)], parent)]
    return [
        _Row(own + c[:-1], [_Ask(last + j, c[j], index, k) for j in request.scored(k)], parent)
        for k, c in enumerate(request.continuations)
    ]
