"""Examples without end, for data that doesn't fit into memory or onto the disk.

A source's rows come in passes. In each, its files are taken in an order of their own, and rows go through a buffer
from which they leave at random. Of several sources the next row's is drawn by their weights. All of it is decided by
the seed, so that a position is a number of rows: a stream is continued by reading past so many, which tokenises
nothing, and goes on with the very next one.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calsmooth.data.examples import Example, Examples, ExampleSet, FormattedRow, Reading, cut, template_used
from calsmooth.data.readers import BadRow
from calsmooth.data.sources import open_source, parse_sources
from calsmooth.data.templates import choose_template
from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 64
"""Tokenised in one call."""

BARREN_ROWS = 20_000
"""So many one after another that give no example are taken to go on like that for ever."""


@dataclass(frozen=True)
class Position:
    """How far a stream has come: rows read, and what became of them (see `calsmooth.data.ExampleSet`)."""

    rows: int = 0
    bad: int = 0
    dropped: int = 0
    truncated: int = 0


class ExampleStream:
    """Endless examples of one source or several."""

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        format: str | None = None,
        template: str = "auto",
        max_length: int,
        seed: int = 0,
        split: str | None = None,
        revision: str | None = None,
        on_bad_row: str = "fail",
        buffer: int,
    ) -> None:
        """buffer: rows from which the next one is drawn. The others: see `load_example_set`.

        Raises:
            UsageError, CalsmoothError: the data can't be had, or there are several sources and they have no weights.
        """
        self.sources = parse_sources(sources, split, revision)
        if len(self.sources) > 1 and self.sources[0].weight is None:
            raise UsageError(
                "--streaming: of several sources each needs a weight, since none is read to its end; "
                f"give --dataset {sources[0]}=0.5, ..."
            )
        self.template = choose_template(template, tokenizer)
        self.reading = Reading(tokenizer, format, self.template, max_length, on_bad_row)
        self.parts = [open_source(source, streaming=True) for source in self.sources]
        self.seed, self.buffer = seed, buffer
        self.formats: dict[str, None] = {}  # that were met so far, in order

    def examples(self, start: Position | None = None) -> Iterator[tuple[Example, Position]]:
        """Each example with the position after it, from a position on.

        Raises:
            CalsmoothError: a row is bad and bad rows aren't to be skipped, a source is empty, or nothing but rows
                without an example come.
        """
        position = start or Position()
        rows = itertools.islice(self._rows(), position.rows, None)
        barren = 0
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            self.formats |= {format: None for _, format in batch if format}
            for found in self.reading.examples(batch):
                position = replace(position, rows=position.rows + 1)
                barren += 1
                if isinstance(found, BadRow):
                    position = replace(position, bad=position.bad + 1)
                else:
                    over = len(found.input_ids) > self.reading.max_length
                    found = cut(found, self.reading.max_length)
                    dropped = not found.target_tokens
                    position = replace(
                        position, truncated=position.truncated + over, dropped=position.dropped + dropped
                    )
                    if not dropped:
                        barren = 0
                        yield found, position
                if barren >= BARREN_ROWS:
                    raise CalsmoothError(
                        f"--streaming: {barren:,} rows one after another gave no example (in all {position.bad:,} bad, "
                        f"{position.dropped:,} without a response within --max-length {self.reading.max_length})"
                    )

    def beginning(self, count: int) -> ExampleSet:
        """The first examples, to be looked at. Errors are those of `examples`."""
        found = list(itertools.islice(self.examples(), count))
        at = found[-1][1]
        return ExampleSet(
            Examples.of(example for example, _ in found),
            rows=at.rows,
            bad=at.bad,
            dropped=at.dropped,
            truncated=at.truncated,
            format=", ".join(self.formats),
            template=template_used(self.formats, self.template),
        )

    def _rows(self) -> Iterator[FormattedRow]:
        streams = [self._source(number) for number in range(len(self.sources))]
        if len(streams) == 1:
            yield from streams[0]
        weights = [source.weight or 0.0 for source in self.sources]
        draws = random.Random(f"mixture of seed {self.seed}")
        while True:
            [stream] = draws.choices(streams, weights)
            yield next(stream)

    def _source(self, number: int) -> Iterator[FormattedRow]:
        for turn in itertools.count():
            draws = random.Random(f"pass {turn} of source {number} of seed {self.seed}")
            parts = list(self.parts[number])
            draws.shuffle(parts)
            rows = itertools.chain.from_iterable(map(self.reading.rows, parts))
            found = False
            for row in shuffled(rows, self.buffer, draws):
                found = True
                yield row
            if not found:
                raise CalsmoothError(f"--dataset {self.sources[number].place}: holds no rows")


def shuffled(rows: Iterator[FormattedRow], buffer: int, draws: random.Random) -> Iterator[FormattedRow]:
    """All rows once, each drawn from the next `buffer` of those that haven't come yet."""
    waiting = list(itertools.islice(rows, buffer))
    for row in rows:
        i = draws.randrange(len(waiting))
        waiting[i], row = row, waiting[i]
        yield row
    draws.shuffle(waiting)
    yield from waiting
