"""A plan in the words of transformers: TrainingArguments."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from calsmooth import console
from calsmooth.errors import UsageError
from calsmooth.finetune.checkpoints import brief
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.plan import Plan
from calsmooth.finetune.zero3 import CONFIGURATION
from calsmooth.models import pick_dtype

# transformers' names; "adamw" is fused where torch has it fused.
OPTIMIZERS = {
    "adafactor": "adafactor",
    "sgd": "sgd",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
}
FROM_BITSANDBYTES = {"adamw_8bit", "paged_adamw_8bit", "lion", "lion_8bit", "paged_lion_8bit"}


class _Arguments(TrainingArguments):
    @property
    def device(self) -> torch.device:
        """Processors have no number: several processes get theirs as cpu:0, to which torch can't load what
        transformers 5.17 wants there, the optimizer's state on resume.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


def training_arguments(
    plan: Plan, folder: Path, device: torch.device, *, resumed: bool, some_unused: bool = False
) -> TrainingArguments:
    """What the Trainer is told. resumed: a checkpoint will be gone on from. some_unused: parameters that text gives no
    gradient, for which DDP must not wait.
    """
    config = plan.config
    schedule, schedule_options = _schedule(config, plan.steps)
    arguments = _Arguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=float(config.lr or 0.0),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=round(config.warmup * plan.steps),
        optim=_optimizer(config.optimizer, device),
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=pick_dtype(config.dtype, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        eval_on_start=bool(config.eval_every) and not resumed,
        save_strategy="steps",
        save_steps=int(config.save_every or 0),
        save_total_limit=None,
        report_to=[],  # calsmooth.finetune.trackers
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        log_level_replica="error",
        ddp_find_unused_parameters=some_unused,
        **_parallel(config),
    )
    if arguments.n_gpu > 1:
        # Where there are more GPUs the Trainer would spread every micro-batch over copies of the model
        # (DataParallel), which doesn't go with a model patched in place; one GPU was asked for.
        arguments._n_gpu = 1
    return arguments


def check_installed(config: FinetuneConfig) -> None:
    """Are the packages there that the options ask for?

    Raises:
        UsageError: one isn't; the message says how to install it.
    """
    needed = [("--report-to", name, name) for name in config.report_to]
    if config.optimizer in FROM_BITSANDBYTES:
        needed.append(("--optimizer", config.optimizer, "bitsandbytes"))
    if config.lora_rank is not None:
        needed.append(("--lora-rank", str(config.lora_rank), "peft"))
    if config.parallel == "zero3":
        needed.append(("--parallel", "zero3", "deepspeed"))
    for flag, value, package in needed:
        if importlib.util.find_spec(package) is None:
            install = "'calsmooth[lora]'" if package == "peft" else package
            raise UsageError(f"{flag} {value}: {package} isn't installed; pip install {install}")


def check_optimizer(config: FinetuneConfig, device: torch.device) -> None:
    """Does bitsandbytes take a step with this optimizer on this device? Tried on one matrix, before there is a model.

    Raises:
        UsageError: it doesn't, as older versions don't on CPUs.
    """
    if config.optimizer not in FROM_BITSANDBYTES:
        return
    import bitsandbytes

    kind = bitsandbytes.optim.Lion if "lion" in config.optimizer else bitsandbytes.optim.AdamW
    # Large enough to be kept in 8 bits and in pages.
    matrix = torch.nn.Parameter(torch.zeros(512, 512, device=device))
    matrix.grad = torch.ones_like(matrix)
    bits, paged = 8 if "8bit" in config.optimizer else 32, "paged" in config.optimizer
    if paged and device.type == "cpu":
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    try:
        kind([matrix], optim_bits=bits, is_paged=paged).step()
    except (NotImplementedError, RuntimeError, AttributeError) as error:  # None where a function isn't in its library
        raise UsageError(
            f"--optimizer {config.optimizer}: bitsandbytes {bitsandbytes.__version__} has no such step on {device} "
            f"({brief(error)}); take --optimizer adamw, or a newer bitsandbytes"
        ) from error
    if paged and device.type == "cpu":
        console.say(f"--optimizer {config.optimizer}: a CPU has no pages to move; its state stays in main memory.")


def _parallel(config: FinetuneConfig) -> dict[str, Any]:
    """How processes share the model."""
    if config.parallel == "fsdp":
        # A checkpoint's weights and moments are gathered into one file each, which any number of processes can read.
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    if config.parallel == "zero3":
        return {"deepspeed": CONFIGURATION}
    return {}


def _optimizer(name: str, device: torch.device) -> str:
    if name == "adamw":
        return "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"
    return OPTIMIZERS[name]


def _schedule(config: FinetuneConfig, steps: int) -> tuple[str, dict[str, Any]]:
    """transformers' name and options of the schedule."""
    if config.scheduler == "cosine" and config.min_lr:
        return "cosine_with_min_lr", {"min_lr_rate": config.min_lr}
    if config.scheduler == "warmup_stable_decay":
        return config.scheduler, {"num_decay_steps": round(config.decay * steps), "min_lr_ratio": config.min_lr}
    return config.scheduler, {}
