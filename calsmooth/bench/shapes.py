"""The heads that are worth timing: vocabulary, hidden size and softcap of public models, and the paper's own shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    name: str
    vocab: int
    hidden: int
    softcap: float | None = None


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("paper", 256_000, 2304),  # Tables 2 and 3: Gemma 2's sizes, timed without its softcap
        Shape("gemma-2-2b", 256_000, 2304, softcap=30.0),
        Shape("gemma-3-270m", 262_144, 640),
        Shape("smollm2-135m", 49_152, 576),
        Shape("mistral-7b-v0.3", 32_768, 4096),
        Shape("llama-3.2-1b", 128_256, 2048),
        Shape("llama-3.2-3b", 128_256, 3072),
        Shape("llama-3-8b", 128_256, 4096),
        Shape("qwen2.5-0.5b", 151_936, 896),
    )
}

PAPER_TOKENS = 8192
"""Tokens a measurement on a GPU takes unless told otherwise, as in Tables 2 and 3."""


def default_preset(device_type: str) -> Shape:
    """The paper's shape on a GPU; on a CPU the head of a model small enough to be trained there."""
    return PRESETS["gemma-3-270m" if device_type == "cpu" else "paper"]
