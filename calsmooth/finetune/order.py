"""In which order examples are trained on: random by seed and epoch, alike lengths together.

Which examples make a step is drawn at random. Within the step they are sorted by length, so that its micro-batches
need little padding; or dealt out, for packing, so that its micro-batches have alike numbers of tokens. The step's
gradient is the same sum, made with less work.

An epoch is every example once. Of a mixture with weights it is as many examples as all the sources have together, of
which each source gives its weight's share. A source that has more goes on in the next epoch where it stopped in this
one; a source that has fewer begins again. So at any time the examples of a source have come equally often, or one
time more.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from calsmooth.data.examples import SourceCount


class EpochOrder(Sampler[int]):
    """Indices of one epoch's examples; seed and epoch alone decide the order, so that a resumed run has the same."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        *,
        sources: Sequence[SourceCount] = (),
        held_out: Sequence[int] = (),
        packed: int | None = None,
    ) -> None:
        """lengths: tokens of each example. batch_size: examples of a step, whatever the accumulation.

        sources: of a mixture, in the order in which their examples stand. held_out: indices that never come. packed:
        examples of a micro-batch, where their numbers of tokens are to be alike.
        """
        self.lengths, self.batch_size, self.seed, self.packed = lengths, batch_size, seed, packed
        weighted = [s for s in sources if s.weight is not None]
        self.pools = _pools([s.examples for s in weighted] or [len(lengths)], set(held_out))
        self.quotas = epoch_quotas([len(pool) for pool in self.pools], [s.weight or 0.0 for s in weighted])
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.quotas)

    def __iter__(self) -> Iterator[int]:
        for step in self.steps(self.epoch):
            yield from deal(step, self.lengths, self.packed) if self.packed else by_length(step, self.lengths)

    def steps(self, epoch: int) -> Iterator[list[int]]:
        """The examples of each of the epoch's steps."""
        order = self._drawn(epoch)
        random.Random(f"epoch {epoch} of seed {self.seed}").shuffle(order)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def most_tokens(self, epochs: int) -> int:
        """Tokens of the step that has the most of them, of the first so many epochs."""
        lengths = np.asarray(self.lengths)
        return max(int(lengths[step].sum()) for epoch in range(epochs) for step in self.steps(epoch))

    def _drawn(self, epoch: int) -> list[int]:
        if len(self.pools) == 1:
            return list(self.pools[0])
        return [
            i
            for number, (pool, quota) in enumerate(zip(self.pools, self.quotas, strict=True))
            for i in self._from_pool(number, pool, epoch * quota, quota)
        ]

    def _from_pool(self, number: int, pool: list[int], begin: int, count: int) -> Iterator[int]:
        """Positions begin, ..., begin + count - 1 of an endless row of passes, each in an order of its own."""
        position, end = begin, begin + count
        while position < end:
            turn, offset = divmod(position, len(pool))
            order = list(pool)
            random.Random(f"pass {turn} of source {number} of seed {self.seed}").shuffle(order)
            taken = order[offset : offset + end - position]
            yield from taken
            position += len(taken)


def _pools(sizes: Sequence[int], held_out: set[int]) -> list[list[int]]:
    """Each source's examples that are trained on."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [[i for i in indices if i not in held_out] for indices in ranges]


def epoch_quotas(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many examples of each source an epoch has; together as many as there are. Without weights: what each has.

    Shares are rounded by largest remainders. A source whose share rounds to nothing gives one example, unless it has
    none; an empty one's share goes to the others.
    """
    total = sum(sizes)
    if not weights or not total:
        return list(sizes)
    weights = [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    exact = [total * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return [max(quota, 1) if size else 0 for quota, size in zip(quotas, sizes, strict=True)]


def by_length(step: Sequence[int], lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Longest first: micro-batches hold alike lengths, and what doesn't fit into memory shows at once."""
    return sorted(step, key=lambda i: -lengths[i])


def deal(step: Sequence[int], lengths: Sequence[int] | np.ndarray, size: int) -> list[int]:
    """The step's examples so that each `size` of them, one after another, have about as many tokens as the others.

    From the longest to the shortest, each goes where there are the fewest tokens yet and room for an example. What is
    left over for a smaller micro-batch comes last.
    """
    rooms = [min(size, len(step) - start) for start in range(0, len(step), size)]
    dealt: list[list[int]] = [[] for _ in rooms]
    tokens = [0] * len(rooms)
    for i in by_length(step, lengths):
        open_ones = [k for k, room in enumerate(rooms) if len(dealt[k]) < room]
        k = min(open_ones, key=lambda k: tokens[k])
        dealt[k].append(i)
        tokens[k] += int(lengths[i])
    full = sorted((k for k in range(len(rooms)) if rooms[k] == size), key=lambda k: -tokens[k])
    rest = [k for k in range(len(rooms)) if rooms[k] != size]
    return [i for k in full + rest for i in dealt[k]]
