"""Options of `calsmooth entropy-bound`: sizes of heads, or models to measure."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from calsmooth.config import Settings, flag_name, setting
from calsmooth.entropy_bound.families import PAPER_VOCABULARIES
from calsmooth.errors import UsageError

SIZES, MODELS = "Sizes of heads, without --model", "Real heads, with --model"

DEFAULT_HIDDEN = (512, 1024, 2048, 3072, 4096)

DEFAULT_RHO = 0.25
"""An illustration, not a measurement: the paper gives no rho for its Figure 4. With this one the floor falls from log V
to 0, near rho sqrt(D) = log V, at hidden sizes of 1,500 to 3,000 for today's vocabularies, where a figure can show it.
With rho = 1 a head of D >= 512 could be all but certain."""


@dataclass(frozen=True)
class EntropyBoundConfig(Settings):
    """Either sizes or models; `resolve` fills in what None stands for."""

    beta: tuple[float, ...] = setting(
        (0.1,), "Label smoothing to hold against the floor.", above=0, maximum=1, flags=("--beta",)
    )
    output: Path | None = setting(
        None,
        "Folder for the files: new or empty.",
        shown_default="runs/entropy-bound or runs/entropy-bound-MODEL",
        flags=("--output", "-o"),
    )

    vocab: tuple[int, ...] | None = setting(
        None,
        "Vocabulary sizes |V|.",
        shown_default=",".join(map(str, PAPER_VOCABULARIES)),
        minimum=2,
        maximum=10**9,
        panel=SIZES,
    )
    hidden: tuple[int, ...] | None = setting(
        None,
        "Hidden sizes D.",
        shown_default=",".join(map(str, DEFAULT_HIDDEN)),
        minimum=1,
        maximum=10**9,
        panel=SIZES,
    )
    rho: float | None = setting(
        None,
        "sigma_C * sigma_h: the head's largest singular value times the largest |entry| of a hidden state.",
        shown_default=f"{DEFAULT_RHO}, an illustration: the paper gives none for its Figure 4",
        minimum=0,
        maximum=1e150,
        panel=SIZES,
    )

    model: tuple[str, ...] | None = setting(
        None,
        "Model folders or hub ids to measure side by side; 'demo' is the built-in one.",
        shown_default="none: sizes only",
        flags=("--model", "-m"),
        metavar="MODEL,...",
        panel=MODELS,
    )
    text: Path | None = setting(
        None,
        "UTF-8 text to measure them on.",
        shown_default="pages that come with calsmooth; demo: its held-out data",
        panel=MODELS,
    )
    dataset: str | None = setting(
        None,
        "Instruction data instead of a text: a file or hub id, in finetune's formats; its responses count.",
        shown_default="none",
        flags=("--dataset", "-d"),
        panel=MODELS,
    )
    max_tokens: int = setting(10_000, "Measure at most so many predictions.", minimum=2, panel=MODELS)
    max_length: int = setting(
        1024, "Longest stretch of text in tokens, if the model has room for it.", minimum=8, panel=MODELS
    )
    bins: int = setting(15, "Confidence bins of the calibration error.", minimum=1, panel=MODELS)
    dtype: str | None = setting(
        None,
        "Precision of the model.",
        shown_default="bfloat16 on GPUs that have it, else float32",
        choices=("float32", "bfloat16", "float16"),
        panel=MODELS,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps.", shown_default="the first GPU", panel=MODELS)
    revision: str | None = setting(
        None, "Branch, tag or commit, of every --model from the hub.", shown_default="main", panel=MODELS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.dataset is not None:
            raise UsageError(
                "--text and --dataset: one at a time; a model is measured on a text or on instruction data"
            )
        elsewhere = SIZES if self.model else MODELS
        for f in dataclasses.fields(self):
            if f.metadata.get("panel") == elsewhere and f.name != "model" and getattr(self, f.name) != f.default:
                if self.model:
                    raise UsageError(f"{flag_name(f)} doesn't go with --model, whose head gives it; leave one out")
                raise UsageError(f"{flag_name(f)} is for measuring a model; add --model (demo is the built-in one)")

    def resolve(self) -> "EntropyBoundConfig":
        """With vocab, hidden and rho filled in."""
        return dataclasses.replace(
            self,
            vocab=self.vocab or PAPER_VOCABULARIES,
            hidden=self.hidden or DEFAULT_HIDDEN,
            rho=DEFAULT_RHO if self.rho is None else self.rho,
        )
