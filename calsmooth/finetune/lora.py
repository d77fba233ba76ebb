"""Low-rank adapters (LoRA) through peft: put on before training, saved by themselves, merged on request.

The fused loss is plugged into the model inside peft's wrapper, whose head stays a plain linear layer. An adapter on the
head is refused: the loss multiplies hidden states by one (V, D) matrix, and the head with its adapter would have to be
made anew, as a whole, in every micro-batch. Training the head itself (no --lora-rank) costs less.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calsmooth.errors import UsageError
from calsmooth.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL = "all-linear"


def add_adapters(model: "PreTrainedModel", config: FinetuneConfig, dtype: torch.dtype) -> Any:
    """The peft model around `model`: adapters in float32 are all that trains; the weights under them become `dtype`.

    Raises:
        UsageError: a named layer doesn't exist, isn't linear, or is the head.
    """
    from peft import LoraConfig, get_peft_model

    rank = int(config.lora_rank or 0)
    targets = list(config.lora_targets)
    if targets != [ALL]:
        _check_targets(model, targets)
    model.to(dtype)  # type: ignore[arg-type]
    folder = Path(str(model.name_or_path))
    if folder.is_dir():
        # Written into the adapter's configuration, from which it finds its model: it may be loaded from elsewhere.
        model.name_or_path = str(folder.resolve())
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=ALL if targets == [ALL] else targets,
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        # peft asks transformers for a name that is about to go.
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.manual_seed(config.seed)  # they begin at random
        return get_peft_model(model, adapters)


def merged(model: Any) -> "PreTrainedModel":
    """The model with its adapters added to its weights, in float32, and the wrapper gone."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.merge_and_unload()


def _check_targets(model: "PreTrainedModel", targets: list[str]) -> None:
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        found = [module for name, module in linear.items() if name == target or name.endswith(f".{target}")]
        if not found:
            names = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head})
            raise UsageError(f"--lora-targets {target}: no linear layer of that name; expected {', '.join(names)}")
        if head in found:
            raise UsageError(
                f"--lora-targets {target}: is the head, on which the fused loss can't have an adapter; leave it out, "
                "or leave out --lora-rank to train the head itself"
            )
