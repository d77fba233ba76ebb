"""What a configuration comes to on its data: examples, steps and the sizes of batches, before a model is loaded."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calsmooth.data import ExampleSet, load_example_set
from calsmooth.errors import UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import micro_batch_candidates
from calsmooth.models import load_tokenizer, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to on this data: shown by --dry-run, followed by `run`."""

    config: FinetuneConfig
    examples: ExampleSet
    micro_batches: list[int]  # sizes that may be tried, largest first
    steps: int

    @property
    def target_tokens(self) -> int:
        return self.examples.examples.target_tokens

    @property
    def micro_batch(self) -> int:
        return self.micro_batches[0]

    @property
    def accumulation(self) -> int:
        return int(self.config.batch_size or 0) // self.micro_batch

    def with_micro_batch(self, size: int) -> "Plan":
        config = dataclasses.replace(self.config, micro_batch_size=size)
        return dataclasses.replace(self, config=config, micro_batches=[size])


def prepare(config: FinetuneConfig) -> "tuple[Plan, PreTrainedTokenizerBase]":
    """Read the data and work out steps and batch sizes; no model is loaded.

    Raises:
        UsageError, CalsmoothError: the data, the tokenizer or the batch sizes can't be as asked.
    """
    config = config.resolve()
    device = pick_device(config.device)
    if config.micro_batch_size and int(config.batch_size or 0) % config.micro_batch_size:
        raise UsageError(
            f"--micro-batch-size {config.micro_batch_size} doesn't divide --batch-size {config.batch_size}"
        )
    batch_size, epochs, max_length = int(config.batch_size or 0), int(config.epochs or 0), int(config.max_length or 0)
    tokenizer = load_tokenizer(config.model, config.revision)
    examples = load_example_set(
        config.dataset,
        tokenizer,
        format=config.format,
        template=config.template,
        max_length=max_length,
        limit=config.limit,
        seed=config.seed,
        split=config.split,
        revision=config.dataset_revision,
        on_bad_row=config.on_bad_row,
        cache=config.cache,
    )
    steps = epochs * -(-len(examples.examples) // batch_size)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    config = dataclasses.replace(config, dtype=dtype, save_every=config.save_every or -(-steps // 10))
    longest = int(examples.examples.lengths.max())
    sizes = (
        [config.micro_batch_size]
        if config.micro_batch_size
        else micro_batch_candidates(batch_size, longest, device.type)
    )
    plan = Plan(config, examples, sizes, steps)
    # Only a GPU says so when a size doesn't fit; elsewhere the first is taken.
    return plan if device.type == "cuda" else plan.with_micro_batch(sizes[0]), tokenizer
