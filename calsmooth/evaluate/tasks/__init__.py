"""The tasks, one small file each. Adding a multiple-choice task is a class in a file here and its line below."""

from calsmooth.evaluate.questions import Task
from calsmooth.evaluate.tasks.arc_easy import ArcEasy
from calsmooth.evaluate.tasks.demo import Demo
from calsmooth.evaluate.tasks.hellaswag import HellaSwag
from calsmooth.evaluate.tasks.mmlu import MMLU
from calsmooth.evaluate.tasks.responses import NAME as RESPONSES

CHOICE_TASKS: dict[str, Task] = {task.name: task for task in (MMLU(), HellaSwag(), ArcEasy(), Demo())}
TASK_NAMES = (*CHOICE_TASKS, RESPONSES)
