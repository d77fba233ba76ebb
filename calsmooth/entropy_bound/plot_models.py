"""One picture of the heads that were measured: entropies and floors, norms, the spectrum of features, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from calsmooth.entropy_bound.advice import Calibration
from calsmooth.entropy_bound.bound import SMALLEST_MEASURED, Array, log_entropy_bound
from calsmooth.entropy_bound.frontier import smoothing_confidence, smoothing_entropy, smoothing_logit_gap
from calsmooth.entropy_bound.measure import Measurement
from calsmooth.metrics import Bins, reliability_bins
from calsmooth.plots import FEW, RunStyle, draw_run, new_figure, run_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESOLUTION = 1e-7
"""Nats: what float32 rounding leaves of an entropy of ordinary logits; nothing smaller needs a place in the picture."""


ON_LINES = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8}
"""The ground of words that may stand on a curve."""


@dataclass(frozen=True)
class Panel:
    """The numbers of one model's curves. Floors come as base-10 logarithms, because real ones underflow."""

    label: str
    entropies: Array  # (N,) rising, nats
    token_floors: Array  # (N,) rising, log10 nats
    floor: float  # log10 nats, Theorem 4.2
    attained: float  # nats, by a hidden state that was made for it
    log_vocab: float
    norms: dict[str, float]  # lengths of logits: what the head could give
    needed: dict[float, float]  # beta -> the length that smoothing's optimum needs
    smoothing: dict[float, float]  # beta -> H*
    confidence: dict[float, float]  # beta -> 1 - beta + beta / V
    spectrum: Array  # (d,) falling
    effective_rank: float
    bins: Bins
    ece: float


def prepare_panel(label: str, m: Measurement, c: Calibration, betas: Sequence[float], bins: int) -> Panel:
    """The curves of one model."""
    reach, tokens = m.reach, m.tokens
    longest = float(tokens.largest.max() * np.sqrt(reach.hidden))
    median, largest = float(np.median(tokens.norm)), float(tokens.norm.max())
    token_radius = np.minimum(reach.radius(tokens.norm), reach.radius(tokens.norm, centred=True))
    short = np.sqrt((reach.vocab - 1) / reach.vocab)
    return Panel(
        label=label,
        entropies=np.sort(tokens.entropy),
        token_floors=np.sort(log_entropy_bound(reach.vocab, 1, token_radius) / np.log(10)),
        floor=float(log_entropy_bound(reach.vocab, 1, reach.radius(longest)) / np.log(10)),
        attained=float(m.peaks.entropy.min()),
        log_vocab=float(np.log(reach.vocab)),
        norms={
            r"Lemma 4.1, $\sigma_C\sigma_h\sqrt{D}$": float(reach.radius(longest)),
            r"longest $\|h\|$": float(reach.radius(largest)),
            r"median $\|h\|$": float(reach.radius(median)),
            r"median $\|h\|$, head centred": float(reach.radius(median, centred=True)),
        },
        needed={beta: float(smoothing_logit_gap(reach.vocab, beta) * short) for beta in betas},
        smoothing={beta: float(smoothing_entropy(reach.vocab, beta)) for beta in betas},
        confidence={beta: float(smoothing_confidence(reach.vocab, beta)) for beta in betas},
        spectrum=m.diversity.eigenvalues,
        effective_rank=m.diversity.effective_rank,
        bins=reliability_bins(tokens.confidence, tokens.correct, bins),
        ece=c.ece,
    )


def plot_models(models: Sequence[tuple[str, Measurement, Calibration]], betas: Sequence[float], bins: int) -> "Figure":
    """All panels for all models, a color, marker and line style each."""
    panels = [prepare_panel(*one, betas, bins) for one in models]
    styles = run_styles(len(panels))
    figure, (entropies, norms, spectrum, reliability) = new_figure(width=13, height=9.5, rows=2, columns=2)
    figure.suptitle("How confident these heads can be, and how confident they are on the text", fontsize=13)
    _plot_entropies(entropies, panels, styles)
    _plot_norms(norms, panels, styles)
    _plot_spectrum(spectrum, panels, styles)
    _plot_reliability(reliability, panels, styles)
    return figure


def _plot_entropies(ax: "Axes", panels: list[Panel], styles: list[RunStyle]) -> None:
    shown = [max(float(p.entropies[0]), RESOLUTION) for p in panels]
    shown += [p.attained for p in panels if p.attained > RESOLUTION]
    left = min(*shown, *(h for p in panels for h in p.smoothing.values())) / 10
    for i, (p, style) in enumerate(zip(panels, styles, strict=True)):
        share = (np.arange(len(p.entropies)) + 1) / len(p.entropies)
        ax.step(np.maximum(p.entropies, left), share, color=style.color, where="post", label=f"{p.label}: on the text")
        ax.axvline(p.log_vocab, color=style.color, linewidth=0.8, linestyle=":")
        if p.token_floors[-1] > np.log10(left):
            floors = np.maximum(10.0**p.token_floors, left)
            ax.step(
                floors, share, color=style.color, where="post", linestyle="--", label=f"{p.label}: each token's floor"
            )
        beyond = []
        if p.floor > np.log10(left):
            ax.axvline(10.0**p.floor, color=style.color, linewidth=1.4, linestyle="-.")
        else:
            beyond.append(f"floor (Theorem 4.2) {_power(p.floor)}")
        if p.attained > left:
            ax.plot(p.attained, 0.0, "^", color=style.color, markersize=8, clip_on=False)
        else:
            beyond.append(
                "attained "
                + ("< " if p.attained < SMALLEST_MEASURED else "")
                + _power(np.log10(max(p.attained, SMALLEST_MEASURED)))
            )
        if beyond:
            ax.annotate(
                ", ".join(beyond),
                (0.0, 0.6 - 0.06 * i),
                xytext=(12, 0),
                textcoords="offset points",
                xycoords="axes fraction",
                color=style.color,
                va="center",
                fontsize=9,
                bbox=ON_LINES,
                arrowprops={"arrowstyle": "->", "color": style.color},
            )
    for beta, entropy in panels[0].smoothing.items():
        _marked_line(ax, entropy, rf"$H^*$, $\beta$ = {beta:g}", height=0.99, va="top")
    ax.plot([], [], "^", color="0.3", linestyle="", label="attained by a hidden state made for it")
    ax.plot([], [], linestyle=":", color="0.3", label=r"$\log |V|$")
    ax.set(xscale="log", xlim=(left, None), ylim=(0, 1.02), xlabel="entropy, nats", ylabel="share of predictions below")
    _legend(ax, loc="upper left")
    ax.set_title("entropies reached, and the floor", fontsize=10)


def _marked_line(ax: "Axes", x: float, words: str, height: float, va: str) -> None:
    """A vertical line with words along it; height: theirs, as a share of the axes."""
    ax.axvline(x, color="0.4", linewidth=0.9)
    ax.annotate(
        words,
        (x, height),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va=va,
        fontsize=8,
        color="0.3",
        bbox=ON_LINES,
        zorder=5,
    )


def _legend(ax: "Axes", loc: Literal["upper left", "lower left", "best"]) -> None:
    legend = ax.legend(fontsize=8, loc=loc, framealpha=0.85, edgecolor="none")
    legend.set_zorder(6)


def _power(log10: float) -> str:
    return f"$10^{{{log10:,.0f}}}$".replace(",", "{,}")


def _plot_norms(ax: "Axes", panels: list[Panel], styles: list[RunStyle]) -> None:
    names = list(panels[0].norms)
    apart = 0.5 / max(len(panels), 2)
    for i, (p, style) in enumerate(zip(panels, styles, strict=True)):
        height = np.arange(len(names)) + apart * (i - (len(panels) - 1) / 2)
        norms = [p.norms[name] for name in names]
        ax.hlines(height, min(p.needed.values()), norms, color=style.color, linewidth=1, alpha=0.5)
        ax.plot(norms, height, style.marker, color=style.color, label=p.label)
    for beta, needed in panels[0].needed.items():
        _marked_line(ax, needed, rf"needed for $\beta$ = {beta:g}", height=0.5, va="center")
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", ylim=(-0.5, len(names) - 0.5), xlabel="longest logits, Euclidean norm")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.5 * min(panels[0].needed.values())), high)
    _legend(ax, loc="best")
    ax.set_title("how long the logits may be, and how long smoothing needs them", fontsize=10)


def _plot_spectrum(ax: "Axes", panels: list[Panel], styles: list[RunStyle]) -> None:
    for p, style in zip(panels, styles, strict=True):
        seen = p.spectrum[p.spectrum > 1e-12 * p.spectrum[0]]
        label = f"{p.label}: effective rank {p.effective_rank:.0f} of {len(p.spectrum)}"
        ax.plot(np.arange(1, len(seen) + 1), seen, color=style.color, linestyle=style.line, label=label)
        ax.axvline(p.effective_rank, color=style.color, linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="singular value")
    _legend(ax, loc="lower left")
    ax.set_title("feature diversity: correlation matrix of the hidden states (Lemma 3.1)", fontsize=10)


def _plot_reliability(ax: "Axes", panels: list[Panel], styles: list[RunStyle]) -> None:
    for p, style in zip(panels, styles, strict=True):
        draw_run(ax, p.bins, style, f"{p.label}: ECE {p.ece:.3f}, n = {p.bins.count.sum():,} tokens")
    ax.plot([0, 1], [0, 1], color="0.25", linewidth=1.2, linestyle="--")
    for beta, confidence in panels[0].confidence.items():
        _marked_line(ax, confidence, rf"smoothing's target, $\beta$ = {beta:g}", height=0.16, va="bottom")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence in the next token", ylabel="accuracy")
    _legend(ax, loc="upper left")
    ax.text(
        0.98, 0.02, f"hollow: fewer than {FEW} tokens; lines with caps:\n95 % interval, as if tokens were independent",
        transform=ax.transAxes, ha="right", fontsize=7.5, color="0.3", bbox=ON_LINES, zorder=5,
    )  # fmt: skip
    ax.set_title("next-token calibration on the text (below the diagonal: over-confident)", fontsize=10)
