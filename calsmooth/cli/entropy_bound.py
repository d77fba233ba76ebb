"""`calsmooth entropy-bound`."""

from typing import TYPE_CHECKING

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.entropy_bound.config import DEFAULT_RHO, EntropyBoundConfig
from calsmooth.entropy_bound.families import family_of

if TYPE_CHECKING:
    from rich.table import Table

    from calsmooth.entropy_bound.run import Point


@settings_command(app, EntropyBoundConfig)
def entropy_bound(config: EntropyBoundConfig, output: Output) -> None:
    """How confident a language-model head can be: the least entropy that its size allows (Theorem 4.2, Figure 4)."""
    from dataclasses import asdict

    from calsmooth.entropy_bound.run import run

    points, files = run(config)
    if config.rho == DEFAULT_RHO:
        console.say(f"rho = {config.rho:g}, an illustration: the paper gives none for its figure (--rho sets it).")
    output.show(_table(points), result=[asdict(point) for point in points])
    console.say("Wrote " + ", ".join(map(str, files)))


def _table(points: "list[Point]") -> "Table":
    from rich.table import Table

    table = Table(
        title=f"Least attainable entropy of a head (Theorem 4.2), rho = {points[0].rho:g}",
        caption="floor: least entropy, nats; gap: (log |V| - floor) / log |V|; max p: largest probability of a token",
    )
    for name in ("|V|", "D", "rho √D", "floor", "log |V|", "gap", "max p"):
        table.add_column(name, justify="right")
    table.add_column("family")
    for i, point in enumerate(points):
        last = i + 1 == len(points) or points[i + 1].vocab != point.vocab
        table.add_row(
            f"{point.vocab:,}",
            str(point.hidden),
            f"{point.radius:.2f}",
            f"{point.entropy_lower_bound:.4g}",
            f"{point.entropy_upper_bound:.2f}",
            f"{point.normalized_gap:.4g}",
            f"{point.max_probability:.4g}",
            family_of(point.vocab),
            end_section=last,
        )
    return table
