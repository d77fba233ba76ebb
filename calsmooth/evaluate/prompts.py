"""What is asked of the model, as text: the prompt of a question and the continuations whose probability is its answer.

Three kinds:

- letter: the choices are listed and the continuations are " A", " B", ... In the `hendrycks` style the text is the
  original MMLU script's byte for byte (two spaces after "about"); `lm-eval` is lm-evaluation-harness's (one space, the
  question stripped).
- cloze: the choices aren't shown, each is a continuation of the question, as lm-evaluation-harness scores HellaSwag and
  ARC.
- conversation: cloze as a chat turn, through the same templates that finetune trains with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calsmooth.data.formats import Conversation, Turn
from calsmooth.data.templates import Rendered, choose_template, render
from calsmooth.evaluate.questions import LETTERS, Question, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """`text(k)` is the prompt with the first k of its `shots` solved examples; any continuation follows it directly.

    special_tokens: whether the tokenizer is to add its own (a chat template has written them already).
    """

    text: Callable[[int], str]
    shots: int
    continuations: tuple[str, ...]
    special_tokens: bool = True


def letter_prompt(question: Question, examples: Sequence[Question], style: str) -> Prompt:
    """The choices listed under letters; the answer is a letter."""
    subject = question.subject.replace("_", " ")
    # The original formats the subject with a space before each word, and its template has one more.
    about = f" {subject}" if style == "hendrycks" else subject
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n"

    def ask(q: Question) -> str:
        text = q.text if style == "hendrycks" else q.text.strip()
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, q.choices, strict=False))
        return f"{text}{listed}\nAnswer:"

    solved = [f"{ask(example)} {LETTERS[example.answer]}\n\n" for example in examples]
    continuations = tuple(f" {letter}" for letter in LETTERS[: len(question.choices)])
    return Prompt(lambda k: header + "".join(solved[:k]) + ask(question), len(solved), continuations)


def cloze_prompt(task: Task, question: Question, examples: Sequence[Question]) -> Prompt:
    """The choices are continuations of the task's cloze context."""
    header = task.cloze_header(question.subject)
    solved = [f"{task.cloze_context(example)} {example.choices[example.answer]}\n\n" for example in examples]
    context = task.cloze_context(question)
    continuations = tuple(f" {choice}" for choice in question.choices)
    return Prompt(lambda k: header + "".join(solved[:k]) + context, len(solved), continuations)


def conversation_prompt(
    tokenizer: "PreTrainedTokenizerBase", question: Question, examples: Sequence[Question]
) -> Prompt:
    """The question is the user's turn, a choice begins the assistant's; both are rendered as finetune renders them."""
    template = choose_template("auto", tokenizer)

    def rendered(k: int, choice: str) -> tuple[Rendered, int, int]:
        turns = [
            Turn(role, content)
            for example in examples[:k]
            for role, content in (("user", example.text), ("assistant", example.choices[example.answer]))
        ]
        turns += [Turn("user", question.text), Turn("assistant", choice)]
        result = render(Conversation(tuple(turns), f"question {question.id}"), template, tokenizer)
        return result, *result.spans[-1]

    def text(k: int) -> str:
        result, start, _ = rendered(k, question.choices[0])
        return result.text[:start]

    def continuation(choice: str) -> str:
        # Up to the choice's end: what the template puts before it belongs to the answer, the end-of-turn mark doesn't.
        result, start, end = rendered(0, choice)
        before, _, _ = result.text[start:end].partition(choice)
        return before + choice

    special_tokens = rendered(0, question.choices[0])[0].special_tokens
    return Prompt(text, len(examples), tuple(map(continuation, question.choices)), special_tokens)
