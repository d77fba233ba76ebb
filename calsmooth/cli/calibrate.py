"""`calsmooth calibrate`: the recalibration, after an evaluation where there are no predictions yet."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from calsmooth import console
from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.cli.app import app
from calsmooth.cli.evaluate import announce
from calsmooth.cli.options import Output, settings_command
from calsmooth.config import Settings, flag_name
from calsmooth.errors import UsageError
from calsmooth.evaluate.config import ChoicesConfig

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class CalibrateCommand(CalibrateConfig, ChoicesConfig):
    """Both configurations' options; `output`, `bins` and `seed` are common to both."""


@settings_command(app, CalibrateCommand)
def calibrate(config: CalibrateCommand, output: Output) -> None:
    """Fit a temperature on one part of the predictions, report calibration before and after on the rest.

    Takes an evaluation's predictions.jsonl, or evaluates --model on --task first. Writes calibration.json and
    reliability.png.
    """
    folder = None
    calibrate_config = _part(CalibrateConfig, config)
    if config.predictions is not None:
        _refuse_evaluation_options(config)
    else:
        calibrate_config, folder = _evaluate_first(config)
    from rich.text import Text

    from calsmooth.calibrate.run import run
    from calsmooth.tables import metrics_table

    result = run(calibrate_config, folder)
    found = result.results
    console.say(
        f"Temperature [bold]{found['temperature']:.4g}[/bold], fitted on {found['n_fit']:,} questions; "
        f"below, the other {found['n_report']:,}."
    )
    rows = [("before", found["before"]), ("after", found["after"])]
    for name, task in found.get("tasks", {}).items():
        rows += [(f"  {name} before", task["before"]), (f"  {name} after", task["after"])]
    output.show(metrics_table(rows), result=found)
    for note in found["notes"]:
        console.say(Text(note, style="dim"))
    console.say(f"Wrote {result.folder}/: {', '.join(sorted(p.name for p in result.folder.iterdir()))}")


def _evaluate_first(config: CalibrateCommand) -> tuple[CalibrateConfig, Any]:
    """(configuration that names the new predictions, folder for both runs' files)."""
    announce(config)
    from calsmooth.evaluate.run import run
    from calsmooth.files import run_folder
    from calsmooth.models import model_label

    folder = run_folder(config.output, f"calibrate-{model_label(config.model)}")
    evaluation = run(_part(ChoicesConfig, config, output=folder / "evaluation"))
    return _part(CalibrateConfig, config, predictions=evaluation.folder / "predictions.jsonl"), folder


def _refuse_evaluation_options(config: CalibrateCommand) -> None:
    common = {f.name for f in fields(CalibrateConfig)}
    for f in fields(ChoicesConfig):
        if f.name not in common and getattr(config, f.name) != f.default:
            raise UsageError(
                f"{flag_name(f)}: {config.predictions} is a finished evaluation; leave the flag out, "
                f"or the file to evaluate anew"
            )


def _part(cls: type[S], config: CalibrateCommand, **changes: Any) -> S:
    """The fields of one of the two configurations."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | changes)
