"""What a finished run leaves in its folder: the model, its card, the loss curve and the summary."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth.environment import versions
from calsmooth.files import read_jsonl, whole_folder, write_json, write_text
from calsmooth.finetune.plan import Plan
from calsmooth.finetune.report import model_card, plot_loss_curve, prepare_loss_curve
from calsmooth.finetune.resume import COMPLETED
from calsmooth.models import model_label
from calsmooth.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_results(
    plan: Plan, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, summary: dict[str, Any]
) -> None:
    config = plan.config
    card = model_card(config.to_dict(), summary, versions())
    metrics = [values for _, values in read_jsonl(folder / "metrics.jsonl")]
    title = f"{model_label(config.model)} on {config.dataset_label()}, beta = {config.beta:g}"
    save_figure(plot_loss_curve(prepare_loss_curve(metrics), title), folder / "loss.png")
    write_text(folder / "README.md", card)
    write_json(folder / "summary.json", summary)
    with whole_folder(folder / "model") as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_text(target / "README.md", card)
    write_text(folder / COMPLETED, "")
    if config.keep_last == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
