"""Several processes on one piece of work, as torchrun or accelerate start them; without them, one.

What they tell each other in words (plain Python values) goes over gloo, whatever they compute on, with a patience of
days: one may have much more to do than another, and it is torchrun that ends them all when one fails.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from calsmooth.environment import started_processes
from calsmooth.errors import CalsmoothError
from calsmooth.models import pick_device

T = TypeVar("T")

PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many there are. The first one reads and writes what all have in common."""

    rank: int = 0
    count: int = 1
    words: Any = None  # the gloo group

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """The device asked for; each process of a machine takes a GPU of its own where no number is given.

        Raises:
            UsageError: the device isn't there.
        """
        device = pick_device(name)
        if self.count > 1 and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches its kernels on the current one
        return device

    def by_first(self, make: Callable[[], T]) -> T:
        """`make()`, called by the first process only and given to all.

        Raises:
            CalsmoothError, UsageError: what `make` raised, in the first process; the others leave without a word.
        """
        if self.count == 1:
            return make()
        sent: list[Any] = [None]
        failure: CalsmoothError | None = None
        if self.first:
            try:
                sent = [(make(), 0)]
            except CalsmoothError as error:
                failure, sent = error, [(None, error.exit_code)]
        dist.broadcast_object_list(sent, src=0, group=self.words)
        value, code = sent[0]
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)
        return value

    def after_first(self, make: Callable[[], T]) -> T:
        """`make()` on every process, on the first one first: it fills the caches that the others then read.

        Raises:
            CalsmoothError, UsageError: what `make` raised, in the first process; the others leave without a word.
        """
        kept: list[T] = []
        self.by_first(lambda: kept.append(make()))
        return kept[0] if kept else make()

    def gathered(self, value: T) -> list[T]:
        """Every process's value in the first one, nothing in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=0, group=self.words)
        return values or []

    def shared(self, value: T) -> list[T]:
        """Every process's value, by rank, in all of them; so it also waits for the last one."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.words)
        return values

    def summed(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes, the same in all of them."""
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self.words)
        return sums.tolist()


ALONE = Processes()


_joined: Processes | None = None


@contextmanager
def joined(device_name: str | None = "cpu") -> Iterator[Processes]:
    """The processes that torchrun started, joined for as long as the outermost such block lasts.

    device_name: of the --device flag, where tensors are exchanged as well: by NCCL on GPUs.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    if started_processes() == 1:
        yield ALONE
        return
    if pick_device(device_name).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cuda:nccl,cpu:gloo")
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    _joined = Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield _joined
    finally:
        _joined = None
        dist.destroy_process_group()
