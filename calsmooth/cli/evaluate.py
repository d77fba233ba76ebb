"""`calsmooth evaluate`: an evaluation, or a comparison of finished ones."""

from dataclasses import dataclass, fields
from pathlib import Path

from rich.text import Text

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.config import flag_name, setting
from calsmooth.errors import UsageError
from calsmooth.evaluate.config import ChoicesConfig, EvaluateConfig
from calsmooth.models import BUILT_IN

OF_COMPARISONS = ("runs", "compare", "output", "seed")
DIFFERENCES_SHOWN = 8
"""More than these are left to the report."""


@dataclass(frozen=True)
class EvaluateCommand(EvaluateConfig):
    """The evaluation, and how to show it; or the runs to compare instead."""

    runs: tuple[str, ...] = setting(
        (),
        "With --compare, two or more: folders of finished runs, FOLDER or NAME=FOLDER; tables are in this order.",
        argument=True,
        metavar="RUN",
    )
    compare: bool = setting(False, "Compare the finished runs given as RUN...: no model is run.")
    by_subject: bool = setting(False, "Show every subject in the table, however many there are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs and not self.compare:
            raise UsageError(f"{self.runs[0]}: RUN goes with --compare; to evaluate a model, name it with --model")
        for f in fields(self):
            if self.compare and f.name not in OF_COMPARISONS and getattr(self, f.name) != f.default:
                raise UsageError(f"{flag_name(f)}: --compare reads finished runs and evaluates nothing; leave it out")


@settings_command(app, EvaluateCommand)
def evaluate(config: EvaluateCommand, output: Output) -> None:
    """Measure a model's accuracy and calibration: multiple choice, or next-token on held-out responses.

    Without --model and --task: the built-in model on the built-in task. Writes predictions.jsonl, results.json,
    reliability.png and report.html. With --compare RUN RUN: tables and pictures of finished runs side by side.
    """
    if config.compare:
        _compare(config, output)
        return
    announce(config)
    from calsmooth.evaluate.report import remarks, results_table
    from calsmooth.evaluate.run import run

    result = run(config)
    output.show(results_table(result.results, config.by_subject), result=result.results)
    _say_dim(remarks(result.results, config.by_subject))
    _say_files(result.folder)


def announce(config: ChoicesConfig) -> None:
    """The first line: what is evaluated, and whether that is the built-in model or task."""
    model = "the built-in model" if config.model == BUILT_IN else config.model
    tasks = ", ".join("the built-in task 'demo'" if name == "demo" else name for name in dict.fromkeys(config.task))
    console.say(f"Evaluating {model} on {tasks}.")


def _compare(config: EvaluateCommand, output: Output) -> None:
    from rich.console import Group

    from calsmooth.evaluate.comparison import compare
    from calsmooth.evaluate.comparison_report import difference_lines, rich_tables

    result = compare(config.runs, config.output, config.seed)
    labels = [run["label"] for run in result.results["runs"]]
    output.show(Group(*rich_tables(labels, result.results["tasks"])), result=result.results)
    differences = difference_lines(result.results)
    if len(differences) > DIFFERENCES_SHOWN:
        more = len(differences) - DIFFERENCES_SHOWN
        differences = [*differences[:DIFFERENCES_SHOWN], f"and {more} more: see report.html"]
    _say_dim([*differences, *result.results["notes"]])
    _say_files(result.folder)


def _say_dim(lines: list[str]) -> None:
    for line in lines:
        console.say(Text(line, style="dim"))


def _say_files(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    console.say(f"Wrote {folder}/: {', '.join(names)}")
