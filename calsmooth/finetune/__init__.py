"""Supervised fine-tuning of causal language models with the fused label-smoothed cross-entropy."""

from calsmooth.finetune.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
