"""What a person sees while a command runs.

Words for people go to standard output, or to standard error where standard output carries JSON. Progress bars go to
standard error and only to a terminal, so that a piped command stays quiet. rich honours NO_COLOR by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)
_words = _out
_quiet = False


def configure(*, json: bool = False, quiet: bool = False) -> None:
    """Set once by the command line: `json` frees standard output for JSON, `quiet` drops notices and progress."""
    global _words, _quiet
    _words, _quiet = (_err if json else _out), quiet


def say(*what: Any) -> None:
    """A notice, a table, a path that was written: for the reader, never for a parser."""
    if not _quiet:
        _words.print(*what)


def warn(message: str) -> None:
    """Something the user should know about a result; shown even with --quiet."""
    _err.print(f"[yellow]warning:[/yellow] {message}")


def fail(message: str) -> None:
    """The one line with which a command ends when it can't do its work."""
    _err.print("[bold red]error:[/bold red]", end=" ")
    _err.print(message, markup=False)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """A progress bar with elapsed and remaining time; yields `advance(steps=1, note="")`.

    Nothing is drawn where standard error isn't a terminal, or with --quiet.
    """
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_err,
        transient=True,
        disable=_quiet or not _err.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance
