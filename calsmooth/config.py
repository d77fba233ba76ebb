"""Configurations: frozen dataclasses whose fields are at once the YAML keys, the command's flags and its --help.

A room declares its options once::

    @dataclass(frozen=True)
    class EvaluateConfig(Settings):
        shots: int = setting(5, "Solved examples before each question.", minimum=0)

and `load` builds one from a YAML file and from flags, which win. Everything is validated when the object is made,
so code that receives a configuration never checks it again.
"""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from calsmooth.errors import UsageError

T = TypeVar("T", bound="Settings")


def setting(
    default: Any,
    help: str,
    *,
    shown_default: str | None = None,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    argument: bool = False,
    flags: tuple[str, ...] = (),
    panel: str | None = None,
    metavar: str | None = None,
    from_mapping: Callable[[Mapping[str, Any], str], str] | None = None,
) -> Any:
    """A field of a `Settings` class.

    `minimum` and `maximum` are allowed values, `above` and `below` are not. `shown_default` says in words what None
    stands for. `argument=True` makes it a positional argument of the command. `flags` replaces the flag that is
    made from the field's name (`batch_size` -> `--batch-size`). `panel` groups flags in --help. `from_mapping` lets a
    YAML file spell a value that is text as a mapping: called with it and with where it stands, it gives the text.
    """
    metadata = {
        "help": help,
        "shown_default": shown_default,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "argument": argument,
        "flags": flags,
        "panel": panel,
        "metavar": metavar,
        "from_mapping": from_mapping,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of every configuration: checks each field's choices and range when the object is made.

    Raises:
        UsageError: a value is outside its range or choices; the message names the flag, the value and the range.
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    _check(flag_name(f), one, f.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (paths as strings, tuples as lists), ready for YAML or JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load(cls: type[T], flags: Mapping[str, Any], file: Path | None = None) -> T:
    """A configuration from a YAML file and flags; a flag that is not None wins over the file, the file over defaults.

    Raises:
        UsageError: the file is missing or isn't a YAML mapping, a key is unknown (the nearest one is suggested),
            or a value has the wrong type or range.
    """
    raw = _read_yaml(cls, file) if file is not None else {}
    values = {name: _coerce(cls, name, value, f"{file}: '{name}'") for name, value in raw.items()}
    values.update({name: value for name, value in flags.items() if value is not None})
    return cls(**values)


def load_grid(cls: type[T], flags: Mapping[str, Any], file: Path | None) -> list[tuple[dict[str, Any], T]]:
    """As `load`, for files that hold a list where one value is expected (`beta: [0, 0.1]`): every combination.

    Returns:
        (what distinguishes it, the configuration) of each; the last list's values vary fastest. Without such a list,
        or where a flag takes its place, one configuration that nothing distinguishes.

    Raises:
        UsageError: as `load`, or a list is empty or names a value twice.
    """
    raw = _read_yaml(cls, file) if file is not None else {}
    flags = {name: value for name, value in flags.items() if value is not None}
    raw = {name: value for name, value in raw.items() if name not in flags}
    axes = {}
    for name, value in raw.items():
        is_tuple = field_type(cls, name)[1]
        if isinstance(value, list) and (not is_tuple or any(isinstance(one, list) for one in value)):
            axes[name] = [_coerce(cls, name, one, f"{file}: '{name}'") for one in value]
            if not value or len(set(axes[name])) < len(value):
                raise UsageError(f"{file}: '{name}' is {value}; expected a list of different values")
    fixed = {name: _coerce(cls, name, v, f"{file}: '{name}'") for name, v in raw.items() if name not in axes}
    combinations = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [(values, cls(**fixed, **flags, **values)) for values in combinations]


def from_flag(cls: type[Settings], name: str, given: Any) -> Any:
    """A field's value from what stands behind its flag; of a field with several, a list whose parts commas separate.

    Raises:
        UsageError: it has the wrong type.
    """
    element, is_tuple, _ = field_type(cls, name)
    where = flag_name(cls.__dataclass_fields__[name])
    if not is_tuple:
        return _coerce_one(element, given, where)
    items = [part.strip() for item in given for part in str(item).split(",") if part.strip()]
    return tuple(_coerce_one(element, item, where) for item in items) or None


def flag_name(f: "dataclasses.Field[Any]") -> str:
    """The name by which messages call a field: its flag, or its metavar where it is a positional argument."""
    if f.metadata.get("argument"):
        return f.metadata.get("metavar") or f.name.upper()
    flags = f.metadata.get("flags") or ()
    return flags[0] if flags else "--" + f.name.replace("_", "-")


def field_type(cls: type[Settings], name: str) -> tuple[type, bool, bool]:
    """(element type, is a tuple of them, may be None) of a field."""
    annotation = typing.get_type_hints(cls)[name]
    optional = False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = len(inner) < len(typing.get_args(annotation))
        annotation = inner[0]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True, optional
    return annotation, False, optional


def _read_yaml(cls: type[Settings], file: Path) -> dict[str, Any]:
    """The values of a file's keys as YAML gives them; the keys are known."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {file}: can't be read ({error.strerror}); give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected a mapping of options such as 'beta: 0.1', got a {type(content).__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{file}: unknown key '{key}'; {hint}")
        values[name] = value
    return values


def _coerce(cls: type[Settings], name: str, value: Any, where: str) -> Any:
    element, is_tuple, optional = field_type(cls, name)
    if value is None:
        if optional:
            return None
        raise UsageError(f"{where} is empty; give a value or leave the key out")
    from_mapping = cls.__dataclass_fields__[name].metadata.get("from_mapping")
    items = value if is_tuple and isinstance(value, list) else [value]
    items = [from_mapping(item, where) if from_mapping and isinstance(item, dict) else item for item in items]
    coerced = tuple(_coerce_one(element, item, where) for item in items)
    return coerced if is_tuple else coerced[0]


def _coerce_one(element: type, value: Any, where: str) -> Any:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    hint = "; YAML takes yes, no, on and off for that: quote the word" if (type(value), element) == (bool, str) else ""
    wrong = UsageError(f"{where} must be {words.get(element, element.__name__)}, got {value!r}{hint}")
    if element is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool | list | dict):
        raise wrong
    try:
        # YAML 1.1 reads 2e-5 (no dot) as text, so numbers may arrive as strings.
        if element is int:
            number = float(value)
            if number != int(number):
                raise wrong
            return int(number)
        return element(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata.get("choices") or ()
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got '{value}'{hint}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    limits = [
        ("at least", metadata.get("minimum"), lambda limit: value >= limit),
        ("above", metadata.get("above"), lambda limit: value > limit),
        ("at most", metadata.get("maximum"), lambda limit: value <= limit),
        ("below", metadata.get("below"), lambda limit: value < limit),
    ]
    if not all(limit is None or holds(limit) for _, limit, holds in limits):
        expected = " and ".join(f"{word} {limit:g}" for word, limit, _ in limits if limit is not None)
        raise UsageError(f"{name} must be {expected}, got {value:g}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
