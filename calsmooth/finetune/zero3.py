"""DeepSpeed's ZeRO-3 under the Trainer: the step waits for its check, and what processes hold is put together.

accelerate lets DeepSpeed take the step within the backward of a step's last micro-batch. A bad one would be in the
weights before anybody has looked at it, and the norm that is logged would be another step's. Here the engine's step is
held back until the Trainer takes it, and the norm comes from the shards.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from calsmooth.errors import UsageError
from calsmooth.finetune.checkpoints import readable
from calsmooth.processes import Processes

CONFIGURATION: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    # Gradients are summed in float32, over micro-batches and over processes, whatever they are computed in.
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    # The Trainer's own: its optimizers are torch's and bitsandbytes', of which DeepSpeed knows some.
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "zero_allow_untested_optimizer": True,
}


@contextmanager
def deepspeed() -> Iterator[None]:
    """Within the block the Trainer may use DeepSpeed; behind it, what it leaves behind in this process is gone.

    While its configuration is there, transformers shards every model that it loads, and accelerate takes every Trainer
    for one of DeepSpeed's.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    talkative = [logging.getLogger(name) for name in ("DeepSpeed", "accelerate.accelerator")]
    levels = [log.level for log in talkative]
    for log in talkative:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # It calls what this torch has newer names for, at every gathering.
            warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
            yield
    finally:
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state(reset_partial_state=True)
        for log, level in zip(talkative, levels, strict=True):
            log.setLevel(level)


def hold_back_step(engine: Any, optimizer: Any, norm: Callable[[Iterable[nn.Parameter]], float]) -> None:
    """The engine's step is taken by `optimizer.step()` instead. norm: of the parameters' gradient, asked for before."""
    take = engine.step
    engine.step = lambda *args, **kwargs: None
    engine.get_global_grad_norm = lambda: norm(engine.module.parameters())

    def step(self: Any, closure: None = None) -> None:
        take()

    optimizer.step = MethodType(step, optimizer)


def load_readable(engine: Any) -> None:
    """What the engine's reading of a damaged checkpoint raises becomes one line (`checkpoints.readable`)."""
    load = engine.load_checkpoint

    def load_checkpoint(checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        with readable(Path(checkpoint)):
            return load(checkpoint, *args, **kwargs)

    engine.load_checkpoint = load_checkpoint


def gradient_norm(parameters: Iterable[nn.Parameter], processes: Processes) -> float:
    """The Euclidean norm of the whole gradient, of which each process holds a part."""
    from deepspeed.utils import safe_get_local_grad

    own = [safe_get_local_grad(p) for p in parameters if p.requires_grad]
    [square] = processes.summed(float(torch.nn.utils.get_total_norm(own)) ** 2)
    return math.sqrt(square)


def whole_weights(model: nn.Module, processes: Processes) -> dict[str, Tensor] | None:
    """In the first process all weights by name, in float32 and in main memory; None in the others, which have to ask
    as well. Names of one tied weight share it.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied = names.setdefault(id(tensor), name)
        if tied == name and hasattr(tensor, "ds_id"):
            tensor = safe_get_full_fp32_param(tensor)
        if processes.first:
            weights[name] = tensor.detach().to("cpu", copy=True) if tied == name else weights[tied]
    return weights if processes.first else None


def check_checkpoint(checkpoint: Path, processes: Processes) -> None:
    """Can these processes go on from it?

    Raises:
        UsageError: it was written by another number of them, each of which holds its own part.
    """
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if parts != processes.count:
        raise UsageError(
            f"--parallel zero3: {checkpoint} is of {parts} processes, here are {processes.count}; resume with as many"
        )
