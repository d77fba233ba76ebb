"""The tasks, one small file each. Adding a multiple-choice task is a class in a file here and its line below."""

import difflib
from pathlib import Path

from calsmooth.errors import UsageError
from calsmooth.evaluate.task import Task
from calsmooth.evaluate.tasks.arc import ArcChallenge, ArcEasy
from calsmooth.evaluate.tasks.commonsense_qa import CommonsenseQA
from calsmooth.evaluate.tasks.demo import Demo
from calsmooth.evaluate.tasks.hellaswag import HellaSwag
from calsmooth.evaluate.tasks.mmlu import MMLU
from calsmooth.evaluate.tasks.openbookqa import OpenBookQA
from calsmooth.evaluate.tasks.own import SUFFIXES, read_task
from calsmooth.evaluate.tasks.piqa import PIQA
from calsmooth.evaluate.tasks.responses import NAME as RESPONSES
from calsmooth.evaluate.tasks.truthfulqa import TruthfulQA
from calsmooth.evaluate.tasks.winogrande import WinoGrande

CHOICE_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MMLU(),
        HellaSwag(),
        ArcEasy(),
        ArcChallenge(),
        OpenBookQA(),
        CommonsenseQA(),
        PIQA(),
        WinoGrande(),
        TruthfulQA(),
        Demo(),
    )
}
TASK_NAMES = (*CHOICE_TASKS, RESPONSES)


def is_task_file(name: str) -> bool:
    """Whether a --task value is a user's own YAML file rather than a name."""
    return Path(name).suffix.lower() in SUFFIXES


def check_task(name: str, names: tuple[str, ...]) -> None:
    """Refuse a --task value that is neither one of `names` nor a YAML file.

    Raises:
        UsageError: it is none; the nearest name is suggested.
    """
    if name in names or is_task_file(name):
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"--task must be one of {', '.join(names)} or your own YAML file, got '{name}'{hint}")


def choice_tasks(names: tuple[str, ...]) -> list[Task]:
    """The multiple-choice tasks among --task's values, in their order, each once.

    Raises:
        UsageError: a task's YAML file is bad, or two tasks have the same name.
    """
    tasks: dict[str, Task] = {}
    for name in dict.fromkeys(names):
        if name == RESPONSES:
            continue
        task = read_task(Path(name)) if is_task_file(name) else CHOICE_TASKS[name]
        if task.name in tasks or (is_task_file(name) and task.name in TASK_NAMES):
            raise UsageError(f"--task {name}: another task is called '{task.name}' too; give it another 'name'")
        tasks[task.name] = task
    return list(tasks.values())
