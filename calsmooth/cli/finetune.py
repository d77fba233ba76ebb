"""`calsmooth finetune`."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.models import BUILT_IN

if TYPE_CHECKING:
    from calsmooth.finetune.plan import Plan
    from calsmooth.finetune.probe import ProbeResult
    from calsmooth.finetune.run import FinetuneResult
    from calsmooth.finetune.sweep import Grid
    from calsmooth.processes import Processes


def _sweep(grid: "Grid", output: Output) -> None:
    from calsmooth.cli.sweep import sweep

    sweep(grid, output, _run)


@settings_command(app, FinetuneConfig, sweep=_sweep)
def finetune(config: FinetuneConfig, output: Output) -> None:
    """Fine-tune a causal language model on instruction data with label smoothing.

    Without --model and --dataset: the built-in ones, evaluated before and after. Writes the model, config.yaml,
    metrics.jsonl, loss.png, a model card and COMPLETED. Lists in the --config file (beta: [0, 0.1]) make a sweep: a
    run for every combination, compared at the end.
    """
    if config.dry_run:
        from calsmooth.cli.plan import show_plan

        show_plan(config, output)
        return
    outcome = _run(config)
    from rich.console import Group

    output.show(Group(*outcome.shown), result=outcome.answer)
    console.say(f"Model: {outcome.result.model}\nPictures: {', '.join(outcome.pictures)}")


@dataclass(frozen=True)
class Outcome:
    """A finished run, evaluated. evaluation: "before" and "after" -> what was measured -> its metrics."""

    result: "FinetuneResult"
    evaluation: dict[str, dict[str, Any]]
    shown: list[Any]
    pictures: list[str]

    @property
    def answer(self) -> dict[str, Any]:
        """For --json."""
        evaluation = {"evaluation": self.evaluation} if self.evaluation else {}
        return {"folder": str(self.result.folder), **self.result.summary, **evaluation}


def _run(config: FinetuneConfig, alike: Path | None = None) -> Outcome:
    """Evaluate, fine-tune, evaluate.

    alike: the folder of a finished run that began with the same model and measured the same of it.
    """
    from calsmooth.processes import joined

    with joined(config.device) as processes:
        return _run_in(processes, config, alike)


def _run_in(processes: "Processes", config: FinetuneConfig, alike: Path | None) -> Outcome:
    from calsmooth.cli.before_after import (
        PICTURE,
        before_after_table,
        measure_after,
        measure_before,
        what_to_measure,
    )

    measuring = what_to_measure(config)
    model = "the built-in model" if config.model == BUILT_IN else config.model
    dataset = "the built-in data" if config.dataset == (BUILT_IN,) else " + ".join(config.dataset)
    console.say(f"Fine-tuning {model} on {dataset} with label smoothing beta = {config.beta:g}.")
    from calsmooth.finetune.resume import find_run
    from calsmooth.finetune.run import run

    going_on = processes.by_first(lambda: find_run(config) if config.resume else None)
    with TemporaryDirectory(prefix="calsmooth-") as scratch:

        def on_start(plan: "Plan", probe: "ProbeResult") -> list[Path]:
            _announce(plan, probe)
            # Before hours of training, so that missing questions show.
            return measure_before(measuring, going_on, Path(scratch), alike) if measuring is not None else []

        result = run(config, on_start)
    outcome = Outcome(result, {}, [*_summary_lines(result.summary)], [str(result.folder / "loss.png")])
    if measuring is None:
        return outcome
    evaluations = measure_after(measuring, result.folder, result.model, processes)
    return replace(
        outcome,
        evaluation={name: e["tasks"] for name, e in evaluations.items()},
        shown=[*outcome.shown, before_after_table(evaluations)],
        pictures=[*outcome.pictures, str(result.folder / PICTURE)],
    )


def _announce(plan: "Plan", probe: "ProbeResult") -> None:
    """Before the first step: what the run comes to, and that the fused loss is this model's own."""
    from calsmooth.cli.plan import plan_lines, warn_of_bad_rows

    warn_of_bad_rows(plan)
    console.say("\n".join(plan_lines(plan)))
    difference = max(probe.loss, probe.head_gradient, probe.decoder_gradient)
    console.say(f"Checked: the fused loss and its gradients are those of the model's own logits, to {difference:.0e}.")


def _summary_lines(summary: dict[str, Any]) -> list[str]:
    memory = summary["peak_memory_bytes"]
    lines = [
        f"{summary['steps']} steps, {summary['tokens']:,} target tokens in {summary['seconds']:.0f} s"
        + (f", peak memory {memory / 1e9:.2f} GB" if memory else "")
        + f"; loss from {summary['first_loss']:.4f} to {summary['final_loss']:.4f} a token."
    ]
    if "held_out" in summary:
        was, now = (summary["held_out"][moment] for moment in ("before", "after"))
        lines.append(
            f"On held-out rows: NLL from {was['eval_nll']:.4f} to {now['eval_nll']:.4f}, "
            f"ECE from {was['eval_ece']:.4f} to {now['eval_ece']:.4f}."
        )
    return lines
