"""What a finished run leaves in its folder: the model, its card, the loss curve and the summary."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from calsmooth.config import load
from calsmooth.data.templates import as_chat_template
from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError
from calsmooth.files import read_json, read_jsonl, whole_folder, write_json, write_text
from calsmooth.finetune.checkpoints import brief
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.logits import fold_temperature
from calsmooth.finetune.lora import merged
from calsmooth.finetune.plan import Plan
from calsmooth.finetune.recording import METRICS
from calsmooth.finetune.report import model_card, plot_loss_curve, prepare_loss_curve
from calsmooth.finetune.resume import COMPLETED
from calsmooth.models import BUILT_IN, model_label
from calsmooth.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_results(
    plan: Plan,
    model: "PreTrainedModel",
    trained: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    summary: dict[str, Any],
) -> None:
    """trained: the model, or adapters around it.

    Raises:
        CalsmoothError: the disk takes no more; checkpoints are whole.
    """
    config = plan.config
    if chat_template := as_chat_template(plan.examples.template, tokenizer):
        tokenizer.chat_template = chat_template  # so that whoever asks the model asks it as it was trained
    card = model_card(config.to_dict(), summary, versions())
    metrics = [values for _, values in read_jsonl(folder / METRICS)]
    title = curve_title(config, summary)
    save_figure(plot_loss_curve(prepare_loss_curve(metrics), title), folder / "loss")
    write_text(folder / "README.md", card)
    write_json(folder / "summary.json", summary)
    try:
        if config.lora_merge:
            _save(trained, tokenizer, card, folder / "adapter")
            trained = merged(trained)
        if config.logit_temperature != 1.0:
            fold_temperature(model, config.logit_temperature)
        _save(trained, tokenizer, card, folder / "model")
    except (OSError, SafetensorError) as error:
        raise CalsmoothError(
            f"{folder / 'model'} can't be written ({brief(error)}); the checkpoints are whole: make room and go on "
            "with --resume"
        ) from error
    write_text(folder / COMPLETED, "")
    if config.keep_last == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def curve_title(config: FinetuneConfig, summary: Mapping[str, Any]) -> str:
    """Which model was trained on what, how, and for how long."""
    model = "the built-in model" if config.model == BUILT_IN else model_label(config.model)
    data = "the built-in data" if config.dataset == (BUILT_IN,) else config.dataset_label()
    how = f"{summary['steps']:,} steps, {summary['tokens']:,} target tokens"
    return f"{model} fine-tuned on {data}, label smoothing beta = {config.beta:g}\n{how}"


def write_cards(folder: Path, evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Write a finished run's model cards anew, with what was measured: moment -> task -> metrics."""
    config = load(FinetuneConfig, {}, folder / "config.yaml")
    environment = read_json(folder / "environment.json")
    summary = read_json(folder / "summary.json")
    card = model_card(config.to_dict(), summary, environment["versions"], evaluations)
    for place in (folder, folder / "model", folder / "adapter"):
        if place.is_dir():
            write_text(place / "README.md", card)


def _save(model: Any, tokenizer: "PreTrainedTokenizerBase", card: str, folder: Path) -> None:
    with whole_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_text(target / "README.md", card)
