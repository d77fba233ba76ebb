"""transformers' Trainer, with the fused loss, whole checkpoints, and a line of metrics a step.

What the Trainer does well (schedules, accumulation, devices, resuming at the right batch with the right random state)
is left to it. Changed is what it can't know: the loss is a sum over target tokens divided once by their number in the
whole accumulated batch, and a checkpoint appears under its name only when every file of it is written.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.batches import Collate
from calsmooth.finetune.checkpoints import PREFIX, brief, checkpoints, publish, readable, remove_checkpoints
from calsmooth.finetune.evaluation import measure
from calsmooth.finetune.loading import loader
from calsmooth.finetune.meter import Meter
from calsmooth.finetune.order import EpochOrder
from calsmooth.finetune.stopping import StopRequest
from calsmooth.finetune.stream import StepStream
from calsmooth.finetune.zero3 import gradient_norm, hold_back_step, load_readable, whole_weights
from calsmooth.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SFTTrainer(Trainer):
    """Trains a model whose `forward` returns the summed loss (`calsmooth.finetune.head.fused_loss`)."""

    def __init__(
        self,
        model: "PreTrainedModel",
        arguments: TrainingArguments,
        examples: Sequence[Example] | StepStream,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        order: EpochOrder | StepStream,
        collate: Collate,
        loss_reduction: str,
        keep_last: int,
        record: Callable[[dict[str, Any]], None],
        stop: StopRequest,
        evaluation: Sequence[Example] = (),
        filtered: bool = False,
        max_loss: float | None = None,
        batch_size: int,
        processes: Processes = ALONE,
    ) -> None:
        """order: in which the examples come; a stream is its own. collate: makes a batch of them. record: called with
        the values of each line of metrics.jsonl. evaluation: the examples that are measured. filtered: the loss tells
        the mass that its gradients keep. max_loss: see `calsmooth.finetune.meter.Meter`. batch_size: examples of a
        step, over all micro-batches of all processes.
        """
        self.examples, self.order, self.collate, self.evaluation = examples, order, collate, evaluation
        self.batch_size, self.processes = batch_size, processes
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=examples,  # any indexable with a length will do
            eval_dataset=evaluation or None,
            data_collator=collate,
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # Makes the Trainer count the targets of the whole accumulated batch and leave the loss as we scale it.
        self.model_accepts_loss_kwargs = True
        self.loss_reduction = loss_reduction
        self.keep_last = keep_last
        self.record, self.filtered = record, filtered
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.meter = Meter(self.order, stop, vocabulary=vocabulary, max_loss=max_loss, processes=processes)
        self.add_callback(self.meter)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            with readable(Path(resume_from_checkpoint)):
                self.meter.load(Path(resume_from_checkpoint))
                if isinstance(self.order, StepStream):
                    self.order.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not accelerate's, which shares out an epoch so that all processes have equally many whole micro-batches:
        # it takes examples of the beginning again at the end, and two processes would train on other steps than one.
        return loader(
            self.examples,
            self.order,
            self.collate,
            batch_size=self.batch_size,
            micro_batch=self.args.per_device_train_batch_size,
            processes=self.processes,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # accelerate hands its plugin to GPUs only; processors shard as well.
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.args.fsdp and self.args.bf16:
            # accelerate's own policy would sum gradients over the processes, and hand on the loss, in bfloat16.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        # The first thing that is made when model and optimizer are wrapped, and it wants to see the optimizer's steps.
        if self.is_deepspeed_enabled:
            self.meter.gradient_norm = partial(gradient_norm, processes=self.processes)
            hold_back_step(self._engine, self.optimizer, self.meter.gradient_norm)
            load_readable(self._engine)
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _engine(self) -> Any:
        """DeepSpeed's, from when it has been made."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Where processes hold shards: all weights in the first process, by name, and nothing in the others (each has
        to ask). None where the model holds its own.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        if self.is_deepspeed_enabled:
            return whole_weights(self._engine.module, self.processes)
        return self.accelerator.get_state_dict(self.model_wrapped)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is None:
            raise CalsmoothError("this version of transformers doesn't count the targets of a batch; use 5.17 or newer")
        divisor: Tensor | None = None
        if self.loss_reduction == "mean":
            # A tensor stays one: its number would have to be waited for.
            items = torch.as_tensor(num_items_in_batch, device=self.args.device, dtype=torch.float32).clamp(min=1)
            # Gradients are averaged over the processes; theirs is a sum.
            divisor = items / self.processes.count
            outputs = model(**inputs, divisor=divisor)
            loss, total = outputs["loss"], outputs["loss"].detach() * divisor
        else:
            outputs = model(**inputs)
            loss, total = outputs["loss"] * self.processes.count, outputs["loss"].detach()
        self.meter.count(num_items_in_batch, total, outputs.get("kept_mass"), inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics.jsonl, under the same names for every --report-to."""
        if "loss" in logs:
            logs = self.meter.line(self.state, logs, self.args.device)
        if "loss" in logs or "eval_nll" in logs:
            self.record({"step": self.state.global_step, "epoch": round(float(self.state.epoch or 0.0), 6), **logs})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out NLL and calibration (`calsmooth.finetune.evaluation.measure`), on the model as it is wrapped."""
        with self.compute_loss_context_manager():
            values = measure(
                self.model_wrapped,
                self.evaluation,
                self.collate,
                self.args.per_device_train_batch_size,
                self.args.device,
                self.filtered,
                self.processes,
            )
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        self.meter.paused()
        return values

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Gathered weights are in the first process only; transformers would look at the shards of the others.
        if self.processes.first or not self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        name = f"{PREFIX}{self.state.global_step}"
        staging = folder / f".{name}"
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self.processes.shared(None)  # every process has written its part
            if self.processes.first:
                self.meter.save(staging / name)
                if isinstance(self.order, StepStream):
                    self.order.save(staging / name, self.state.global_step)
                publish(staging / name, folder / name)
                remove_checkpoints(folder, keep=max(self.keep_last, 1))
            self.processes.shared(None)  # it has its name
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CalsmoothError(
                f"checkpoint of step {self.state.global_step} could not be written to {folder} ({brief(error)}); "
                f"{_earlier(folder)}; make room and go on with --resume"
            ) from error
        finally:
            self.args.output_dir = str(folder)
            if self.processes.first:
                shutil.rmtree(staging, ignore_errors=True)


def _earlier(folder: Path) -> str:
    whole = checkpoints(folder)
    return f"{whole[-1].name} is whole" if whole else "there is no earlier one"
