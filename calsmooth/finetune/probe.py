"""Before any training: does the fused loss equal this model's own logits and torch's cross-entropy?

A few real examples go through the model both ways in float32. An architecture whose logits hold something that
`calsmooth.finetune.head` doesn't know of is found out here, in seconds, and not by a worse model.

The reference is torch's cross-entropy in float64 on the model's own float32 logits. In float32 torch's label smoothing
rounds much of its gradient away where the vocabulary is large: against a SmolLM2-135M (49,152 tokens) that is float64
throughout it is off by 1.2e-3, the fused loss by 3e-6.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.head import IGNORED, balance_loss, fused_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# float32 sums of a hundred tokens through a whole model, taken in another order.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3

PROBE_EXAMPLES, PROBE_LENGTH = 2, 64


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
    watched = [head.weight, *_some_decoder_parameters(model)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            own = _own_loss(model, batch, beta)
            # Allowed to be unused: an expert that no token went to, a part that sees images.
            own_gradients = torch.autograd.grad(own, watched, allow_unused=True)
            with fused_loss(model, beta), warnings.catch_warnings():
                # Float32 isn't for the kernels, which says nothing of the training to come.
                warnings.filterwarnings("ignore", message="linear_cross_entropy runs chunk by chunk")
                fused = model(**batch).loss
            fused_gradients = torch.autograd.grad(fused, watched, allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    head_gradient, *decoder_gradients = map(_difference, fused_gradients, own_gradients)
    result = ProbeResult(_difference(fused, own), head_gradient, max(decoder_gradients))
    # "not <=" so that NaN fails.
    if not (result.loss <= LOSS_TOLERANCE and max(result.head_gradient, result.decoder_gradient) <= GRADIENT_TOLERANCE):
        raise CalsmoothError(
            f"{type(model).__name__}: the fused loss doesn't equal the model's own (relative difference: loss "
            f"{result.loss:.1e}, head gradient {result.head_gradient:.1e}, decoder gradient "
            f"{result.decoder_gradient:.1e}); this architecture does to its logits what calsmooth doesn't know"
        )
    return result


def every_parameter_takes_part(model: "PreTrainedModel", trained: torch.nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether each parameter that is trained gets a gradient from text; the part that sees images doesn't.

    trained: the model, or adapters around it; its gradients are empty afterwards.
    """
    with fused_loss(model, 0.0):
        trained(**batch).loss.backward()
    all_do = all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    trained.zero_grad(set_to_none=True)
    return all_do


def probe_batch(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> dict[str, torch.Tensor]:
    """A few short stretches around the first response tokens."""
    cut = []
    for example in examples[:PROBE_EXAMPLES]:
        first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        start = max(0, min(first - PROBE_LENGTH // 2, len(example.input_ids) - PROBE_LENGTH))
        window = slice(start, start + PROBE_LENGTH)
        cut.append(Example(example.input_ids[window], example.labels[window]))
    batch = Collator(int(tokenizer.pad_token_id))(cut)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _own_loss(model: "PreTrainedModel", batch: dict[str, Tensor], beta: float) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORED
    outputs = model(**inputs, use_cache=False)
    logits, balance = outputs.logits[:, :-1][wanted], balance_loss(model, outputs)
    if logits.device.type == "mps":  # which has no float64
        logits, targets, wanted = logits.cpu(), targets.cpu(), wanted.cpu()
    loss = F.cross_entropy(logits.double(), targets[wanted], label_smoothing=beta, reduction="sum")
    return loss if balance is None else loss + balance.to(loss.device) * wanted.sum()


def _some_decoder_parameters(model: "PreTrainedModel") -> list[Tensor]:
    """The last, a middle and the first matrix: what their gradients show is the gradient by the hidden states.

    No vectors: the bias of an attention's keys, to name one, has a gradient of zero, and rounding is all of it.
    """
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.base_model.parameters() if p.requires_grad and p.dim() > 1 and p is not head]
    if not matrices:
        raise CalsmoothError(f"{type(model).__name__}: no trainable matrix in the decoder")
    return [matrices[i] for i in (-1, len(matrices) // 2, 0)]


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
