"""From sizes to the points of Theorem 4.2, its figure and its files."""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from calsmooth.entropy_bound.bound import (
    entropy_bound,
    entropy_bound_asymptote,
    max_probability,
    normalized_entropy_gap,
)
from calsmooth.entropy_bound.config import EntropyBoundConfig
from calsmooth.entropy_bound.plot import plot_gap_curves, prepare_gap_curves
from calsmooth.files import run_folder, write_json, write_text
from calsmooth.plots import save_figure


@dataclass(frozen=True)
class Point:
    """One head. Entropies in nats."""

    vocab: int
    hidden: int
    rho: float
    radius: float  # rho sqrt(D): the largest norm of the logits
    entropy_lower_bound: float
    entropy_upper_bound: float  # log |V|
    entropy_asymptote: float
    normalized_gap: float
    max_probability: float


def compute_points(config: EntropyBoundConfig) -> list[Point]:
    """Every vocabulary with every hidden size, in the order given."""
    points = []
    for vocab in config.vocab:
        for hidden in config.hidden:
            head = (vocab, hidden, config.rho)
            points.append(
                Point(
                    *head,
                    radius=float(config.rho * np.sqrt(hidden)),
                    entropy_lower_bound=float(entropy_bound(*head)),
                    entropy_upper_bound=float(np.log(vocab)),
                    entropy_asymptote=float(entropy_bound_asymptote(*head)),
                    normalized_gap=float(normalized_entropy_gap(*head)),
                    max_probability=float(max_probability(*head)),
                )
            )
    return points


def run(config: EntropyBoundConfig) -> tuple[list[Point], list[Path]]:
    """The points, and the files written: entropy_bound.json, .csv, .png and .svg in the output folder.

    Raises:
        UsageError: the output folder holds files already.
    """
    points = compute_points(config)
    figure = plot_gap_curves(prepare_gap_curves(config.vocab, config.hidden, config.rho))
    folder = run_folder(config.output, "entropy-bound")
    files = [
        write_json(folder / "entropy_bound.json", [asdict(point) for point in points]),
        write_text(folder / "entropy_bound.csv", _csv(points)),
        save_figure(figure, folder / "entropy_bound.png"),
        save_figure(figure, folder / "entropy_bound.svg"),
    ]
    return points, files


def _csv(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(asdict(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()
