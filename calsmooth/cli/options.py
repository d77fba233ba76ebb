"""Turns a configuration class into a Typer command, so that fields, flags, YAML keys and --help can't drift apart."""

import inspect
import json as json_module
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from calsmooth import console
from calsmooth.config import Settings, field_type, from_flag, load, load_grid

C = TypeVar("C", bound=Settings)

_METAVARS: dict[type, str] = {bool: "", str: "TEXT", int: "N", float: "X", Path: "PATH"}


@dataclass(frozen=True)
class Output:
    """Where a command's result goes: tables for people, or with --json one JSON value alone on standard output."""

    json: bool

    def show(self, *renderables: Any, result: Mapping[str, Any] | list[Any]) -> None:
        if self.json and console.speaks():
            print(json_module.dumps(result, indent=2, allow_nan=False, ensure_ascii=False))
        elif not self.json:
            console.say(*renderables)


def settings_command(
    app: typer.Typer,
    config_class: type[C],
    name: str | None = None,
    sweep: Callable[[list[tuple[dict[str, Any], C]], Output], None] | None = None,
) -> Callable[[Callable[[C, Output], None]], Callable[[C, Output], None]]:
    """Register `function(config, output)` as a command whose flags are `config_class`'s fields.

    Adds --config (YAML; flags win), --json, --quiet and --debug, which every command has. Where the YAML file holds a
    list where one value is expected, `sweep` is called instead, with every combination (`calsmooth.config.load_grid`).
    """

    def register(function: Callable[[C, Output], None]) -> Callable[[C, Output], None]:
        def command(**given: Any) -> None:
            json, quiet = given.pop("json"), given.pop("quiet")
            given.pop("debug")  # read by `main`, which decides what an error looks like
            file = given.pop("config")
            console.configure(json=json, quiet=quiet)
            flags = {key: from_flag(config_class, key, value) for key, value in given.items() if value is not None}
            grid = load_grid(config_class, flags, file) if sweep else [({}, load(config_class, flags, file))]
            if sweep is not None and grid[0][0]:
                sweep(grid, Output(json=json))
            else:
                function(grid[0][1], Output(json=json))

        parameters = [_parameter(config_class, f) for f in fields(config_class)] + _common_parameters()
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        # A docstring's lines are the source's, not the terminal's.
        command.__doc__ = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        off = frozenset(f.name for f in fields(config_class) if f.default is False)
        app.command(name or function.__name__.replace("_", "-"), cls=_with_short_help(off))(command)
        return function

    return register


def _with_short_help(off: frozenset[str]) -> type[TyperCommand]:
    """A command whose --help leaves out the --no-FLAG of what is `off` anyway: its column would be everyone's."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            for parameter in self.params:
                if parameter.name in off:
                    parameter.secondary_opts = []
            super().format_help(ctx, formatter)

    return Command


def _parameter(config_class: type[Settings], f: "Field[Any]") -> inspect.Parameter:
    element, is_tuple, _ = field_type(config_class, f.name)
    m = f.metadata
    shown = m["shown_default"] or ("" if f.default is None or f.default is False else _show(f.default))
    # Typer itself would show None, which is what an unset flag is, or put the words in parentheses.
    help_text = m["help"] + (f" One of: {', '.join(m['choices'])}." if m["choices"] else "")
    help_text += f" [dim]\\[default: {shown}][/dim]" if shown else ""
    metavar = m["metavar"] or _METAVARS[element]
    common: dict[str, Any] = {
        "help": help_text,
        "metavar": f"{metavar},..." if is_tuple and metavar and not m["metavar"] else metavar,
        "rich_help_panel": m["panel"],
        "show_default": False,
    }
    info: Any
    if m["argument"]:
        info = typer.Argument(**common)
    else:
        dashed = f.name.replace("_", "-")
        # What a file switches on, a flag can switch off.
        flags = m["flags"] or ((f"--{dashed}/--no-{dashed}",) if element is bool else (f"--{dashed}",))
        info = typer.Option(*flags, **common)
    # Unset flags arrive as None, so that a YAML value can be told from a default. Numbers are read as in a YAML file.
    annotation: Any = (list[str] if is_tuple else str if element in (int, float) else element) | None
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info]
    )


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _common_parameters() -> list[inspect.Parameter]:
    panel = "All commands"

    def option(name: str, kind: Any, default: Any, *flags: str, help: str) -> inspect.Parameter:
        metavar = "FILE" if kind == Path | None else ""
        info = typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    return [
        option(
            "config",
            Path | None,
            None,
            "--config",
            help="YAML file with these options as keys. Flags win; --no-FLAG for a switch that is on in it.",
        ),
        option("json", bool, False, "--json", help="Print the result as JSON alone on standard output."),
        option("quiet", bool, False, "--quiet", "-q", help="No notices and no progress bars."),
        option("debug", bool, False, "--debug", help="On an error, show the Python traceback."),
    ]
