"""finetune: rows -> examples -> hidden states -> loss -> gradients -> a run folder.

The folder: config.yaml, environment.json, metrics.jsonl, checkpoints/, then model/, loss.png, README.md (the model
card), summary.json, and COMPLETED last of all.
"""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from calsmooth import console
from calsmooth.environment import describe_device, environment, peak_memory
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import check_run_folder, read_json, run_folder, write_json, write_text
from calsmooth.finetune.arguments import check_installed, training_arguments
from calsmooth.finetune.checkpoints import check_whole, checkpoints
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import enable_gradient_checkpointing, largest_that_fits
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.logits import check_temperature, set_dropout, set_softcap
from calsmooth.finetune.lora import add_adapters
from calsmooth.finetune.meter import BadStepError
from calsmooth.finetune.packing import check_packing, collator
from calsmooth.finetune.plan import Plan, prepare
from calsmooth.finetune.probe import ProbeResult, probe, probe_batch
from calsmooth.finetune.recording import METRICS, metrics_recorder, report_bad_step, summarize_metrics, tensorboard
from calsmooth.finetune.results import write_results
from calsmooth.finetune.resume import (
    COMPLETED,
    as_started,
    check_same_data,
    find_run,
    keep_metrics_until,
    remove_half_written,
    write_data_summary,
)
from calsmooth.finetune.stopping import StoppedError, stop_requests
from calsmooth.finetune.trainer import SFTTrainer
from calsmooth.models import load_config, load_model, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class FinetuneResult:
    """folder: the run's files. summary: steps, tokens, seconds, final_loss, device, probe (what summary.json holds)."""

    folder: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run(
    config: FinetuneConfig,
    on_start: Callable[[Plan, ProbeResult], Iterable[Path]] = lambda plan, probe: (),
) -> FinetuneResult:
    """Fine-tune and write the run folder; with config.resume go on with one.

    on_start: called before the first step, when everything that can be refused has been; the files and folders that it
        gives are moved into the run's folder.

    Raises:
        UsageError: the folder, an option or a path isn't as it has to be.
        CalsmoothError: data, model, loss or disk fail; what was written so far stays whole.
        StoppedError: SIGTERM or SIGINT asked the run to stop; it did, behind a checkpoint.
    """
    folder = find_run(config) if config.resume else None
    if config.resume and folder is None:
        # A job that always says --resume, so that it goes on after it was preempted, has to be able to start.
        console.say(f"{config.output} holds no run yet; starting one.")
    if folder is not None and (folder / COMPLETED).exists():
        console.say(f"{folder} is complete already; nothing to resume.")
        return FinetuneResult(folder, read_json(folder / "summary.json"))
    # What can be refused is refused before minutes are spent on data and model.
    if folder is not None:
        config = as_started(config, folder)
    elif config.output is not None:
        check_run_folder(config.output)
    check_installed(config)
    device = _training_device(config.device)
    plan, tokenizer = prepare(config)
    if folder is not None:
        check_same_data(plan, folder)
    model, trained, found = _models(plan, tokenizer, device)
    plan = plan.with_micro_batch(_micro_batch(plan, model, trained, tokenizer, device))
    given = on_start(plan, found)
    if folder is None:
        folder = run_folder(config.output, config.default_name())
        write_text(folder / "config.yaml", dataclasses.replace(plan.config, output=folder, resume=False).to_yaml())
        write_json(folder / "environment.json", environment(device))
        write_data_summary(plan, folder)
    else:
        remove_half_written(folder)
    for path in given:
        shutil.rmtree(folder / path.name, ignore_errors=True)  # what a killed process left half-done
        shutil.move(path, folder / path.name)
    checkpoint = next(reversed(checkpoints(folder / "checkpoints")), None)
    summary = _train(plan, model, trained, tokenizer, folder, checkpoint, device)
    summary["probe"] = vars(found)
    write_results(plan, model, trained, tokenizer, folder, summary)
    return FinetuneResult(folder, summary)


def _models(
    plan: Plan, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> "tuple[PreTrainedModel, Any, ProbeResult]":
    """The model as it is to be trained, what is trained of it (itself, or adapters around it), and the probe's word."""
    config = plan.config
    settings = load_config(config.model, config.revision)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    if config.logit_softcap is not None:
        set_softcap(settings, config.logit_softcap)
    model = load_model(config.model, dtype=torch.float32, device=device, revision=config.revision, config=settings)
    batch = probe_batch(plan.examples.examples, tokenizer, device)
    found = probe(model, batch, config.beta)
    if config.packing:
        check_packing(model)
    if config.logit_temperature != 1.0:
        check_temperature(model, batch, config.logit_temperature)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora_rank is None:
        return model, model, found
    return model, add_adapters(model, config, pick_dtype(config.dtype, device)), found


def _train(
    plan: Plan,
    model: "PreTrainedModel",
    trained: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    checkpoint: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """trained: the model, or adapters around it."""
    config = plan.config
    done = check_whole(checkpoint) if checkpoint else 0
    keep_metrics_until(folder / METRICS, done if checkpoint else -1)
    use_cache = model.config.use_cache  # the Trainer switches it off, and the saved model would generate slowly
    with (
        metrics_recorder(folder / METRICS, done, plan.steps) as record,
        stop_requests() as stop,
        fused_loss(model, config.beta, mode=config.loss_mode, temperature=config.logit_temperature),
        _random_state_kept(),
    ):
        set_seed(config.seed)
        trainer = SFTTrainer(
            trained,
            training_arguments(plan, folder, device, resumed=checkpoint is not None),
            plan.stream or plan.examples.examples,
            tokenizer,
            order=plan.stream or plan.order,
            collate=collator(config.packing, model, int(tokenizer.pad_token_id)),
            loss_reduction=config.loss_reduction,
            keep_last=config.keep_last,
            record=record,
            stop=stop,
            evaluation=plan.evaluation,
            filtered=config.loss_mode == "filtered",
            max_loss=config.max_loss,
            batch_size=int(config.batch_size or 0),
        )
        if "tensorboard" in config.report_to:
            trainer.add_callback(tensorboard(folder, done))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except BadStepError as error:
            raise CalsmoothError(report_bad_step(error, tokenizer, folder)) from error
    if stop.signal is not None and trainer.state.global_step < plan.steps:
        raise StoppedError(
            f"stopped by {stop.name} after step {trainer.state.global_step} of {plan.steps}, behind a checkpoint; "
            f"go on with --resume --output {folder}",
            stop.signal,
        )
    model.config.use_cache = use_cache
    return {
        **summarize_metrics(folder / METRICS),
        "steps": plan.steps,
        "seconds": round(trainer.meter.seconds, 2),
        "peak_memory_bytes": peak_memory(device),
        "resumed_at_step": done or None,
        "device": describe_device(device),
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "format": plan.examples.format,
        "template": plan.examples.template,
        **plan.rows_read(plan.steps),
    }


def _training_device(name: str | None) -> torch.device:
    """The device to train on: the first GPU, or what was asked for.

    Raises:
        UsageError: the device isn't there or isn't the first, or several processes were started.
    """
    device = pick_device(name)
    if device.index:
        raise UsageError(
            f"--device {name}: fine-tuning takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={device.index} "
            "and --device cuda"
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError("several processes were started (WORLD_SIZE); calsmooth finetune runs in one, on one GPU")
    return device


def _micro_batch(
    plan: Plan, model: "PreTrainedModel", trained: Any, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> int:
    """The largest size that fits, tried out where there is a choice."""
    if len(plan.micro_batches) == 1:
        return plan.micro_batch
    trained.train()
    dtype = pick_dtype(plan.config.dtype, device)
    collate = collator(plan.config.packing, model, int(tokenizer.pad_token_id))
    with fused_loss(model, plan.config.beta, mode=plan.config.loss_mode):
        return largest_that_fits(trained, plan.heaviest, collate, plan.micro_batches, dtype)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A caller in the same process finds its random state as it was."""
    states = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])
