"""Going on with a run: which folder, with which settings, and what of it is whole."""

import dataclasses
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth.config import load
from calsmooth.errors import UsageError
from calsmooth.files import read_json, write_json, write_text
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.prior import UNIFORM, UNIGRAM

if TYPE_CHECKING:
    from calsmooth.finetune.plan import Plan

COMPLETED = "COMPLETED"
"""Written last of all: a folder without it is an interrupted run's."""

DATA = "data.json"
"""What the run's data came to, so that it isn't gone on with on other data."""

# Where a run lies and how it is watched may differ when it is resumed; what it computes may not.
FREE_ON_RESUME = {"cache", "output", "resume", "dry_run", "keep_last", "log_every", "save_every", "report_to"}


def find_run(config: FinetuneConfig) -> Path | None:
    """The folder to resume; None where the named one is empty, so that a run may be started with --resume, too."""
    if config.output is not None:
        if not config.output.exists() or not any(config.output.iterdir()):
            return None
        if not (config.output / "config.yaml").is_file():
            raise UsageError(f"--output {config.output}: holds no run to resume (no config.yaml); give a run's folder")
        return config.output
    name = config.default_name()
    mine = re.compile(re.escape(name) + r"(-\d+)?")  # beta0.1 and beta0.1-2, but not beta0.15
    started = [p.parent for p in Path("runs").glob("*/config.yaml") if mine.fullmatch(p.parent.name)]
    runs = [folder for folder in started if not (folder / COMPLETED).exists()]
    if not runs:
        raise UsageError(f"--resume: no unfinished run of the name runs/{name}; give its folder with --output")
    return max(runs, key=lambda p: (p / "config.yaml").stat().st_mtime)


def as_started(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """The settings that the run was started with; those that are asked for now must be the same or left open.

    Raises:
        UsageError: a setting differs.
    """
    old = load(FinetuneConfig, {}, folder / "config.yaml")
    changes = {}
    for f in dataclasses.fields(FinetuneConfig):
        was, now = getattr(old, f.name), getattr(config, f.name)
        if f.name in FREE_ON_RESUME:
            changes[f.name] = was if now in (None, f.default) and f.name not in ("resume", "dry_run") else now
        elif now is not None and now != was:
            raise UsageError(
                f"--resume: the run in {folder} has {f.name} = {was}, now {now} is asked for; resume with "
                f"--config {folder / 'config.yaml'}, or leave --resume out to start a new run"
            )
    return dataclasses.replace(old, **changes)


def write_data_summary(plan: "Plan", folder: Path) -> None:
    write_json(folder / DATA, data_summary(plan))


def check_same_data(plan: "Plan", folder: Path) -> None:
    """A run goes on with the examples that it began with.

    Raises:
        UsageError: the data has changed since.
    """
    if not (folder / DATA).exists():
        return
    was, now = read_json(folder / DATA), data_summary(plan)
    if was.get("smoothing_prior") != now.get("smoothing_prior"):
        raise UsageError(
            f"--resume: {plan.config.smoothing_prior} (smoothing_prior) isn't what the run in {folder} began with; "
            "bring the old file back, or leave --resume out to start a new run"
        )
    if was != now:
        raise UsageError(
            f"--resume: the data isn't what the run in {folder} began with ({was['examples']:,} examples of "
            f"{was['tokens']:,} tokens then, {now['examples']:,} of {now['tokens']:,} now, checksum {was['checksum']} "
            f"then, {now['checksum']} now); bring the old data back, or leave --resume out to start a new run"
        )


def data_summary(plan: "Plan") -> dict[str, Any]:
    examples = plan.examples.examples
    checksum = zlib.crc32(examples.learned.data, zlib.crc32(examples.tokens.data))
    summary = {"examples": len(examples), "tokens": len(examples.tokens), "checksum": f"{checksum:08x}"}
    if plan.config.smoothing_prior not in (UNIFORM, UNIGRAM):
        summary["smoothing_prior"] = f"{zlib.crc32(Path(plan.config.smoothing_prior).read_bytes()):08x}"
    return summary


def remove_half_written(folder: Path) -> None:
    """What a killed process was about to write: their names begin with a dot until they are whole."""
    for path in [*folder.glob(".*"), *(folder / "checkpoints").glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a line that was cut short by a crash."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                break
            if values["step"] > step:
                break
            kept.append(values)
    write_text(path, "".join(json.dumps(values) + "\n" for values in kept))
