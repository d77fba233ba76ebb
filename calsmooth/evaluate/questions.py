"""A multiple-choice question, validated, and the drawing of a sample of them."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calsmooth.errors import CalsmoothError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice. Questions of a `subject` share their solved examples.

    order: of each choice, its index in the data, where that is another: the task shuffles choices, or leaves some out.
    """

    id: str
    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int
    order: tuple[int, ...] | None = None


def make_question(
    where: str, id: str, subject: str, text: Any, choices: Any, answer: Any, order: Sequence[int] | None = None
) -> Question:
    """A validated question.

    Raises:
        CalsmoothError: the question or a choice is missing or isn't text, there are fewer than 2 or more than 26
            choices, or the answer isn't the index of one.
    """
    if not isinstance(text, str) or not text.strip():
        raise CalsmoothError(f"{where}: the question must be text that isn't empty, got {text!r}")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        raise CalsmoothError(f"{where}: expected a list of 2 to {len(LETTERS)} choices, got {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise CalsmoothError(f"{where}: every choice must be text that isn't empty, got {choice!r}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise CalsmoothError(f"{where}: the answer must be an index from 0 to {len(choices) - 1}, got {answer!r}")
    return Question(id, subject, text, tuple(choices), answer, None if order is None else tuple(order))


def sample(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` questions, spread evenly over the subjects, in their original order.

    Subjects give one question each in turn until the limit is reached, so that their counts differ by at most one
    unless a subject runs out. The seed draws the order of the subjects and of the questions within each.
    """
    if limit is None or limit >= len(questions):
        return questions
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_subject[question.subject].append(index)
    generator = random.Random(seed)
    hands = list(by_subject.values())
    generator.shuffle(hands)
    for indices in hands:
        generator.shuffle(indices)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < limit:
        chosen += [indices[turn] for indices in hands if turn < len(indices)][: limit - len(chosen)]
        turn += 1
    return [questions[i] for i in sorted(chosen)]
