"""Tokenised data on disk, so that the next run starts at once: in the cache folder, by a hash of what made it.

The hash is taken of everything that decides the tokens: the bytes of the data, the tokenizer with its chat template,
the settings, and the versions of the code. So nothing ever has to be told that an entry is out of date, and the folder
may be deleted at any time.

An entry appears under its name only when it is whole. Of several runs that need the same one, a lock lets the first
make it while the others wait; the lock of a killed process is released by the system.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import calsmooth
from calsmooth import console
from calsmooth.errors import CalsmoothError
from calsmooth.files import cache_folder, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

LAYOUT = 1
"""Of an entry's files. To be raised when they or the making of examples change."""

WORTH_SECONDS = 2.0
"""What was made faster than this isn't kept."""

ABANDONED_SECONDS = 24 * 3600
"""After so long a half-written entry is a killed process's."""


def fingerprint(tokenizer: "PreTrainedTokenizerBase", **settings: Any) -> str:
    """A name for what this tokenizer makes of the data under these settings, which must be plain values."""
    import tokenizers
    import transformers

    made_by = {
        "layout": LAYOUT,
        "versions": [calsmooth.__version__, transformers.__version__, tokenizers.__version__],
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(type(tokenizer)),
        "chat_template": getattr(tokenizer, "chat_template", None),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    described = json.dumps(made_by | settings, sort_keys=True, default=str)
    return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cached(key: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
    """What `make` gives, from the cache if it is there, else made and kept.

    save(value, folder) and load(folder) must be each other's inverse. A cache that can't be written or read costs a
    warning and the time to make the value; what `make` raises is raised.
    """
    import filelock

    entry = cache_folder() / "tokens" / key
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = filelock.FileLock(f"{entry}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            console.say("Waiting for another run, which tokenises the same data ...")
            lock.acquire()
    except OSError as error:
        console.warn(f"{entry.parent}: tokenised data can't be kept there ({error.strerror}); CALSMOOTH_CACHE moves it")
        return make()
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        # Who waits for the removed file still gets its lock. At worst an entry is made twice, and the second dropped.
        stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
        if entry.is_dir():
            try:
                return load(entry)
            except (CalsmoothError, OSError, ValueError, TypeError, KeyError) as error:
                console.warn(f"{entry}: damaged, made again ({' '.join(str(error).split())[:120]})")
                shutil.rmtree(entry, ignore_errors=True)
        started = time.monotonic()
        value = make()
        if time.monotonic() - started >= WORTH_SECONDS:
            _keep(entry, value, save)
        return value


def _keep(entry: Path, value: T, save: Callable[[T, Path], None]) -> None:
    for leftover in entry.parent.glob(".*"):
        with contextlib.suppress(OSError):  # another run may be removing it as well
            if time.time() - leftover.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(leftover)
    try:
        with whole_folder(entry) as folder:
            save(value, folder)
    except OSError as error:
        if entry.is_dir():  # another run was faster
            return
        console.warn(f"{entry.parent}: tokenised data couldn't be kept there ({error.strerror})")
