"""A plan in the words of transformers: TrainingArguments."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from calsmooth.finetune.plan import Plan
from calsmooth.models import pick_dtype


def training_arguments(plan: Plan, folder: Path, device: torch.device) -> TrainingArguments:
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
