"""Where files are kept, how they are written (whole or not at all) and read; run folders."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calsmooth.errors import CalsmoothError, UsageError


def cache_folder() -> Path:
    """Where calsmooth keeps what outlives a run: $CALSMOOTH_CACHE, else calsmooth/ in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("CALSMOOTH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "calsmooth"


def write_bytes(path: Path, content: bytes) -> Path:
    """Write through a temporary file in the same folder and rename: a reader sees the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def write_text(path: Path, text: str) -> Path:
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """JSON with two-space indentation; NaN is refused, because most readers refuse it."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file.

    Raises:
        CalsmoothError: the file can't be read or isn't JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise CalsmoothError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed value) for each line that isn't blank.

    Raises:
        CalsmoothError: the file can't be read, or a line isn't JSON; the message names file and line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise CalsmoothError(f"{path}, line {number}: not valid JSON ({error})") from None
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise CalsmoothError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears under its own name only once it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_folder(output: Path | None, default_name: str) -> Path:
    """A new, empty folder for a run's files, created here.

    A folder that the user named must be empty or new; without one it is runs/`default_name`, numbered where that
    is taken, so that the same command can be repeated and nothing is overwritten.

    Raises:
        UsageError: the named folder holds files already, is a file or can't be written.
        CalsmoothError: the folder can't be made.
    """
    if output is None:
        output = next(p for p in _numbered(Path("runs") / default_name) if not _occupied(p))
    check_run_folder(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalsmoothError(f"--output {output}: can't be made ({error.strerror}); give another folder") from None
    return output


def check_run_folder(output: Path, flag: str = "--output") -> None:
    """For commands that work for long before they write: is the folder that the user named empty or new?

    Raises:
        UsageError: it holds files already, is a file, or can't be written.
    """
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{flag} {output}: {'' if there == output else f'{there} '}is a file; give a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {output}: {there} can't be written; give another folder")
    if _occupied(output):
        raise UsageError(f"{flag} {output}: holds files already; give an empty or new folder")


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _umask() -> int:
    # The only way to read it is to set it; mkstemp made the file private, which a result shouldn't be.
    mask = os.umask(0)
    os.umask(mask)
    return mask
