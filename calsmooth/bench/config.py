"""Options of `calsmooth bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from calsmooth.bench.shapes import PRESETS
from calsmooth.config import Settings, setting
from calsmooth.errors import UsageError

METHOD_NAMES = (
    "calsmooth",
    "eager",
    "torch.compile",
    "chunked",
    "F.linear_cross_entropy",
    "cut-cross-entropy",
    "liger-kernel",
    "trl",
    "quack-kernels",
    "fla-core",
    "paper",
)
Mode = Literal["exact", "lean", "filtered"]
MODES: tuple[Mode, ...] = get_args(Mode)
DEFAULT_FILTER_EPS = 2.0**-12

_PROBLEM, _INPUTS, _METHODS = "The problem", "Its inputs", "What is measured"


@dataclass(frozen=True)
class BenchConfig(Settings):
    preset: tuple[str, ...] = setting(
        (),
        "Heads of known models, separated by commas; 'all' for every one.",
        choices=(*PRESETS, "all"),
        shown_default="paper on a GPU, gemma-3-270m on a CPU",
        panel=_PROBLEM,
    )
    vocab: tuple[int, ...] | None = setting(
        None,
        "Vocabulary sizes |V|, separated by commas; several draw a curve.",
        shown_default="the preset's",
        minimum=2,
        maximum=16_000_000,
        panel=_PROBLEM,
    )
    hidden: int | None = setting(
        None, "Hidden size D.", shown_default="the preset's", minimum=2, maximum=65_536, panel=_PROBLEM
    )
    tokens: tuple[int, ...] | None = setting(
        None,
        "Tokens N, separated by commas; several draw a curve.",
        shown_default="8192 on a GPU; on a CPU what a minute allows",
        minimum=1,
        maximum=4_000_000,
        panel=_PROBLEM,
    )
    beta: tuple[float, ...] = setting(
        (0.1,), "Label smoothing; several values are timed side by side.", minimum=0, maximum=1, panel=_PROBLEM
    )
    softcap: float | None = setting(
        None, "Logit softcap, 0 for none.", shown_default="the preset's", minimum=0, panel=_PROBLEM
    )
    dtype: str | None = setting(
        None,
        "Type of hidden states and head.",
        shown_default="bfloat16 on a GPU, float32 on a CPU",
        choices=("float32", "bfloat16", "float16"),
        panel=_PROBLEM,
    )
    frozen: str = setting(
        "none",
        "What needs no gradient: the head as in LoRA, or the body.",
        choices=("none", "head", "body"),
        panel=_PROBLEM,
    )
    inputs: str = setting(
        "model-like",
        "Random inputs whose softmax looks like a trained model's, or those of an untrained head.",
        choices=("model-like", "randn"),
        panel=_INPUTS,
    )
    model: str | None = setting(
        None,
        "Use this model's own hidden states and head: a folder or hub id, 'demo' is built in; needs --text.",
        shown_default="random inputs",
        flags=("--model", "-m"),
        panel=_INPUTS,
    )
    text: Path | None = setting(None, "The text that --model reads.", panel=_INPUTS)
    seed: int = setting(0, "Seed of the random inputs.", minimum=0, maximum=2**31 - 1, panel=_INPUTS)
    method: tuple[str, ...] = setting(
        (), "Methods, separated by commas.", choices=METHOD_NAMES, shown_default="all available", panel=_METHODS
    )
    mode: tuple[str, ...] = setting(
        (), "calsmooth's modes, separated by commas.", choices=MODES, shown_default="all available", panel=_METHODS
    )
    filter_eps: tuple[float, ...] = setting(
        (DEFAULT_FILTER_EPS,),
        "calsmooth's filtered mode replaces softmax entries below this by their mean; several are timed side by side.",
        shown_default="2^-12",
        above=0,
        below=1,
        panel=_METHODS,
    )
    autotune: bool = setting(
        False,
        "First search the block sizes of calsmooth's GPU kernels that are fastest over all problems given, and keep "
        "them for every later run on this GPU.",
        panel=_METHODS,
    )
    repeats: int | None = setting(
        None,
        "Timed rounds, each with every method once.",
        shown_default="20 on a GPU, at most 3 on a CPU",
        minimum=1,
        maximum=10_000,
        panel=_METHODS,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps.", shown_default="the first GPU")
    output: Path | None = setting(
        None, "Folder for the files: new or empty.", shown_default="runs/bench", flags=("--output", "-o")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.text is None):
            given, missing = ("--model", "--text FILE") if self.text is None else ("--text", "--model DIR")
            raise UsageError(f"{given} needs {missing}: a model's own hidden states come from a text that it reads")
        if self.model is not None and (self.preset or self.vocab or self.hidden or self.softcap is not None):
            raise UsageError("--model brings its own sizes; leave out --preset, --vocab, --hidden and --softcap")
        if self.text is not None and not self.text.is_file():
            what = "is a folder; give a file" if self.text.is_dir() else "no such file"
            raise UsageError(f"--text {self.text}: {what}")
        ours = "--mode" if self.mode else "--filter-eps" if self.filter_eps != (DEFAULT_FILTER_EPS,) else None
        if ours and self.method and "calsmooth" not in self.method:
            raise UsageError(f"{ours} is for the method calsmooth, which --method leaves out; add it, or drop {ours}")
