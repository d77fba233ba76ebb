"""The demo's table: `python -m calsmooth.demo.compare --seeds 0,1,2 --beta 0,0.1`.

Fine-tunes the built-in model with each label smoothing and seed and evaluates it on the held-out questions and on the
tokens of held-out responses, through the same functions as `calsmooth finetune` and `calsmooth evaluate`. Prints the
model's numbers before, each run's after, and each beta's mean over the seeds; writes them to compare.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from rich.table import Table

from calsmooth import console
from calsmooth.demo import HELDOUT_FILE
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.run import run as evaluate
from calsmooth.files import run_folder, write_json
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.run import run as finetune
from calsmooth.models import BUILT_IN

TASKS = {"demo": "questions", "responses": "tokens"}
METRICS = {"accuracy": "acc.", "ece": "ECE", "nll": "NLL"}


def main() -> int:
    parser = argparse.ArgumentParser("python -m calsmooth.demo.compare", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seeds", type=_numbers(int), default=[0, 1, 2], help="for example 0,1,2 (the default)")
    parser.add_argument("--beta", type=_numbers(float), default=[0.0, 0.1], help="for example 0,0.1 (the default)")
    parser.add_argument("--output", type=Path, help="new or empty folder for the runs (default: runs/demo-compare)")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    console.configure(json=arguments.json)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        folder = run_folder(arguments.output, "demo-compare")
        result = compare(arguments.seeds, arguments.beta, folder)
        write_json(folder / "compare.json", result)
    except CalsmoothError as error:
        console.fail(str(error))
        return error.exit_code
    if arguments.json:
        print(json.dumps(result, indent=2))
    console.say(table(result))
    console.say(f"Runs and compare.json: {folder}")
    return 0


def compare(seeds: Sequence[int], betas: Sequence[float], folder: Path) -> dict[str, Any]:
    """Fine-tune and evaluate each combination below `folder`.

    Returns `before` (metrics by task), `runs` (a list of `beta`, `seed`, `seconds` and metrics by task) and `mean` (a
    list of `beta` and the mean metrics by task over the seeds).

    Raises:
        UsageError, CalsmoothError: what `finetune` and `evaluate` raise.
    """
    before = _measure(BUILT_IN, folder / "before")
    runs: list[dict[str, Any]] = []
    for beta in betas:
        for seed in seeds:
            console.say(f"beta = {beta:g}, seed {seed} ({len(runs) + 1} of {len(betas) * len(seeds)})")
            run = folder / f"beta{beta:g}-seed{seed}"
            tuned = finetune(FinetuneConfig(beta=beta, seed=seed, output=run, keep_last=0))
            runs.append(
                {
                    "beta": beta,
                    "seed": seed,
                    "seconds": tuned.summary["seconds"],
                    **_measure(str(tuned.model), run / "after"),
                }
            )
    mean = [{"beta": beta, **_mean([run for run in runs if run["beta"] == beta])} for beta in betas]
    return {"before": before, "runs": runs, "mean": mean}


def table(result: dict[str, Any]) -> Table:
    """`compare`'s result for people: the model before, then each beta's mean over its seeds and each seed."""
    shown = Table(
        title="The built-in model before and after fine-tuning",
        caption="questions: held-out, multiple choice; tokens: of held-out responses",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("beta", "seed", *(f"{words}\n{name}" for words in TASKS.values() for name in METRICS.values())):
        shown.add_column(name, justify="right")
    shown.add_row("before", "", *_cells(result["before"]), end_section=True)
    for mean in result["mean"]:
        shown.add_row(f"{mean['beta']:g}", "mean", *_cells(mean), style="bold")
        for run in result["runs"]:
            if run["beta"] == mean["beta"]:
                shown.add_row("", str(run["seed"]), *_cells(run))
        shown.add_section()
    return shown


def _measure(model: str, folder: Path) -> dict[str, dict[str, float]]:
    config = EvaluateConfig(model=model, task=tuple(TASKS), dataset=str(HELDOUT_FILE), output=folder)
    found = evaluate(config).results["tasks"]
    return {task: {name: found[task][name] for name in METRICS} for task in TASKS}


def _mean(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {task: {name: fmean(run[task][name] for run in runs) for name in METRICS} for task in TASKS}


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row[task][name]:.3f}" for task in TASKS for name in METRICS]


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}s"  # argparse names it in its message
    return parse


if __name__ == "__main__":
    raise SystemExit(main())
