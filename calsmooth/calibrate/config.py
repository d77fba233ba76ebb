"""What `calsmooth calibrate` can be asked for, apart from the evaluation that may come first."""

from dataclasses import dataclass
from pathlib import Path

from calsmooth.config import Settings, setting


@dataclass(frozen=True)
class CalibrateConfig(Settings):
    """One recalibration of finished predictions."""

    predictions: Path | None = setting(
        None,
        "The predictions.jsonl of an evaluation.",
        shown_default="evaluate --model on --task first",
        argument=True,
        metavar="PREDICTIONS",
    )
    fit_fraction: float = setting(
        0.5, "Share of the questions to fit on; the report is on the others.", above=0.0, below=1.0
    )
    output: Path | None = setting(
        None, "Folder for the results: new or empty.", shown_default="runs/calibrate-NAME", flags=("--output", "-o")
    )
    bins: int = setting(15, "Confidence bins of ECE, MCE, SCE and ACE and of the picture.", minimum=1)
    seed: int = setting(0, "Seed of the split into parts, of --limit's draw and of the intervals.", minimum=0)
