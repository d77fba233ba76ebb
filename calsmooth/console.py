"""What a person sees while a command runs.

Words for people go to standard output, or to standard error where standard output carries JSON. Progress bars go to
standard error and only to a terminal, so that a piped command stays quiet. rich honours NO_COLOR by itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)
_words = _out
_quiet = False


def configure(*, json: bool = False, quiet: bool = False) -> None:
    """Set once by the command line: `json` frees standard output for JSON, `quiet` drops notices and progress."""
    global _words, _quiet
    _words, _quiet = (_err if json else _out), quiet or not speaks()


def speaks() -> bool:
    """Whether this is the process that talks to the user: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def say(*what: Any) -> None:
    """A notice, a table, a path that was written: for the reader, never for a parser."""
    if not _quiet:
        _words.print(*what)


def warn(message: str) -> None:
    """Something the user should know about a result; shown even with --quiet, by the process that talks to the user."""
    if speaks():
        _err.print(f"[yellow]warning:[/yellow] {message}")


def fail(message: str) -> None:
    """The one line with which a command ends when it can't do its work."""
    _err.print("[bold red]error:[/bold red]", end=" ")
    _err.print(message, markup=False)


class _NoteBelow(Progress):
    """A progress bar whose note has a line of its own."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(description: str, total: float | None, note_below: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar with elapsed and remaining time; yields `advance(steps=1, note="")`.

    note_below: the note is long and gets a line of its own. Nothing is drawn where standard error isn't a terminal, or
    with --quiet.
    """
    bar = (_NoteBelow if note_below else Progress)(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        *([] if note_below else [TextColumn("{task.fields[note]}")]),
        console=_err,
        transient=True,
        # Steps may take minutes: the remaining time is told from all of them.
        speed_estimate_period=3600 if note_below else 30,
        disable=_quiet or not _err.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance
