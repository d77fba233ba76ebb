"""Counts what a run has done, makes its lines of metrics, and stops it before a bad step or when it is asked to."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from calsmooth.environment import peak_memory
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.order import EpochOrder
from calsmooth.finetune.stopping import StopRequest
from calsmooth.finetune.stream import StepStream
from calsmooth.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

METER = "meter.json"

EXPLODED = 3.0
"""A loss is too high above so many times the larger of the first step's and of knowing nothing, ln(vocabulary)."""


@dataclass(frozen=True)
class MicroBatch:
    """What a bad step is traced back to."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    loss: Tensor  # summed over the targets


class BadStepError(CalsmoothError):
    """The step that was about to be taken is no step to take; its micro-batches are kept to be looked at."""

    def __init__(self, message: str, step: int, micro_batches: list[MicroBatch]) -> None:
        super().__init__(message)
        self.step, self.micro_batches = step, micro_batches


class Meter(TrainerCallback):
    """Watches every step: its tokens, its loss, whether it may be taken."""

    def __init__(
        self,
        order: EpochOrder | StepStream,
        stop: StopRequest,
        *,
        vocabulary: int,
        max_loss: float | None,
        processes: Processes = ALONE,
    ) -> None:
        """vocabulary: tokens. max_loss: a token, above which a step isn't taken (None: see EXPLODED)."""
        self.gradient_norm: Callable[[Iterable[torch.nn.Parameter]], float] = gradient_norm
        self.order, self.stop, self.processes = order, stop, processes
        self.nothing_known, self.max_loss = math.log(vocabulary), max_loss
        self.tokens = 0  # of the whole run
        self.loss, self.kept_mass, self.last_tokens = 0.0, 0.0, 0  # summed since the last line; tokens until then
        self.first_loss: float | None = None  # a token, of the run's first step
        self.step_tokens: Tensor | int = 0
        self.step_loss: Tensor | float = 0.0
        self.step_kept_mass: Tensor | float | None = None
        self.micro_batches: list[MicroBatch] = []
        self.stopping = False
        self.earlier_seconds = 0.0
        self.started = self.last_time = time.perf_counter()

    def save(self, checkpoint: Path) -> None:
        values = {
            "tokens": self.tokens,
            "last_tokens": self.last_tokens,
            "loss": self.loss,
            "kept_mass": self.kept_mass,
            "first_loss": self.first_loss,
            "seconds": self.seconds,
        }
        (checkpoint / METER).write_text(json.dumps(values))

    def load(self, checkpoint: Path) -> None:
        values = json.loads((checkpoint / METER).read_text())
        self.tokens, self.last_tokens = values["tokens"], values["last_tokens"]
        self.loss, self.kept_mass = values["loss"], values["kept_mass"]
        self.first_loss = values["first_loss"]
        self.earlier_seconds = values["seconds"]

    @property
    def seconds(self) -> float:
        """Of training, over all the processes that a resumed run took."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def count(self, tokens: Tensor | int, loss: Tensor, kept_mass: Tensor | None, inputs: Mapping[str, Tensor]) -> None:
        """One micro-batch. tokens: targets of the whole step that it is a part of. loss, kept_mass: summed."""
        self.step_tokens = tokens
        self.step_loss = self.step_loss + loss
        if kept_mass is not None:
            self.step_kept_mass = kept_mass + (0.0 if self.step_kept_mass is None else self.step_kept_mass)
        self.micro_batches.append(MicroBatch(inputs["input_ids"], inputs["labels"], loss))

    def line(self, state: "TrainerState", logs: dict[str, float], device: torch.device) -> dict[str, Any]:
        """The values since the last line. The loss is a token's under either --loss-reduction, so that runs compare."""
        now = time.perf_counter()
        tokens = self.tokens - self.last_tokens
        values = {
            "loss": self.loss / max(tokens, 1),
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "tokens": self.tokens,
            "tokens_per_second": round(tokens / max(now - self.last_time, 1e-9), 1),
            "peak_memory_bytes": peak_memory(device),
        }
        if self.step_kept_mass is not None:
            values["kept_mass"] = self.kept_mass / max(tokens, 1)
        self.last_tokens, self.last_time, self.loss, self.kept_mass = self.tokens, now, 0.0, 0.0
        return values

    def paused(self) -> None:
        """Evaluating and writing a checkpoint aren't training: their seconds are left out of the speed."""
        self.last_time = max(self.last_time, time.perf_counter())

    def on_train_begin(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.started = self.last_time = time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.order.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any
    ) -> None:
        self.micro_batches, self.step_loss, self.step_kept_mass = [], 0.0, None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        # Before the update, so that neither the weights nor a checkpoint ever take a bad step.
        norm = self.gradient_norm(given["model"].parameters())
        # From here on all processes know the same, and decide alike.
        self.step_loss, kept_mass, asked = self.processes.summed(
            float(self.step_loss), float(self.step_kept_mass or 0.0), self.stop.signal is not None
        )
        self.step_kept_mass = None if self.step_kept_mass is None else kept_mass
        self.stopping = asked > 0
        loss = self.step_loss / max(int(self.step_tokens), 1)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        limit = self.max_loss or EXPLODED * max(self.nothing_known, self.first_loss)
        if math.isfinite(norm) and loss <= limit:
            return
        if math.isfinite(norm) and math.isfinite(loss):
            why = f"the loss is {loss:.4g} a token, above {limit:.4g} (--max-loss); knowing nothing costs " + (
                f"{self.nothing_known:.4g}"
            )
        else:
            why = f"the loss is {loss:g} a token and the gradient norm {norm:g}"
        raise BadStepError(why, state.global_step + 1, self.micro_batches)

    def on_step_end(self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        self.tokens += int(self.step_tokens)
        self.loss += float(self.step_loss)
        self.kept_mass += float(self.step_kept_mass or 0.0)
        if state.global_step == state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        elif self.stopping:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        self.paused()


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Euclidean, of all gradients together; also of those that are sharded over processes (DTensor)."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
