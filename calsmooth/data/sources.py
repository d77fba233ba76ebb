"""Where users keep their rows: a file, files that match a pattern, a folder, the Hugging Face hub; one or a mixture.

A source is written `PLACE[:CONFIGURATION][@REVISION][#SPLIT][=WEIGHT]`, on the command line and in YAML:

    train.jsonl                         one file
    'data/*.jsonl'                      all files that match, in the order of their names
    org/name                            the hub's data set, its split 'train'
    org/name:en@v1.2#train[:10%]=0.3    a configuration, revision, part of a split; a weight in the mixture

A file or folder of exactly that name is taken as such, whatever marks its name holds. In YAML a source may also be a
mapping with the keys `source`, `configuration`, `revision`, `split` and `weight`.
"""

import glob
import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from calsmooth.data.readers import READERS, BadRow, Row, as_row, reader
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.hub import prepare_hub
from calsmooth.models import BUILT_IN

__all__ = ["BadRow", "Part", "Row", "Source", "load_rows", "open_source", "parse_sources", "source_text"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SOURCE = re.compile(r"(?P<place>[\w.-]+(?:/[\w.-]+)?(?::[^@]+)?)(?:@(?P<revision>.+))?")
_WEIGHT = re.compile(r"(?P<rest>.+)=(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)")
_SPLIT = re.compile(r"(?P<rest>[^#]+)#(?P<split>[^#]+)")
MAPPING_KEYS = ("source", "configuration", "revision", "split", "weight")


@dataclass(frozen=True)
class Source:
    """One part of a mixture. place: a path, a pattern, a folder or a hub id, with ':configuration' where it has one.

    weight: of its examples in the mixture, against those of the other sources; None: as many as it has.
    """

    place: str
    revision: str | None = None
    split: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set.

    read: its rows from the beginning. fingerprint: a text that changes when they do.
    """

    name: str
    read: Callable[[], Iterator[Row | BadRow]]
    fingerprint: Callable[[], str]


def parse_sources(texts: Sequence[str], split: str | None = None, revision: str | None = None) -> tuple[Source, ...]:
    """The sources of a mixture; `split` and `revision` are for those folders and hub ids that don't say their own.

    Raises:
        UsageError: nothing is there, something that isn't on the hub is to have a split or a revision, a weight isn't
            a number above 0, or only some of the sources have one.
    """
    sources = [_parse(text) for text in texts]
    unweighted = [s.place for s in sources if s.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise UsageError(f"--dataset {unweighted[0]}: has no weight and others have; give all one (=0.5) or none")
    has_splits, has_revisions = [_has_splits(s.place) for s in sources], [_is_hub_id(s.place) for s in sources]
    if split and not any(has_splits):
        raise UsageError(f"--split {split}: only folders and hub ids have splits, {texts[0]} has none")
    if revision and not any(has_revisions):
        raise UsageError(f"--dataset-revision {revision}: only hub ids have revisions, {texts[0]} has none")
    return tuple(
        replace(s, split=s.split or (split if splits else None), revision=s.revision or (revision if on_hub else None))
        for s, splits, on_hub in zip(sources, has_splits, has_revisions, strict=True)
    )


def source_text(value: Mapping[str, Any], where: str) -> str:
    """A YAML mapping in the syntax of the flag.

    Raises:
        UsageError: a key is unknown, or 'source' isn't there.
    """
    unknown = [key for key in value if key not in MAPPING_KEYS]
    if unknown or not isinstance(value.get("source"), str):
        wrong = f"unknown key '{unknown[0]}'" if unknown else "no text under the key 'source'"
        raise UsageError(f"{where}: {wrong}; a source is text, or a mapping of {', '.join(MAPPING_KEYS)}")
    marks = {"configuration": ":", "revision": "@", "split": "#", "weight": "="}
    return str(value["source"]) + "".join(f"{m}{value[key]}" for key, m in marks.items() if value.get(key) is not None)


def open_source(source: Source, streaming: bool = False) -> list[Part]:
    """The files or the split that a source stands for; nothing of them is read yet.

    streaming: rows of the hub come as they are asked for, and nothing is kept on the disk.

    Raises:
        UsageError: nothing is there, or its type is unknown.
        CalsmoothError: the hub doesn't have it, or can't be reached.
    """
    files = _files(source.place)
    if files:
        return [Part(str(path), partial(reader(path), path), partial(_digest, path)) for path in files]
    if _has_splits(source.place):
        return [_from_datasets(source, streaming)]
    raise _nothing_there(source.place)


def load_rows(
    source: str, *, split: str | None = None, revision: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """All rows of one source, or a random `limit` of them in their own order.

    Args:
        source: see the top of this file; 'demo' is the built-in instruction data.
        split: of a folder or hub data set; 'train' by default.
        revision: branch, tag or commit on the hub.

    Raises:
        UsageError: the source looks like a path and isn't there, or its type is unknown.
        CalsmoothError: it can't be read or fetched, holds no rows, or a row isn't a mapping of columns.
    """
    [parsed] = parse_sources([source], split, revision)
    rows = []
    for part in open_source(parsed):
        for row in part.read():
            if isinstance(row, BadRow):
                raise CalsmoothError(row.why)
            rows.append(row)
    if not rows:
        raise CalsmoothError(f"--dataset {source}: holds no rows")
    return rows if limit is None else [rows[i] for i in choose(len(rows), limit, seed)]


def choose(count: int, limit: int, seed: int) -> list[int]:
    """A random `limit` of the indices below `count` (all, if there are no more), in ascending order."""
    return sorted(random.Random(seed).sample(range(count), min(limit, count)))


def _parse(text: str) -> Source:
    if _exists(text):
        return Source(text)
    rest, weight, split = text, None, None
    if found := _WEIGHT.fullmatch(rest):
        rest, weight = found["rest"], _weight(found["weight"], text)
    if not _exists(rest) and (found := _SPLIT.fullmatch(rest)):
        rest, split = found["rest"], found["split"]
    if _exists(rest) or _looks_like_path(rest):
        if not _exists(rest):
            raise _nothing_there(rest)
        if split and not _has_splits(rest):
            raise UsageError(f"--dataset {text}: a file has no splits; leave '#{split}' out")
        return Source(rest, None, split, weight)
    found = _HUB_SOURCE.fullmatch(rest)
    if not found:
        raise _nothing_there(rest)
    return Source(found["place"], found["revision"], split, weight)


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (0 < weight < math.inf):
        raise UsageError(f"--dataset {source}: a weight must be a number above 0, got '{text}'")
    return weight


def _nothing_there(place: str) -> UsageError:
    if glob.has_magic(place):
        return UsageError(f"--dataset {place}: no file matches; give a file, a pattern, a folder or a hub id")
    return UsageError(f"--dataset {place}: no such file; give a file, a folder or a hub id such as org/name")


def _exists(place: str) -> bool:
    return place == BUILT_IN or (bool(place) and (Path(place).expanduser().is_dir() or bool(_files(place))))


def _looks_like_path(place: str) -> bool:
    return place.startswith((".", "/", "~")) or glob.has_magic(place) or Path(place).suffix.lower() in READERS


def _is_hub_id(place: str) -> bool:
    return not _exists(place) and bool(_HUB_ID.fullmatch(place.split(":", 1)[0]))


def _has_splits(place: str) -> bool:
    return Path(place).expanduser().is_dir() or _is_hub_id(place)


def _files(place: str) -> list[Path]:
    if place == BUILT_IN:
        from calsmooth.demo import TRAIN_FILE

        return [TRAIN_FILE]
    path = Path(place).expanduser()
    if not place or path.is_file():
        return [path] if place else []
    if not glob.has_magic(place):
        return []
    return [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None


def _from_datasets(source: Source, streaming: bool) -> Part:
    folder, split = Path(source.place).expanduser(), source.split or "train"
    online = folder.is_dir() or prepare_hub()
    import datasets

    name, _, configuration = (str(folder), "", "") if folder.is_dir() else source.place.partition(":")
    try:
        rows = datasets.load_dataset(
            name, configuration or None, split=split, revision=source.revision, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())[:200] if online else "the hub can't be reached and the cache doesn't hold it"
        then = "check the name, --split and the network, or give a local file"
        if folder.is_dir():
            then = "expected JSON, JSONL, CSV or parquet files there, named after their split where there are several"
        raise CalsmoothError(f"--dataset {source.place}: could not be loaded: {why}; {then}") from error

    def read() -> Iterator[Row | BadRow]:
        for number, row in enumerate(rows, 1):
            yield as_row(row, f"{source.place} ({split}), row {number}")

    # `datasets` keeps a fingerprint of what it has loaded; what is streamed has none and is never cached.
    return Part(f"{source.place} ({split})", read, lambda: str(rows._fingerprint))
