"""calibrate: a temperature fitted on one part of a predictions file and reported on the other.

`run(CalibrateConfig(predictions=...))` in `run.py` is the whole of it.
"""
