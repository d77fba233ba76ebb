"""What an evaluation predicted, in files. Stable, documented in the README.

predictions.jsonl: a line a question, between evaluate and calibrate. token_predictions.npz: an entry a response token.
"""

import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from calsmooth.errors import CalsmoothError
from calsmooth.files import read_jsonl, write_bytes, write_text

PREDICTIONS = "predictions.jsonl"
TOKEN_PREDICTIONS = "token_predictions.npz"

ROUNDING = 0.01
"""Nats by which a log-probability may lie above 0: a certain token's is the difference of two equal sums, which were
rounded apart. Logits of a few hundred in float32 come to 1e-4. Such a value counts as 0; a greater one is a mistake."""

_REQUIRED = ("task", "subject", "id", "logprobs", "gold")


@dataclass(frozen=True)
class Prediction:
    """One question's scored choices.

    logprobs: natural-log probability of each choice, as the model gave it: not renormalised over the choices.
    gold: index of the right choice.
    logprobs_per_byte: the same divided by the UTF-8 length of each choice's text, where choices are scored as whole
        texts (the cloze format) and long ones would otherwise lose.
    order: of each choice, its index in the data, where that is another (a task that shuffles its choices).
    """

    task: str
    subject: str
    id: str
    logprobs: tuple[float, ...]
    gold: int
    logprobs_per_byte: tuple[float, ...] | None = None
    order: tuple[int, ...] | None = None

    def to_line(self) -> str:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def read_predictions(path: Path) -> list[Prediction]:
    """All predictions of a file, validated.

    Raises:
        CalsmoothError: the file is missing, empty, or a line lacks a field, has fewer than two choices, a
            log-probability that isn't finite or is above 0 (by more than `ROUNDING`), or a gold index outside its
            choices.
    """
    predictions = [_parse(value, f"{path}, line {number}") for number, value in read_jsonl(path)]
    if not predictions:
        raise CalsmoothError(f"{path}: holds no predictions; expected one JSON object a line")
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> Path:
    return write_text(path, "".join(p.to_line() for p in predictions))


def _parse(value: Any, where: str) -> Prediction:
    if not isinstance(value, dict):
        raise CalsmoothError(f"{where}: expected an object, got a {type(value).__name__}")
    missing = [name for name in _REQUIRED if name not in value]
    if missing:
        raise CalsmoothError(f"{where}: no field '{missing[0]}'; a prediction has task, subject, id, logprobs and gold")
    logprobs, gold, per_byte = value["logprobs"], value["gold"], value.get("logprobs_per_byte")
    if not isinstance(logprobs, list) or len(logprobs) < 2 or not all(_is_logprob(x) for x in logprobs):
        raise CalsmoothError(f"{where}: 'logprobs' must be two or more finite numbers of at most 0, got {logprobs!r}")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(logprobs):
        raise CalsmoothError(f"{where}: 'gold' must be an index from 0 to {len(logprobs) - 1}, got {gold!r}")
    if per_byte is not None and not (
        isinstance(per_byte, list) and len(per_byte) == len(logprobs) and all(_is_logprob(x) for x in per_byte)
    ):
        raise CalsmoothError(f"{where}: 'logprobs_per_byte' must match 'logprobs' in length, got {per_byte!r}")
    order = value.get("order")
    if order is not None and not (
        isinstance(order, list)
        and len(order) == len(set(map(str, order))) == len(logprobs)
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in order)
    ):
        raise CalsmoothError(f"{where}: 'order' must be an index of the data for each of 'logprobs', got {order!r}")
    return Prediction(
        task=str(value["task"]),
        subject=str(value["subject"]),
        id=str(value["id"]),
        logprobs=_at_most_0(logprobs),
        gold=gold,
        logprobs_per_byte=None if per_byte is None else _at_most_0(per_byte),
        order=None if order is None else tuple(order),
    )


def _is_logprob(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x <= ROUNDING


def _at_most_0(logprobs: Sequence[float]) -> tuple[float, ...]:
    return tuple(min(float(x), 0.0) for x in logprobs)


# --- tokens of responses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenPredictions:
    """One entry a response token, in the order of the data set: top-1 probability, 1 where it was right, -log p(token)
    in nats and Brier score, all float64, and the index of the token's row, an integer.
    """

    confidence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    row: np.ndarray


def write_token_predictions(path: Path, tokens: TokenPredictions) -> Path:
    """The arrays in numpy's compressed format, under the names of the fields."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        confidence=tokens.confidence,
        correct=tokens.correct.astype(np.uint8),
        nll=tokens.nll,
        brier=tokens.brier,
        row=tokens.row.astype(np.int32),
    )
    return write_bytes(path, buffer.getvalue())


def read_token_predictions(path: Path) -> TokenPredictions:
    """
    Raises:
        CalsmoothError: the file can't be read, or isn't what `write_token_predictions` writes.
    """
    names = [field.name for field in dataclasses.fields(TokenPredictions)]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CalsmoothError(f"{path}: can't be read as token predictions ({error})") from None
    if len({array.shape for array in arrays.values()}) > 1 or arrays["row"].ndim != 1 or len(arrays["row"]) == 0:
        raise CalsmoothError(f"{path}: expected arrays {', '.join(names)} of one length above 0")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise CalsmoothError(f"{path}: holds a value that is not a number")
    return TokenPredictions(
        **{n: array.astype(np.float64) for n, array in arrays.items() if n != "row"}, row=arrays["row"]
    )
