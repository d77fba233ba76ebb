"""What `calsmooth finetune` can be asked for. The defaults are the paper's recipe, or the built-in model's own."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.config import Settings, setting
from calsmooth.models import BUILT_IN

DATA, TRAINING, COMPUTE = "Data", "Training", "Computing"

# Section 5.3 and appendix B.4 of the paper, where they say; else open-instruct's settings, on which it builds.
PAPER_RECIPE: dict[str, Any] = {"lr": 2e-5, "epochs": 2, "batch_size": 128, "max_length": 4096}


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """One fine-tuning run. `resolve` fills in what None stands for."""

    model: str = setting(BUILT_IN, "Model folder or hub id; 'demo' is the built-in one.", flags=("--model", "-m"))
    dataset: str = setting(
        BUILT_IN,
        "Instruction data: a JSON, JSONL, CSV or parquet file, a folder or a hub id; 'demo' is built in.",
        flags=("--dataset", "-d"),
    )
    beta: float = setting(
        0.1, "Label smoothing: how much of the target's probability is spread over all tokens.", minimum=0, below=1
    )
    output: Path | None = setting(
        None, "Folder for the run: new or empty.", shown_default="runs/finetune-MODEL-betaB", flags=("--output", "-o")
    )
    resume: bool = setting(
        False, "Go on with an interrupted run (the one in --output, or the newest of the default name)."
    )
    dry_run: bool = setting(False, "Show configuration, one masked example, tokens and steps; train nothing.")

    format: str | None = setting(
        None,
        "Columns of the data.",
        shown_default="told from the columns",
        choices=("alpaca", "messages", "sharegpt", "prompt"),
        panel=DATA,
    )
    template: str = setting(
        "auto",
        "How a conversation becomes text: the model's chat template, or Alpaca's.",
        choices=("auto", "chat", "alpaca"),
        panel=DATA,
    )
    on_bad_row: str = setting(
        "fail",
        "At a row whose columns are missing, empty or of the wrong type.",
        choices=("fail", "skip"),
        panel=DATA,
    )
    split: str | None = setting(None, "Split of a hub data set.", shown_default="train", panel=DATA)
    limit: int | None = setting(
        None, "Train on a random choice of so many rows.", shown_default="all", minimum=1, panel=DATA
    )
    max_length: int | None = setting(
        None,
        "Longest example in tokens; longer ones are cut.",
        shown_default="4096; demo: its own",
        minimum=2,
        panel=DATA,
    )
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub.", panel=DATA)
    dataset_revision: str | None = setting(None, "Branch, tag or commit of the data on the hub.", panel=DATA)

    lr: float | None = setting(
        None, "Peak learning rate of AdamW.", shown_default="2e-5; demo: its own", above=0, panel=TRAINING
    )
    epochs: int | None = setting(
        None, "Passes over the data.", shown_default="2; demo: its own", minimum=1, panel=TRAINING
    )
    batch_size: int | None = setting(
        None,
        "Examples a step, over all micro-batches.",
        shown_default="128; demo: its own",
        minimum=1,
        panel=TRAINING,
    )
    scheduler: str = setting(
        "linear",
        "Learning-rate schedule after the warmup.",
        choices=("linear", "cosine", "constant_with_warmup"),
        panel=TRAINING,
    )
    warmup: float = setting(0.03, "Share of the steps that warm up.", minimum=0, maximum=1, panel=TRAINING)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", minimum=0, panel=TRAINING)
    max_grad_norm: float = setting(1.0, "Clip the gradient to this norm; 0 doesn't clip.", minimum=0, panel=TRAINING)
    loss_reduction: str = setting(
        "mean",
        "Divide the summed loss by the batch's target tokens (mean), or not (sum, as the paper).",
        choices=("mean", "sum"),
        panel=TRAINING,
    )
    seed: int = setting(0, "Seed of the data order, of dropout and of --limit's choice.", minimum=0, panel=TRAINING)

    micro_batch_size: int | None = setting(
        None,
        "Examples at once; changes speed and memory only.",
        shown_default="as many as fit",
        minimum=1,
        panel=COMPUTE,
    )
    gradient_checkpointing: bool = setting(False, "Compute activations twice to keep fewer of them.", panel=COMPUTE)
    dtype: str | None = setting(
        None,
        "Precision of the computation (weights and optimizer stay float32).",
        shown_default="bfloat16 on GPUs that have it, else float32",
        choices=("float32", "bfloat16"),
        panel=COMPUTE,
    )
    device: str | None = setting(None, "cpu, cuda, mps.", shown_default="the first GPU", panel=COMPUTE)
    save_every: int | None = setting(
        None, "Steps between checkpoints.", shown_default="a tenth of the run", minimum=1, panel=COMPUTE
    )
    keep_last: int = setting(
        1, "Checkpoints to keep; 0 removes even the last when the run is complete.", minimum=0, panel=COMPUTE
    )
    log_every: int = setting(1, "Steps between lines of metrics.jsonl.", minimum=1, panel=COMPUTE)

    def resolve(self) -> "FinetuneConfig":
        """With lr, epochs, batch_size and max_length filled in: the built-in model's recipe, or the paper's."""
        recipe = PAPER_RECIPE
        if self.model == BUILT_IN:
            from calsmooth.demo.recipe import RECIPE

            recipe = RECIPE
        return dataclasses.replace(self, **{k: v for k, v in recipe.items() if getattr(self, k) is None})

    def default_name(self) -> str:
        """Name of the run's folder under runs/ where --output says nothing."""
        from calsmooth.models import model_label

        return f"finetune-{model_label(self.model)}-beta{self.beta:g}"
