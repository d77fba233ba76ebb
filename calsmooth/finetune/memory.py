"""How much memory a run will take, before a byte of it is taken.

Weights, gradients and the optimizer's state follow from the number of parameters. Activations are counted: the model's
own forward pass runs on tensors that have shapes and no content (torch's FakeTensorMode), and what autograd would keep
is added up. So every architecture, attention and precision counts as what it is. The fused loss's part is its own:
the gradients that it makes in the forward pass, and one chunk of logits.

Activations are those of uncompiled layers; compiled ones (`--compile`) keep fewer: the estimate is an upper bound then.

What an allocator loses to fragments, and what CUDA and its libraries take (about a gigabyte), comes on top.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calsmooth.finetune.batches import pack, packed_size, padded_size
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.logits import set_dropout
from calsmooth.finetune.lora import add_adapters
from calsmooth.finetune.plan import Plan
from calsmooth.loss.chunked import CHUNK_BYTES
from calsmooth.models import load_config, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FLOAT32 = 4

USABLE = 0.9
"""Share of a GPU's memory that an estimate may fill: the rest is the libraries' and lost to fragments."""

# Bytes of state a trained parameter.
OPTIMIZER_BYTES = {
    "adamw": 8,
    "adafactor": 0,  # a row and a column a matrix
    "sgd": 0,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion": 4,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, for a micro-batch of rows x width tokens.

    activations: None where this architecture's forward pass can't run without content.
    low_precision: copies of the weights that autocast makes. full_logits: what the logits of the micro-batch's targets
    and their gradient would take in float32, which the fused loss doesn't make.
    """

    rows: int
    width: int  # tokens
    weights: int
    gradients: int
    optimizer: int
    low_precision: int
    activations: int | None
    loss: int
    full_logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.low_precision + (self.activations or 0) + self.loss


def micro_batch_and_memory(plan: Plan) -> tuple[Plan, MemoryEstimate]:
    """The plan with the largest micro-batch whose estimate fits into the GPU, and that estimate.

    A run tries the sizes out instead; where there is no GPU the plan has one size only.
    """
    device = pick_device(plan.config.device)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    for size in plan.micro_batches:
        found = _of_micro_batch(plan, size)
        if memory is None or found.total <= memory * USABLE:
            break
    return plan.with_micro_batch(size), found


def _of_micro_batch(plan: Plan, size: int) -> MemoryEstimate:
    lengths = [len(e.input_ids) for e in plan.heaviest(size)]
    rows = len(pack(lengths)) if plan.config.packing else len(lengths)
    width = (packed_size(lengths, pack(lengths)) if plan.config.packing else padded_size(lengths)) // rows
    targets = sum(e.target_tokens for e in plan.heaviest(size))
    return estimate_memory(load_config(plan.config.model, plan.config.revision), plan.config, rows, width, targets)


def estimate_memory(
    settings: "PreTrainedConfig", config: FinetuneConfig, rows: int, width: int, targets: int
) -> MemoryEstimate:
    """For a micro-batch of `rows` x `width` tokens, of which `targets` are learned.

    settings: the model's configuration. config: with its dtype resolved.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype or "float32"]
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        trained: Any = model if config.lora_rank is None else add_adapters(model, config, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend_on_cpu(trained)
        trained.train()
        kept = _kept(trained, width, dtype)
    parameters = list(trained.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    text = settings.get_text_config(decoder=True)
    head, hidden = text.vocab_size * text.hidden_size, targets * text.hidden_size
    activations, low_precision = (None, 0) if kept is None else (kept[0] * rows, kept[1])
    if activations is not None and config.gradient_checkpointing:
        # Kept are the inputs of the layers, and while one of them is made again, what it keeps.
        layers = text.num_hidden_layers
        activations = layers * rows * width * text.hidden_size * dtype.itemsize + activations // layers
    trains_head = model.get_output_embeddings().weight.requires_grad
    return MemoryEstimate(
        rows=rows,
        width=width,
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients=learned * FLOAT32,
        optimizer=learned * OPTIMIZER_BYTES[config.optimizer],
        low_precision=low_precision,
        activations=activations,
        loss=min(targets * text.vocab_size * FLOAT32, CHUNK_BYTES) + FLOAT32 * (hidden + head * trains_head),
        full_logits=2 * FLOAT32 * targets * text.vocab_size,
    )


def _pretend_on_cpu(model: nn.Module) -> None:
    """Give a model from the meta device, which autocast and attention don't know, fake tensors on the CPU."""
    # Tied weights are one parameter before, and have to be one afterwards.
    replaced = {p: nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad) for p in model.parameters()}
    for module in list(model.modules()):
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else replaced[parameter]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")


def _kept(model: nn.Module, width: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """(bytes kept for the backward pass a row, bytes kept once whatever the rows); None if they can't be counted."""
    # torch logs a traceback for an operation that has no fake version; that there is none is our answer.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        one, two = (saved_bytes(model, rows, width, dtype) for rows in (1, 2))
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        log.setLevel(level)
    return two - one, max(2 * one - two, 0)


def saved_bytes(model: nn.Module, rows: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps after the forward pass of rows x width tokens, the model's parameters aside."""
    parameters = {_storage(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in parameters:
            kept[_storage(tensor)] = tensor
        return tensor

    device = next(model.parameters()).device
    tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
    lower = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), lower:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
