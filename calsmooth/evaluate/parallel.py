"""Several processes on one evaluation, as torchrun or accelerate starts them; without them, one.

They only ever exchange plain Python values, over gloo, so that it makes no difference what they compute on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from calsmooth.errors import CalsmoothError
from calsmooth.models import pick_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many there are. The first one reads and writes what all have in common."""

    rank: int = 0
    count: int = 1

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
            return pick_device(f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}")
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
        dist.broadcast_object_list(sent, src=0)
        value, code = sent[0]
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)
        return value

    def gathered(self, value: T) -> list[T]:
        """Every process's value in the first one, nothing in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=0)
        return values or []


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, joined for as long as the block lasts."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    # One may have much more to do than another: it is torchrun that ends them all when one fails.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
