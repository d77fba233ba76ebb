"""Scores on disk while an evaluation runs: each unit's is appended when it is done, and --resume reads them back.

They lie in the run folder, in `unfinished/`, which is removed when the results are written: a folder that still has it
is an interrupted evaluation's. `key.json` in it says what is evaluated (the hashes of model and data, the prompts, the
precision): scores of anything else are never mixed in.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.errors import UsageError
from calsmooth.files import check_run_folder, read_json, run_folder, write_json, write_text

UNFINISHED = "unfinished"

Key = Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """folder: the run's. done: by unit, what an interrupted evaluation had found."""

    folder: Path
    done: Mapping[str, dict[str, Any]]

    @contextmanager
    def open(self, rank: int) -> Iterator[Callable[[str, dict[str, Any]], None]]:
        """Yields `write(unit, record)`; each process has a file of its own."""
        folder = self.folder / UNFINISHED
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"process-{rank}.jsonl", "w", encoding="utf-8") as file:

            def write(unit: str, record: dict[str, Any]) -> None:
                file.write(json.dumps({"unit": unit, **record}, allow_nan=False) + "\n")
                file.flush()

            yield write

    def close(self) -> None:
        """The results are written: the scores aren't needed any more."""
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Can a new evaluation begin in this folder? Known before a model is loaded.

    Raises:
        UsageError: it holds files already; where these are an interrupted evaluation's, --resume is named.
    """
    if (folder / UNFINISHED).is_dir():
        raise UsageError(
            f"--output {folder}: holds an interrupted evaluation; go on with --resume, or give an empty or new folder"
        )
    check_run_folder(folder)


def start(folder: Path | None, default_name: str, key: Key) -> Ledger:
    """A new evaluation's ledger, in a new or empty folder (runs/`default_name` where none is named).

    Raises:
        UsageError: the folder holds files already.
    """
    if folder is not None:
        check_new(folder)
    folder = run_folder(folder, default_name)
    write_json(folder / UNFINISHED / "key.json", key)
    return Ledger(folder, {})


def resume(folder: Path | None, default_name: str, key: Key) -> Ledger:
    """The ledger of an interrupted evaluation: of the folder, or the newest of the default name.

    A named folder that is empty or new is started in.

    Raises:
        UsageError: there is no interrupted evaluation, or it is one of something else; the message says of what.
    """
    if folder is None:
        found = [p.parent for p in Path("runs").glob(f"{default_name}*/{UNFINISHED}")]
        mine = [
            p for p in found if p.name.removeprefix(default_name).removeprefix("-").isdigit() or p.name == default_name
        ]
        if not mine:
            raise UsageError(
                f"--resume: no interrupted evaluation in runs/{default_name}; give its folder with --output"
            )
        folder = max(mine, key=lambda p: (p / UNFINISHED / "key.json").stat().st_mtime)
    elif not folder.exists() or not any(folder.iterdir()):
        return start(folder, default_name, key)
    kept = folder / UNFINISHED
    if not (kept / "key.json").is_file():
        state = "is complete" if (folder / "results.json").is_file() else "holds no interrupted evaluation"
        raise UsageError(f"--resume: {folder} {state}; leave --resume out and give an empty or new folder")
    _check_same(folder, read_json(kept / "key.json"), key)
    done = _read(kept)
    # All in one file, so that the processes, as many as there are this time, can begin theirs anew.
    lines = (json.dumps({"unit": unit, **record}) + "\n" for unit, record in done.items())
    write_text(kept / "done.jsonl", "".join(lines))
    for file in kept.glob("process-*.jsonl"):
        file.unlink()
    return Ledger(folder, done)


def _check_same(folder: Path, old: Key, new: Key) -> None:
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            raise UsageError(
                f"--resume: the evaluation in {folder} was begun with {name} {_brief(old.get(name))}, now it is "
                f"{_brief(new.get(name))}; ask for the same, or leave --resume out and give a new folder"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that the interrupted process was writing
            done[record.pop("unit")] = record
    return done
