"""A conversation as text, with the stretches of it that are the assistant's.

Text is rendered whole and tokenised whole; labels follow from character spans. So no token ever spans a seam between
pieces that were tokenised apart, and training sees the very tokens that inference will.

A chat template that marks the assistant's part itself ({% generation %} ... {% endgeneration %}) is taken at its word.
For any other, a turn's part is what it adds to the prompt that precedes it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calsmooth.data.formats import Conversation
from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("auto", "chat", "alpaca", "tulu")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """text: the whole conversation. spans: (start, end) of what the model has to say, end-of-turn mark included.

    special_tokens: whether the tokenizer still has to add its own (a chat template writes them itself).
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    special_tokens: bool


def choose_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """'chat', 'alpaca' or 'tulu': what `name` means for this tokenizer ('auto' is chat where it has a chat template).

    A chat template that `as_chat_template` made is known again, so that a model that was trained with 'alpaca' goes on
    with it.

    Raises:
        UsageError: no such template, or 'chat' was asked for and the tokenizer has no chat template.
    """
    if name not in TEMPLATES:
        raise UsageError(f"--template must be one of {', '.join(TEMPLATES)}, got '{name}'")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name == "auto":
        name = "chat" if has_chat else "alpaca"
    if name == "chat" and not has_chat:
        raise UsageError("--template chat: this model's tokenizer has no chat template; use --template alpaca or tulu")
    if name == "chat":
        ours = (t for t in _AS_CHAT_TEMPLATE if tokenizer.chat_template == as_chat_template(t, tokenizer))
        return next(ours, name)
    return name


def render(conversation: Conversation, template: str, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """The conversation under 'chat', 'alpaca' or 'tulu'; prompt/completion rows and plain text are left as they are.

    Raises:
        CalsmoothError: the chat template refuses the conversation, or rewrites earlier text when a turn is added, so
            that the assistant's part can't be told.
    """
    if conversation.verbatim:
        return _join([(turn.content, turn.role == "assistant") for turn in conversation.turns], tokenizer)
    if template == "alpaca":
        return _join(_alpaca_pieces(conversation), tokenizer)
    if template == "tulu":
        return _join(_tulu_pieces(conversation), tokenizer)
    return _chat(conversation, tokenizer)


def _join(pieces: list[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    text, spans = "", []
    for piece, learned in pieces:
        start = len(text)
        text += piece
        if learned:
            end = tokenizer.eos_token or ""
            text += "" if text.endswith(end) else end  # prompt/completion text may bring its own marks
            spans.append((start, len(text)))
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return Rendered(text, tuple(spans), special_tokens=not begun)


_INTRO = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request."
)
_WITH_INPUT = ", paired with an input that provides further context"


def _alpaca_pieces(conversation: Conversation) -> list[tuple[str, bool]]:
    """The template of Stanford Alpaca; more turns repeat its sections."""
    has_input = any(turn.input for turn in conversation.turns)
    system = [turn.content for turn in conversation.turns if turn.role == "system"]
    intro = _INTRO.format(context=_WITH_INPUT if has_input else "")
    pieces = [("\n\n".join(system) if system else intro, False)]
    for turn in conversation.turns:
        if turn.role == "user":
            section = f"\n\n### Instruction:\n{turn.content}"
            section += f"\n\n### Input:\n{turn.input}" if turn.input else ""
            pieces.append((section, False))
        elif turn.role == "assistant":
            pieces += [("\n\n### Response:\n", False), (turn.content, True)]
    return pieces


def _tulu_pieces(conversation: Conversation) -> list[tuple[str, bool]]:
    """The template of open-instruct's Tulu models: a line for the role, then what it says."""
    pieces: list[tuple[str, bool]] = []
    for turn in conversation.turns:
        # A response ends with the end-of-sequence token, which is its own to say; the line break after it isn't.
        seam = "\n" if pieces and pieces[-1][1] else ""
        if turn.role == "assistant":
            pieces += [(f"{seam}<|assistant|>\n", False), (turn.content, True)]
        else:
            content = f"{turn.content}\n\n{turn.input}" if turn.input else turn.content
            pieces.append((f"{seam}<|{turn.role}|>\n{content}\n", False))
    return pieces


# What the assistant says, with its end mark unless it brings that itself.
_SAID = (
    "{% set end = eos_token or '' %}"
    "{% generation %}{{ m.content if m.content.endswith(end) else m.content + end }}{% endgeneration %}"
)
# The line breaks are written as strings: Hugging Face's renderer drops those that follow a tag. A message may have an
# 'input' beside its 'content', as a row of Alpaca's format has one.
_AS_CHAT_TEMPLATE = {
    "alpaca": (
        "{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}"
        "{% if system %}{{ system | join('\\n\\n') }}"
        "{% elif messages | selectattr('input') | list %}{{ WITH_INPUT }}{% else %}{{ WITHOUT_INPUT }}{% endif %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '\\n\\n### Instruction:\\n' + m.content }}"
        "{% if m.input %}{{ '\\n\\n### Input:\\n' + m.input }}{% endif %}"
        "{% elif m.role == 'assistant' %}{{ '\\n\\n### Response:\\n' }}SAID{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    )
    .replace("WITH_INPUT", repr(_INTRO.format(context=_WITH_INPUT)))
    .replace("WITHOUT_INPUT", repr(_INTRO.format(context="")))
    .replace("SAID", _SAID),
    "tulu": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}SAID"
        "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
        "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}"
        "{% if m.input %}{{ '\\n\\n' + m.input }}{% endif %}{{ '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ).replace("SAID", _SAID),
}


def as_chat_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """'alpaca' or 'tulu' as a chat template for this tokenizer, so that a model trained with it is asked with it.

    Messages are {role, content}, and a user's may have an `input`, which Alpaca's layout sets apart. Tokens are those
    of `render`. None for 'chat', which the tokenizer has already.
    """
    jinja = _AS_CHAT_TEMPLATE.get(template)
    if jinja is None:
        return None
    # Text from a chat template is tokenised without the tokenizer's own marks.
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + _after_bos(template, tokenizer) + jinja if adds_bos else jinja


def _after_bos(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What stands behind a beginning token that is written out, so that the text has the tokens that it has by itself.

    Some sentencepiece tokenizers read a word at the beginning of a text, but not one behind a token, as if a space came
    before it.
    """
    begins = "Below" if template == "alpaca" else "<|user|>"
    wanted = tokenizer(begins)["input_ids"]
    for between in ("", " "):
        written = f"{tokenizer.bos_token}{between}{begins}"
        if tokenizer(written, add_special_tokens=False)["input_ids"] == wanted:
            return between
    return ""


def _chat(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    messages = [
        {"role": t.role, "content": f"{t.content}\n\n{t.input}" if t.input else t.content} for t in conversation.turns
    ]

    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return _marked(conversation, messages, template, tokenizer)

    def rendered(count: int, prompt: bool = False) -> str:
        with _refusals(conversation):
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    if conversation.turns[0].role == "assistant":
        raise CalsmoothError(
            f"{conversation.where}: starts with the assistant, which a chat template can't; use --template alpaca"
        )
    whole = rendered(len(messages))
    spans = []
    for i, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        # What the template writes after its end-of-turn mark (usually a line break) is never the model's to say.
        before, after = rendered(i, prompt=True), rendered(i + 1).rstrip()
        if not after.startswith(before):
            before = rendered(i)  # a template whose generation prompt differs from what it writes for a turn
        if not (after.startswith(before) and whole.startswith(after)):
            raise CalsmoothError(
                f"{conversation.where}: the chat template rewrites earlier text when a turn is added, so the "
                "assistant's part can't be told; use --template alpaca"
            )
        spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans), special_tokens=False)


def _marked(
    conversation: Conversation, messages: list[dict[str, str]], template: str, tokenizer: "PreTrainedTokenizerBase"
) -> Rendered:
    # What apply_chat_template(..., return_assistant_tokens_mask=True) does before it tokenises.
    from transformers.utils.chat_template_utils import render_jinja_template

    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    with _refusals(conversation):
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )
    (text,), (marks,) = rendered
    end_mark = tokenizer.eos_token or ""
    # Some templates close their mark before the end of the turn, which a model has to learn to say.
    spans = [(start, end + len(end_mark) * text.startswith(end_mark, end)) for start, end in marks]
    if not spans:
        raise CalsmoothError(f"{conversation.where}: the chat template marks nothing here as the assistant's")
    return Rendered(text, tuple(spans), special_tokens=False)


@contextmanager
def _refusals(conversation: Conversation) -> Iterator[None]:
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        raise CalsmoothError(f"{conversation.where}: the chat template refuses this conversation ({error})") from None
