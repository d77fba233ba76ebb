"""Before any training: does the fused loss equal this model's own logits and torch's cross-entropy?

A few real examples go through the model both ways in float32. An architecture whose logits hold something that
`calsmooth.finetune.head` doesn't know of is found out here, in seconds, and not by a worse model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from calsmooth.errors import CalsmoothError
from calsmooth.finetune.head import IGNORED, fused_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 sums of a hundred tokens through a whole model, taken in another order.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ProbeResult:
    """Relative differences |fused - own| / |own| of the summed loss and of the gradients (Euclidean norms)."""

    loss: float
    head_gradient: float
    decoder_gradient: float


def probe(model: "PreTrainedModel", batch: dict[str, Tensor], beta: float) -> ProbeResult:
    """Compare both ways on one small batch of input_ids, attention_mask and labels, (B, T) each.

    The model is left as it was: no gradient, no mode, no random number is touched.

    Raises:
        CalsmoothError: the two differ by more than rounding; the message says by how much.
    """
    head = model.get_output_embeddings()
    decoder = _last_decoder_parameter(model)
    mode = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            own = _own_loss(model, batch, beta)
            own_gradients = torch.autograd.grad(own, [head.weight, decoder])
            with fused_loss(model, beta):
                fused = model(**batch).loss
            fused_gradients = torch.autograd.grad(fused, [head.weight, decoder])
    finally:
        model.train(mode)
    result = ProbeResult(
        _difference(fused, own),
        _difference(fused_gradients[0], own_gradients[0]),
        _difference(fused_gradients[1], own_gradients[1]),
    )
    # "not <=" so that NaN fails.
    if not (result.loss <= LOSS_TOLERANCE and max(result.head_gradient, result.decoder_gradient) <= GRADIENT_TOLERANCE):
        raise CalsmoothError(
            f"{type(model).__name__}: the fused loss doesn't equal the model's own (relative difference: loss "
            f"{result.loss:.1e}, head gradient {result.head_gradient:.1e}, decoder gradient "
            f"{result.decoder_gradient:.1e}); this architecture does to its logits what calsmooth doesn't know"
        )
    return result


def _own_loss(model: "PreTrainedModel", batch: dict[str, Tensor], beta: float) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        label_smoothing=beta,
        reduction="sum",
    )


def _last_decoder_parameter(model: "PreTrainedModel") -> Tensor:
    """A small parameter close below the head: what its gradient shows is the gradient by the hidden states."""
    head = model.get_output_embeddings().weight
    parameters = [p for p in model.base_model.parameters() if p.requires_grad and p is not head]
    if not parameters:
        raise CalsmoothError(f"{type(model).__name__}: no trainable parameter in the decoder")
    return parameters[-1]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
