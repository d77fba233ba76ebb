"""--report-to wandb and trackio: the lines of metrics.jsonl, as they are written, to the same run after --resume.

TensorBoard's files are `calsmooth.finetune.recording.tensorboard`'s; a value has one name in all three.
"""

import inspect
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from calsmooth import console
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune.config import FinetuneConfig

Record = Callable[[dict[str, Any]], None]


@contextmanager
def reports(config: FinetuneConfig, folder: Path, done: int, writes: bool = True) -> Iterator[Record]:
    """Yields `report(values)`, which hands on a line of metrics. done: steps that were taken before, by the same run.

    The settings of the run are its configuration there. writes: whether this process reports at all.

    Raises:
        CalsmoothError: wandb doesn't answer.
    """
    with ExitStack() as stack:
        sinks: list[Callable[..., None]] = []
        if writes and "wandb" in config.report_to:
            sinks.append(stack.enter_context(_wandb(config, folder)))
        if writes and "trackio" in config.report_to:
            sinks.append(stack.enter_context(_trackio(config, folder, done)))

        def report(values: dict[str, Any]) -> None:
            renamed = {reported_name(name): value for name, value in values.items() if name != "step"}
            for sink in sinks:
                sink({**renamed, "train/global_step": values["step"]}, step=values["step"])

        yield report


def reported_name(name: str) -> str:
    """eval_nll -> eval/nll, loss -> train/loss: as transformers names them for TensorBoard."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def check_login(config: FinetuneConfig) -> None:
    """wandb would ask at the terminal who one is, in the middle of a job.

    Raises:
        UsageError: it doesn't know.
    """
    if "wandb" not in config.report_to:
        return
    import wandb

    if not _online():
        return
    # Older versions can't say it without asking.
    if "prompt" in inspect.signature(wandb.login).parameters and not wandb.login(prompt=False):
        raise UsageError("--report-to wandb: there is no API key; run `wandb login`, or set WANDB_MODE=offline")


def _online() -> bool:
    import wandb

    return wandb.setup().settings.mode in ("online", "run", "shared")


@contextmanager
def _wandb(config: FinetuneConfig, folder: Path) -> Iterator[Callable[..., None]]:
    import wandb

    # Its own folders tell its number: [offline-]run-DATE-ID.
    earlier = sorted((folder / "wandb").glob("*run-*-*"), key=lambda path: path.name.rsplit("run-", 1)[1])
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "calsmooth"),
            name=folder.name,
            id=earlier[-1].name.rsplit("-", 1)[1] if earlier else None,
            resume="allow",
            dir=str(folder),
            config=config.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise CalsmoothError(f"--report-to wandb: {error}; go on without it, or with WANDB_MODE=offline") from error
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    console.say(f"wandb: {run.url}" if _online() else f"wandb: offline; later, `wandb sync {Path(run.dir).parent}`")
    try:
        yield run.log
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


@contextmanager
def _trackio(config: FinetuneConfig, folder: Path, done: int) -> Iterator[Callable[..., None]]:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", "calsmooth")
    with redirect_stdout(io.StringIO()):  # half a screen
        # Another run of this name, begun elsewhere or before, stays another one.
        trackio.init(project=project, name=folder.name, config=config.to_dict(), resume="allow" if done else "never")
    console.say(f"trackio: run {folder.name}; look at it with `trackio show --project {project}`")
    try:
        yield trackio.log
    finally:
        with redirect_stdout(io.StringIO()):
            trackio.finish()
