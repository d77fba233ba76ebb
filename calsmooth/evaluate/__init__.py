"""evaluate: a model's accuracy and calibration on multiple-choice tasks and on held-out responses.

`run(EvaluateConfig(...))` in `run.py` is the whole of it; `config.py` has the options, `tasks/` one small file a task.
"""
