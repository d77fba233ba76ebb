"""Figures that several rooms draw, and how every figure is saved. `prepare_*` computes, `plot_*` draws."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from calsmooth.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float = 6.0, height: float = 4.0, rows: int = 1, columns: int = 1) -> "tuple[Figure, list]":
    """A figure with `rows` x `columns` axes (flat list), made without pyplot: no global state, no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.grid(True, color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path, dpi: int = 150) -> Path:
    """Write a figure whole or not at all; the format follows the path's suffix (.png, .svg, .pdf)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip("."), dpi=dpi)
    return write_bytes(path, buffer.getvalue())
