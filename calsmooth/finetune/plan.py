"""What a configuration comes to on its data: examples, steps and the sizes of batches, before a model is loaded."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from calsmooth.data import IGNORED, Example, ExampleSet, load_example_set
from calsmooth.data.stream import ExampleStream
from calsmooth.errors import UsageError
from calsmooth.finetune.batches import pack, packed_size, padded_size
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.evaluation import choose_held_out
from calsmooth.finetune.fit import fastest, micro_batch_candidates, packed_tokens
from calsmooth.finetune.order import EpochOrder
from calsmooth.finetune.prior import check_prior
from calsmooth.finetune.stream import StepStream
from calsmooth.models import check_vocabulary, load_config, load_tokenizer, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 256
"""Examples of a stream that are looked at before training, at most."""

STEPS_LOOKED_AT = 8
"""For the share of padding."""


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to on this data: shown by --dry-run, followed by `run`."""

    config: FinetuneConfig
    examples: ExampleSet
    micro_batches: list[int]  # sizes that may be tried, largest first
    steps: int
    held_out: Sequence[int] = ()  # indices of examples that aren't trained on
    evaluation: Sequence[Example] = ()  # what is measured during training
    step_tokens: int | None = None  # of the step that has the most, where examples are packed
    processes: int = 1  # that share each step
    endless: ExampleStream | None = None  # what is trained on with --streaming, of which `examples` is the beginning

    @cached_property
    def order(self) -> EpochOrder:
        """In which the examples are trained on."""
        return epoch_order(self.config, self.examples, self.held_out, self.micro_batch)

    @cached_property
    def stream(self) -> StepStream | None:
        """What is trained on with --streaming."""
        if self.endless is None:
            return None
        return StepStream(
            self.endless, int(self.config.batch_size or 1), self.micro_batch if self.config.packing else None
        )

    @cached_property
    def target_tokens(self) -> int:
        """That are trained on in the first epoch; of a stream, those in its beginning."""
        return int(self.examples.examples.targets[list(self.order)].sum())

    def rows_read(self, steps: int = 0) -> dict[str, int]:
        """Rows and what became of them: of all the data, or of a stream until after so many steps."""
        read = self.stream.position(steps) if self.stream and steps else self.examples
        return {
            "rows": read.rows,
            "rows_bad": read.bad,
            "rows_dropped": read.dropped,
            "rows_truncated": read.truncated,
        }

    @property
    def micro_batch(self) -> int:
        return self.micro_batches[0]

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, one after the other in each process."""
        return int(self.config.batch_size or 0) // (self.micro_batch * self.processes)

    def with_micro_batch(self, size: int) -> "Plan":
        config = dataclasses.replace(self.config, micro_batch_size=size)
        return dataclasses.replace(self, config=config, micro_batches=[size])

    def padding_share(self, packing: bool) -> float:
        """Share of the tokens that the model reads which is padding, packed or not, over the first few steps."""
        config = dataclasses.replace(self.config, packing=packing)
        read = tokens_read(config, self.examples, self.held_out, self.micro_batch)
        return 1.0 - read.tokens / sum(read.micro_batches)

    def heaviest(self, size: int) -> list[Example]:
        """A micro-batch of `size` examples that needs at least as much memory as any in the run."""
        examples = self.examples.examples
        if self.endless is not None:  # anything may come
            length, first = int(self.config.max_length or 1), examples[0]
            ids = (first.input_ids * -(-length // len(first.input_ids)))[:length]
            return [Example(ids, [IGNORED, *ids[1:]])] * size
        longest = np.argsort(-examples.lengths, kind="stable")[:size]
        if self.step_tokens is not None:
            most = packed_tokens(self.step_tokens, size, int(self.config.batch_size or 1), int(examples.lengths.max()))
            longest = longest[np.cumsum(examples.lengths[longest]) <= most]
        return [examples[int(i)] for i in longest]


def prepare(config: FinetuneConfig, processes: int = 1) -> "tuple[Plan, PreTrainedTokenizerBase]":
    """Read the data and work out steps and batch sizes; no model is loaded. processes: that share each step.

    Raises:
        UsageError, CalsmoothError: the data, the tokenizer or the batch sizes can't be as asked.
    """
    config = config.resolve()
    device = pick_device(config.device)
    _check_batch_size(config, processes)
    batch_size, epochs, max_length = int(config.batch_size or 0), int(config.epochs or 0), int(config.max_length or 0)
    model_config = load_config(config.model, config.revision)
    check_prior(config.smoothing_prior, getattr(model_config.get_text_config(decoder=True), "vocab_size", None))
    tokenizer = load_tokenizer(config.model, config.revision)
    reading: dict[str, Any] = {
        "format": config.format,
        "template": config.template,
        "max_length": max_length,
        "seed": config.seed,
        "split": config.split,
        "revision": config.dataset_revision,
        "on_bad_row": config.on_bad_row,
    }
    if config.streaming:
        endless = ExampleStream(config.dataset, tokenizer, buffer=config.shuffle_buffer, **reading)
        examples = endless.beginning(min(batch_size, SAMPLE))
    else:
        endless = None
        examples = load_example_set(config.dataset, tokenizer, limit=config.limit, cache=config.cache, **reading)
    highest = max(int(examples.examples.tokens.max()), tokenizer.pad_token_id or 0)
    check_vocabulary(config.model, model_config, highest)
    held_out, evaluation = _held_out(config, examples, tokenizer)
    order = epoch_order(config, examples, held_out)
    steps = epochs * -(-len(order) // batch_size)
    steps = int(config.max_steps or 0) if config.streaming else min(steps, config.max_steps or steps)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    config = dataclasses.replace(config, dtype=dtype, save_every=config.save_every or -(-steps // 10))
    longest = max_length if endless else int(examples.examples.lengths.max())
    step_tokens = None
    if config.packing and not endless:
        step_tokens = order.most_tokens(-(-steps * batch_size // len(order)))
    sizes = (
        [config.micro_batch_size]
        if config.micro_batch_size
        else fastest(
            micro_batch_candidates(batch_size // processes, longest, device.type, step_tokens),
            lambda size: tokens_read(config, examples, held_out, size).micro_batches,
            device.type,
        )
    )
    plan = Plan(config, examples, sizes, steps, held_out, evaluation, step_tokens, processes, endless)
    # Only a GPU says so when a size doesn't fit; elsewhere the first is taken.
    return plan if device.type == "cuda" else plan.with_micro_batch(sizes[0]), tokenizer


@dataclass(frozen=True)
class TokensRead:
    """By the model, over the first few steps: tokens, and with their padding those of each micro-batch."""

    tokens: int
    micro_batches: list[int]


def tokens_read(config: FinetuneConfig, examples: ExampleSet, held_out: Sequence[int], size: int) -> TokensRead:
    """With micro-batches of `size` examples, packed or padded."""
    lengths = examples.examples.lengths
    order = epoch_order(config, examples, held_out, size)
    indices = list(itertools.islice(order, STEPS_LOOKED_AT * int(config.batch_size or 1)))
    batches = [lengths[indices[start : start + size]].tolist() for start in range(0, len(indices), size)]
    read = [packed_size(batch, pack(batch)) if config.packing else padded_size(batch) for batch in batches]
    return TokensRead(int(lengths[indices].sum()), read)


def _check_batch_size(config: FinetuneConfig, processes: int) -> None:
    """Raises:
    UsageError: the batch can't be cut as it is asked for.
    """
    batch_size, micro_batch = int(config.batch_size or 0), config.micro_batch_size
    if batch_size % processes:
        raise UsageError(f"--batch-size {batch_size}: can't be shared evenly by {processes} processes")
    if micro_batch and batch_size // processes % micro_batch:
        share = f" over {processes} processes" if processes > 1 else ""
        raise UsageError(f"--micro-batch-size {micro_batch} doesn't divide --batch-size {batch_size}{share}")


def epoch_order(
    config: FinetuneConfig, examples: ExampleSet, held_out: Sequence[int], micro_batch: int = 1
) -> EpochOrder:
    return EpochOrder(
        examples.examples.lengths,
        int(config.batch_size or 1),
        config.seed,
        sources=examples.sources,
        held_out=held_out,
        packed=micro_batch if config.packing else None,
    )


def _held_out(
    config: FinetuneConfig, examples: ExampleSet, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[Example]]:
    """Indices of the training examples to leave out, and the examples to measure: --eval-dataset's, or those."""
    if not config.eval_every:
        return [], []
    if config.eval_dataset is not None:
        found = load_example_set(
            config.eval_dataset,
            tokenizer,
            format=config.format,
            template=config.template,
            max_length=int(config.max_length or 0),
            limit=config.eval_rows,
            seed=config.seed,
            on_bad_row=config.on_bad_row,
            cache=config.cache,
        )
        return [], list(found.examples)
    if len(examples.examples) < 2:
        raise UsageError("--eval-every: one example can't be trained on and held out; give more data or --eval-dataset")
    held_out = choose_held_out(len(examples.examples), config.eval_rows, config.seed)
    return held_out, [examples.examples[i] for i in held_out]
