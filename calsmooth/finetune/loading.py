"""Which micro-batches of a step are this process's, and the loader that makes them.

A step's micro-batches go round the processes: with two, the first has the 1st, 3rd, 5th ..., the second the others.
All have equally many, because each one has to join in whenever gradients are summed: where a step's last round isn't
full (at the end of an epoch), a process without one gets a blank, which has no targets and adds nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from calsmooth.data import IGNORED, Example
from calsmooth.finetune.order import EpochOrder
from calsmooth.finetune.stream import StepStream
from calsmooth.processes import Processes

T = TypeVar("T")

BLANK = Example([0], [IGNORED])
_BLANK_INDEX = -1


def own_share(micro_batches: Sequence[T], processes: Processes, blank: T) -> list[T]:
    """This process's of a step's micro-batches, as many as every other's."""
    rounds = -(-len(micro_batches) // processes.count)
    places = range(processes.rank, rounds * processes.count, processes.count)
    return [micro_batches[i] if i < len(micro_batches) else blank for i in places]


def loader(
    examples: Sequence[Example] | StepStream,
    order: EpochOrder | StepStream,
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    *,
    batch_size: int,
    micro_batch: int,
    processes: Processes,
    pin_memory: bool,
) -> DataLoader[Any]:
    """The micro-batches of this process, collated.

    batch_size: examples of a step, over all processes. micro_batch: examples at once in one process.
    """
    if isinstance(order, StepStream):
        shares: IterableDataset[list[Example]] = _StreamShares(order, batch_size, micro_batch, processes)
        return DataLoader(shares, batch_size=None, collate_fn=collate, pin_memory=pin_memory)
    assert not isinstance(examples, StepStream)
    return DataLoader(
        _WithBlank(examples),
        batch_sampler=_OrderShares(order, batch_size, micro_batch, processes),
        collate_fn=collate,
        pin_memory=pin_memory,
    )


class _OrderShares(Sampler[list[int]]):
    """Lists of indices, a micro-batch each."""

    def __init__(self, order: EpochOrder, batch_size: int, micro_batch: int, processes: Processes) -> None:
        self.order, self.batch_size, self.micro_batch, self.processes = order, batch_size, micro_batch, processes

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        at_once = self.micro_batch * self.processes.count
        return whole * (self.batch_size // at_once) + -(-rest // at_once)

    def __iter__(self) -> Iterator[list[int]]:
        for step in _steps(self.order, self.batch_size):
            yield from own_share(_cut(step, self.micro_batch), self.processes, [_BLANK_INDEX])


class _StreamShares(IterableDataset[list[Example]]):
    """Lists of examples, a micro-batch each. Every process reads the whole stream and leaves the others' parts."""

    def __init__(self, stream: StepStream, batch_size: int, micro_batch: int, processes: Processes) -> None:
        self.stream, self.batch_size, self.micro_batch, self.processes = stream, batch_size, micro_batch, processes

    def __iter__(self) -> Iterator[list[Example]]:
        for step in _steps(self.stream, self.batch_size):
            yield from own_share(_cut(step, self.micro_batch), self.processes, [BLANK])


class _WithBlank(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return BLANK if index == _BLANK_INDEX else self.examples[index]


def _steps(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while step := list(islice(iterator, size)):
        yield step


def _cut(step: list[T], size: int) -> list[list[T]]:
    return [step[i : i + size] for i in range(0, len(step), size)]
