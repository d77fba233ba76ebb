"""What `calsmooth finetune` can be asked for. The defaults are the paper's recipe, or the built-in model's own."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.config import Settings, flag_name, setting
from calsmooth.data.sources import source_text
from calsmooth.errors import UsageError
from calsmooth.models import BUILT_IN

DATA, TRAINING, LOGITS, ADAPTERS = "Data", "Training", "Logits", "Adapters (LoRA)"
EVALUATION, COMPUTE = "Evaluation and logging", "Computing"

# Section 5.3 and appendix B.4 of the paper, where they say; else open-instruct's settings, on which it builds.
PAPER_RECIPE: dict[str, Any] = {"lr": 2e-5, "epochs": 2, "batch_size": 128, "max_length": 4096}


OPTIMIZERS = ("adamw", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "lion", "lion_8bit", "paged_lion_8bit")


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """One fine-tuning run. `resolve` fills in what None stands for."""

    model: str = setting(BUILT_IN, "Model folder or hub id; 'demo' is the built-in one.", flags=("--model", "-m"))
    dataset: tuple[str, ...] = setting(
        (BUILT_IN,),
        "Instruction data: a JSON, JSONL, CSV, TSV or parquet file, a pattern ('data/*.jsonl'), a folder or a hub id, "
        "each written SOURCE@REVISION#SPLIT=WEIGHT; several are mixed; 'demo' is built in.",
        flags=("--dataset", "-d"),
        metavar="SOURCE,...",
        from_mapping=source_text,
    )
    beta: float = setting(
        0.1, "Label smoothing: how much of the target's probability is spread over all tokens.", minimum=0, below=1
    )
    smoothing_prior: str = setting(
        "uniform",
        "What is smoothed towards: uniform, unigram (the training targets' frequencies), or a .npy file of one "
        "probability for each token.",
        metavar="uniform|unigram|FILE",
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
        choices=("alpaca", "messages", "sharegpt", "prompt", "text"),
        panel=DATA,
    )
    template: str = setting(
        "auto",
        "How a conversation becomes text: the model's chat template (auto: where it has one), Alpaca's or Tulu's.",
        choices=("auto", "chat", "alpaca", "tulu"),
        panel=DATA,
    )
    on_bad_row: str = setting(
        "fail",
        "At a row that can't be read or whose columns are missing, empty or of the wrong type.",
        choices=("fail", "skip"),
        panel=DATA,
    )
    split: str | None = setting(
        None, "Split of the folders and hub ids that don't say theirs (#SPLIT).", shown_default="train", panel=DATA
    )
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
    dataset_revision: str | None = setting(
        None,
        "Branch, tag or commit of the hub ids that don't say theirs (@REVISION).",
        shown_default="main",
        panel=DATA,
    )
    packing: bool = setting(
        False,
        "Put several examples into a row instead of padding; they don't see each other, and a step has the same ones.",
        panel=DATA,
    )
    streaming: bool = setting(
        False,
        "Read rows while training, for data that doesn't fit: never to its end, so that --max-steps says how long.",
        panel=DATA,
    )
    shuffle_buffer: int = setting(
        10_000, "With --streaming: rows among which the next one is drawn.", minimum=1, panel=DATA
    )
    cache: bool = setting(
        True, "Keep tokenised data for the next run (in ~/.cache/calsmooth or CALSMOOTH_CACHE).", panel=DATA
    )

    lr: float | None = setting(
        None, "Peak learning rate.", shown_default="2e-5; demo: its own", above=0, panel=TRAINING
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
    max_steps: int | None = setting(
        None,
        "Stop after so many steps; the schedule ends there, too.",
        shown_default="all of --epochs",
        minimum=1,
        panel=TRAINING,
    )
    optimizer: str = setting(
        "adamw",
        "The optimizer; those of 8 bits, paged ones and lion need bitsandbytes.",
        choices=OPTIMIZERS,
        panel=TRAINING,
    )
    adam_beta1: float = setting(0.9, "AdamW's and Lion's first decay rate.", minimum=0, below=1, panel=TRAINING)
    adam_beta2: float = setting(0.999, "AdamW's and Lion's second decay rate.", minimum=0, below=1, panel=TRAINING)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", minimum=0, panel=TRAINING)
    weight_decay: float = setting(0.0, "The optimizer's weight decay.", minimum=0, panel=TRAINING)
    scheduler: str = setting(
        "linear",
        "Learning-rate schedule after the warmup.",
        choices=("linear", "cosine", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
        panel=TRAINING,
    )
    warmup: float = setting(0.03, "Share of the steps that warm up.", minimum=0, maximum=1, panel=TRAINING)
    decay: float = setting(
        0.2, "Share of the steps that decay at the end of warmup_stable_decay.", minimum=0, maximum=1, panel=TRAINING
    )
    min_lr: float = setting(
        0.0, "Share of --lr at which cosine and warmup_stable_decay end.", minimum=0, maximum=1, panel=TRAINING
    )
    dropout: float | None = setting(
        None,
        "Set every dropout of the architecture to this; refused where it has none.",
        shown_default="the model's own",
        minimum=0,
        below=1,
        panel=TRAINING,
    )
    max_grad_norm: float = setting(1.0, "Clip the gradient to this norm; 0 doesn't clip.", minimum=0, panel=TRAINING)
    loss_reduction: str = setting(
        "mean",
        "Divide the summed loss by the batch's target tokens (mean), or not (sum, as the paper).",
        choices=("mean", "sum"),
        flags=("--loss-reduction", "--reduction"),
        panel=TRAINING,
    )
    max_loss: float | None = setting(
        None,
        "Stop when a step's loss a token is above this, before the step is taken.",
        shown_default="3 times the larger of the first step's and ln(vocabulary)",
        above=0,
        panel=TRAINING,
    )
    seed: int = setting(0, "Seed of the data order, of dropout and of --limit's choice.", minimum=0, panel=TRAINING)

    logit_temperature: float = setting(
        1.0,
        "Train with the logits divided by this; the saved model's weights or configuration hold it.",
        above=0,
        panel=LOGITS,
    )
    logit_softcap: float | None = setting(
        None,
        "Train with the logits softcapped at this (0 takes a model's own softcap away), where its configuration can "
        "hold it: Gemma 2 and 3.",
        shown_default="the model's own",
        minimum=0,
        panel=LOGITS,
    )

    lora_rank: int | None = setting(
        None,
        "Train low-rank adapters of this rank (needs peft).",
        shown_default="train every weight",
        minimum=1,
        panel=ADAPTERS,
    )
    lora_alpha: float | None = setting(
        None,
        "The adapters are scaled by this over their rank.",
        shown_default="twice the rank",
        above=0,
        panel=ADAPTERS,
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapters.", minimum=0, below=1, panel=ADAPTERS)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",),
        "Names of the layers that get adapters, such as q_proj,v_proj; all-linear: every one but the head.",
        metavar="NAME,...",
        panel=ADAPTERS,
    )
    lora_merge: bool = setting(
        False,
        "Add the adapters to the weights at the end: model/ is a whole model, adapter/ keeps them.",
        panel=ADAPTERS,
    )

    eval_every: int | None = setting(
        None,
        "Steps between measurements of NLL and ECE on held-out rows, also before the first and after the last step.",
        shown_default="never",
        minimum=1,
        panel=EVALUATION,
    )
    eval_dataset: str | None = setting(
        None,
        "Held-out data, in the form of --dataset.",
        shown_default="rows of --dataset that aren't trained on",
        panel=EVALUATION,
    )
    eval_rows: int = setting(256, "Held-out rows; of --dataset at most a tenth.", minimum=1, panel=EVALUATION)
    eval_task: tuple[str, ...] = setting(
        (),
        "Tasks of `calsmooth evaluate` that the model is measured on before and after, such as mmlu,arc_easy.",
        shown_default="none; demo: its own",
        metavar="TASK,...",
        panel=EVALUATION,
    )
    eval_data_dir: Path | None = setting(
        None, "Folder with the tasks' files.", shown_default="the hub", panel=EVALUATION
    )
    eval_limit: int | None = setting(
        None, "A random choice of so many questions a task.", shown_default="all", minimum=1, panel=EVALUATION
    )
    report_to: tuple[str, ...] = setting(
        (),
        "Also log to these, each where it is installed.",
        choices=("tensorboard", "wandb", "trackio"),
        shown_default="metrics.jsonl only",
        metavar="NAME,...",
        panel=EVALUATION,
    )

    micro_batch_size: int | None = setting(
        None,
        "Examples at once; changes speed and memory only.",
        shown_default="the fastest that fits",
        minimum=1,
        panel=COMPUTE,
    )
    compile: bool = setting(
        False, "Compile the model's layers (torch.compile): up to a minute at first, faster steps after.", panel=COMPUTE
    )
    gradient_checkpointing: bool = setting(False, "Compute activations twice to keep fewer of them.", panel=COMPUTE)
    loss_mode: str = setting(
        "exact",
        "How the loss makes its gradients: each mode's memory, speed and error are those of `calsmooth bench`.",
        choices=("exact", "filtered", "lean"),
        panel=COMPUTE,
    )
    dtype: str | None = setting(
        None,
        "Precision of the computation (weights and optimizer stay float32; weights under adapters don't).",
        shown_default="bfloat16 on GPUs that have it, else float32",
        choices=("float32", "bfloat16"),
        panel=COMPUTE,
    )
    parallel: str | None = setting(
        None,
        "Several processes (torchrun): ddp, each holds the model; fsdp and zero3 (DeepSpeed), each holds a part.",
        shown_default="as accelerate launch says, else ddp",
        choices=("ddp", "fsdp", "zero3"),
        panel=COMPUTE,
    )
    device: str | None = setting(None, "cpu, cuda, mps.", shown_default="the first GPU", panel=COMPUTE)
    revision: str | None = setting(
        None, "Branch, tag or commit of the model on the hub.", shown_default="main", panel=COMPUTE
    )
    save_every: int | None = setting(
        None, "Steps between checkpoints.", shown_default="a tenth of the run", minimum=1, panel=COMPUTE
    )
    keep_last: int = setting(
        1, "Checkpoints to keep; 0 removes even the last when the run is complete.", minimum=0, panel=COMPUTE
    )
    log_every: int = setting(1, "Steps between lines of metrics.jsonl.", minimum=1, panel=EVALUATION)

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str):  # from Python one source may be given as it is
            object.__setattr__(self, "dataset", (self.dataset,))
        super().__post_init__()
        if self.lora_rank is None:
            self._refuse(("lora_alpha", "lora_dropout", "lora_targets", "lora_merge"), "adapters need --lora-rank")
        changed = self.logit_temperature != 1.0 or self.logit_softcap is not None
        if changed and self.lora_rank is not None and not self.lora_merge:
            raise UsageError(
                "--logit-temperature and --logit-softcap change the model, and adapters can't hold it; add --lora-merge"
            )
        if self.eval_dataset is not None and self.eval_every is None and "responses" not in self.eval_task:
            raise UsageError("--eval-dataset is measured by --eval-every or --eval-task responses; add one of them")
        if self.min_lr and self.scheduler not in ("cosine", "warmup_stable_decay"):
            raise UsageError(f"--min-lr: the {self.scheduler} schedule ends at 0; take cosine or warmup_stable_decay")

        if self.scheduler != "warmup_stable_decay":
            self._refuse(("decay",), "goes with --scheduler warmup_stable_decay")
        if not self.eval_task:
            self._refuse(("eval_data_dir", "eval_limit"), "tasks are named with --eval-task")
        if self.streaming:
            self._check_stream()
        else:
            self._refuse(("shuffle_buffer",), "goes with --streaming")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """What was asked for and would have no effect."""
        for f in dataclasses.fields(self):
            if f.name in names and getattr(self, f.name) != f.default:
                raise UsageError(f"{flag_name(f)}: {why}; add that, or leave it out")

    def _check_stream(self) -> None:
        if self.max_steps is None:
            raise UsageError("--streaming: a stream has no end; say with --max-steps how many steps to train")
        for flag, value, instead in (
            ("--epochs", self.epochs, "--max-steps says how long to train"),
            ("--limit", self.limit, "--max-steps times --batch-size examples are read"),
        ):
            if value is not None:
                raise UsageError(f"{flag} {value}: goes with data that has an end, not with --streaming; {instead}")
        if self.smoothing_prior == "unigram":
            raise UsageError(
                "--smoothing-prior unigram: a stream's targets can't be counted before it is read; give a .npy file"
            )
        if self.eval_every and self.eval_dataset is None:
            raise UsageError("--eval-every: nothing can be held out of a stream; give --eval-dataset")

    def resolve(self) -> "FinetuneConfig":
        """With lr, epochs, batch_size and max_length filled in: the built-in model's recipe, or the paper's."""
        recipe = PAPER_RECIPE
        if self.model == BUILT_IN:
            from calsmooth.demo.recipe import RECIPE

            recipe = RECIPE
        open_ones = {
            k: v for k, v in recipe.items() if getattr(self, k) is None and not (k == "epochs" and self.streaming)
        }
        return dataclasses.replace(self, **open_ones)

    def dataset_label(self) -> str:
        """A short name of the data for titles: the last part of each path or hub id, its weight where it has one."""
        return " + ".join(Path(source).name for source in self.dataset)

    def default_name(self) -> str:
        """Name of the run's folder under runs/ where --output says nothing."""
        from calsmooth.models import model_label

        return f"finetune-{model_label(self.model)}-beta{self.beta:g}"
