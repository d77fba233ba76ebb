"""The built-in model, data set and task: a made-up world small enough to train in a minute on a CPU."""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_FOLDER = _HERE / "model"
"""A tiny causal language model with its tokenizer, in Hugging Face's layout."""

TRAIN_FILE = _HERE / "data" / "train.jsonl"
"""Instruction data (alpaca columns) to fine-tune on: what `--dataset demo` stands for."""

HELDOUT_FILE = _HERE / "data" / "heldout.jsonl"
"""Instruction data of the same kind that no one trains on: for next-token calibration."""

QUESTIONS_FILE = _HERE / "data" / "questions.jsonl"
"""Multiple-choice questions about the same world: what `--task demo` stands for."""
