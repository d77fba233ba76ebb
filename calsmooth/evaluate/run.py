"""evaluate: tasks -> prompts -> log-probabilities -> predictions.jsonl -> metrics -> results.json and a picture."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth import metrics
from calsmooth.console import progress
from calsmooth.environment import environment
from calsmooth.evaluate.config import ChoicesConfig, EvaluateConfig
from calsmooth.evaluate.next_token import predict_tokens
from calsmooth.evaluate.prompts import Prompt, prompter
from calsmooth.evaluate.questions import Question, sample
from calsmooth.evaluate.requests import Encoder, Request
from calsmooth.evaluate.scoring import Scorer
from calsmooth.evaluate.task import Task, TaskData
from calsmooth.evaluate.tasks import RESPONSES, choice_tasks
from calsmooth.evaluate.tasks.responses import load_responses
from calsmooth.files import run_folder, write_json
from calsmooth.models import load_model, load_tokenizer, model_label, pick_device, pick_dtype
from calsmooth.plots import Reliability, plot_reliability, prepare_reliability, save_figure
from calsmooth.records import Prediction, write_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 1000
DEFAULT_RESPONSE_LENGTH = 1024


@dataclass
class TaskResult:
    """One task's part of results.json, its predictions (none for `responses`) and its panel of the picture."""

    summary: dict[str, Any]
    panel: Reliability
    predictions: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluateResult:
    """`results` is what results.json holds; `folder` has predictions.jsonl, results.json, reliability.png and .svg.

    panels: each task's part of the picture, for drawing it beside another run's.
    """

    results: dict[str, Any]
    predictions: list[Prediction]
    panels: dict[str, Reliability]
    folder: Path


def run(config: ChoicesConfig) -> EvaluateResult:
    """Evaluate a model and write the run folder. Prints nothing but progress bars.

    Raises:
        UsageError: a folder, device or option that isn't there or doesn't fit.
        CalsmoothError: the model or a task's data can't be had or is bad.
    """
    # Data first: a missing file should show before a model is loaded.
    loaded = [(task, _load(task, config)) for task in choice_tasks(config.task)]
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, config.revision)
    responses = None
    if isinstance(config, EvaluateConfig) and RESPONSES in config.task:
        length = config.max_length or DEFAULT_RESPONSE_LENGTH
        responses = load_responses(
            config.dataset,
            config.model,
            tokenizer,
            split=config.split,
            max_length=length,
            limit=config.limit,
            seed=config.seed,
        )
    model = load_model(config.model, dtype=dtype, device=device, revision=config.revision)
    folder = run_folder(config.output, f"evaluate-{model_label(config.model)}")

    tasks: dict[str, TaskResult] = {}
    started = time.perf_counter()
    for task, data in loaded:
        tasks[task.name] = _choices(task, data, config, model, tokenizer)
    if responses is not None:
        tasks[RESPONSES] = _responses(*responses, config, model)
    predictions = [p for task in tasks.values() for p in task.predictions]
    results = {
        "model": config.model,
        "tasks": {name: task.summary for name, task in tasks.items()},
        "notes": list(dict.fromkeys(note for task in tasks.values() for note in task.notes)),
        "config": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 3),
        **environment(device),
    }
    if predictions:
        write_predictions(folder / "predictions.jsonl", predictions)
    write_json(folder / "results.json", results)
    panels = {name: task.panel for name, task in tasks.items()}
    figure = plot_reliability(list(panels.values()))
    for suffix in ("png", "svg"):
        save_figure(figure, folder / f"reliability.{suffix}")
    return EvaluateResult(results, predictions, panels, folder)


def _load(task: Task, config: ChoicesConfig) -> TaskData:
    return task.load(config.data_dir, task.shots if config.shots is None else config.shots)


def _choices(
    task: Task,
    data: TaskData,
    config: ChoicesConfig,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> TaskResult:
    """Score a multiple-choice task."""
    shots = task.shots if config.shots is None else config.shots
    form = config.format or task.format
    notes = list(data.notes)
    chat = config.shots_as if config.chat_template else None
    wording, ask = prompter(task, format=form, style=config.prompt_style, chat=chat, tokenizer=tokenizer)
    encode = Encoder(tokenizer, config.max_length or _longest(model))
    scorer = Scorer(model, batch_size=config.batch_size)
    questions = sample(data.questions, config.limit, config.seed)
    predictions, requests = [], []
    with progress(task.name, len(questions)) as advance:
        ordered = sorted(questions, key=lambda q: q.subject)
        for _, group in groupby(ordered, key=lambda q: q.subject):
            members = list(group)
            prompts = [ask(question, list(data.examples.get(question.subject, ()))) for question in members]
            encoded = [encode(prompt) for prompt in prompts]
            scores = scorer.score(encoded, advance)
            predictions += [
                _prediction(task.name, question, logprobs, prompt)
                for question, logprobs, prompt in zip(members, scores, prompts, strict=True)
            ]
            requests += encoded
    fewest = min(len(data.examples.get(q.subject, ())) for q in questions)
    if fewest < shots:
        notes.append(f"{task.name}: only {fewest} of {shots} solved examples exist")
    notes += _notes(task.name, requests, scorer)
    summary = {
        **_summary(predictions, config, resamples=RESAMPLES),
        "questions_available": len(data.questions),
        "format": form,
        "prompt": wording,
        "chat_template": chat,
        "shots": min(shots, fewest),
        "prompts_with_dropped_shots": sum(r.dropped_shots > 0 for r in requests),
        "prompts_truncated": sum(r.truncated for r in requests),
        "prefix_reuse": scorer.sharing.prefix,
        "tokens_run": scorer.tokens_run,
        "tokens_in_full": sum(_tokens_in_full(r) for r in requests),
        "source": data.source,
    }
    subjects = {name: list(group) for name, group in groupby(predictions, key=lambda p: p.subject)}
    if len(subjects) > 1:
        summary["subjects"] = {name: _summary(group, config) for name, group in subjects.items()}
    if form == "cloze":
        per_byte = [p.logprobs_per_byte for p in predictions if p.logprobs_per_byte is not None]
        summary["per_byte"] = metrics.summarize(per_byte, [p.gold for p in predictions], bins=config.bins)
        # The exponential of a mean is no probability, so that there is no mass to speak of.
        del summary["per_byte"]["choice_mass"]
    confidence, correct = metrics.top_of([p.logprobs for p in predictions], [p.gold for p in predictions])
    panel = prepare_reliability(confidence, correct, bins=config.bins, title=task.name)
    summary["reliability"] = panel.to_dict()
    return TaskResult(summary, panel, predictions, notes)


def _responses(examples: Sequence[Any], source: str, config: ChoicesConfig, model: "PreTrainedModel") -> TaskResult:
    """Score next-token predictions on held-out responses."""
    with progress(RESPONSES, len(examples)) as advance:
        tokens = predict_tokens(model, examples, batch_size=config.batch_size, advance=advance)
    top = metrics.summarize_top(
        tokens.confidence,
        tokens.correct,
        bins=config.bins,
        resamples=RESAMPLES,
        seed=config.seed,
        clusters=tokens.row,  # the tokens of a response aren't independent
    )
    panel = prepare_reliability(tokens.confidence, tokens.correct, bins=config.bins, title=RESPONSES)
    summary = {
        **top,
        # Over a whole vocabulary there is no list of choices to be judged one by one.
        "sce": None,
        "ace": None,
        "brier": float(tokens.brier.mean()),
        "nll": float(tokens.nll.mean()),
        "choice_mass": None,
        "rows": len(examples),
        "source": source,
        "reliability": panel.to_dict(),
    }
    return TaskResult(summary, panel)


def _prediction(task: str, question: Question, logprobs: list[float], prompt: Prompt) -> Prediction:
    per_byte = None
    if prompt.answer_bytes is not None:
        per_byte = tuple(value / length for value, length in zip(logprobs, prompt.answer_bytes, strict=True))
    return Prediction(task, question.subject, question.id, tuple(logprobs), question.answer, per_byte)


def _summary(predictions: Sequence[Prediction], config: ChoicesConfig, resamples: int = 0) -> dict[str, Any]:
    logprobs, gold = [p.logprobs for p in predictions], [p.gold for p in predictions]
    return metrics.summarize(logprobs, gold, bins=config.bins, resamples=resamples, seed=config.seed)


def _notes(task: str, requests: Sequence[Request], scorer: Scorer) -> list[str]:
    notes = []
    dropped = sum(r.dropped_shots > 0 for r in requests)
    truncated = sum(r.truncated for r in requests)
    if dropped:
        notes.append(f"{task}: {dropped} of {len(requests)} prompts were too long and lost solved examples")
    if truncated:
        notes.append(
            f"{task}: {truncated} of {len(requests)} questions were too long by themselves and lost their start"
        )
    if not scorer.sharing.prefix:
        notes.append(f"prompts are run in full, because {scorer.sharing.reason}")
    return notes


def _tokens_in_full(request: Request) -> int:
    """What one full forward a choice (or one a question, where all choices are one token) would run."""
    if all(len(c) == 1 for c in request.continuations):
        return len(request.context)
    return sum(len(request.context) + len(c) - 1 for c in request.continuations)


def _longest(model: "PreTrainedModel") -> int | None:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
