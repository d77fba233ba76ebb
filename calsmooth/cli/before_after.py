"""What `calsmooth finetune` measures before and after: tasks of `calsmooth evaluate`, on the old model and the new.

A run's folder gets before/ and after/, what `calsmooth evaluate` writes for each, calibration.png with both side by
side, and both in the model card.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.errors import UsageError
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.tasks import RESPONSES
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.models import BUILT_IN

if TYPE_CHECKING:
    from rich.table import Table

    from calsmooth.processes import Processes

PICTURE = "calibration.png"
BEFORE, AFTER = "before", "after"
RESULTS = "results.json"

WORDS = {"demo": "questions"}
"""How the built-in task is called where it is measured without being asked for."""

Evaluations = Mapping[str, dict[str, Any]]
"""Moment (before, after) -> the content of results.json."""


def what_to_measure(config: FinetuneConfig) -> EvaluateConfig | None:
    """The evaluation of the model before: what --eval-task names, or the built-in model's own; None for nothing.

    Raises:
        UsageError: a task doesn't exist, or its options don't fit.
    """
    if not config.eval_task:
        if config.model != BUILT_IN or config.dataset != (BUILT_IN,):
            return None
        from calsmooth.demo import HELDOUT_FILE

        return EvaluateConfig(
            task=("demo", "responses"), dataset=str(HELDOUT_FILE), template=config.template, device=config.device
        )
    try:
        return EvaluateConfig(
            model=config.model,
            revision=config.revision,
            task=config.eval_task,
            data_dir=config.eval_data_dir,
            dataset=config.eval_dataset,
            template=config.template if RESPONSES in config.eval_task else None,  # the same before and after
            limit=config.eval_limit,
            dtype=config.dtype,
            device=config.device,
        )
    except UsageError as error:
        raise UsageError(str(error).replace("--task", "--eval-task").replace("--limit", "--eval-limit")) from None


def measure_before(
    measuring: EvaluateConfig, run_folder: Path | None, scratch: Path, alike: Path | None = None
) -> list[Path]:
    """A folder below `scratch` with the old model's results; none where the run that is gone on with has them.

    alike: the folder of a finished run of which the same was measured before.
    """
    if run_folder is not None and (run_folder / BEFORE / RESULTS).exists():
        return []
    if alike is not None:
        return [Path(shutil.copytree(alike / BEFORE, scratch / BEFORE))]
    return [_evaluate(measuring, scratch / BEFORE, "Before")]


def measure_after(measuring: EvaluateConfig, folder: Path, model: Path, processes: "Processes") -> Evaluations:
    """Evaluate the new model, once, also where a finished run is looked at again; draw both and complete the card."""
    from calsmooth.files import read_json
    from calsmooth.finetune.results import write_cards
    from calsmooth.models import model_description
    from calsmooth.plots import plot_reliability, save_figure, stored_reliability

    if not processes.by_first((folder / AFTER / RESULTS).exists):
        # What is there is of an evaluation that was interrupted.
        processes.by_first(lambda: shutil.rmtree(folder / AFTER, ignore_errors=True))
        _evaluate(replace(measuring, model=str(model), revision=None), folder / AFTER, "After")
    found = {moment: read_json(folder / moment / RESULTS) for moment in (BEFORE, AFTER)}
    if processes.first and not (folder / PICTURE).exists():
        panels = [
            stored_reliability(results["tasks"][task], f"{WORDS.get(task, task)}, {moment}")
            for task in measuring.task
            for moment, results in found.items()
        ]
        # Before and after side by side, a task below the other: no wider than a page.
        figure = plot_reliability(panels, columns=2)
        figure.suptitle(model_description(str(model)), fontsize=10)
        save_figure(figure, folder / Path(PICTURE).stem)
        write_cards(folder, {moment: results["tasks"] for moment, results in found.items()})
    return found


def before_after_table(evaluations: Evaluations) -> "Table":
    from calsmooth.tables import metrics_table

    tasks = evaluations[AFTER]["tasks"]
    rows = [
        (f"{WORDS.get(task, task)}, {moment}", results["tasks"][task])
        for task in tasks
        for moment, results in evaluations.items()
    ]
    return metrics_table(rows, first="held-out")


def _evaluate(config: EvaluateConfig, folder: Path, moment: str) -> Path:
    from calsmooth.evaluate.run import run

    console.say(f"{moment}: measuring {', '.join(WORDS.get(task, task) for task in config.task)}.")
    return run(replace(config, output=folder)).folder
