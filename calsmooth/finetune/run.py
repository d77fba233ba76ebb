"""finetune: rows -> examples -> hidden states -> loss -> gradients -> a run folder.

The folder: config.yaml, environment.json, metrics.jsonl, checkpoints/, then model/, loss.png, README.md (the model
card), summary.json, and COMPLETED last of all.
"""

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from calsmooth import console
from calsmooth.environment import describe_device, environment, peak_memory
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import check_run_folder, read_json, run_folder, write_json, write_text
from calsmooth.finetune.arguments import check_installed, check_optimizer, training_arguments
from calsmooth.finetune.checkpoints import check_whole, checkpoints
from calsmooth.finetune.compiled import compiled_layers
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import enable_gradient_checkpointing, largest_that_fits
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.logits import check_temperature, set_dropout, set_softcap
from calsmooth.finetune.lora import add_adapters
from calsmooth.finetune.meter import BadStepError
from calsmooth.finetune.packing import check_packing, collator
from calsmooth.finetune.plan import Plan, prepare
from calsmooth.finetune.prior import smoothing_prior
from calsmooth.finetune.probe import ProbeResult, every_parameter_takes_part, probe, probe_batch
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
from calsmooth.finetune.trackers import check_login, reports
from calsmooth.finetune.trainer import SFTTrainer
from calsmooth.finetune.zero3 import check_checkpoint, deepspeed
from calsmooth.heads import find_head
from calsmooth.models import load_config, load_model, pick_device, pick_dtype
from calsmooth.processes import Processes, joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARDED = ("fsdp", "zero3")
"""Ways in which no process holds the whole model."""


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

    Under torchrun the processes share the work (config.parallel says how); the first one writes the files, all return
    the result.

    on_start: called before the first step, when everything that can be refused has been; the files and folders that it
        gives are moved into the run's folder.

    Raises:
        UsageError: the folder, an option or a path isn't as it has to be.
        CalsmoothError: data, model, loss or disk fail; what was written so far stays whole.
        StoppedError: SIGTERM or SIGINT asked the run to stop; it did, behind a checkpoint.
    """
    with joined(config.device) as processes:
        return _run(config, on_start, processes)


def _run(
    config: FinetuneConfig, on_start: Callable[[Plan, ProbeResult], Iterable[Path]], processes: Processes
) -> FinetuneResult:
    config, begun = processes.by_first(lambda: _begin(config))
    if begun is not None and (begun / COMPLETED).exists():
        console.say(f"{begun} is complete already; nothing to resume.")
        return FinetuneResult(begun, read_json(begun / "summary.json"))
    check_installed(config)
    processes.by_first(lambda: check_login(config))
    device = training_device(config, processes)
    processes.by_first(lambda: check_optimizer(config, device))
    if device.type == "cpu":
        # Where DeepSpeed is installed, accelerate loads it for any run; it would take a GPU, or say that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    plan, tokenizer = processes.after_first(lambda: prepare(config, processes.count))
    if begun is not None:
        check_same_data(plan, begun)
    # What is going to be sharded is whole once, in main memory, where there is more room.
    sharded = config.parallel in SHARDED
    model, trained, found = _models(plan, tokenizer, torch.device("cpu") if sharded else device)
    plan = plan.with_micro_batch(min(processes.shared(_micro_batch(plan, model, trained, tokenizer, device))))
    given = on_start(plan, found)
    folder, checkpoint, done = processes.by_first(lambda: _start(plan, begun, device, given))
    if config.parallel == "zero3" and checkpoint is not None:
        processes.by_first(lambda: check_checkpoint(checkpoint, processes))
    with deepspeed() if config.parallel == "zero3" else nullcontext():
        summary, weights = _train(plan, model, trained, tokenizer, folder, checkpoint, done, device, processes)
    summary["probe"] = vars(found)
    if processes.first:
        if weights is not None:
            model = trained = _with_weights(_model(plan.config, torch.device("cpu")), weights)
        write_results(plan, model, trained, tokenizer, folder, summary)
    processes.shared(None)  # the files are there
    return FinetuneResult(folder, summary)


def _begin(config: FinetuneConfig) -> tuple[FinetuneConfig, Path | None]:
    """What can be refused is refused before minutes are spent on data and model.

    Returns the settings, and the folder of the run that is gone on with, or of a finished one.
    """
    folder = find_run(config) if config.resume else None
    if config.resume and folder is None:
        # A job that always says --resume, so that it goes on after it was preempted, has to be able to start.
        console.say(f"{config.output} holds no run yet; starting one.")
    if folder is not None and not (folder / COMPLETED).exists():
        config = as_started(config, folder)
    elif folder is None and config.output is not None:
        check_run_folder(config.output)
    return config, folder


def _start(
    plan: Plan, folder: Path | None, device: torch.device, given: Iterable[Path]
) -> tuple[Path, Path | None, int]:
    """The run's folder, made where it is new; the checkpoint to go on from, and its step. given: is moved into it."""
    if folder is None:
        folder = run_folder(plan.config.output, plan.config.default_name())
        write_text(folder / "config.yaml", dataclasses.replace(plan.config, output=folder, resume=False).to_yaml())
        write_json(folder / "environment.json", environment(device))
        write_data_summary(plan, folder)
    else:
        remove_half_written(folder)
    for path in given:
        shutil.rmtree(folder / path.name, ignore_errors=True)  # what a killed process left half-done
        shutil.move(path, folder / path.name)
    checkpoint = next(reversed(checkpoints(folder / "checkpoints")), None)
    done = check_whole(checkpoint) if checkpoint else 0
    keep_metrics_until(folder / METRICS, done if checkpoint else -1)
    return folder, checkpoint, done


def _model(config: FinetuneConfig, device: torch.device) -> "PreTrainedModel":
    settings = load_config(config.model, config.revision)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    if config.logit_softcap is not None:
        set_softcap(settings, config.logit_softcap)
    return load_model(config.model, dtype=torch.float32, device=device, revision=config.revision, config=settings)


def _with_weights(model: "PreTrainedModel", weights: dict[str, torch.Tensor]) -> "PreTrainedModel":
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _models(
    plan: Plan, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> "tuple[PreTrainedModel, Any, ProbeResult]":
    """The model as it is to be trained, what is trained of it (itself, or adapters around it), and the probe's word."""
    config = plan.config
    model = _model(config, device)
    batch = probe_batch(plan.examples.examples, tokenizer, device)
    found = probe(model, batch, config.beta)
    if config.packing:
        check_packing(model)
    if config.logit_temperature != 1.0:
        check_temperature(model, config.logit_temperature)
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
    done: int,
    device: torch.device,
    processes: Processes,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """The summary, and all weights where processes hold shards of them.

    trained: the model, or adapters around it. done: the step that the checkpoint was made at, 0 without one.
    """
    config = plan.config
    some_unused = False
    if processes.count > 1 and config.parallel not in SHARDED:
        batch = probe_batch(plan.examples.examples, tokenizer, device)
        some_unused = not every_parameter_takes_part(model, trained, batch)
    trained_parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)  # DeepSpeed leaves them empty
    use_cache = model.config.use_cache  # the Trainer switches it off, and the saved model would generate slowly
    with (
        reports(config, folder, done, writes=processes.first) as report,
        metrics_recorder(folder / METRICS, done, plan.steps, report, writes=processes.first) as record,
        stop_requests() as stop,
        _layers(config, model),
        fused_loss(
            model,
            config.beta,
            mode=config.loss_mode,
            temperature=config.logit_temperature,
            smoothing_prior=smoothing_prior(plan, find_head(model).vocabulary, device),
        ),
        _random_state_kept(),
    ):
        set_seed(config.seed)
        trainer = SFTTrainer(
            trained,
            training_arguments(plan, folder, device, resumed=checkpoint is not None, some_unused=some_unused),
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
            processes=processes,
        )
        torch.manual_seed(config.seed + processes.rank)  # no two processes' dropout is alike
        if "tensorboard" in config.report_to and processes.first:
            trainer.add_callback(tensorboard(folder, done))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except BadStepError as error:
            bad = BadStepError(str(error), error.step, [m for ms in processes.shared(error.micro_batches) for m in ms])
            message = processes.by_first(lambda: report_bad_step(bad, tokenizer, folder))
            if not processes.first:  # one of them says it
                raise SystemExit(CalsmoothError.exit_code) from error
            raise CalsmoothError(message) from error
    if trainer.meter.stopping and trainer.state.global_step < plan.steps:
        [number, *_] = [number for number in processes.shared(stop.signal) if number is not None]
        if not processes.first:  # one of them says it
            raise SystemExit(128 + number)
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of {plan.steps}, behind "
            f"a checkpoint; go on with --resume --output {folder}",
            number,
        )
    model.config.use_cache = use_cache
    summary = {
        **summarize_metrics(folder / METRICS),
        "steps": plan.steps,
        "seconds": round(trainer.meter.seconds, 2),
        "peak_memory_bytes": peak_memory(device),
        "resumed_at_step": done or None,
        "device": describe_device(device),
        "trained_parameters": trained_parameters,
        "format": plan.examples.format,
        "template": plan.examples.template,
        "processes": processes.count,
        **plan.rows_read(plan.steps),
    }
    return summary, trainer.gathered_weights()


def training_device(config: FinetuneConfig, processes: Processes) -> torch.device:
    """The device to train on: the first GPU, this process's own where there are several, or what was asked for.

    Raises:
        UsageError: the device isn't there or isn't the first, or can't be shared as it is asked for.
    """
    device = pick_device(config.device)
    if device.index:
        raise UsageError(
            f"--device {config.device}: fine-tuning takes the first GPU that it sees; set "
            f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
        )
    if config.parallel is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UsageError(
            "accelerate launch asks for DeepSpeed, whose settings are calsmooth's own here; give --parallel zero3, and "
            "start the processes with torchrun or accelerate launch --multi_gpu"
        )
    if config.parallel in SHARDED:
        if processes.count == 1:
            raise UsageError(
                f"--parallel {config.parallel}: there is one process; start several, as with "
                "torchrun --nproc-per-node 2 -m calsmooth finetune ..."
            )
        if config.lora_rank is not None:
            raise UsageError(f"--parallel {config.parallel}: doesn't go with --lora-rank; use --parallel ddp")
        if device.type == "cuda" and config.micro_batch_size is None:
            raise UsageError(
                f"--parallel {config.parallel}: what fits beside a part of the model can't be tried out; give "
                "--micro-batch-size"
            )
    return processes.device(config.device)


def _micro_batch(
    plan: Plan, model: "PreTrainedModel", trained: Any, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> int:
    """The largest size that fits, tried out where there is a choice."""
    if len(plan.micro_batches) == 1:
        return plan.micro_batch
    trained.train()
    dtype = pick_dtype(plan.config.dtype, device)
    collate = collator(plan.config.packing, model, int(tokenizer.pad_token_id))
    with _layers(plan.config, model), fused_loss(model, plan.config.beta, mode=plan.config.loss_mode):
        return largest_that_fits(trained, plan.heaviest, collate, plan.micro_batches, dtype)


def _layers(config: FinetuneConfig, model: "PreTrainedModel") -> AbstractContextManager[None]:
    return compiled_layers(model) if config.compile else nullcontext()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A caller in the same process finds its random state as it was."""
    states = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])
