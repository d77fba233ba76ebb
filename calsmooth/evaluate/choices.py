"""A multiple-choice task: its questions as units of work, and what their log-probabilities come to."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from calsmooth import metrics
from calsmooth.evaluate.config import ChoicesConfig
from calsmooth.evaluate.prompts import Prompt, prompter
from calsmooth.evaluate.questions import Question, sample
from calsmooth.evaluate.requests import Encoder, Request
from calsmooth.evaluate.results import RESAMPLES, TaskResult, memory_note
from calsmooth.evaluate.scoring import Scorer
from calsmooth.evaluate.task import Task, TaskData
from calsmooth.evaluate.units import Record, Unit, in_threads, packed, parts
from calsmooth.models import check_vocabulary
from calsmooth.plots import Reliability, prepare_reliability
from calsmooth.records import Prediction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = list[tuple[Prompt, Request]]


CHARACTERS = 4
"""Of a token, about."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Questions of a subject, by index. prefix, cost: characters of the solved examples, and of all that is run."""

    questions: Sequence[int]
    prefix: int
    cost: int


class Choices:
    """One task's questions, put to one model.

    max_length: of a sequence, in tokens; None for no limit.
    """

    def __init__(
        self,
        task: Task,
        data: TaskData,
        config: ChoicesConfig,
        tokenizer: "PreTrainedTokenizerBase",
        scorer: Scorer,
        max_length: int | None,
    ) -> None:
        self.name, self.data, self.config, self.scorer = task.name, data, config, scorer
        self.form = config.format or task.format
        self.chat = config.shots_as if config.chat_template else None
        self.wording, self._ask = prompter(
            task, format=self.form, style=config.prompt_style, chat=self.chat, tokenizer=tokenizer
        )
        self._encode = Encoder(tokenizer, max_length)
        questions = sorted(sample(data.questions, config.limit, config.seed), key=lambda q: q.subject)
        self.subjects = {subject: list(group) for subject, group in groupby(questions, key=lambda q: q.subject)}
        self.questions = questions
        asked_for = task.shots if config.shots is None else config.shots
        fewest = min(len(data.examples.get(subject, ())) for subject in self.subjects)
        self.shots = min(asked_for, fewest)
        self._parts = self._cut()
        self.notes = list(data.notes)
        if fewest < asked_for:
            self.notes.append(f"{task.name}: only {fewest} of {asked_for} solved examples exist")

    def key(self) -> str:
        """What is asked, in a few words and as a hash: of every question, and of each subject's first whole prompt."""
        digest = hashlib.sha256()
        for question in self.questions:
            asked = (question.id, question.subject, question.text, question.choices, question.answer)
            digest.update(json.dumps(asked).encode())
        for members in self.subjects.values():
            prompt = self._prompt(members[0])
            digest.update(json.dumps([prompt.text(prompt.shots), prompt.openings, prompt.continuations]).encode())
        words = f"{len(self.questions):,} questions, {self.form}, {self.wording}, {self.shots} shots"
        return f"{words}, sha256 {digest.hexdigest()}"

    def units(self) -> list[Unit]:
        """A part of a subject each, or where the device makes short work of that, several.

        Named by the parts that it holds, so that none is taken for one that another device had been given.
        """
        costs = [part.cost for part in self._parts]
        units = []
        for held in packed(costs, CHARACTERS * self.scorer.batches.enough):
            questions = [self.questions[i] for number in held for i in self._parts[number].questions]
            units.append(
                Unit(
                    name=f"{self.name}/{held.start}-{held.stop - 1}",
                    cost=sum(costs[number] for number in held),
                    steps=len(questions),
                    prepare=partial(in_threads, self._prepare, questions),
                    score=partial(self._score, [question.subject for question in questions]),
                )
            )
        return units

    def result(self, records: Sequence[Record]) -> TaskResult:
        """Metrics of all questions; the records are those of `units()`, in that order."""
        scored = [pair for record in records for pair in zip(record["logprobs"], record["per_byte"], strict=True)]
        asked = [i for part in self._parts for i in part.questions]
        logprobs, per_byte = zip(*(pair for _, pair in sorted(zip(asked, scored, strict=True))), strict=True)
        predictions = [
            Prediction(
                self.name, q.subject, q.id, tuple(values), q.answer, tuple(divided) if divided else None, q.order
            )
            for q, values, divided in zip(self.questions, logprobs, per_byte, strict=True)
        ]
        total = {name: sum(record[name] for record in records) for name in _counts([], 0, 0)}
        summary = {
            **self._summary(predictions, resamples=RESAMPLES),
            "questions_available": len(self.data.questions),
            "format": self.form,
            "prompt": self.wording,
            "chat_template": self.chat,
            "shots": self.shots,
            "prompts_with_dropped_shots": total["dropped"],
            "prompts_truncated": total["truncated"],
            "prefix_reuse": self.scorer.sharing.prefix,
            "tokens_run": total["tokens_run"],
            "tokens_in_full": total["tokens_in_full"],
            "source": self.data.source,
            "key": self.key(),
        }
        if len(self.subjects) > 1:
            of_subject = groupby(predictions, key=lambda p: p.subject)
            summary["subjects"] = {name: self._subject(list(group)) for name, group in of_subject}
        gold = [p.gold for p in predictions]
        if self.form == "letter":
            summary |= metrics.summarize_unnormalised(
                logprobs, gold, bins=self.config.bins, resamples=RESAMPLES, seed=self.config.seed
            )
        if self.form == "cloze":
            summary["per_byte"] = self._metrics(per_byte, gold, RESAMPLES)
            # The exponential of a mean is no probability, so that there is no mass to speak of.
            del summary["per_byte"]["choice_mass"]
            summary["per_byte"]["reliability"] = self._panel(per_byte, gold, summary["per_byte"]).to_dict()
        panel = self._panel(logprobs, gold, summary)
        summary["reliability"] = panel.to_dict()
        return TaskResult(summary, panel, predictions, [*self.notes, *self._notes(total)])

    def _cut(self) -> list[_Part]:
        """Subjects in parts, the longest solved examples first: subjects whose prompts begin about as long meet."""
        cut: list[_Part] = []
        start = 0
        for members in self.subjects.values():
            prompt = self._prompt(members[0])
            prefix = max(len(prompt.text(prompt.shots)) - _own_characters(members[0]), 0)
            for part in parts(range(start, start + len(members))):
                times = 1 if self.scorer.sharing.prefix else len(part)
                own = sum(_own_characters(self.questions[i]) for i in part)
                cut.append(_Part(part, prefix, own + times * prefix))
            start += len(members)
        return sorted(cut, key=lambda part: -part.prefix)

    def _prompt(self, question: Question) -> Prompt:
        return self._ask(question, list(self.data.examples.get(question.subject, ())))

    def _prepare(self, question: Question) -> tuple[Prompt, Request]:
        prompt = self._prompt(question)
        return prompt, self._encode(prompt)

    def _score(self, subjects: Sequence[str], asked: Asked, advance: Callable[..., None]) -> Record:
        scorer = self.scorer
        run, halved = scorer.tokens_run, scorer.batches.halvings
        requests = [request for _, request in asked]
        check_vocabulary(self.config.model, scorer.model.config, max(map(_highest, requests), default=0))
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, (subject, request) in enumerate(zip(subjects, requests, strict=True)):
            # Prompts that lost solved examples, or their start, share less with the others.
            groups[subject, request.dropped_shots, request.truncated].append(i)
        logprobs = scorer.score(requests, advance, list(groups.values()))
        per_byte = [
            prompt.answer_bytes and [v / n for v, n in zip(values, prompt.answer_bytes, strict=True)]
            for (prompt, _), values in zip(asked, logprobs, strict=True)
        ]
        counts = _counts(requests, scorer.tokens_run - run, scorer.batches.halvings - halved)
        return {"logprobs": logprobs, "per_byte": per_byte, **counts}

    def _summary(self, predictions: Sequence[Prediction], resamples: int = 0) -> dict:
        return self._metrics([p.logprobs for p in predictions], [p.gold for p in predictions], resamples)

    def _subject(self, predictions: Sequence[Prediction]) -> dict:
        """A subject's ECE means little without what so few questions of a calibrated model would show."""
        top = metrics.top_of([p.logprobs for p in predictions], [p.gold for p in predictions])
        return self._summary(predictions) | metrics.against_calibrated(
            *top, bins=self.config.bins, seed=self.config.seed
        )

    def _metrics(self, scores: Sequence[Sequence[float]], gold: Sequence[int], resamples: int) -> dict:
        return metrics.summarize(scores, gold, bins=self.config.bins, resamples=resamples, seed=self.config.seed)

    def _panel(self, scores: Sequence[Sequence[float]], gold: Sequence[int], summary: Mapping[str, Any]) -> Reliability:
        top = metrics.top_of(scores, gold)
        return prepare_reliability(*top, bins=self.config.bins, title=self.name, ece_interval=summary["ece_interval"])

    def _notes(self, total: dict[str, int]) -> list[str]:
        notes, n, sharing = [], len(self.questions), self.scorer.sharing
        if total["dropped"]:
            notes.append(f"{self.name}: {total['dropped']} of {n} prompts were too long and lost solved examples")
        if total["truncated"]:
            notes.append(
                f"{self.name}: {total['truncated']} of {n} questions were too long by themselves and lost their start"
            )
        if not sharing.prefix:
            notes.append(f"prompts are run in full, because {sharing.reason}")
        elif total["long_answers"] and not sharing.contexts:
            notes.append(f"each choice is run with its question, because {sharing.reason}")
        if self.scorer.readout.fallback is not None:
            notes.append(f"log-probabilities are those of the model's own logits: {self.scorer.readout.fallback}")
        return notes + memory_note(self.name, total["halvings"])


def _own_characters(question: Question) -> int:
    return 100 + len(question.text) + sum(map(len, question.choices))


def _counts(requests: Sequence[Request], tokens_run: int, halvings: int) -> dict[str, int]:
    return {
        "dropped": sum(r.dropped_shots > 0 for r in requests),
        "truncated": sum(r.truncated for r in requests),
        "long_answers": sum(any(len(c) > 1 for c in r.continuations) for r in requests),
        "tokens_run": tokens_run,
        "tokens_in_full": sum(map(_tokens_in_full, requests)),
        "halvings": halvings,
    }


def _highest(request: Request) -> int:
    """Of the token ids that the model is to read."""
    return max(map(max, (request.context, *request.continuations)))


def _tokens_in_full(request: Request) -> int:
    """What one full forward a choice (or one a question, where all choices are one token) would run."""
    if all(len(c) == 1 for c in request.continuations):
        return len(request.context)
    return sum(len(request.context) + len(c) - 1 for c in request.continuations)
