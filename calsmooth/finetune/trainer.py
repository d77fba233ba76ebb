"""transformers' Trainer, with the fused loss, whole checkpoints, and a line of metrics a step.

What the Trainer does well (schedules, accumulation, devices, resuming at the right batch with the right random state)
is left to it. Changed is what it can't know: the loss is a sum over target tokens divided once by their number in the
whole accumulated batch, and a checkpoint appears under its name only when every file of it is written.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.checkpoints import PREFIX, brief, remove_checkpoints
from calsmooth.finetune.meter import Meter
from calsmooth.finetune.order import EpochOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SFTTrainer(Trainer):
    """Trains a model whose `forward` returns the summed loss (`calsmooth.finetune.head.fused_loss`)."""

    def __init__(
        self,
        model: "PreTrainedModel",
        arguments: TrainingArguments,
        examples: Sequence[Example],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int,
        loss_reduction: str,
        keep_last: int,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        """batch_size: examples of a step. record: called with the values of each line of metrics.jsonl."""
        self.order = EpochOrder([len(e.input_ids) for e in examples], batch_size, arguments.seed)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=examples,  # any indexable with a length will do
            data_collator=Collator(int(tokenizer.pad_token_id)),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # Makes the Trainer count the targets of the whole accumulated batch and leave the loss as we scale it.
        self.model_accepts_loss_kwargs = True
        self.loss_reduction = loss_reduction
        self.keep_last = keep_last
        self.meter = Meter(record, self.order)
        self.add_callback(self.meter)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            self.meter.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"]
        if num_items_in_batch is None:
            raise CalsmoothError("this version of transformers doesn't count the targets of a batch; use 5.17 or newer")
        self.meter.count(num_items_in_batch, loss.detach())
        if self.loss_reduction == "mean":
            loss = loss / max(int(num_items_in_batch), 1)
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        name = f"{PREFIX}{self.state.global_step}"
        staging = folder / f".{name}"
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self.meter.save(staging / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(staging / name, folder / name)
            remove_checkpoints(folder, keep=max(self.keep_last, 1))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CalsmoothError(
                f"checkpoint of step {self.state.global_step} could not be written to {folder} ({brief(error)}); "
                "earlier checkpoints are whole: make room and go on with --resume"
            ) from error
        finally:
            self.args.output_dir = str(folder)
            shutil.rmtree(staging, ignore_errors=True)
