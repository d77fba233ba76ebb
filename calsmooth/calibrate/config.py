"""What `calsmooth calibrate` can be asked for, apart from the evaluation that may come first."""

from dataclasses import dataclass
from pathlib import Path

from calsmooth.config import Settings, setting
from calsmooth.errors import UsageError

METHODS = ("temperature", "vector", "isotonic", "histogram")
FIT_FRACTION = 0.5


@dataclass(frozen=True)
class CalibrateConfig(Settings):
    """One recalibration of finished predictions."""

    predictions: Path | None = setting(
        None,
        "The predictions.jsonl of an evaluation, or a samples_*.jsonl of lm-evaluation-harness (--log_samples), or a "
        "folder of either.",
        shown_default="evaluate --model on --task first",
        argument=True,
        metavar="PREDICTIONS",
    )
    method: str = setting(
        "temperature",
        "temperature: one number; vector: a scale and a bias for each choice's place; isotonic, histogram: a map from "
        "stated to seen probability.",
        choices=METHODS,
    )
    fit_fraction: float | None = setting(
        None,
        "Share of the questions to fit on; the report is on the others.",
        shown_default=str(FIT_FRACTION),
        above=0.0,
        below=1.0,
    )
    folds: int | None = setting(
        None,
        "Instead of two parts: so many, each reported with a fit on the others, so that every question counts.",
        minimum=2,
    )
    bake: Path | None = setting(
        None,
        "Write a copy of the model whose own probabilities are the calibrated ones to this new folder. Letters and "
        "temperature only.",
        metavar="DIR",
    )
    force: bool = setting(False, "With --bake: also where the verdict is not to apply the temperature.")
    output: Path | None = setting(
        None, "Folder for the results: new or empty.", shown_default="runs/calibrate-NAME", flags=("--output", "-o")
    )
    bins: int = setting(15, "Confidence bins of ECE, MCE, SCE, ACE, of the picture and of histogram.", minimum=1)
    seed: int = setting(0, "Seed of the split into parts, of --limit's draw and of the intervals.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds is not None and self.fit_fraction is not None:
            raise UsageError("--folds and --fit-fraction are two ways to split the questions; give one of them")
        if self.force and self.bake is None:
            raise UsageError("--force: bakes against the verdict, and there is no --bake; add it, or leave --force out")
        if self.bake is not None and self.method != "temperature":
            raise UsageError(
                f"--bake: only a temperature can be folded into a model's weights, and --method is {self.method}; "
                f"leave one of them out"
            )
