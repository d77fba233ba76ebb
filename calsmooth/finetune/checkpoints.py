"""The checkpoints of a run's folder. One that is being written begins with a dot until it is whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from calsmooth.errors import CalsmoothError

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError, SafetensorError)
"""What reading a damaged file of a checkpoint can raise: torch's, pickle's, json's and safetensors' errors."""


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. Half-written ones begin with a dot and are none."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(ValueError):
            found.append((int(path.name.removeprefix(PREFIX)), path))
    return [path for _, path in sorted(found)]


def remove_checkpoints(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[: -keep or None]:
        shutil.rmtree(path, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Give a written checkpoint its name: its sizes are noted and it is on the disk before it appears.

    Raises:
        OSError: the disk is full or broken; nothing has appeared.
    """
    sizes = {str(p.relative_to(staged)): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in [p for p in staged.rglob("*") if p.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)


def check_whole(checkpoint: Path) -> int:
    """The step that a checkpoint was made at.

    Raises:
        CalsmoothError: a file of it is missing, has another size than when it was written, or can't be read.
    """
    with readable(checkpoint):
        sizes = json.loads((checkpoint / MANIFEST).read_text())
        for name, size in sizes.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found:,} bytes, not the {size:,} that were written")
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into one line that says what to do."""
    try:
        yield
    except UNREADABLE as error:
        others = [path.name for path in checkpoints(checkpoint.parent) if path != checkpoint]
        then = f"go on from {others[-1]}" if others else "start from the beginning"
        raise CalsmoothError(
            f"{checkpoint}: not a readable checkpoint ({brief(error)}); remove this folder and --resume will {then}"
        ) from error


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
