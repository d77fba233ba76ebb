"""Examples that a model trains on or is measured on: token ids, and labels on the response tokens only."""

import array
import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from calsmooth import console
from calsmooth.data.cache import cached, fingerprint
from calsmooth.data.formats import VERBATIM, Conversation, detect_format, to_conversation
from calsmooth.data.sources import BadRow, Part, Row, Source, choose, open_source, parse_sources
from calsmooth.data.templates import Rendered, choose_template, render
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of tokens that are read but not learned (torch's ignore_index)."""

ROWS_AT_ONCE = 256
"""Tokenised in one call, which costs a third less than one call a row."""

BAD_ROWS_KEPT = 3
"""So many of the skipped rows' faults are kept for the reader."""


@dataclass(frozen=True)
class Example:
    """input_ids and labels have one length; labels[0] is IGNORED, since nothing comes before the first token."""

    input_ids: list[int]
    labels: list[int]

    @property
    def target_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Many examples in three flat arrays, which may lie in a file: 5 bytes a token, whatever their number.

    tokens: (total,) int32. learned: (total,) bool, where the label is the token. starts: (n + 1,) int64.
    """

    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        store = _Store()
        for example in examples:
            store.add(example)
        return store.examples()

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each."""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """(n,) target tokens of each."""
        before = np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])
        return np.diff(before[self.starts])

    @property
    def target_tokens(self) -> int:
        """Of all together."""
        return int(np.count_nonzero(self.learned))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        here = slice(int(self.starts[i]), int(self.starts[i + 1]))
        tokens = self.tokens[here]
        return Example(tokens.tolist(), np.where(self.learned[here], tokens, IGNORED).tolist())


@dataclass(frozen=True)
class SourceCount:
    """One source of a mixture. examples: of the set, which has them in the sources' order. weight: see `Source`."""

    name: str
    examples: int
    weight: float | None


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a data set and how they came about.

    rows: read. bad: left out because they couldn't be read or a column was wrong; bad_rows: what was wrong with the
    first few. dropped: left out because the response lay past max_length. truncated: cut at max_length.
    format: of the rows, or several names. template: which made text of them, or 'none' where they were text already.
    from_cache: nothing had to be tokenised.
    """

    examples: Examples
    rows: int
    bad: int
    dropped: int
    truncated: int
    format: str
    template: str
    sources: tuple[SourceCount, ...] = ()
    bad_rows: tuple[str, ...] = ()
    from_cache: bool = False


def load_examples(source: str | Sequence[str], tokenizer: "PreTrainedTokenizerBase", **options: Any) -> list[Example]:
    """The examples alone of `load_example_set(source, tokenizer, **options)`, which says what the options are."""
    return list(load_example_set(source, tokenizer, **options).examples)


def load_example_set(
    source: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    format: str | None = None,
    template: str = "auto",
    max_length: int,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    revision: str | None = None,
    on_bad_row: str = "fail",
    cache: bool = False,
) -> ExampleSet:
    """Read, render and tokenise one source or several (see `calsmooth.data.sources`).

    Args:
        format: a name in `calsmooth.data.formats.FORMATS`; None tells it from each file's first row.
        template: 'auto', 'chat', 'alpaca' or 'tulu' (see `calsmooth.data.templates`).
        max_length: longer examples keep their beginning.
        limit: a random, seeded choice of so many rows of all together.
        on_bad_row: 'fail' at a row that can't be read or whose columns are missing, empty or of the wrong type, or
            'skip' and count it.
        cache: keep what was tokenised for the next time (see `calsmooth.data.cache`).

    Raises:
        UsageError, CalsmoothError: the data can't be had, a row is bad, or no response fits max_length.
    """
    sources = parse_sources([source] if isinstance(source, str) else source, split, revision)
    parts = [(i, part) for i, s in enumerate(sources) for part in open_source(s)]
    template = choose_template(template, tokenizer)
    reading = Reading(tokenizer, format, template, max_length, on_bad_row)

    def tokenise() -> ExampleSet:
        return _tokenise(sources, parts, reading, limit, seed)

    if not cache:
        return tokenise()
    key = fingerprint(
        tokenizer,
        parts=[(i, part.fingerprint()) for i, part in parts],
        sources=[(s.place, s.weight) for s in sources],
        format=format,
        template=template,
        max_length=max_length,
        limit=limit,
        seed=seed if limit else None,
        on_bad_row=on_bad_row,
    )
    return cached(key, tokenise, _save, _load)


def encode(conversation: Conversation, template: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
    """Token ids of the whole conversation, labels on the assistant's tokens (its end-of-turn mark included).

    Raises:
        UsageError: the tokenizer can't say which characters a token covers.
        CalsmoothError: the chat template can't be used for this conversation.
    """
    return _encode([_render(conversation, template, tokenizer)], tokenizer)[0]


@dataclass(frozen=True)
class Reading:
    """How rows become examples. format: None where each file's first good row tells it."""

    tokenizer: "PreTrainedTokenizerBase"
    format: str | None
    template: str
    max_length: int
    on_bad_row: str

    def rows(self, part: Part) -> Iterator["FormattedRow"]:
        """The rows of a file with its format."""
        format = self.format
        for row in part.read():
            if format is None and isinstance(row, Row):
                try:
                    format = detect_format(row)
                except CalsmoothError as error:
                    row = BadRow(str(error))
            yield row, format

    def examples(self, rows: Sequence["FormattedRow"]) -> "list[Example | BadRow]":
        """An example for each row, longer than max_length as it may be, or why there is none.

        Raises:
            CalsmoothError: a row is bad, and bad rows aren't to be skipped.
        """
        rendered = [self._rendered(row, format) for row, format in rows]
        encoded = iter(_encode([r for r in rendered if isinstance(r, Rendered)], self.tokenizer))
        return [next(encoded) if isinstance(r, Rendered) else r for r in rendered]

    def _rendered(self, row: Row | BadRow, format: str | None) -> Rendered | BadRow:
        advice = "; mend or remove such rows (finetune: --on-bad-row skip)"
        try:
            if isinstance(row, BadRow) or format is None:
                raise CalsmoothError(row.why if isinstance(row, BadRow) else f"{row.where}: of no known format")
            conversation = to_conversation(row, format)
            advice = ""  # a template that can't be used says itself what to do
            return _render(conversation, self.template, self.tokenizer)
        except UsageError:
            raise
        except CalsmoothError as error:
            if self.on_bad_row == "fail":
                raise CalsmoothError(f"{error}{advice}") from None
            return BadRow(str(error))


def template_used(formats: Iterable[str], template: str) -> str:
    """The template's name, or 'none' where the text of every format was in its final form already."""
    return "none" if set(formats) <= VERBATIM else template


FormattedRow = tuple[Row | BadRow, str | None]


def cut(example: Example, max_length: int) -> Example:
    """The example's beginning."""
    if len(example.input_ids) <= max_length:
        return example
    return Example(example.input_ids[:max_length], example.labels[:max_length])


def _tokenise(
    sources: Sequence[Source], parts: Sequence[tuple[int, Part]], reading: Reading, limit: int | None, seed: int
) -> ExampleSet:
    store, counts = _Store(), [0] * len(sources)
    rows, truncated, bad = 0, 0, 0
    bad_rows: list[str] = []
    formats: dict[str, None] = {}  # in the order in which they are met
    with console.progress("tokenising", limit) as advance:
        for number, batch in _batches(parts, reading, limit, seed):
            rows += len(batch)
            formats |= {format: None for _, format in batch if format}
            for found in reading.examples(batch):
                if isinstance(found, BadRow):
                    bad += 1
                    bad_rows += [found.why] if len(bad_rows) < BAD_ROWS_KEPT else []
                    continue
                truncated += len(found.input_ids) > reading.max_length
                found = cut(found, reading.max_length)
                if found.target_tokens:
                    store.add(found)
                    counts[number] += 1
            advance(len(batch))
    named = f"--dataset {', '.join(s.place for s in sources)}"
    if not rows:
        raise CalsmoothError(f"{named}: holds no rows")
    if bad == rows:
        raise CalsmoothError(f"{named}: every row is bad, the first one: {bad_rows[0]}")
    if not len(store):
        raise CalsmoothError(f"{named}: no response fits --max-length {reading.max_length}; raise it")
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise CalsmoothError(f"--dataset {source.place}: gives no example; leave it out, or mend its rows")
    return ExampleSet(
        store.examples(),
        rows,
        bad,
        rows - bad - len(store),
        truncated,
        ", ".join(formats),
        template_used(formats, reading.template),
        tuple(SourceCount(s.place, n, s.weight) for s, n in zip(sources, counts, strict=True)),
        tuple(bad_rows),
    )


def _batches(
    parts: Sequence[tuple[int, Part]], reading: Reading, limit: int | None, seed: int
) -> Iterator[tuple[int, list[FormattedRow]]]:
    """(number of the source, rows that come one after another in it)."""
    rows = ((number, row) for number, part in parts for row in reading.rows(part))
    if limit is not None:
        everything = list(rows)
        rows = (everything[i] for i in choose(len(everything), limit, seed))
    for number, group in itertools.groupby(rows, key=lambda item: item[0]):
        while batch := [row for _, row in itertools.islice(group, ROWS_AT_ONCE)]:
            yield number, batch


def _render(conversation: Conversation, template: str, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    if not tokenizer.is_fast:
        raise UsageError(
            "this model has only a slow tokenizer, which can't map tokens to text; convert it to a fast one"
        )
    return render(conversation, template, tokenizer)


def _encode(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    examples: list[Example | None] = [None] * len(rendered)
    for special in (True, False):
        indices = [i for i, r in enumerate(rendered) if r.special_tokens == special]
        if not indices:
            continue
        texts = [rendered[i].text for i in indices]
        encoded = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        for i, ids, offsets in zip(indices, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            examples[i] = _labelled(list(ids), offsets, rendered[i])
    return [example for example in examples if example is not None]


def _labelled(ids: list[int], offsets: Sequence[tuple[int, int]], rendered: Rendered) -> Example:
    labels = [
        token if _inside(start, end, rendered) else IGNORED for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    if labels:
        labels[0] = IGNORED
    return Example(ids, labels)


def _inside(start: int, end: int, rendered: Rendered) -> bool:
    if start == end:  # a special token that the tokenizer added
        return False
    # A token that joins the end of the prompt with the first word (" yes" after "Answer: ") is the response's: were
    # it left out, a short response would never be learned.
    i = bisect.bisect_left(rendered.spans, end, key=lambda span: span[0]) - 1
    return i >= 0 and start < rendered.spans[i][1]


class _Store:
    """Examples as they come, in arrays that grow."""

    def __init__(self) -> None:
        self.tokens, self.learned, self.starts = array.array("i"), bytearray(), array.array("q", [0])

    def add(self, example: Example) -> None:
        self.tokens.extend(example.input_ids)
        self.learned.extend(label != IGNORED for label in example.labels)
        self.starts.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def examples(self) -> Examples:
        return Examples(
            np.frombuffer(self.tokens, dtype=np.int32),
            np.frombuffer(self.learned, dtype=np.bool_),
            np.frombuffer(self.starts, dtype=np.int64),
        )


_ARRAYS = ("tokens", "learned", "starts")


def _save(found: ExampleSet, folder: Path) -> None:
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(found.examples, name))
    about = {name: value for name, value in vars(found).items() if name not in ("examples", "from_cache")}
    write_json(folder / "about.json", about | {"sources": [vars(s) for s in found.sources]})


def _load(folder: Path) -> ExampleSet:
    about = read_json(folder / "about.json")
    about["sources"] = tuple(SourceCount(**s) for s in about["sources"])
    about["bad_rows"] = tuple(about["bad_rows"])
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return ExampleSet(Examples(**arrays), **about, from_cache=True)
