"""Options of `calsmooth entropy-bound`."""

from dataclasses import dataclass
from pathlib import Path

from calsmooth.config import Settings, setting
from calsmooth.entropy_bound.families import PAPER_VOCABULARIES

DEFAULT_RHO = 0.25
"""An illustration, not a measurement: the paper gives no rho for its Figure 4. With this one the floor falls from log V
to 0, near rho sqrt(D) = log V, at hidden sizes of 1,500 to 3,000 for today's vocabularies, where a figure can show it.
With rho = 1 a head of D >= 512 could be all but certain."""


@dataclass(frozen=True)
class EntropyBoundConfig(Settings):
    vocab: tuple[int, ...] = setting(
        PAPER_VOCABULARIES, "Vocabulary sizes |V|, separated by commas.", minimum=2, maximum=10**9
    )
    hidden: tuple[int, ...] = setting(
        (512, 1024, 2048, 3072, 4096), "Hidden sizes D, separated by commas.", minimum=1, maximum=10**9
    )
    rho: float = setting(
        DEFAULT_RHO,
        "sigma_C * sigma_h: the head's largest singular value times the largest |entry| of a hidden state. "
        "The default is an illustration; the paper gives none for its Figure 4.",
        minimum=0,
        maximum=1e150,
    )
    output: Path | None = setting(None, "Folder for the files.", shown_default="runs/entropy-bound")
