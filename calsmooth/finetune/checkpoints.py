"""The checkpoints of a run's folder. One that is being written begins with a dot until it is whole."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from calsmooth.errors import CalsmoothError

PREFIX = "checkpoint-"


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


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint was made at.

    Raises:
        CalsmoothError: its state can't be read.
    """
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalsmoothError(
            f"{checkpoint}: not a readable checkpoint ({brief(error)}); remove this folder and --resume again"
        ) from None


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
