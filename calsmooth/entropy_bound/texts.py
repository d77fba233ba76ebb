"""What a head is measured on: a text, cut into stretches that fit the model, or instruction data with its responses.

Both end as examples: token ids, and labels where a prediction counts.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from calsmooth.data import IGNORED, Example
from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN_TEXT = Path(__file__).parent / "sample.txt"
"""Some pages of plain English, a little code and a table, written for this purpose: enough to try the command."""

CHARACTERS_A_TOKEN = 16
"""More than any usual text has: how far a long file is read for so many tokens."""


def read_text(path: Path, max_tokens: int) -> str:
    """The beginning of a UTF-8 file, at least as far as max_tokens tokens of any usual text go.

    Raises:
        UsageError: there is no such file.
        CalsmoothError: it can't be read, isn't UTF-8, or is empty.
    """
    if not path.is_file():
        raise UsageError(f"--text {path}: no such file; give a UTF-8 text file, or --dataset for instruction data")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(max_tokens * CHARACTERS_A_TOKEN)
    except UnicodeDecodeError as error:
        raise CalsmoothError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None
    if not text.strip():
        raise CalsmoothError(f"{path}: holds no text")
    return text


def text_examples(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Example]:
    """Stretches of max_length tokens, one after the other; every token counts that has another before it.

    Where the tokenizer begins its sequences with a token of its own, so does each stretch.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = _beginning(tokenizer)
    step = max_length - len(begin)
    stretches = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    return [Example(stretch, [IGNORED, *stretch[1:]]) for stretch in stretches if len(stretch) > 1]


def take_tokens(examples: list[Example], max_tokens: int) -> list[Example]:
    """The first examples that hold max_tokens labels between them; of the last, the beginning."""
    taken, left = [], max_tokens
    for example in examples:
        if left <= 0:
            break
        wanted = [i for i, label in enumerate(example.labels) if label != IGNORED]
        if len(wanted) > left:
            end = wanted[left - 1] + 1
            example = Example(example.input_ids[:end], example.labels[:end])
        taken.append(example)
        left -= min(len(wanted), left)
    return taken


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    begins = len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id
    return [whole[0]] if begins else []
