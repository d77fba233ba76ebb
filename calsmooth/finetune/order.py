"""In which order examples are trained on: random by seed and epoch, alike lengths together.

Which examples make a step is drawn at random. Within the step they are sorted by length, so that its micro-batches
need little padding: the step's gradient is the same sum, made with less work.
"""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Indices of one epoch's examples; seed and epoch alone decide the order, so that a resumed run has the same."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """lengths: tokens of each example. batch_size: examples of a step, whatever the accumulation."""
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)))
        random.Random(f"epoch {self.epoch} of seed {self.seed}").shuffle(order)
        for start in range(0, len(order), self.batch_size):
            # Longest first: what doesn't fit into memory shows at once.
            yield from sorted(order[start : start + self.batch_size], key=lambda i: -self.lengths[i])
