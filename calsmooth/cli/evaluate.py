"""`calsmooth evaluate`."""

from dataclasses import dataclass

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.config import setting
from calsmooth.evaluate.config import ChoicesConfig, EvaluateConfig
from calsmooth.models import BUILT_IN


@dataclass(frozen=True)
class EvaluateCommand(EvaluateConfig):
    """The evaluation, and how to show it."""

    by_subject: bool = setting(False, "Show every subject in the table, however many there are.")


@settings_command(app, EvaluateCommand)
def evaluate(config: EvaluateCommand, output: Output) -> None:
    """Measure a model's accuracy and calibration: multiple choice, or next-token on held-out responses.

    Without --model and --task: the built-in model on the built-in task. Writes predictions.jsonl, results.json and
    reliability.png.
    """
    announce(config)
    from rich.text import Text

    from calsmooth.evaluate.report import remarks, results_table
    from calsmooth.evaluate.run import run

    result = run(config)
    output.show(results_table(result.results, config.by_subject), result=result.results)
    for remark in remarks(result.results, config.by_subject):
        console.say(Text(remark, style="dim"))
    console.say(f"Wrote {result.folder}/: {', '.join(sorted(p.name for p in result.folder.iterdir()))}")


def announce(config: ChoicesConfig) -> None:
    """The first line: what is evaluated, and whether that is the built-in model or task."""
    model = "the built-in model" if config.model == BUILT_IN else config.model
    tasks = ", ".join("the built-in task 'demo'" if name == "demo" else name for name in dict.fromkeys(config.task))
    console.say(f"Evaluating {model} on {tasks}.")
