"""What a run leaves for people: the loss curve and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calsmooth.plots import BLUE, GREEN, ORANGE, PURPLE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING_WINDOW = 0.05
"""Share of the run over which the drawn mean runs."""


@dataclass(frozen=True)
class LossCurve:
    steps: list[int]
    loss: list[float]
    smooth: list[float]  # mean of `loss` over `window` logged steps around each
    window: int
    lr: list[float]
    held_out: dict[str, list[float]]  # step, eval_nll, eval_ece; empty lists where nothing was measured on the way


def prepare_loss_curve(metrics: list[dict[str, Any]]) -> LossCurve:
    """From the lines of metrics.jsonl."""
    measured = [m for m in metrics if "eval_nll" in m]
    held_out = {key: [m[key] for m in measured] for key in ("step", "eval_nll", "eval_ece")}
    metrics = [m for m in metrics if "loss" in m]
    loss = [m["loss"] for m in metrics]
    half = round(len(loss) * SMOOTHING_WINDOW / 2)
    smooth = [_centered_mean(loss, i, half) for i in range(len(loss))]
    return LossCurve([m["step"] for m in metrics], loss, smooth, 2 * half + 1, [m["lr"] for m in metrics], held_out)


def _centered_mean(values: list[float], place: int, half: int) -> float:
    """The mean of up to `half` values on either side of a place; near an end of fewer, on both sides alike, so that it
    neither lags behind nor leans to the middle."""
    reach = min(half, place, len(values) - 1 - place)
    return sum(values[place - reach : place + reach + 1]) / (2 * reach + 1)


def plot_loss_curve(curve: LossCurve, title: str) -> "Figure":
    """The training loss and the learning rate; below, held-out NLL and ECE, where they were measured."""
    measured = bool(curve.held_out["step"])
    figure, (ax, *below) = new_figure(6.5, 6.0 if measured else 4.0, rows=2 if measured else 1)
    figure.suptitle(title, fontsize=10)
    ax.plot(curve.steps, curve.loss, color=BLUE, alpha=0.35, linewidth=1.0, label="loss of a step")
    smooth = "loss" if curve.window == 1 else f"mean of {curve.window} logged steps"
    ax.plot(curve.steps, curve.smooth, color=BLUE, linewidth=2.0, label=smooth)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per target token)")
    rate = ax.twinx()
    rate.plot(curve.steps, curve.lr, color=ORANGE, linewidth=1.4, linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    # Each tick in full, 0.0002 or 2e-05, without a factor for all of them in the corner.
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend_above(ax, [*ax.get_lines(), *rate.get_lines()])
    for lower in below:
        _draw_held_out(lower, curve)
    shown = [*curve.steps, *curve.held_out["step"]] or [0]
    margin = 0.02 * max(max(shown) - min(shown), 1)
    for each in (ax, *below):
        each.set_xlim(min(shown) - margin, max(shown) + margin)
        each.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _legend_above(ax: Any, lines: list[Any]) -> None:
    """Outside: a curve may run anywhere inside."""
    ax.legend(
        lines, [line.get_label() for line in lines], frameon=False, fontsize=8, ncols=len(lines), loc="lower right",
        bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2,
    )  # fmt: skip


def _draw_held_out(ax: Any, curve: LossCurve) -> None:
    steps = curve.held_out["step"]
    [nll] = ax.plot(steps, curve.held_out["eval_nll"], "o-", color=GREEN, markersize=3.5, label="NLL")
    ax.set_xlabel("step")
    ax.set_ylabel("held-out NLL (nats per token)")
    error = ax.twinx()
    [ece] = error.plot(steps, curve.held_out["eval_ece"], "s--", color=PURPLE, markersize=3.5, label="ECE")
    error.set_ylabel("held-out ECE")
    error.set_ylim(bottom=0)
    _legend_above(ax, [nll, ece])


def model_card(
    settings: dict[str, Any],
    summary: dict[str, Any],
    versions: dict[str, str],
    evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> str:
    """README.md in the hub's layout: front matter for its index, then what was done and how to do it again.

    evaluations: moment (before, after) -> task -> its metrics.
    """
    front = ["---", "library_name: transformers", "tags:", "- calsmooth", "- label-smoothing", "- sft"]
    if "/" in settings["model"] and not settings["model"].startswith((".", "/")):
        front.append(f"base_model: {settings['model']}")
    data = ", ".join(f"`{source}`" for source in settings["dataset"])
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in settings.items() if value is not None)
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "\n".join([*front, "---"])
        + f"""

# {settings["model"]}, fine-tuned with label smoothing {settings["beta"]:g}

Supervised fine-tuning of `{settings["model"]}` on {data} with
calsmooth: cross-entropy on the response tokens, label smoothing
beta = {settings["beta"]:g} towards {_prior_name(settings["smoothing_prior"])}.

| result | |
|---|---|
| steps | {summary["steps"]} |
| target tokens seen | {summary["tokens"]:,} |
| loss, mean of the last tenth of the run | {summary["final_loss"]:.4f} |
| training time | {summary["seconds"]:.0f} s on {summary["device"]} |
{_held_out_rows(summary)}{_evaluation_section(evaluations or {})}
The loss is the smoothed one, which a perfect model doesn't bring to 0. How confident this model is and how often it
is right can be measured with `calsmooth evaluate --model FOLDER`.

## Settings

| setting | value |
|---|---|
{rows}

Made with {used}.
"""
    )


def _prior_name(choice: str) -> str:
    names = {"uniform": "the uniform distribution", "unigram": "the unigram distribution of the targets"}
    return names.get(choice, f"the distribution in `{choice}`")


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _held_out_rows(summary: dict[str, Any]) -> str:
    if "held_out" not in summary:
        return ""
    was, now = (summary["held_out"][moment] for moment in ("before", "after"))
    labels = {
        "eval_nll": "NLL",
        "eval_ece": "ECE",
        "eval_accuracy": "accuracy",
        "eval_logit_distance": "logit distance",
    }
    return "".join(
        f"| next-token {label} on held-out rows, before and after | {was[key]:.4f}, {now[key]:.4f} |\n"
        for key, label in labels.items()
    )


def _evaluation_section(evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The tasks' table of before and after."""
    if not evaluations:
        return ""
    tasks = list(next(iter(evaluations.values())))
    lines = [
        f"| {task}, {moment} | {m['n']:,} | {m['accuracy']:.3f} | {m['ece']:.3f} | {m['rms_ce']:.3f} | {m['nll']:.3f} |"
        for task in tasks
        for moment, m in ((moment, measured[task]) for moment, measured in evaluations.items())
    ]
    header = "| task | n | accuracy | ECE | RMS | NLL |\n|---|---|---|---|---|---|"
    return "\n## Evaluation\n\n" + "\n".join([header, *lines]) + "\n"
