"""Predictions to calibrate: our own predictions.jsonl, or the samples that lm-evaluation-harness wrote.

What a file is shows in its first line, whatever it is called.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_jsonl
from calsmooth.records import Prediction, read_predictions

PREDICTIONS = "predictions.jsonl"
SAMPLES = "samples_*.jsonl"
_DATED = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[\d.:-]+")


def load_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file, or of all files of a folder: its predictions.jsonl, or else its harness samples.

    Raises:
        UsageError: there is no such file, or no predictions are in the folder.
        CalsmoothError: a file is bad, or the folder holds a task twice.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file; give the predictions.jsonl of an evaluation")
    if not path.is_dir():
        return _read(path)
    if (path / PREDICTIONS).is_file():
        return _read(path / PREDICTIONS)
    files = sorted(path.rglob(SAMPLES))
    if not files:
        raise UsageError(f"{path}: holds neither {PREDICTIONS} nor {SAMPLES}; give the folder of an evaluation")
    predictions: list[Prediction] = []
    seen: dict[str, Path] = {}
    for file in files:
        part = _read(file)
        for task in {p.task for p in part}:
            if task in seen:
                raise CalsmoothError(
                    f"{path}: {seen[task].relative_to(path)} and {file.relative_to(path)} are both of {task}; give the "
                    f"files of one run"
                )
            seen[task] = file
        predictions += part
    return predictions


def _read(path: Path) -> list[Prediction]:
    first = next(iter(read_jsonl(path)), (0, None))[1]
    if isinstance(first, dict) and "doc_id" in first and ("resps" in first or "filtered_resps" in first):
        return read_samples(path)
    return read_predictions(path)


def read_samples(path: Path) -> list[Prediction]:
    """The multiple-choice samples of one task, as lm-evaluation-harness writes them with --log_samples.

    Each choice's log-likelihood is the sum over its tokens; texts longer than a letter also give it per UTF-8 byte, by
    the length without the space in front (its `acc_bytes`; `acc_norm` counts characters instead). Where the harness
    wrote the samples once per filter, the first filter's are taken. The line's own `acc` must come out again.

    Raises:
        CalsmoothError: a line isn't such a sample (generated text, several right answers, ...), is not finite, or the
            file's own accuracy contradicts it.
    """
    dated = _DATED.fullmatch(path.stem)
    task = dated["task"] if dated else path.stem.removeprefix("samples_")
    samples: list[_Sample] = []
    for number, line in read_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(line, dict):
            raise CalsmoothError(f"{where}: expected an object, got a {type(line).__name__}")
        if not samples or line.get("filter") == samples[0].filter:
            samples.append(_sample(line, where))
    gold = _right_choices(samples)
    return [_prediction(task, sample, index) for sample, index in zip(samples, gold, strict=True)]


@dataclass(frozen=True)
class _Sample:
    id: str
    subject: str | None
    filter: Any
    logprobs: list[float]
    texts: list[str]  # the choices, without the space in front
    target: str  # the right choice's number or text
    acc: float | None  # what the harness made of it
    where: str


def _sample(line: dict[str, Any], where: str) -> _Sample:
    logprobs, texts = _choices(line, where)
    doc, acc = line.get("doc"), line.get("acc")
    subject = doc.get("subject") if isinstance(doc, dict) else None
    return _Sample(
        id=str(line.get("doc_id")),
        subject=subject if isinstance(subject, str) else None,
        filter=line.get("filter"),
        logprobs=logprobs,
        texts=[text.strip() for text in texts],
        target=str(line.get("target")).strip(),
        acc=acc if isinstance(acc, int | float) else None,
        where=where,
    )


def _prediction(task: str, sample: _Sample, gold: int) -> Prediction:
    per_byte = None
    if max(map(len, sample.texts)) > 1:
        # An empty choice, which some tasks have, still cost its space.
        lengths = [max(len(text.encode("utf-8")), 1) for text in sample.texts]
        per_byte = tuple(value / length for value, length in zip(sample.logprobs, lengths, strict=True))
    return Prediction(task, sample.subject or task, sample.id, tuple(sample.logprobs), gold, per_byte)


def _choices(line: dict[str, Any], where: str) -> tuple[list[float], list[str]]:
    """(log-likelihood of each choice, text of each choice)."""
    answers = line.get("filtered_resps") or [_first_of(r) for r in line.get("resps") or []]
    asked = line.get("arguments") or {}
    asked = list(asked.values()) if isinstance(asked, dict) else asked
    texts = [text for text in map(_second, asked) if text is not None]
    if not answers or not len(answers) == len(texts) == len(asked) or not all(map(_is_loglikelihood, answers)):
        raise CalsmoothError(
            f"{where}: expected a multiple-choice sample, with a log-likelihood for each choice in 'filtered_resps' "
            f"and its text in 'arguments'; tasks that generate text have none"
        )
    logprobs = [float(answer[0]) for answer in answers]
    if "acc_mutual_info" in line.get("metrics", ()):  # then the choices come again, without their question
        logprobs, texts = logprobs[: len(logprobs) // 2], texts[: len(texts) // 2]
    if len(logprobs) < 2:
        raise CalsmoothError(f"{where}: expected two or more choices, got {len(logprobs)}")
    if not np.isfinite(logprobs).all() or max(logprobs) > 1e-6:
        raise CalsmoothError(f"{where}: log-likelihoods must be finite numbers of at most 0, got {logprobs}")
    return logprobs, texts


def _first_of(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _second(argument: Any) -> str | None:
    """The continuation of a (context, continuation) request, in either of the harness's spellings."""
    if isinstance(argument, dict):
        argument = list(argument.values())
    return argument[1] if isinstance(argument, list) and len(argument) > 1 and isinstance(argument[1], str) else None


def _is_loglikelihood(answer: Any) -> bool:
    """[log-likelihood, is greedy], numbers or their text."""
    if not isinstance(answer, list) or len(answer) != 2:
        return False
    try:
        float(answer[0])
    except (TypeError, ValueError):
        return False
    return True


def _right_choices(samples: Sequence[_Sample]) -> list[int]:
    """The right choice's index of each sample of a file.

    A task's targets are numbers, or they are texts. Where both could be meant (choices that are digits), the harness's
    own `acc` tells, in some line of the file.
    """
    problem = ""
    for reading in (_by_number, _by_text):
        gold = [reading(sample) for sample in samples]
        wrong = next((w for s, g in zip(samples, gold, strict=True) if (w := _contradiction(s, g))), None)
        if wrong is None:
            return [index for index in gold if index is not None]
        problem = problem or wrong
    raise CalsmoothError(problem)


def _by_number(sample: _Sample) -> int | None:
    number = int(sample.target) if sample.target.isdecimal() else len(sample.texts)
    return number if number < len(sample.texts) else None


def _by_text(sample: _Sample) -> int | None:
    return sample.texts.index(sample.target) if sample.target in sample.texts else None


def _contradiction(sample: _Sample, gold: int | None) -> str | None:
    """What is wrong with this index as the right choice; None where nothing is."""
    if gold is None:
        return (
            f"{sample.where}: 'target' must be the number or the text of one of the {len(sample.texts)} choices, got "
            f"{sample.target!r}; tasks with several right answers can't be calibrated"
        )
    answer = int(np.argmax(sample.logprobs))
    if sample.acc is not None and (answer == gold) != (sample.acc == 1):
        return (
            f"{sample.where}: 'acc' is {sample.acc:g}, but the most probable choice is number {answer} and the target "
            f"{sample.target!r}; expected the samples of a plain multiple-choice task"
        )
    return None
