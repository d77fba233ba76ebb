"""From sizes to the points of Theorem 4.2, what label smoothing asks of them, figures and files."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calsmooth.entropy_bound.bound import (
    entropy_bound,
    entropy_bound_asymptote,
    max_probability,
    normalized_entropy_gap,
)
from calsmooth.entropy_bound.config import EntropyBoundConfig
from calsmooth.entropy_bound.frontier import (
    hidden_for_smoothing,
    rho_for_smoothing,
    smoothing_confidence,
    smoothing_entropy,
    smoothing_frontier,
    smoothing_logit_gap,
)
from calsmooth.entropy_bound.plot import plot_frontier, plot_gap_curves, prepare_frontier, prepare_gap_curves
from calsmooth.files import run_folder, write_json, write_text
from calsmooth.plots import save_figure


@dataclass(frozen=True)
class Smoothing:
    """What one smoothing weight asks of a head (`calsmooth.entropy_bound.frontier`). Entropies in nats.

    rho, hidden: the least with which the head can reach smoothing's optimum, all else equal; hidden is None where no
    size is enough (rho = 0). excess: entropy - floor: the over-confidence that there is room for; negative where the
    optimum is out of reach, and smoothing acts as none.
    """

    beta: float
    confidence: float
    entropy: float
    logit_gap: float
    rho: float
    hidden: float | None
    reachable: bool
    excess: float


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
    smoothing_frontier: float  # the least beta whose optimum the head can reach
    smoothing: tuple[Smoothing, ...]  # one a --beta


def compute_points(config: EntropyBoundConfig) -> list[Point]:
    """Every vocabulary with every hidden size, in the order given; the configuration is a resolved one."""
    assert config.vocab
    assert config.hidden
    assert config.rho is not None
    return [compute_point(vocab, hidden, config.rho, config.beta) for vocab in config.vocab for hidden in config.hidden]


def compute_point(vocab: int, hidden: int, rho: float, betas: Iterable[float]) -> Point:
    """Theorem 4.2 for one head, and each smoothing weight held against it."""
    head = (vocab, hidden, rho)
    floor = float(entropy_bound(*head))
    frontier = float(smoothing_frontier(*head))
    return Point(
        *head,
        radius=float(rho * np.sqrt(hidden)),
        entropy_lower_bound=floor,
        entropy_upper_bound=float(np.log(vocab)),
        entropy_asymptote=float(entropy_bound_asymptote(*head)),
        normalized_gap=float(normalized_entropy_gap(*head)),
        max_probability=float(max_probability(*head)),
        smoothing_frontier=frontier,
        smoothing=tuple(
            Smoothing(
                beta=beta,
                confidence=float(smoothing_confidence(vocab, beta)),
                entropy=float(smoothing_entropy(vocab, beta)),
                logit_gap=float(smoothing_logit_gap(vocab, beta)),
                rho=float(rho_for_smoothing(vocab, hidden, beta)),
                hidden=float(hidden_for_smoothing(vocab, rho, beta)) if rho > 0 else None,
                reachable=beta >= frontier,
                excess=float(smoothing_entropy(vocab, beta)) - floor,
            )
            for beta in betas
        ),
    )


def run(config: EntropyBoundConfig) -> tuple[list[Point], list[Path]]:
    """The points, and the files written to the output folder.

    entropy_bound.json, .csv and figure: the theorem. smoothing_frontier.csv and figure: where smoothing meets it, a
    line a head and beta.

    Raises:
        UsageError: the output folder holds files already.
    """
    points = compute_points(config)
    assert config.vocab
    assert config.hidden
    assert config.rho is not None
    bound = plot_gap_curves(prepare_gap_curves(config.vocab, config.hidden, config.rho))
    frontier = plot_frontier(prepare_frontier(config.vocab, config.hidden, config.rho, config.beta))
    folder = run_folder(config.output, "entropy-bound")
    plain = [{key: value for key, value in asdict(point).items() if key != "smoothing"} for point in points]
    smoothed = [
        {"vocab": p.vocab, "hidden": p.hidden, **{f"smoothing_{k}": v for k, v in asdict(one).items()}}
        for p in points
        for one in p.smoothing
    ]
    files = [
        write_json(folder / "entropy_bound.json", [asdict(point) for point in points]),
        write_text(folder / "entropy_bound.csv", _csv(plain)),
        *save_figure(bound, folder / "entropy_bound"),
        write_text(folder / "smoothing_frontier.csv", _csv(smoothed)),
        *save_figure(frontier, folder / "smoothing_frontier"),
    ]
    return points, files


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
