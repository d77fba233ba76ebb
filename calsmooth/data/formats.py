"""The shapes in which people keep instruction data, each turned into a `Conversation`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError, UsageError


@dataclass(frozen=True)
class Turn:
    """One message. `input` is Alpaca's second field, which its own template sets apart."""

    role: str  # system, user or assistant
    content: str
    input: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the assistant's are what a model learns.

    verbatim: the text is already in its final form (prompt/completion data, plain text): no template may touch it.
    """

    turns: tuple[Turn, ...]
    where: str
    verbatim: bool = False


def detect_format(row: Row) -> str:
    """The name of the format whose columns this row has.

    Raises:
        CalsmoothError: no format fits; the message names the columns found and the known formats.
    """
    for name, (columns, _) in FORMATS.items():
        if any(set(needed) <= row.columns.keys() for needed in columns):
            return name
    known = "; ".join(f"{name}: {' or '.join('+'.join(c) for c in columns)}" for name, (columns, _) in FORMATS.items())
    raise CalsmoothError(f"{row.where}: columns {_names(row)} fit no known format ({known})")


def to_conversation(row: Row, format: str) -> Conversation:
    """A row of the named format as a conversation that ends with the assistant.

    Raises:
        UsageError: no such format.
        CalsmoothError: a column is missing, empty or of the wrong type; the message names the row and the column.
    """
    if format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}, got '{format}'")
    conversation = FORMATS[format][1](row)
    if not any(turn.role == "assistant" for turn in conversation.turns):
        raise CalsmoothError(f"{row.where}: no assistant turn, so nothing to learn")
    return conversation


def _alpaca(row: Row) -> Conversation:
    user = Turn("user", _text(row, "instruction"), _text(row, "input", required=False))
    return Conversation((user, Turn("assistant", _text(row, "output"))), row.where)


def _prompt_completion(row: Row) -> Conversation:
    completion = "completion" if "completion" in row.columns else "response"
    turns = (Turn("user", _text(row, "prompt")), Turn("assistant", _text(row, completion)))
    return Conversation(turns, row.where, verbatim=True)


def _plain_text(row: Row) -> Conversation:
    """Every token is a target: a text is what the model says, with nothing before it."""
    return Conversation((Turn("assistant", _text(row, "text")),), row.where, verbatim=True)


def _messages(row: Row) -> Conversation:
    return _turns(row, "messages", "role", "content", {r: r for r in ("system", "user", "assistant")})


def _sharegpt(row: Row) -> Conversation:
    roles = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    messages = row.columns.get("conversations")
    first = messages[0] if isinstance(messages, list) and messages else None
    # Newer sets keep the column's name and take the keys of 'messages'.
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _turns(row, "conversations", *keys, roles)


def _turns(row: Row, column: str, role_key: str, content_key: str, roles: dict[str, str]) -> Conversation:
    if column not in row.columns:
        raise CalsmoothError(f"{row.where}: no column '{column}'; found {_names(row)}")
    messages = row.columns[column]
    if not isinstance(messages, list) or not messages:
        raise CalsmoothError(f"{row.where}: column '{column}' must be a list of messages, got {_short(messages)}")
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"{row.where}: {column}, message {number}"
        if not isinstance(message, dict) or role_key not in message or content_key not in message:
            raise CalsmoothError(f"{where}: expected '{role_key}' and '{content_key}', got {_short(message)}")
        role, content = message[role_key], message[content_key]
        if not isinstance(role, str) or role not in roles:
            raise CalsmoothError(f"{where}: '{role_key}' must be one of {', '.join(roles)}, got {_short(role)}")
        if not isinstance(content, str) or (roles[role] == "assistant" and not content.strip()):
            raise CalsmoothError(f"{where}: '{content_key}' must be text, got {_short(content)}")
        _check_unicode(content, f"{where}: '{content_key}'")
        turns.append(Turn(roles[role], content))
    return Conversation(tuple(turns), row.where)


def _text(row: Row, column: str, required: bool = True) -> str:
    value = row.columns.get(column)
    if value is None and not required:
        return ""
    if column not in row.columns:
        raise CalsmoothError(f"{row.where}: no column '{column}'; found {_names(row)}")
    if not isinstance(value, str):
        raise CalsmoothError(f"{row.where}: column '{column}' must be text, got {_short(value)}")
    if required and not value.strip():
        raise CalsmoothError(f"{row.where}: column '{column}' is empty")
    _check_unicode(value, f"{row.where}: column '{column}'")
    return value


def _check_unicode(text: str, what: str) -> None:
    # JSON's \u escapes can spell half of a surrogate pair, which no tokenizer can read.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise CalsmoothError(f"{what} isn't Unicode text: character {error.start + 1} is {half}, half a pair") from None


def _names(row: Row) -> str:
    return ", ".join(map(str, row.columns)) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# name: (alternatives of columns by which it is known, reader). The first that fits is taken; plain text is the last,
# because sets of every kind also keep a rendered 'text' beside their columns.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Row], Conversation]]] = {
    "messages": ((("messages",),), _messages),
    "sharegpt": ((("conversations",),), _sharegpt),
    "alpaca": ((("instruction", "output"),), _alpaca),
    "prompt": ((("prompt", "completion"), ("prompt", "response")), _prompt_completion),
    "text": ((("text",),), _plain_text),
}

VERBATIM = {"prompt", "text"}
"""Formats whose text is in its final form already: no template is used."""
