"""finetune: rows -> examples -> hidden states -> loss -> gradients -> a run folder.

The folder: config.yaml, environment.json, metrics.jsonl, checkpoints/, then model/, loss.png, README.md (the model
card), summary.json, and COMPLETED last of all.
"""

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from calsmooth import console
from calsmooth.environment import describe_device, environment, peak_memory
from calsmooth.errors import UsageError
from calsmooth.files import check_run_folder, read_json, read_jsonl, run_folder, write_json, write_text
from calsmooth.finetune.arguments import training_arguments
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.checkpoints import checkpoint_step, checkpoints
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import enable_gradient_checkpointing, largest_that_fits
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.plan import Plan, prepare
from calsmooth.finetune.probe import ProbeResult, probe, probe_batch
from calsmooth.finetune.results import write_results
from calsmooth.finetune.resume import COMPLETED, as_started, find_run, keep_metrics_until, remove_half_written
from calsmooth.finetune.trainer import SFTTrainer
from calsmooth.models import load_model, pick_device, pick_dtype

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
    config: FinetuneConfig, on_start: Callable[[Plan, ProbeResult], None] = lambda plan, probe: None
) -> FinetuneResult:
    """Fine-tune and write the run folder; with config.resume go on with one.

    on_start: called before the first step.

    Raises:
        UsageError: the folder, an option or a path isn't as it has to be.
        CalsmoothError: data, model, loss or disk fail; what was written so far stays whole.
    """
    folder = find_run(config) if config.resume else None
    if folder is not None and (folder / COMPLETED).exists():
        console.say(f"{folder} is complete already; nothing to resume.")
        return FinetuneResult(folder, read_json(folder / "summary.json"))
    # What can be refused is refused before minutes are spent on data and model.
    if folder is not None:
        config = as_started(config, folder)
    elif config.output is not None:
        check_run_folder(config.output)
    device = _training_device(config.device)
    plan, tokenizer = prepare(config)
    model = load_model(config.model, dtype=torch.float32, device=device, revision=config.revision)
    found = probe(model, probe_batch(plan.examples.examples, tokenizer, device), config.beta)
    plan = plan.with_micro_batch(_micro_batch(plan, model, tokenizer, device))
    if folder is None:
        folder = run_folder(config.output, config.default_name())
        write_text(folder / "config.yaml", dataclasses.replace(plan.config, output=folder, resume=False).to_yaml())
        write_json(folder / "environment.json", environment(device))
    else:
        remove_half_written(folder)
    on_start(plan, found)
    checkpoint = next(reversed(checkpoints(folder / "checkpoints")), None)
    summary = _train(plan, model, tokenizer, folder, checkpoint, device)
    summary["probe"] = vars(found)
    write_results(plan, model, tokenizer, folder, summary)
    return FinetuneResult(folder, summary)


def _train(
    plan: Plan,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    checkpoint: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    config = plan.config
    done = checkpoint_step(checkpoint) if checkpoint else 0
    keep_metrics_until(folder / "metrics.jsonl", done)
    use_cache = model.config.use_cache  # the Trainer switches it off, and the saved model would generate slowly
    with (
        open(folder / "metrics.jsonl", "a", encoding="utf-8") as lines,
        console.progress("fine-tuning", plan.steps) as advance,
        fused_loss(model, config.beta),
        _random_state_kept(),
    ):
        advance(done)
        last = [done]

        def record(values: dict[str, Any]) -> None:
            lines.write(json.dumps(values) + "\n")
            lines.flush()
            note = f"loss {values['loss']:.4f}  lr {values['lr']:.1e}  {values['tokens_per_second']:,.0f} tok/s"
            advance(values["step"] - last[0], note=note)
            last[0] = values["step"]

        set_seed(config.seed)
        trainer = SFTTrainer(
            model,
            training_arguments(plan, folder, device),
            plan.examples.examples,
            tokenizer,
            batch_size=int(config.batch_size or 0),
            loss_reduction=config.loss_reduction,
            keep_last=config.keep_last,
            record=record,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache
    metrics = [values for _, values in read_jsonl(folder / "metrics.jsonl")]
    tail = metrics[-max(1, len(metrics) // 10) :]
    return {
        "steps": plan.steps,
        "tokens": metrics[-1]["tokens"],
        "first_loss": metrics[0]["loss"],
        "final_loss": sum(m["loss"] for m in tail) / len(tail),
        "seconds": round(trainer.meter.seconds, 2),
        "peak_memory_bytes": peak_memory(device),
        "resumed_at_step": done or None,
        "device": describe_device(device),
        "format": plan.examples.format,
        "template": plan.examples.template,
        "rows": plan.examples.rows,
        "rows_bad": plan.examples.bad,
        "rows_dropped": plan.examples.dropped,
        "rows_truncated": plan.examples.truncated,
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
    plan: Plan, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> int:
    """The largest size that fits, tried out where there is a choice."""
    if plan.config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if len(plan.micro_batches) == 1:
        return plan.micro_batch
    model.train()
    dtype = pick_dtype(plan.config.dtype, device)
    collate = Collator(int(tokenizer.pad_token_id))
    with fused_loss(model, plan.config.beta):
        return largest_that_fits(model, plan.examples.examples, collate, plan.micro_batches, dtype)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A caller in the same process finds its random state as it was."""
    states = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])
