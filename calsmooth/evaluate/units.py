"""An evaluation as units of work, which are cut the same way whoever does them and whatever was done before.

So any number of processes and any number of interruptions give the same scores: a unit is scored as a whole, by one
process, and what it gives is a plain value that can be written down (`calsmooth.evaluate.ledger`) and sent.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from calsmooth.console import progress
from calsmooth.environment import processes_here
from calsmooth.evaluate.ledger import Ledger
from calsmooth.processes import Processes

T = TypeVar("T")

UNIT = 256
"""Questions or rows of a part at most: a unit is one part, or several that are small for the device."""
BATCHES = 8
"""How many full batches the parts of one unit may come to: enough for a fast device to be busy, for sequences of about
the same length to meet, and not too much for an interruption to cost."""
MOST_THREADS = 16

Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """`score(prepare(), advance)` is done by one process, `prepare` while the unit before it is scored.

    name: unique in the evaluation. cost: how long it will take, in any measure that is the same for all units. steps:
    how often `advance` is called, in sum.
    """

    name: str
    cost: int
    steps: int
    score: Callable[[Any, Callable[..., None]], Record]
    prepare: Callable[[], Any] = lambda: None


def parts(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in as few consecutive parts of at most `UNIT` as there can be, about equally long."""
    count = math.ceil(len(items) / UNIT)
    ends = [len(items) * i // count for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(ends)]


def packed(costs: Sequence[float], batch: float) -> list[range]:
    """Consecutive parts, by index, that make a unit each: one, or as many as cost no more than `BATCHES` batches do."""
    units: list[range] = []
    cost = 0.0
    for number, more in enumerate(costs):
        if units and cost + more <= BATCHES * batch:
            units[-1] = range(units[-1].start, number + 1)
            cost += more
        else:
            units.append(range(number, number + 1))
            cost = more
    return units


def in_threads(function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
    """[function(item), ...] by as many threads as there are processors: for work that doesn't hold Python's lock."""
    threads = max(min((os.cpu_count() or 1) // processes_here(), MOST_THREADS), 1)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def share(units: Sequence[Unit], processes: Processes) -> list[Unit]:
    """This process's units, the most expensive first, so that all processes have about the same to do."""
    load = [0] * processes.count
    mine = []
    for unit in sorted(units, key=lambda unit: -unit.cost):
        least = load.index(min(load))
        load[least] += unit.cost
        if least == processes.rank:
            mine.append(unit)
    return mine


def perform(units: Sequence[Unit], ledger: Ledger, processes: Processes, description: str) -> Mapping[str, Record]:
    """Do what the ledger doesn't hold yet, and write it there; in the first process, the records of all units."""
    mine = share([unit for unit in units if unit.name not in ledger.done], processes)
    made: dict[str, Record] = {}
    with (
        progress(description, sum(unit.steps for unit in mine)) as advance,
        ledger.open(processes.rank) as write,
        ThreadPoolExecutor(1) as ahead,
    ):
        waiting = [ahead.submit(unit.prepare) for unit in mine[:1]]
        for unit, following in zip(mine, [*mine[1:], None], strict=True):
            prepared = waiting.pop().result()
            if following is not None:
                waiting.append(ahead.submit(following.prepare))
            made[unit.name] = unit.score(prepared, advance)
            write(unit.name, made[unit.name])
    records = dict(ledger.done)
    for found in processes.gathered(made):
        records |= found
    return records
