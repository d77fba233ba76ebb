"""torch.compile for the decoder's layers, one by one.

A layer's norms, activations and residual sums become a few kernels instead of dozens; all layers of a kind share what
is compiled for the first. The head stays as it is: the fused loss is there. What happens between layers (masks, hooks
of FSDP) runs uncompiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIANTS = 64
"""Of one kind of layer: with and without gradients, dropout, padding; torch gives up after 8 and runs uncompiled."""


@contextmanager
def compiled_layers(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block the model's layers run compiled, made when they first run; afterwards they are as they were.

    Raises:
        UsageError: the model has no layers that transformers marks as such.
        CalsmoothError: torch can't compile them here; the message says why.
    """
    layers = [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"--compile: {type(model).__name__} has no layers that transformers marks as such; leave it out"
        )
    for layer in layers:
        layer.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    except TorchDynamoException as error:
        raise CalsmoothError(
            f"--compile: torch could not compile the layers of {type(model).__name__} here "
            f"({next(iter(str(error).strip().splitlines()), type(error).__name__)}); leave --compile out"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
