"""Examples that a model trains on or is measured on: token ids, and labels on the response tokens only."""

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.data.formats import Conversation, detect_format, to_conversation
from calsmooth.data.sources import load_rows
from calsmooth.data.templates import Rendered, choose_template, render
from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of tokens that are read but not learned (torch's ignore_index)."""


@dataclass(frozen=True)
class Example:
    """input_ids and labels have one length; labels[0] is IGNORED, since nothing comes before the first token."""

    input_ids: list[int]
    labels: list[int]

    @property
    def target_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a data set and how they came about.

    rows: read. bad: left out because a column was wrong. dropped: left out because the response lay past max_length.
    truncated: cut at max_length.
    """

    examples: list[Example]
    rows: int
    bad: int
    dropped: int
    truncated: int
    format: str
    template: str


def load_examples(source: str, tokenizer: "PreTrainedTokenizerBase", **options: Any) -> list[Example]:
    """The examples alone of `load_example_set(source, tokenizer, **options)`, which says what the options are."""
    return load_example_set(source, tokenizer, **options).examples


def load_example_set(
    source: str,
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
) -> ExampleSet:
    """Read, render and tokenise a data set (see `calsmooth.data.sources.load_rows` for `source`).

    Args:
        format: a name in `calsmooth.data.formats.FORMATS`; None tells it from the first row's columns.
        template: 'auto', 'chat' or 'alpaca' (see `calsmooth.data.templates`).
        max_length: longer examples keep their beginning.
        limit: a random, seeded choice of so many rows.
        on_bad_row: 'fail' at a row whose columns are missing, empty or of the wrong type, or 'skip' and count it.

    Raises:
        UsageError, CalsmoothError: the data can't be had, a row is bad, or no response fits max_length.
    """
    rows = load_rows(source, split=split, revision=revision, limit=limit, seed=seed)
    format = format or detect_format(rows[0])
    template = choose_template(template, tokenizer)
    examples, truncated, bad = [], 0, 0
    with console.progress("tokenising", len(rows)) as advance:
        for row in rows:
            advance()
            try:
                conversation = to_conversation(row, format)
            except CalsmoothError as error:
                if on_bad_row == "fail":
                    raise type(error)(f"{error}; mend or remove such rows (finetune: --on-bad-row skip)") from None
                bad += 1
                continue
            example = encode(conversation, template, tokenizer)
            if len(example.input_ids) > max_length:
                truncated += 1
                example = Example(example.input_ids[:max_length], example.labels[:max_length])
            if example.target_tokens:
                examples.append(example)
    if bad == len(rows):
        raise CalsmoothError(f"--dataset {source}: every row is bad; --on-bad-row fail names the first one's column")
    if not examples:
        raise CalsmoothError(f"--dataset {source}: no response fits --max-length {max_length}; raise it")
    return ExampleSet(examples, len(rows), bad, len(rows) - bad - len(examples), truncated, format, template)


def encode(conversation: Conversation, template: str, tokenizer: "PreTrainedTokenizerBase") -> Example:
    """Token ids of the whole conversation, labels on the assistant's tokens (its end-of-turn mark included).

    Raises:
        UsageError: the tokenizer can't say which characters a token covers.
        CalsmoothError: the chat template can't be used for this conversation.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            "this model has only a slow tokenizer, which can't map tokens to text; convert it to a fast one"
        )
    rendered = render(conversation, template, tokenizer)
    encoded = tokenizer(
        rendered.text, add_special_tokens=rendered.special_tokens, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
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
