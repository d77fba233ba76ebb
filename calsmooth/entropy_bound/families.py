"""Vocabulary and hidden sizes of public models, as their configuration files on the Hugging Face hub give them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    name: str
    vocab: int
    members: tuple[tuple[str, int], ...]  # (size, hidden)


FAMILIES = (
    Family("Mistral", 32_768, (("7B v0.3", 4096),)),
    Family("SmolLM2", 49_152, (("135M", 576), ("360M", 960), ("1.7B", 2048))),
    Family("Llama 3", 128_256, (("1B", 2048), ("3B", 3072), ("8B", 4096), ("70B", 8192))),
    Family("Qwen2.5", 151_936, (("0.5B", 896), ("1.5B", 1536), ("3B", 2048))),
    Family("Qwen2.5", 152_064, (("7B", 3584), ("14B, 32B", 5120), ("72B", 8192))),
    Family("Gemma 2", 256_000, (("2B", 2304), ("9B", 3584), ("27B", 4608))),
    Family("Gemma 3", 262_144, (("270M", 640), ("1B", 1152))),
    Family("Gemma 3", 262_208, (("4B", 2560), ("12B", 3840), ("27B", 5376))),
)
"""Llama 3 stands for 3, 3.1 and 3.2, which share a vocabulary. The larger models of Qwen2.5 and Gemma 3 have a few more
rows in their heads."""

PAPER_VOCABULARIES = (32_768, 128_256, 256_000)
"""Mistral-7B, Llama 3 and Gemma 2: the families that the paper fine-tunes."""


def family_of(vocab: int) -> str:
    """The family with this vocabulary, or ''."""
    return next((family.name for family in FAMILIES if family.vocab == vocab), "")
