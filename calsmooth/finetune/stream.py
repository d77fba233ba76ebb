"""A stream of examples as the Trainer takes it: step after step, resumed at the very row of a checkpoint."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from calsmooth.data import IGNORED, Example
from calsmooth.data.stream import ExampleStream, Position
from calsmooth.files import read_json, write_json
from calsmooth.finetune.order import by_length, deal

STATE = "stream.json"

STEPS_REMEMBERED = 64
"""The Trainer asks for a batch or two before it has done the step before them; more than that is never needed."""

SKIPPED = Example([0], [IGNORED])
"""Stands for an example that a resumed run has had already: the Trainer asks for it and throws it away."""


class StepStream(IterableDataset[Example]):
    """The examples of one step after another, in the order that `EpochOrder` gives them within a step."""

    def __init__(self, stream: ExampleStream, batch_size: int, packed: int | None = None) -> None:
        """batch_size: examples of a step. packed: see `EpochOrder`."""
        self.stream, self.batch_size, self.packed = stream, batch_size, packed
        self.resumed_step, self.start = 0, Position()
        self.positions: OrderedDict[int, Position] = OrderedDict({0: self.start})  # after each of the last steps

    def set_epoch(self, epoch: int) -> None:
        """A stream has no epochs; the Trainer sees one that never ends."""

    def position(self, step: int) -> Position:
        """After that step, which must be the current one."""
        return self.positions[step]

    def save(self, checkpoint: Path, step: int) -> None:
        write_json(checkpoint / STATE, {"step": step, **asdict(self.position(step))})

    def load(self, checkpoint: Path) -> None:
        """Go on behind the checkpoint's step: until there the stream gives as many placeholders.

        Raises:
            CalsmoothError: the checkpoint's state can't be read.
        """
        state: dict[str, Any] = read_json(checkpoint / STATE)
        self.resumed_step = state.pop("step")
        self.start = Position(**state)
        self.positions = OrderedDict({self.resumed_step: self.start})

    def __iter__(self) -> Iterator[Example]:
        yield from itertools.repeat(SKIPPED, self.resumed_step * self.batch_size)
        examples = self.stream.examples(self.start)
        for step in itertools.count(self.resumed_step + 1):
            found = list(itertools.islice(examples, self.batch_size))
            self.positions[step] = found[-1][1]
            if len(self.positions) > STEPS_REMEMBERED:
                self.positions.popitem(last=False)
            lengths = [len(example.input_ids) for example, _ in found]
            indices = range(len(found))
            for i in deal(indices, lengths, self.packed) if self.packed else by_length(indices, lengths):
                yield found[i][0]
