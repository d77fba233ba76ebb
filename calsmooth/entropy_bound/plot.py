"""Pictures of the theorem over sizes.

Figure 4: how much of the range of entropies a head can use, against the vocabulary, for several hidden sizes, and
beside it the same quantity over vocabulary and hidden size together, with public models drawn in.

The frontier: the floor beside what label smoothing asks for, and the least beta that the head can follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calsmooth.entropy_bound.bound import Array, entropy_bound, normalized_entropy_gap, rho_for_probability
from calsmooth.entropy_bound.families import FAMILIES, family_of
from calsmooth.entropy_bound.frontier import hidden_for_smoothing, smoothing_entropy, smoothing_frontier
from calsmooth.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LOWERED = {("Gemma 2", "2B"): 1, ("Qwen2.5", "3B"): 6, ("Gemma 2", "9B"): 5, ("Gemma 3", "12B"): 2}
"""Points by which a name on the map stands lower than its dot, where others are near; 3 elsewhere."""


@dataclass(frozen=True)
class GapCurves:
    """Normalised entropy gaps: along a grid of vocabularies for each hidden size, and over both."""

    rho: float
    vocab: tuple[int, ...]  # the sizes asked for, marked on the curves
    hidden: tuple[int, ...]
    grid: Array  # (G,) vocabulary sizes
    gaps: Array  # (H, G)
    marks: Array  # (H, len(vocab))
    map_vocab: Array  # (A,)
    map_hidden: Array  # (B,)
    map_gaps: Array  # (B, A)


def prepare_gap_curves(vocab: tuple[int, ...], hidden: tuple[int, ...], rho: float) -> GapCurves:
    """The numbers of Figure 4 around the given sizes."""
    grid = np.geomspace(max(2.0, min(1_000, *vocab) / 1.3), 1.3 * max(1_000_000, *vocab), 300)
    map_vocab = np.geomspace(20_000, 480_000, 120)
    map_hidden = np.geomspace(400, 10_000, 120)
    column = np.array(hidden, float)[:, None]
    return GapCurves(
        rho=rho,
        vocab=vocab,
        hidden=hidden,
        grid=grid,
        gaps=normalized_entropy_gap(grid, column, rho),
        marks=normalized_entropy_gap(np.array(vocab, float), column, rho),
        map_vocab=map_vocab,
        map_hidden=map_hidden,
        map_gaps=normalized_entropy_gap(map_vocab, map_hidden[:, None], rho),
    )


def plot_gap_curves(curves: GapCurves) -> "Figure":
    """Figure 4 on the left, the map of public models on the right."""
    figure, (left, right) = new_figure(width=13, height=5.2, columns=2)
    figure.suptitle(
        rf"Least attainable entropy of a head (Theorem 4.2), $\rho = \sigma_C\,\sigma_h = {curves.rho:g}$",
        fontsize=13,
    )
    _plot_curves(left, curves)
    _plot_map(right, curves)
    return figure


def _plot_curves(ax: "Axes", curves: GapCurves) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(curves.hidden)))
    for hidden, gaps, marks, color in zip(curves.hidden, curves.gaps, curves.marks, colors, strict=True):
        ax.plot(curves.grid, gaps, color=color, label=f"D = {hidden}")
        ax.plot(curves.vocab, marks, "o", color=color, markersize=4)
    ax.set_xscale("log")
    ax.set_xlim(curves.grid[0], curves.grid[-1])
    ax.set_ylim(-0.02, 1.02)
    _name_vocabularies(ax, curves.vocab)
    ax.set_xlabel("vocabulary size |V|")
    ax.set_ylabel(r"normalised entropy gap, $(\log |V| - \mathrm{bound})\;/\;\log |V|$")
    # Below the axes: wherever it stood inside, some choice of sizes would draw a curve under it.
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=min(5, len(curves.hidden)),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _name_vocabularies(ax: "Axes", vocab: Sequence[int]) -> None:
    """A line at each size, and above the axes its name, in as many rows as it takes for no two names to meet."""
    low, high = np.log(ax.get_xlim())
    character = 0.0135  # of the axes' width, at this size of letters
    rows: list[float] = []  # how far each row is taken, as a share of the axes' width
    for size in sorted(set(vocab)):
        ax.axvline(size, color="0.6", linestyle=":", linewidth=0.9)
        words = f"{family_of(size)} {size:,}".strip()
        wide = character * len(words)
        place = float((np.log(size) - low) / (high - low))
        # Centered on its line, but for what would stand out on either side.
        left = min(max(place - wide / 2, 0.0), max(1.0 - wide, 0.0))
        row = next((i for i, taken in enumerate(rows) if left > taken + character), len(rows))
        rows[row:] = [left + wide, *rows[row + 1 :]]
        ax.annotate(
            words, (left, 1.0), xycoords="axes fraction", xytext=(0, 4 + 11 * row), textcoords="offset points",
            fontsize=8, color="0.35",
        )  # fmt: skip


def _plot_map(ax: "Axes", curves: GapCurves) -> None:
    ax.grid(False)
    image = ax.contourf(
        curves.map_vocab, curves.map_hidden, curves.map_gaps, levels=np.linspace(0, 1, 21), cmap="viridis"
    )
    ax.figure.colorbar(image, ax=ax, label="normalised entropy gap", ticks=np.linspace(0, 1, 6))
    if curves.rho > 0:
        # Where a token can reach a probability of 1/2: rho_for_probability falls with sqrt(D), so it solves for D.
        half = (rho_for_probability(curves.map_vocab, 1, 0.5) / curves.rho) ** 2
        ax.plot(curves.map_vocab, half, color="white", linestyle="--", linewidth=1.2, scalex=False, scaley=False)
    for family in FAMILIES:
        for size, hidden in family.members:
            ax.plot(
                family.vocab, hidden, "o", color="white", markeredgecolor="black", markersize=4, markeredgewidth=0.7
            )
            # So that no two labels meet.
            to_left = family.name in ("SmolLM2", "Llama 3", "Gemma 2") or size in ("7B", "14B, 32B")
            lower = LOWERED.get((family.name, size), 3)
            ax.annotate(
                f"{family.name} {size}",
                (family.vocab, hidden),
                xytext=(-6 if to_left else 6, -lower),
                textcoords="offset points",
                ha="right" if to_left else "left",
                fontsize=7.5,
                color="black",
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.6},
            )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(curves.map_vocab[0], curves.map_vocab[-1])
    ax.set_ylim(curves.map_hidden[0], curves.map_hidden[-1])
    ax.set_xticks([25_000, 50_000, 100_000, 200_000, 400_000], ["25k", "50k", "100k", "200k", "400k"])
    ax.set_yticks([512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"])
    ax.minorticks_off()
    ax.set_xlabel("vocabulary size |V|")
    ax.set_ylabel("hidden size D")
    title = rf"public models, if their $\rho$ were {curves.rho:g}"
    if curves.rho > 0:
        title += "; above the dashed line a token can reach p = 1/2"
    ax.set_title(title, fontsize=10)


@dataclass(frozen=True)
class FrontierCurves:
    """Floors and frontiers along a grid of hidden sizes, and what each beta asks for."""

    rho: float
    vocab: tuple[int, ...]
    beta: tuple[float, ...]
    hidden: tuple[int, ...]  # the sizes asked for, marked on the frontier
    grid: Array  # (G,) hidden sizes
    floors: Array  # (len(vocab), G), nats
    frontiers: Array  # (len(vocab), G), the least beta in reach
    marks: Array  # (len(vocab), len(hidden))
    wanted: Array  # (len(vocab), len(beta)), H* in nats
    meeting: Array  # (len(vocab), len(beta)), the hidden size at which floor and H* meet; inf for rho = 0


def prepare_frontier(
    vocab: tuple[int, ...], hidden: tuple[int, ...], rho: float, beta: tuple[float, ...]
) -> FrontierCurves:
    """The numbers of the frontier's picture, over hidden sizes that show the given ones and where the curves meet."""
    column = np.array(vocab, float)[:, None]
    meeting = hidden_for_smoothing(column, rho, np.array(beta))
    shown = [*hidden, *(size for size in meeting.ravel() if 64 <= size <= 65_536)]
    grid = np.geomspace(max(1.0, min(shown) / 2), 2 * max(shown), 400)
    return FrontierCurves(
        rho=rho,
        vocab=vocab,
        beta=beta,
        hidden=hidden,
        grid=grid,
        floors=entropy_bound(column, grid, rho),
        frontiers=smoothing_frontier(column, grid, rho),
        marks=smoothing_frontier(column, np.array(hidden, float), rho),
        wanted=smoothing_entropy(column, np.array(beta)),
        meeting=meeting,
    )


def plot_frontier(curves: FrontierCurves) -> "Figure":
    """Floor and H* against the hidden size on the left, the frontier beta(D, V) on the right."""
    from matplotlib import colormaps

    figure, (left, right) = new_figure(width=13, height=5.2, columns=2)
    figure.suptitle(
        rf"What smoothing asks for, and what the head can give, $\rho = \sigma_C\,\sigma_h = {curves.rho:g}$",
        fontsize=13,
    )
    colors = colormaps["viridis"](np.linspace(0.0, 0.8, len(curves.vocab)))
    styles = ["--", ":", "-.", (0, (5, 1)), (0, (1, 1))]
    for v, (vocab, color) in enumerate(zip(curves.vocab, colors, strict=True)):
        left.plot(curves.grid, curves.floors[v], color=color, label=f"floor, |V| = {vocab:,}")
        for b in range(len(curves.beta)):
            left.axhline(curves.wanted[v, b], color=color, linestyle=styles[b % len(styles)], linewidth=1)
            if curves.grid[0] <= curves.meeting[v, b] <= curves.grid[-1]:
                left.plot(curves.meeting[v, b], curves.wanted[v, b], "o", color=color, markersize=5)
        right.plot(curves.grid, curves.frontiers[v], color=color, label=f"|V| = {vocab:,}")
        right.plot(curves.hidden, curves.marks[v], "o", color=color, markersize=4)
    for b, beta in enumerate(curves.beta):
        left.plot([], [], color="0.4", linestyle=styles[b % len(styles)], label=rf"$H^*$, $\beta$ = {beta:g}")
        right.axhline(beta, color="0.4", linestyle=styles[b % len(styles)], linewidth=1)
        right.annotate(
            rf"$\beta$ = {beta:g}",
            (1.0, beta),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.4",
        )
    left.set(xscale="log", xlabel="hidden size D", ylabel="entropy, nats", ylim=(0, None))
    left.set_title("Smoothing changes the optimum only to the right of a dot, where floor < $H^*$", fontsize=10)
    least = min(curves.beta)
    right.set(
        xscale="log", yscale="log", xlabel="hidden size D", ylabel=r"least $\beta$ that acts", ylim=(least / 1000, 1.5)
    )
    right.set_title(
        r"The frontier $\beta(D, V) = V\,/\,(V - 1 + e^{x})$: below it $\beta$ has the optimum of $\beta = 0$",
        fontsize=10,
    )
    for ax in (left, right):
        ax.set_xlim(curves.grid[0], curves.grid[-1])
        ticks = [size for size in 2.0 ** np.arange(0, 31) if curves.grid[0] <= size <= curves.grid[-1]]
        ticks = ticks[:: 1 + len(ticks) // 10]
        ax.set_xticks(ticks, [f"{size:.0f}" for size in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=8, frameon=False)
    return figure
