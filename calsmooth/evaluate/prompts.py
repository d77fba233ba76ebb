"""What is asked of the model, as text: the prompt of a question and the continuations whose probability is its answer.

The words of a question come in two formats:

- letter: the choices are listed and the continuations are " A", " B", ... In the `hendrycks` style the text is the
  original MMLU script's byte for byte (two spaces after "about"); `lm-eval` is lm-evaluation-harness's (one space, the
  question stripped).
- cloze: the choices aren't shown, each is a continuation of the question, as lm-evaluation-harness scores HellaSwag and
  ARC.

Either is put into plain text, as a base model is asked, or into a chat: what stands before the questions is the system
turn, a question the user's, and the continuation begins the assistant's.
"""

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calsmooth.data.formats import Conversation, Turn
from calsmooth.data.templates import choose_template, render
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import LETTERS, Question
from calsmooth.evaluate.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("hendrycks", "lm-eval")
ANSWER = "\u27e8the answer of the model\u27e9"
"""Stands for the answer while a chat is rendered, to find where it begins; no template and no question has it."""


@dataclass(frozen=True)
class Prompt:
    """`text(k)` is the prompt with the first k of its `shots` solved examples; any continuation follows it directly.

    openings: for each choice, what stands between the text and its continuation without being scored; none where empty.
    answer_bytes: UTF-8 length of each choice's scored text; None where that is a letter.
    special_tokens: whether the tokenizer is to add its own (a chat template has written them already).
    """

    text: Callable[[int], str]
    shots: int
    continuations: tuple[str, ...]
    openings: tuple[str, ...] = ()
    answer_bytes: tuple[int, ...] | None = None
    special_tokens: bool = True


@dataclass(frozen=True)
class Wording:
    """A task in one format. name: what results call it.

    answers: for each choice, what follows the context as given, and the text that is scored, a space before it.
    """

    name: str
    header: Callable[[str], str]
    context: Callable[[Question], str]
    answers: Callable[[Question], list[tuple[str, str]]]
    letters: bool

    def answer_bytes(self, question: Question) -> tuple[int, ...] | None:
        return None if self.letters else tuple(len(text.encode("utf-8")) for _, text in self.answers(question))

    def solved(self, question: Question) -> tuple[str, str]:
        """(all that is asked, the right answer)."""
        given, answer = self.answers(question)[question.answer]
        return self.context(question) + given, answer


def letters(task: Task, style: str) -> Wording:
    """The choices listed under letters; the answer is a letter."""

    def context(question: Question) -> str:
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
        return f"{task.letter_text(question, style)}{listed}\nAnswer:"

    def answers(question: Question) -> list[tuple[str, str]]:
        return [("", letter) for letter in LETTERS[: len(question.choices)]]

    return Wording(style, lambda subject: task.letter_header(subject, style), context, answers, letters=True)


def cloze(task: Task) -> Wording:
    """The choices are continuations of the task's cloze context."""
    return Wording("continuation", task.cloze_header, task.cloze_context, task.cloze_answers, letters=False)


def plain_prompt(wording: Wording, question: Question, examples: Sequence[Question]) -> Prompt:
    """One text: header, solved examples, question."""
    header, context = wording.header(question.subject), wording.context(question)
    solved = [f"{asked} {answer}\n\n" for asked, answer in map(wording.solved, examples)]
    answers = wording.answers(question)
    return Prompt(
        text=lambda k: header + "".join(solved[:k]) + context,
        shots=len(solved),
        continuations=tuple(f" {answer}" for _, answer in answers),
        openings=tuple(given for given, _ in answers) if any(given for given, _ in answers) else (),
        answer_bytes=wording.answer_bytes(question),
    )


class Chat:
    """Puts questions into conversations, as a tokenizer's template writes them.

    template: chat, or alpaca for tokenizers without a chat template. shots_as: solved examples are turns of their own,
    or text within the one user turn.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str, shots_as: str = "turns") -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.shots_as = shots_as
        self._takes_system: bool | None = None

    def prompt(self, wording: Wording, question: Question, examples: Sequence[Question]) -> Prompt:
        """The continuations begin where the template puts the assistant's answer.

        lm-evaluation-harness takes the line break that may end the generation prompt for part of every continuation,
        so that its log-probabilities are lower than ours by that line break's, the same for all choices.

        Raises:
            CalsmoothError: the template refuses the conversation or rewrites the question.
        """
        context, answers = wording.context(question), wording.answers(question)
        openings: tuple[str, ...] = ()
        if any(given for given, _ in answers):
            # What the choices' conversations have in common is shared; the template's text after the given part isn't.
            texts = [self._render(wording, question, examples[:0], context + given)[0] for given, _ in answers]
            shared = len(os.path.commonprefix(texts))  # noqa: RUF071 (characters are what is meant)
            openings = tuple(text[shared:] for text in texts)
        asked = context + answers[0][0]

        def text(k: int) -> str:
            whole, _ = self._render(wording, question, examples[:k], asked)
            return whole.removesuffix(openings[0]) if openings else whole

        return Prompt(
            text=text,
            shots=len(examples),
            # Templates strip what they are given, or ought to.
            continuations=tuple(answer.strip() for _, answer in answers),
            openings=openings,
            answer_bytes=wording.answer_bytes(question),
            special_tokens=self._render(wording, question, examples[:0], asked)[1],
        )

    def _render(
        self, wording: Wording, question: Question, examples: Sequence[Question], asked: str
    ) -> tuple[str, bool]:
        """(the conversation up to the answer, whether the tokenizer still has to add its special tokens)."""
        header = wording.header(question.subject)
        turns: list[Turn] = []
        solved = [wording.solved(example) for example in examples]
        if self.shots_as == "text":
            asked = "".join(f"{context} {answer}\n\n" for context, answer in solved) + asked
            solved = []
        for context, answer in solved:
            turns += [Turn("user", context), Turn("assistant", answer)]
        turns.append(Turn("user", asked))
        if header and self._system():
            turns.insert(0, Turn("system", header))
        elif header:
            turns[0] = Turn("user", header + turns[0].content)
        return self._before_answer((*turns, Turn("assistant", ANSWER)), f"question {question.id}")

    def _before_answer(self, turns: tuple[Turn, ...], where: str) -> tuple[str, bool]:
        if self.template == "chat":
            text, special_tokens = self._chat(turns, where), False
        else:
            rendered = render(Conversation(turns, where), self.template, self.tokenizer)
            text, special_tokens = rendered.text, rendered.special_tokens
        before, found, _ = text.rpartition(ANSWER)
        if not found:
            raise CalsmoothError(f"{where}: the chat template doesn't write the assistant's answer as it is given")
        return before, special_tokens

    def _chat(self, turns: tuple[Turn, ...], where: str) -> str:
        from jinja2.exceptions import TemplateError

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise CalsmoothError(f"{where}: the chat template refuses this conversation ({error})") from None

    def _system(self) -> bool:
        """Whether the template writes a system turn; where it doesn't, the first user turn takes its text."""
        if self._takes_system is None:
            turns = (Turn("system", "Be brief."), Turn("user", "Is it so?"), Turn("assistant", ANSWER))
            try:
                self._takes_system = "Be brief." in self._before_answer(turns, "system turn")[0]
            except CalsmoothError:
                self._takes_system = False
        return self._takes_system


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises:
    UsageError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("--chat-template: this model's tokenizer has no chat template; leave the flag out")


def prompter(
    task: Task,
    *,
    format: str,
    style: str,
    chat: str | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[str, Callable[[Question, Sequence[Question]], Prompt]]:
    """(the prompt's name for results, the function that makes a question's prompt with its solved examples).

    format: letter or cloze. chat: turns or text, how solved examples are put into a chat; None for plain text, except
    for a task that is a conversation by itself.

    Raises:
        UsageError: a chat is asked for and the tokenizer has no chat template.
    """
    wording = letters(task, style) if format == "letter" else cloze(task)
    if chat is not None:
        require_chat_template(tokenizer)
        conversation = Chat(tokenizer, "chat", chat)
    elif task.conversation and format == "cloze":
        conversation = Chat(tokenizer, choose_template("auto", tokenizer))
    else:
        return wording.name, lambda question, examples: plain_prompt(wording, question, examples)
    name = wording.name if wording.letters else "conversation"
    return name, lambda question, examples: conversation.prompt(wording, question, examples)
