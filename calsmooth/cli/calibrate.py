"""`calsmooth calibrate`: the recalibration, after an evaluation where there are no predictions yet."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rich.text import Text

from calsmooth import console
from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.cli.app import app
from calsmooth.cli.evaluate import announce
from calsmooth.cli.options import Output, settings_command
from calsmooth.config import Settings, flag_name, setting
from calsmooth.environment import started_processes
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.config import ChoicesConfig
from calsmooth.files import check_run_folder, read_json, run_folder
from calsmooth.models import BUILT_IN

S = TypeVar("S", bound=Settings)

EVALUATION = "evaluation"
"""The folder of the evaluation, where one came first, inside the calibration's."""
FOR_BAKING = ("model", "revision", "dtype", "device")


@dataclass(frozen=True)
class CalibrateCommand(CalibrateConfig, ChoicesConfig):
    """Both configurations' options; `output`, `bins` and `seed` are common to both."""

    resume: bool = setting(False, "Go on with an interrupted calibration: the one in --output.")


@settings_command(app, CalibrateCommand)
def calibrate(config: CalibrateCommand, output: Output) -> None:
    """Recalibrate on one part of the predictions, report calibration before and after on the rest.

    Takes an evaluation's predictions.jsonl or lm-evaluation-harness's samples, or evaluates --model on --task first.
    Says whether the recalibration is worth applying. Writes calibration.json, reliability.png and report.html.
    """
    _refuse_several_processes()
    folder: Path | None = None
    calibrate_config = _part(CalibrateConfig, config)
    model, revision = config.model, config.revision
    if config.predictions is not None:
        _refuse_evaluation_options(config)
        if config.bake is not None:
            model, revision = _evaluated_model(config)
    else:
        announce(config)
    if config.bake is not None:
        # Refused here, before an evaluation that may take long.
        check_run_folder(config.bake, "--bake")
        from calsmooth.calibrate.bake import check_letters

        check_letters(model, revision)
    if config.predictions is None:
        calibrate_config, folder = _evaluate_first(config)
    from calsmooth.calibrate.report import remarks, rows, verdicts, what_was_fitted
    from calsmooth.calibrate.run import run
    from calsmooth.tables import metrics_table

    result = run(calibrate_config, folder)
    found = result.results
    for words, sentence in verdicts(found):
        console.say(Text(f"{words}: {sentence}", style="bold"))
    console.say(Text(what_was_fitted(found)))
    output.show(metrics_table(rows(found)), result=found)
    for note in remarks(found):
        console.say(Text(note, style="dim"))
    console.say(f"Wrote {result.folder}/: {', '.join(sorted(p.name for p in result.folder.iterdir()))}")
    if config.bake is not None:
        if found["fit"]["bounded"]:
            raise CalsmoothError(f"--bake: nothing was baked, for there is no best temperature: {found['notes'][0]}")
        if not (found["verdict"]["apply"] or config.force):
            raise CalsmoothError(
                f"--bake: nothing was baked. {found['verdict']['sentence']} To bake it all the same, add --force"
            )
        _bake(config, config.bake, model, revision, found["temperature"])


def _bake(config: CalibrateCommand, folder: Path, model: str, revision: str | None, temperature: float) -> None:
    from calsmooth.calibrate.bake import bake
    from calsmooth.models import pick_device, pick_dtype

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    baked = bake(model, temperature, folder, revision=revision, dtype=dtype, device=device)
    console.say(
        f"Baked the temperature into {baked.folder}/: {', '.join(baked.changed)}. Loaded again, its logits are "
        f"{model}'s divided by {temperature:.4g}, to {baked.difference:.0e}. Text sampled from it is as if drawn at "
        f"that temperature."
    )


def _evaluated_model(config: CalibrateCommand) -> tuple[str, str | None]:
    """(name, revision) of the model that made the predictions: the one given, or the one that results.json names."""
    assert config.predictions is not None
    if config.model != BUILT_IN:
        return config.model, config.revision
    folder = config.predictions if config.predictions.is_dir() else config.predictions.parent
    results = folder / "results.json"
    if not results.is_file():
        raise UsageError(f"--bake: {folder} has no results.json that names the model; name it with --model")
    found = read_json(results)
    return str(found["model"]), found["config"].get("revision")


def _evaluate_first(config: CalibrateCommand) -> tuple[CalibrateConfig, Path]:
    """(configuration that names the new predictions, folder for both runs' files)."""
    from calsmooth.evaluate.run import run
    from calsmooth.models import model_label

    if config.resume:
        folder = _interrupted(config.output)
    else:
        folder = run_folder(config.output, f"calibrate-{model_label(config.model)}")
    if not (folder / EVALUATION / "results.json").is_file():
        run(_part(ChoicesConfig, config, output=folder / EVALUATION))
    return _part(CalibrateConfig, config, predictions=folder / EVALUATION / "predictions.jsonl"), folder


def _interrupted(output: Path | None) -> Path:
    """The folder of an interrupted calibration: --output, or, if that is the evaluation's inside it, the one around."""
    if output is None:
        raise UsageError("--resume: name the folder of the interrupted calibration with --output")
    folder = output.parent if output.name == EVALUATION else output
    if not (folder / EVALUATION).is_dir() or (folder / "calibration.json").is_file():
        raise UsageError(f"--resume: {folder} holds no interrupted calibration; leave --resume out")
    return folder


def _refuse_several_processes() -> None:
    if started_processes() > 1:
        raise UsageError(
            f"calibrate works in one process, {started_processes()} were started; share the evaluation "
            "(torchrun ... -m calsmooth evaluate) and calibrate its predictions.jsonl without torchrun"
        )


def _refuse_evaluation_options(config: CalibrateCommand) -> None:
    common = {f.name for f in fields(CalibrateConfig)}
    for f in fields(ChoicesConfig):
        needed = config.bake is not None and f.name in FOR_BAKING
        if f.name not in common and not needed and getattr(config, f.name) != f.default:
            raise UsageError(
                f"{flag_name(f)}: {config.predictions} is a finished evaluation; leave the flag out, "
                f"or the file to evaluate anew"
            )


def _part(cls: type[S], config: CalibrateCommand, **changes: Any) -> S:
    """The fields of one of the two configurations."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | changes)
