"""`calsmooth finetune`."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.cli.app import app
from calsmooth.cli.options import Output, settings_command
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.models import BUILT_IN

if TYPE_CHECKING:
    from rich.table import Table

    from calsmooth.finetune.probe import ProbeResult
    from calsmooth.finetune.run import Plan


@settings_command(app, FinetuneConfig)
def finetune(config: FinetuneConfig, output: Output) -> None:
    """Fine-tune a causal language model on instruction data with label smoothing.

    Without --model and --dataset: the built-in ones, evaluated before and after. Writes the model, config.yaml,
    metrics.jsonl, loss.png, a model card and COMPLETED.
    """
    if config.dry_run:
        _show_plan(config, output)
        return
    built_in = config.model == BUILT_IN and config.dataset == BUILT_IN
    model = "the built-in model" if config.model == BUILT_IN else config.model
    dataset = "the built-in data" if config.dataset == BUILT_IN else config.dataset
    console.say(f"Fine-tuning {model} on {dataset} with label smoothing beta = {config.beta:g}.")
    from rich.console import Group

    from calsmooth.finetune.run import run

    result = run(config, _announce)
    shown: list[Any] = [_summary_line(result.summary)]
    answer: dict[str, Any] = {"folder": str(result.folder), **result.summary}
    files = [str(result.folder / "loss.png")]
    if built_in:
        evaluations = {
            name: _evaluate(model, result.folder / name)
            for name, model in (("before", BUILT_IN), ("after", str(result.model)))
        }
        answer["evaluation"] = {name: e["tasks"] for name, e in evaluations.items()}
        shown.append(_before_after(evaluations))
        files += [str(result.folder / name / "reliability.png") for name in evaluations]
    output.show(Group(*shown), result=answer)
    console.say(f"Model: {result.model}\nPictures: {', '.join(files)}")


def _announce(plan: "Plan", probe: "ProbeResult") -> None:
    """Before the first step: what the run comes to, and that the fused loss is this model's own."""
    console.say(_plan_line(plan))
    console.say(
        f"The fused loss equals the model's own logits and cross-entropy: relative difference {probe.loss:.0e}, "
        f"of gradients {max(probe.head_gradient, probe.decoder_gradient):.0e}."
    )


def _summary_line(summary: dict[str, Any]) -> str:
    memory = summary["peak_memory_bytes"]
    return (
        f"{summary['steps']} steps, {summary['tokens']:,} target tokens in {summary['seconds']:.0f} s"
        + (f", peak memory {memory / 1e9:.2f} GB" if memory else "")
        + f"; loss from {summary['first_loss']:.4f} to {summary['final_loss']:.4f} a token."
    )


def _evaluate(model: str, folder: Path) -> dict[str, Any]:
    """results.json of the built-in questions and held-out responses; done once, also when a run is looked at again."""
    from calsmooth.demo import HELDOUT_FILE
    from calsmooth.evaluate.config import EvaluateConfig
    from calsmooth.evaluate.run import run
    from calsmooth.files import read_json

    if (folder / "results.json").exists():
        results: dict[str, Any] = read_json(folder / "results.json")
        return results
    config = EvaluateConfig(model=model, task=("demo", "responses"), dataset=str(HELDOUT_FILE), output=folder)
    return run(config).results


def _before_after(evaluations: dict[str, dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(title="Before and after fine-tuning", title_justify="left")
    table.add_column("measured on")
    table.add_column("model")
    for name in ("accuracy", "ECE", "NLL"):
        table.add_column(name, justify="right")
    names = {"demo": "held-out questions", "responses": "tokens of held-out responses"}
    for task, words in names.items():
        for moment, results in evaluations.items():
            found = results["tasks"][task]
            table.add_row(
                words if moment == "before" else "",
                moment,
                f"{found['accuracy']:.3f}",
                f"{found['ece']:.4f}",
                f"{found['nll']:.4f}",
            )
        table.add_section()
    return table


def _show_plan(config: FinetuneConfig, output: Output) -> None:
    from rich.console import Group
    from rich.text import Text

    from calsmooth.data import IGNORED
    from calsmooth.finetune.run import prepare

    plan, tokenizer = prepare(config)
    example = plan.examples.examples[0]
    text = Text()
    # Stretches, not tokens, are decoded: a character may be made of several tokens.
    for ignored, stretch in groupby(range(len(example.labels)), key=lambda i: example.labels[i] == IGNORED):
        text.append(
            str(tokenizer.decode([example.input_ids[i] for i in stretch])), style="dim" if ignored else "bold green"
        )
    shown: list[Any] = [
        Text(plan.config.to_yaml()),
        Text("The first example; what is dim is read, what is bold is learned:", style="italic"),
        text,
        Text(),
        _plan_line(plan),
    ]
    output.show(
        Group(*shown),
        result={
            "config": plan.config.to_dict(),
            "rows": plan.examples.rows,
            "rows_bad": plan.examples.bad,
            "rows_dropped": plan.examples.dropped,
            "rows_truncated": plan.examples.truncated,
            "format": plan.examples.format,
            "template": plan.examples.template,
            "tokens": sum(len(e.input_ids) for e in plan.examples.examples),
            "target_tokens": plan.target_tokens,
            "micro_batch_size": plan.micro_batch,
            "accumulation": plan.accumulation,
            "steps": plan.steps,
        },
    )


def _plan_line(plan: "Plan") -> str:
    e = plan.examples
    left_out = {"bad": e.bad, "without a response within --max-length": e.dropped}
    notes = [f"{n:,} {why} left out" for why, n in left_out.items() if n]
    notes += [f"{e.truncated:,} cut at --max-length"] if e.truncated else []
    more = f" ({', '.join(notes)})" if notes else ""
    return (
        f"{e.rows:,} rows{more}, format {e.format}, template {e.template}: "
        f"{sum(len(x.input_ids) for x in e.examples):,} tokens, {plan.target_tokens:,} of them targets.\n"
        f"{plan.steps:,} steps of {plan.config.batch_size} examples ({plan.accumulation} x {plan.micro_batch})."
    )
