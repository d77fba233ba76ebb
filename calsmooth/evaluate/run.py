"""evaluate: tasks -> prompts -> log-probabilities -> predictions.jsonl -> metrics -> results.json and a picture."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calsmooth
from calsmooth import console
from calsmooth.environment import environment, peak_memory
from calsmooth.evaluate import ledger
from calsmooth.evaluate.choices import Choices
from calsmooth.evaluate.config import ChoicesConfig, EvaluateConfig
from calsmooth.evaluate.ledger import Ledger
from calsmooth.evaluate.next_token import TokenPredictor
from calsmooth.evaluate.prompts import require_chat_template
from calsmooth.evaluate.report import write_report
from calsmooth.evaluate.responses import Responses
from calsmooth.evaluate.scoring import Scorer
from calsmooth.evaluate.task import Task, TaskData
from calsmooth.evaluate.tasks import RESPONSES, choice_tasks
from calsmooth.evaluate.tasks.responses import ResponseRows, load_responses
from calsmooth.evaluate.units import perform
from calsmooth.files import write_json
from calsmooth.models import (
    load_model,
    load_tokenizer,
    model_description,
    model_fingerprint,
    model_label,
    pick_dtype,
)
from calsmooth.plots import Reliability
from calsmooth.processes import Processes, joined
from calsmooth.records import (
    PREDICTIONS,
    TOKEN_PREDICTIONS,
    Prediction,
    TokenPredictions,
    write_predictions,
    write_token_predictions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_RESPONSE_LENGTH = 1024


@dataclass(frozen=True)
class EvaluateResult:
    """`results` is what results.json holds; `folder` has it, predictions.jsonl, the figure and report.html.

    panels: each task's part of the picture, for drawing it beside another run's.
    """

    results: dict[str, Any]
    predictions: list[Prediction]
    panels: dict[str, Reliability]
    folder: Path


def run(config: ChoicesConfig) -> EvaluateResult:
    """Evaluate a model and write the run folder. Prints nothing but progress bars, and a hint where it is interrupted.

    Under torchrun the processes share the work; the first one writes the files, all return the result.

    Raises:
        UsageError: a folder, device or option that isn't there or doesn't fit.
        CalsmoothError: the model or a task's data can't be had or is bad.
    """
    with joined() as processes:
        return _run(config, processes)


def _run(config: ChoicesConfig, processes: Processes) -> EvaluateResult:
    # Folder and data first: what is missing or taken should show before a model is loaded.
    if config.output is not None and not config.resume:
        processes.by_first(partial(ledger.check_new, config.output))
    loaded = [(task, _load(task, config)) for task in choice_tasks(config.task)]
    device = processes.device(config.device)
    dtype = pick_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, config.revision)
    if config.chat_template:
        require_chat_template(tokenizer)
    responses = _load_responses(config, tokenizer)
    model = load_model(config.model, dtype=dtype, device=device, revision=config.revision)

    started = time.perf_counter()
    max_length = config.max_length or _longest(model)
    tasks: list[Choices | Responses] = []
    if loaded:
        scorer = Scorer(model, batch_size=config.batch_size, reuse=config.reuse)
        tasks += [Choices(task, data, config, tokenizer, scorer, max_length) for task, data in loaded]
    if responses is not None:
        tasks.append(Responses(responses, config, TokenPredictor(model, batch_size=config.batch_size)))
    fingerprint = processes.by_first(lambda: model_fingerprint(config.model, model))
    key = {
        "calsmooth version": calsmooth.__version__,
        "model": fingerprint,
        "precision": str(dtype).removeprefix("torch."),
        "longest sequence": max_length,
        **{f"task {task.name}": task.key() for task in tasks},
    }
    # Where the scores are written down as they come; with --resume, of the interrupted evaluation of the same.
    begin = ledger.resume if config.resume else ledger.start
    kept = processes.by_first(lambda: begin(config.output, f"evaluate-{model_label(config.model)}", key))
    units = {task.name: task.units() for task in tasks}
    try:
        records = perform([unit for of_task in units.values() for unit in of_task], kept, processes, ", ".join(units))
    except KeyboardInterrupt:
        if processes.first:
            console.warn(f"interrupted; the same command with --resume --output {kept.folder} goes on")
        raise
    scored = time.perf_counter()

    def finish() -> EvaluateResult:
        found = {task.name: task.result([records[unit.name] for unit in units[task.name]]) for task in tasks}
        predictions = [p for task in found.values() for p in task.predictions]
        results = {
            "model": config.model,
            "model_description": model_description(config.model),
            "tasks": {name: task.summary for name, task in found.items()},
            "notes": list(dict.fromkeys(note for task in found.values() for note in task.notes)),
            "config": config.to_dict(),
            "model_hash": fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - started, 3),
            "scoring_seconds": round(scored - started, 3),
            "peak_memory_bytes": peak_memory(device),
            **environment(device),
        }
        panels = {name: task.panel for name, task in found.items()}
        tokens = next((task.tokens for task in found.values() if task.tokens is not None), None)
        _write(kept, results, predictions, tokens)
        return EvaluateResult(results, predictions, panels, kept.folder)

    return processes.by_first(finish)


def _load(task: Task, config: ChoicesConfig) -> TaskData:
    return task.load(config.data_dir, task.shots if config.shots is None else config.shots)


def _load_responses(config: ChoicesConfig, tokenizer: "PreTrainedTokenizerBase") -> ResponseRows | None:
    """The rows, where they are asked for."""
    if not isinstance(config, EvaluateConfig) or RESPONSES not in config.task:
        return None
    return load_responses(
        config.dataset,
        config.model,
        tokenizer,
        split=config.split,
        template=config.template,
        max_length=config.max_length or DEFAULT_RESPONSE_LENGTH,
        limit=config.limit,
        seed=config.seed,
    )


def _write(
    kept: Ledger, results: Mapping[str, Any], predictions: Sequence[Prediction], tokens: TokenPredictions | None
) -> None:
    if predictions:
        write_predictions(kept.folder / PREDICTIONS, predictions)
    if tokens is not None:
        write_token_predictions(kept.folder / TOKEN_PREDICTIONS, tokens)
    write_report(kept.folder, results)
    write_json(kept.folder / "results.json", results)
    kept.close()


def _longest(model: "PreTrainedModel") -> int | None:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
