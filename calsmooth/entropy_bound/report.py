"""The tables of `calsmooth entropy-bound`: heads by their sizes, and models that were measured, side by side."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from calsmooth.entropy_bound.bound import SMALLEST_MEASURED
from calsmooth.entropy_bound.families import family_of

if TYPE_CHECKING:
    from calsmooth.entropy_bound.run import Point
    from calsmooth.entropy_bound.run_models import MeasuredModel

Report = dict[str, Any]


def points_table(points: "Sequence[Point]") -> Table:
    """One row a head."""
    names = ("|V|", "D", "rho √D", "floor", "log |V|", "gap", "max p", "least β", "family")
    table = _table(f"Least attainable entropy of a head (Theorem 4.2), rho = {points[0].rho:g}", names, left=(8,))
    table.caption = (
        "floor: least entropy, nats. gap: (log |V| - floor) / log |V|. max p: largest probability of a token. "
        "least β: a smaller one acts as none."
    )
    table.caption_justify = "left"
    for i, point in enumerate(points):
        last = i + 1 == len(points) or points[i + 1].vocab != point.vocab
        table.add_row(
            f"{point.vocab:,}",
            str(point.hidden),
            f"{point.radius:.2f}",
            f"{point.entropy_lower_bound:.3g}",
            f"{point.entropy_upper_bound:.2f}",
            f"{point.normalized_gap:.3g}",
            f"{point.max_probability:.3g}",
            f"{point.smoothing_frontier:.2g}",
            family_of(point.vocab),
            end_section=last,
        )
    return table


def smoothing_table(points: "Sequence[Point]") -> Table:
    """What each beta asks of each vocabulary: one row both, whatever the hidden sizes."""
    names = ("|V|", "β", "target p", "H*", "logit gap", "rho √D needed", f"D needed at rho = {points[0].rho:g}")
    table = _table("What label smoothing asks for: its optimum, entropy H* in nats", names)
    one_size = {point.vocab: point for point in points}.values()
    for point in one_size:
        for s in point.smoothing:
            table.add_row(
                f"{point.vocab:,}",
                f"{s.beta:g}",
                f"{s.confidence:.4g}",
                f"{s.entropy:.3f}",
                f"{s.logit_gap:.2f}",
                f"{s.rho * point.hidden**0.5:.2f}",
                "no size does" if s.hidden is None else f"{s.hidden:,.0f}",
            )
    return table


def models_table(measured: "Sequence[MeasuredModel]") -> Table:
    """Quantities down, models across."""
    table = _table("", ("entropies in nats", *(one.label for one in measured)), left=(0,))
    table.title = None
    table.caption_justify = "left"
    table.caption = (
        "centred: without the rows' mean, which softmax doesn't see. a chosen h: along a token's row in the head, as "
        "long as the text's median h; probed tokens: those whose rows were tried."
    )
    reports = [one.report for one in measured]

    def section(name: str) -> None:
        if table.row_count:
            table.add_row()
        table.add_row(f"[bold]{name}[/bold]")

    def row(name: str, show: Callable[[Report], str]) -> None:
        table.add_row("  " + name, *map(show, reports))

    section("The head and its hidden states")
    row("vocabulary x hidden size", lambda r: f"{r['vocab']:,} x {r['hidden']}")
    row("sigma_C; of the centred head", lambda r: "{sigma_c:.1f}; {sigma_c_centred:.1f}".format(**r["head"]))
    row(
        "sigma_h; of 99 % of tokens",
        lambda r: "{sigma_h:.1f}; {sigma_h_q99:.1f}".format(**r["hidden_states"]),
    )
    row("||h||: median; longest", lambda r: "{median:.1f}; {max:.1f}".format(**r["hidden_states"]["norm"]))
    row("rho = sigma_C sigma_h", lambda r: f"{r['rho']:.4g}")
    section("Floors")
    row("Theorem 4.2", lambda r: _nats(r["entropy_lower_bound"], r["entropy_lower_bound_log10"]))
    row("with the head centred", lambda r: _nats(r["floors"]["centred"], r["floors"]["centred_log10"]))
    row(
        "median token's, by ||h||",
        lambda r: _nats(r["floors"]["token"]["median"], r["floors"]["token_median_log10"]),
    )
    row("attained by a chosen h", lambda r: _tiny(r["attained"]["entropy"]))
    section("Entropies on the text")
    row("predictions", lambda r: f"{r['calibration']['n']:,}")
    row("least; median", lambda r: "{min:.2g}; {median:.2g}".format(**r["entropy"]))
    row("10 % below; 90 % below", lambda r: "{q10:.2g}; {q90:.2g}".format(**r["entropy"]))
    row("mean; log |V|", lambda r: f"{r['entropy']['mean']:.3g}; {r['entropy_upper_bound']:.2f}")
    section("How loose the theorem is")
    row("least on the text - floor", lambda r: f"{r['looseness']['text_minimum']:.2g}")
    row("mean of entropy - own floor", lambda r: f"{r['looseness']['token_mean']:.3g}")
    row("for the head itself, up to", lambda r: _tiny(r["looseness"]["head_at_most"]))
    section("Feature diversity (Lemma 3.1)")
    row("least singular value", _least_singular_value)
    row("if features were independent", lambda r: _optional(r["diversity"]["smallest_if_independent"]))
    row("effective rank, of features", lambda r: "{effective_rank:.1f}, {features}".format(**r["diversity"]))
    section("Calibration of the next token")
    row("accuracy; mean confidence", lambda r: "{accuracy:.3f}; {confidence:.3f}".format(**r["calibration"]))
    row("ECE; by chance if calibrated", lambda r: "{ece:.3f}; {sampling:.3f}".format(**r["calibration"]))
    row("over-; under-confident part", lambda r: "{over:.3f}; {under:.3f}".format(**r["calibration"]))
    for i, first in enumerate(reports[0]["smoothing"]):

        def row_of_beta(name: str, show: Callable[[Report], str], i: int = i) -> None:
            row(name, lambda r: show(r["smoothing"][i]))

        section(f"Smoothing, beta = {first['beta']:g}")
        row_of_beta("target: probability; H*", lambda s: f"{s['confidence']:.4f}; {s['entropy']:.3f}")
        row_of_beta("H* - floor: room to restrain", lambda s: f"{s['excess']:.3f}")
        row_of_beta("probed tokens able to exceed", lambda s: f"{s['can_reach']:.0%}")
        row_of_beta("predictions above its target", lambda s: f"{s['above']:.1%}")
        row_of_beta("addressable part of ECE", lambda s: f"{s['addressable']:.3f}")
    return table


def _table(title: str, headings: Sequence[str], left: Sequence[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in left else "right")
    return table


def _nats(value: float, log10: float) -> str:
    """A floor that would print as 0 is told by its power of ten."""
    return f"{value:.2g}" if log10 > -300 else f"10^{log10:,.0f}"


def _tiny(value: float) -> str:
    return f"{value:.2g}" if value > SMALLEST_MEASURED else f"below {SMALLEST_MEASURED:g}"


def _least_singular_value(r: Report) -> str:
    value = r["diversity"]["smallest_singular_value"]
    return "needs more tokens" if value is None else f"{value:.2e}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
