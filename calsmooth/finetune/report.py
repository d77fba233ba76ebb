"""What a run leaves for people: the loss curve and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calsmooth.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING_WINDOW = 0.05
"""Share of the run over which the drawn mean runs."""


@dataclass(frozen=True)
class LossCurve:
    steps: list[int]
    loss: list[float]
    smooth: list[float]  # running mean of `loss`
    lr: list[float]
    held_out: dict[str, list[float]]  # step, eval_nll, eval_ece; empty lists where nothing was measured on the way


def prepare_loss_curve(metrics: list[dict[str, Any]]) -> LossCurve:
    """From the lines of metrics.jsonl."""
    measured = [m for m in metrics if "eval_nll" in m]
    held_out = {key: [m[key] for m in measured] for key in ("step", "eval_nll", "eval_ece")}
    metrics = [m for m in metrics if "loss" in m]
    loss = [m["loss"] for m in metrics]
    window = max(1, round(len(loss) * SMOOTHING_WINDOW))
    smooth = [sum(loss[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(loss))]
    return LossCurve([m["step"] for m in metrics], loss, smooth, [m["lr"] for m in metrics], held_out)


def plot_loss_curve(curve: LossCurve, title: str) -> "Figure":
    """The training loss and the learning rate; below, held-out NLL and ECE, where they were measured."""
    measured = bool(curve.held_out["step"])
    figure, (ax, *below) = new_figure(6.5, 6.0 if measured else 4.0, rows=2 if measured else 1)
    ax.plot(curve.steps, curve.loss, color="#4477aa", alpha=0.35, linewidth=1.0, label="loss")
    ax.plot(curve.steps, curve.smooth, color="#4477aa", linewidth=2.0, label="running mean")
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per target token)")
    ax.set_title(title, fontsize=10)
    rate = ax.twinx()
    rate.plot(curve.steps, curve.lr, color="#cc6677", linewidth=1.0, linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    handles = [*ax.get_lines(), *rate.get_lines()]
    ax.legend(handles, [h.get_label() for h in handles], frameon=False, fontsize=8)
    for lower in below:
        _draw_held_out(lower, curve)
    for each in (ax, *below):
        each.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_held_out(ax: Any, curve: LossCurve) -> None:
    steps = curve.held_out["step"]
    [nll] = ax.plot(steps, curve.held_out["eval_nll"], "o-", color="#4477aa", markersize=3, label="NLL")
    ax.set_xlabel("step")
    ax.set_ylabel("held-out NLL (nats per token)")
    error = ax.twinx()
    [ece] = error.plot(steps, curve.held_out["eval_ece"], "s--", color="#cc6677", markersize=3, label="ECE")
    error.set_ylabel("held-out ECE")
    error.set_ylim(bottom=0)
    ax.legend(
        [nll, ece], ["NLL", "ECE"], frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0)
    )


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
beta = {settings["beta"]:g}.

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
