"""What `calsmooth evaluate` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from calsmooth.config import Settings, setting
from calsmooth.data.templates import TEMPLATES
from calsmooth.errors import UsageError
from calsmooth.evaluate.tasks import CHOICE_TASKS, RESPONSES, TASK_NAMES, check_task
from calsmooth.models import BUILT_IN

PROMPT, DATA, COMPUTE = "Prompts", "Data", "Computing"
TASK_HELP = "Tasks, separated by commas or repeated; a YAML file is a task of your own. Names: {}."


@dataclass(frozen=True)
class ChoicesConfig(Settings):
    """One evaluation of a model on multiple-choice tasks."""

    task_names: ClassVar[tuple[str, ...]] = tuple(CHOICE_TASKS)

    model: str = setting(BUILT_IN, "Model folder or hub id; 'demo' is the built-in one.", flags=("--model", "-m"))
    task: tuple[str, ...] = setting(
        ("demo",),
        TASK_HELP.format(", ".join(CHOICE_TASKS)),
        flags=("--task", "-t"),
        metavar="NAME,...",
    )
    output: Path | None = setting(
        None, "Folder for the results: new or empty.", shown_default="runs/evaluate-MODEL", flags=("--output", "-o")
    )
    resume: bool = setting(
        False, "Go on with an interrupted evaluation (the one in --output, or the newest of the default name)."
    )
    shots: int | None = setting(
        None,
        "Solved examples before each question.",
        shown_default="5; truthfulqa_mc1, demo: 0",
        minimum=0,
        panel=PROMPT,
    )
    format: str | None = setting(
        None,
        "How choices are scored: by their letter, or each as a continuation (cloze).",
        shown_default="letter; demo: cloze",
        choices=("letter", "cloze"),
        panel=PROMPT,
    )
    prompt_style: str = setting(
        "hendrycks",
        "Wording of letter prompts: the original MMLU script's or lm-evaluation-harness's.",
        choices=("hendrycks", "lm-eval"),
        panel=PROMPT,
    )
    chat_template: bool = setting(
        False, "Ask in the model's chat format: questions are the user's turns, answers the assistant's.", panel=PROMPT
    )
    shots_as: str = setting(
        "turns",
        "With --chat-template: solved examples as turns of their own, or as text in the question's turn.",
        choices=("turns", "text"),
        panel=PROMPT,
    )
    data_dir: Path | None = setting(
        None, "Local files of the tasks, or a folder of TASK folders.", shown_default="Hugging Face hub", panel=DATA
    )
    limit: int | None = setting(
        None,
        "Score at most so many questions a task, drawn evenly over its subjects. For trying out.",
        shown_default="all",
        minimum=1,
        panel=DATA,
    )
    bins: int = setting(15, "Confidence bins of ECE, MCE, SCE and ACE and of the picture.", minimum=1)
    seed: int = setting(0, "Seed of --limit's draw and of the bootstrap intervals.", minimum=0)
    batch_size: int | None = setting(
        None,
        "Sequences run at once; changes speed and memory only.",
        shown_default="what the free memory holds",
        minimum=1,
        panel=COMPUTE,
    )
    reuse: bool = setting(
        True,
        "Run what prompts have in common once, where the model allows it; off: every prompt in full.",
        panel=COMPUTE,
    )
    dtype: str | None = setting(
        None,
        "Precision of the model.",
        shown_default="bfloat16 on GPUs that have it, else float32",
        choices=("float32", "bfloat16", "float16"),
        panel=COMPUTE,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps.", shown_default="the first GPU", panel=COMPUTE)
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub.", panel=COMPUTE)
    max_length: int | None = setting(
        None,
        "Longest sequence in tokens; solved examples are dropped from prompts that are longer.",
        shown_default="the model's",
        minimum=2,
        panel=COMPUTE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.task:
            check_task(name, self.task_names)


@dataclass(frozen=True)
class EvaluateConfig(ChoicesConfig):
    """One evaluation of a model on multiple-choice tasks, on held-out responses, or both."""

    task_names: ClassVar[tuple[str, ...]] = TASK_NAMES

    task: tuple[str, ...] = setting(
        ("demo",),
        TASK_HELP.format(", ".join(TASK_NAMES)),
        flags=("--task", "-t"),
        metavar="NAME,...",
    )
    dataset: str | None = setting(
        None,
        "Held-out instruction data for the task 'responses': a file or hub id, in finetune's formats.",
        shown_default="the built-in model's own",
        panel=DATA,
    )
    split: str | None = setting(None, "Split of a --dataset from the hub.", shown_default="train", panel=DATA)
    template: str | None = setting(
        None,
        "For 'responses': how a conversation becomes text, by the model's chat template (auto: where it has one), "
        "Alpaca's or Tulu's. Models that are compared need the same.",
        shown_default="the one of the finetune run that the model lies in, else auto",
        choices=TEMPLATES,
        panel=PROMPT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and RESPONSES not in self.task:
            raise UsageError(
                f"--template: goes with --task {RESPONSES}; leave it out (for choices there is --chat-template)"
            )
