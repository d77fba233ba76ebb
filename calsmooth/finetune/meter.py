"""Counts what a run has done, writes its lines of metrics, and stops it when its gradient is no longer a number."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from calsmooth.errors import CalsmoothError
from calsmooth.files import read_json
from calsmooth.finetune.order import EpochOrder

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

METER = "meter.json"


class Meter(TrainerCallback):
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
