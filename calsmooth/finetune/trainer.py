"""transformers' Trainer, with the fused loss, whole checkpoints, and a line of metrics a step.

What the Trainer does well (schedules, accumulation, devices, resuming at the right batch with the right random state)
is left to it. Changed is what it can't know: the loss is a sum over target tokens divided once by their number in the
whole accumulated batch, and a checkpoint appears under its name only when every file of it is written.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calsmooth.data import IGNORED, Example
from calsmooth.errors import CalsmoothError
from calsmooth.files import read_json
from calsmooth.finetune.order import EpochOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState

PREFIX = "checkpoint-"
METER = "meter.json"


class Collator:
    """Examples -> one batch, padded on the right to the longest (a multiple of 8)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        width = -(-max(len(e.input_ids) for e in examples) // 8) * 8
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORED)
        attention_mask = torch.zeros(len(examples), width, dtype=torch.long)
        for i, e in enumerate(examples):
            n = len(e.input_ids)
            input_ids[i, :n] = torch.tensor(e.input_ids)
            labels[i, :n] = torch.tensor(e.labels)
            attention_mask[i, :n] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


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
        self.meter = _Meter(record, self.order)
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
                f"checkpoint of step {self.state.global_step} could not be written to {folder} ({_brief(error)}); "
                "earlier checkpoints are whole: make room and go on with --resume"
            ) from error
        finally:
            self.args.output_dir = str(folder)
            shutil.rmtree(staging, ignore_errors=True)


class _Meter(TrainerCallback):
    """Counts tokens and loss, writes the lines of metrics, and stops a run whose gradient is no longer a number."""

    def __init__(self, record: Callable[[dict[str, Any]], None], order: EpochOrder) -> None:
        self.record, self.order = record, order
        self.tokens = 0  # of the whole run
        self.last_tokens, self.loss = 0, 0.0  # tokens at the last line, loss summed since then
        self.batch_tokens: Tensor | int = 0
        self.batch_loss: Tensor | float = 0.0
        self.earlier_seconds = 0.0
        self.started = self.last_time = time.perf_counter()

    def save(self, checkpoint: Path) -> None:
        values = {
            "tokens": self.tokens, "last_tokens": self.last_tokens, "loss": self.loss, "seconds": self.seconds,
        }  # fmt: skip
        (checkpoint / METER).write_text(json.dumps(values))

    def load(self, checkpoint: Path) -> None:
        values = read_json(checkpoint / METER)
        self.tokens, self.last_tokens, self.loss = values["tokens"], values["last_tokens"], values["loss"]
        self.earlier_seconds = values["seconds"]

    @property
    def seconds(self) -> float:
        """Of training, over all the processes that a resumed run took."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def count(self, tokens: Tensor | int, summed_loss: Tensor) -> None:
        """One micro-batch: its summed loss, and the targets of the whole step that it is a part of."""
        self.batch_tokens = tokens
        self.batch_loss = self.batch_loss + summed_loss

    def on_train_begin(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.started = self.last_time = time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.order.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        # Before the update, so that neither the weights nor a checkpoint ever take a gradient that isn't a number.
        gradients = [p.grad for p in given["model"].parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            loss = float(self.batch_loss) / max(int(self.batch_tokens), 1)
            raise CalsmoothError(
                f"step {state.global_step + 1}: the loss is {loss:g} and the gradient norm {norm:g}; "
                "lower --lr, or look at the data"
            )

    def on_step_end(self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        self.tokens += int(self.batch_tokens)
        self.loss += float(self.batch_loss)
        self.batch_loss = 0.0
        control.should_log = control.should_log or state.global_step == state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        tokens = self.tokens - self.last_tokens
        # Per token under either --loss-reduction, so that runs can be compared.
        loss, speed = self.loss / max(tokens, 1), tokens / max(now - self.last_time, 1e-9)
        self.last_tokens, self.last_time, self.loss = self.tokens, now, 0.0
        self.record(
            {
                "step": state.global_step,
                "epoch": round(float(state.epoch or 0.0), 6),
                "loss": loss,
                "lr": float(logs["learning_rate"]),
                "grad_norm": float(logs.get("grad_norm", 0.0)),
                "tokens": self.tokens,
                "tokens_per_second": round(speed, 1),
            }
        )

    def on_save(self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        # Writing a checkpoint isn't training: leave its seconds out of the speed.
        self.last_time = max(self.last_time, time.perf_counter())


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. Half-written ones begin with a dot and are none."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(ValueError):
            found.append((int(path.name.removeprefix(PREFIX)), path))
    return [path for _, path in sorted(found)]


def remove_checkpoints(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[: -keep or None]:
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint was made at.

    Raises:
        CalsmoothError: its state can't be read.
    """
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalsmoothError(
            f"{checkpoint}: not a readable checkpoint ({_brief(error)}); remove this folder and --resume again"
        ) from None


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
