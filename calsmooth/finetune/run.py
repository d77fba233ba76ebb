"""finetune: rows -> examples -> hidden states -> loss -> gradients -> a run folder.

The folder: config.yaml, environment.json, metrics.jsonl, checkpoints/, then model/, loss.png, README.md (the model
card), summary.json, and COMPLETED last of all.
"""

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed

from calsmooth import console
from calsmooth.config import load
from calsmooth.data import Example, ExampleSet, load_example_set
from calsmooth.environment import describe_device, environment, peak_memory, versions
from calsmooth.errors import UsageError
from calsmooth.files import check_run_folder, read_json, read_jsonl, run_folder, whole_folder, write_json, write_text
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import enable_gradient_checkpointing, largest_that_fits, micro_batch_candidates
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.probe import ProbeResult, probe
from calsmooth.finetune.report import model_card, plot_loss_curve, prepare_loss_curve
from calsmooth.finetune.trainer import Collator, SFTTrainer, checkpoint_step, checkpoints
from calsmooth.models import load_model, load_tokenizer, model_label, pick_device, pick_dtype
from calsmooth.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETED = "COMPLETED"
PROBE_EXAMPLES, PROBE_LENGTH = 2, 64
# Where a run lies and how it is watched may differ when it is resumed; what it computes may not.
FREE_ON_RESUME = {"output", "resume", "dry_run", "keep_last", "log_every", "save_every"}


@dataclass(frozen=True)
class FinetuneResult:
    """folder: the run's files. summary: steps, tokens, seconds, final_loss, device, probe (what summary.json holds)."""

    folder: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to on this data: shown by --dry-run, followed by `run`."""

    config: FinetuneConfig
    examples: ExampleSet
    micro_batches: list[int]  # sizes that may be tried, largest first
    steps: int

    @property
    def target_tokens(self) -> int:
        return sum(e.target_tokens for e in self.examples.examples)

    @property
    def micro_batch(self) -> int:
        return self.micro_batches[0]

    @property
    def accumulation(self) -> int:
        return int(self.config.batch_size or 0) // self.micro_batch

    def with_micro_batch(self, size: int) -> "Plan":
        config = dataclasses.replace(self.config, micro_batch_size=size)
        return dataclasses.replace(self, config=config, micro_batches=[size])


def prepare(config: FinetuneConfig) -> "tuple[Plan, PreTrainedTokenizerBase]":
    """Read the data and work out steps and batch sizes; no model is loaded.

    Raises:
        UsageError, CalsmoothError: the data, the tokenizer or the batch sizes can't be as asked.
    """
    config = config.resolve()
    device = pick_device(config.device)
    if config.micro_batch_size and int(config.batch_size or 0) % config.micro_batch_size:
        raise UsageError(
            f"--micro-batch-size {config.micro_batch_size} doesn't divide --batch-size {config.batch_size}"
        )
    batch_size, epochs, max_length = int(config.batch_size or 0), int(config.epochs or 0), int(config.max_length or 0)
    tokenizer = load_tokenizer(config.model, config.revision)
    examples = load_example_set(
        config.dataset,
        tokenizer,
        format=config.format,
        template=config.template,
        max_length=max_length,
        limit=config.limit,
        seed=config.seed,
        split=config.split,
        revision=config.dataset_revision,
        on_bad_row=config.on_bad_row,
    )
    steps = epochs * -(-len(examples.examples) // batch_size)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    config = dataclasses.replace(config, dtype=dtype, save_every=config.save_every or -(-steps // 10))
    longest = max(len(e.input_ids) for e in examples.examples)
    sizes = (
        [config.micro_batch_size]
        if config.micro_batch_size
        else micro_batch_candidates(batch_size, longest, device.type)
    )
    plan = Plan(config, examples, sizes, steps)
    # Only a GPU says so when a size doesn't fit; elsewhere the first is taken.
    return plan if device.type == "cuda" else plan.with_micro_batch(sizes[0]), tokenizer


def run(
    config: FinetuneConfig, on_start: Callable[[Plan, ProbeResult], None] = lambda plan, probe: None
) -> FinetuneResult:
    """Fine-tune and write the run folder; with config.resume go on with one.

    on_start: called before the first step.

    Raises:
        UsageError: the folder, an option or a path isn't as it has to be.
        CalsmoothError: data, model, loss or disk fail; what was written so far stays whole.
    """
    folder = _find_run(config) if config.resume else None
    if folder is not None and (folder / COMPLETED).exists():
        console.say(f"{folder} is complete already; nothing to resume.")
        return FinetuneResult(folder, read_json(folder / "summary.json"))
    # What can be refused is refused before minutes are spent on data and model.
    if folder is not None:
        config = _as_started(config, folder)
    elif config.output is not None:
        check_run_folder(config.output)
    device = _training_device(config.device)
    plan, tokenizer = prepare(config)
    model = load_model(config.model, dtype=torch.float32, device=device, revision=config.revision)
    found = probe(model, _probe_batch(plan.examples.examples, tokenizer, device), config.beta)
    plan = plan.with_micro_batch(_micro_batch(plan, model, tokenizer, device))
    if folder is None:
        folder = run_folder(config.output, config.default_name())
        write_text(folder / "config.yaml", dataclasses.replace(plan.config, output=folder, resume=False).to_yaml())
        write_json(folder / "environment.json", environment(device))
    else:
        _remove_half_written(folder)
    on_start(plan, found)
    checkpoint = next(reversed(checkpoints(folder / "checkpoints")), None)
    summary = _train(plan, model, tokenizer, folder, checkpoint, device)
    summary["probe"] = vars(found)
    _write_results(plan, model, tokenizer, folder, summary)
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
    _keep_metrics_until(folder / "metrics.jsonl", done)
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
            _arguments(plan, folder, device),
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


def _arguments(plan: Plan, folder: Path, device: torch.device) -> TrainingArguments:
    config = plan.config
    bf16 = pick_dtype(config.dtype, device) == torch.bfloat16
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=float(config.epochs or 1),
        learning_rate=float(config.lr or 0.0),
        lr_scheduler_type=config.scheduler,
        warmup_steps=round(config.warmup * plan.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=int(config.save_every or 0),
        save_total_limit=None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        # Where there are more GPUs the Trainer would spread every micro-batch over copies of the model
        # (DataParallel), which doesn't go with a model patched in place; one GPU was asked for.
        arguments._n_gpu = 1
    return arguments


def _write_results(
    plan: Plan, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, summary: dict[str, Any]
) -> None:
    config = plan.config
    card = model_card(config.to_dict(), summary, versions())
    metrics = [values for _, values in read_jsonl(folder / "metrics.jsonl")]
    title = f"{model_label(config.model)} on {Path(config.dataset).name}, beta = {config.beta:g}"
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


def _probe_batch(
    examples: list[Example], tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> dict[str, torch.Tensor]:
    """A few short stretches around the first response tokens."""
    cut = []
    for example in examples[:PROBE_EXAMPLES]:
        first = next(i for i, label in enumerate(example.labels) if label != -100)
        start = max(0, min(first - PROBE_LENGTH // 2, len(example.input_ids) - PROBE_LENGTH))
        window = slice(start, start + PROBE_LENGTH)
        cut.append(Example(example.input_ids[window], example.labels[window]))
    batch = Collator(int(tokenizer.pad_token_id))(cut)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _find_run(config: FinetuneConfig) -> Path | None:
    """The folder to resume; None where the named one is empty, so that a run may be started with --resume, too."""
    if config.output is not None:
        if not config.output.exists() or not any(config.output.iterdir()):
            return None
        if not (config.output / "config.yaml").is_file():
            raise UsageError(f"--output {config.output}: holds no run to resume (no config.yaml); give a run's folder")
        return config.output
    name = config.default_name()
    mine = re.compile(re.escape(name) + r"(-\d+)?")  # beta0.1 and beta0.1-2, but not beta0.15
    started = [p.parent for p in Path("runs").glob("*/config.yaml") if mine.fullmatch(p.parent.name)]
    runs = [folder for folder in started if not (folder / COMPLETED).exists()]
    if not runs:
        raise UsageError(f"--resume: no unfinished run of the name runs/{name}; give its folder with --output")
    return max(runs, key=lambda p: (p / "config.yaml").stat().st_mtime)


def _as_started(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """The settings that the run was started with; those that are asked for now must be the same or left open.

    Raises:
        UsageError: a setting differs.
    """
    old = load(FinetuneConfig, {}, folder / "config.yaml")
    changes = {}
    for f in dataclasses.fields(FinetuneConfig):
        was, now = getattr(old, f.name), getattr(config, f.name)
        if f.name in FREE_ON_RESUME:
            changes[f.name] = was if now in (None, f.default) and f.name not in ("resume", "dry_run") else now
        elif now is not None and now != was:
            raise UsageError(
                f"--resume: the run in {folder} has {f.name} = {was}, now {now} is asked for; resume with "
                f"--config {folder / 'config.yaml'}, or leave --resume out to start a new run"
            )
    return dataclasses.replace(old, **changes)


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


def _remove_half_written(folder: Path) -> None:
    """What a killed process was about to write: their names begin with a dot until they are whole."""
    for path in [*folder.glob(".*"), *(folder / "checkpoints").glob(".*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a line that was cut short by a crash."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                break
            if values["step"] > step:
                break
            kept.append(values)
    write_text(path, "".join(json.dumps(values) + "\n" for values in kept))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A caller in the same process finds its random state as it was."""
    states = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])
