"""`calsmooth entropy-bound`."""

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.entropy_bound.config import DEFAULT_RHO, EntropyBoundConfig


@settings_command(app, EntropyBoundConfig)
def entropy_bound(config: EntropyBoundConfig, output: Output) -> None:
    """How confident a head can be: the least entropy that its size allows (Theorem 4.2), and what smoothing can do.

    Without --model: over vocabulary and hidden sizes (Figure 4). With --model: a real head's singular value, its hidden
    states, the floor, and the entropies that it really reaches on a text; several models stand side by side.
    """
    if config.model:
        _models(config, output)
    else:
        _sizes(config.resolve(), output)


def _sizes(config: EntropyBoundConfig, output: Output) -> None:
    from dataclasses import asdict

    from calsmooth.entropy_bound.report import points_table, smoothing_table
    from calsmooth.entropy_bound.run import run

    points, files = run(config)
    if config.rho == DEFAULT_RHO:
        console.say(f"rho = {config.rho:g}, an illustration: the paper gives none for its figure (--rho sets it).")
    output.show(points_table(points), "", smoothing_table(points), result=[asdict(point) for point in points])
    console.say("Wrote " + ", ".join(map(str, files)))


def _models(config: EntropyBoundConfig, output: Output) -> None:
    from rich.text import Text

    from calsmooth.entropy_bound.advice import ASSUMPTIONS
    from calsmooth.entropy_bound.report import models_table
    from calsmooth.entropy_bound.run_models import run

    measured, files = run(config)
    output.show(models_table(measured), result=[one.report for one in measured])
    console.say()
    for one in measured:
        for advice in one.report["smoothing"]:
            console.say(Text(f"{one.label}, beta = {advice['beta']:g}: {advice['verdict']}"))
    console.say(Text(ASSUMPTIONS, style="dim"))
    console.say("Wrote " + ", ".join(map(str, files)))
