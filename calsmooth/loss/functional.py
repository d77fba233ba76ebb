"""The public function: checks what it is given, then hands it to the first implementation that can take it."""

from typing import Literal

import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked
from calsmooth.loss.problem import Problem

# Fastest first. Each module says in `why_not(problem)` what keeps it from taking a problem (None: it can take it),
# before anything runs; an implementation that was chosen and fails is a bug, never a reason to try the next.
IMPLEMENTATIONS = (chunked,)


def linear_cross_entropy(
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64 or int32
    *,
    bias: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Label-smoothed cross-entropy of `softcap(scale * (hidden_states @ lm_head_weight.T + bias))`, exact.

    Equal in value and gradients to `torch.nn.functional.cross_entropy(logits, targets, label_smoothing=beta)` on
    those logits (see `linear_cross_entropy_reference`, the definition), but the logits never exist as a whole: peak
    memory above inputs and gradients is one chunk of them. Source: section 5 and equation 15 of the paper, with
    torch's sign.

    Args:
        hidden_states: (..., D), floating point; the leading dimensions are those of `targets`.
        lm_head_weight: (V, D), same dtype and device; under autocast both are cast to its dtype.
        targets: (...), integer class indices in [0, V) or `ignore_index`. Not shifted: entry i is the label of
            hidden state i. Indices are checked on the CPU; on a GPU a check would stall it.
        bias: (V,), added to the raw logits.
        label_smoothing: beta in [0, 1]: the target distribution is (1 - beta) onehot + beta / V.
        ignore_index: targets with this value give no loss and no gradient.
        reduction: 'mean' over the targets that aren't ignored (0, with a graph, if there is none), 'sum', or 'none'
            (shape of `targets`, 0 where ignored). With 'none' the backward pass walks the vocabulary again, since the
            incoming gradients are unknown before; 'mean' and 'sum' make their gradients in the forward pass.
        softcap: t in z = t * tanh(z / t), as in Gemma 2; None for none.
        scale: factor on the raw logits before the softcap (Cohere's logit_scale, 1 / Granite's logits_scaling).

    Returns:
        float32, or float64 for float64 inputs; a scalar unless reduction is 'none'. Differentiable once in
        hidden_states, lm_head_weight and bias; what doesn't require a gradient costs nothing.

    Raises:
        UsageError: shapes, dtypes or devices don't fit together, an option is outside its range, or (CPU) a target
            is outside [0, V).
    """
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states, lm_head_weight = hidden_states.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden_states, lm_head_weight, targets, bias, label_smoothing, ignore_index, reduction, softcap)
    problem = Problem(
        hidden_states=hidden_states.flatten(0, -2),
        lm_head_weight=lm_head_weight,
        targets=targets.flatten(),
        bias=bias,
        label_smoothing=float(label_smoothing),
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=None if softcap is None else float(softcap),
        scale=float(scale),
    )
    implementation = next(i for i in IMPLEMENTATIONS if i.why_not(problem) is None)
    with torch.autocast(device_type, enabled=False):  # the implementations choose the precision of every product
        loss = implementation.linear_cross_entropy(problem)
    return loss.view(targets.shape) if reduction == "none" else loss


def _check(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
) -> None:
    def shape(t: Tensor) -> tuple[int, ...]:
        return tuple(t.shape)

    if lm_head_weight.dim() != 2 or hidden_states.dim() < 2 or hidden_states.shape[-1] != lm_head_weight.shape[1]:
        raise UsageError(
            f"hidden_states {shape(hidden_states)} and lm_head_weight {shape(lm_head_weight)} don't fit; "
            "expected (..., D) and (V, D)"
        )
    if targets.shape != hidden_states.shape[:-1]:
        expected = shape(hidden_states)[:-1]
        raise UsageError(
            f"targets {shape(targets)} don't fit hidden_states {shape(hidden_states)}; expected {expected}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"targets are {targets.dtype}; expected class indices, int64 or int32")
    V = lm_head_weight.shape[0]
    if bias is not None and shape(bias) != (V,):
        raise UsageError(f"bias {shape(bias)} doesn't fit lm_head_weight {shape(lm_head_weight)}; expected ({V},)")
    if not hidden_states.is_floating_point() or hidden_states.dtype != lm_head_weight.dtype:
        raise UsageError(
            f"hidden_states are {hidden_states.dtype} and lm_head_weight is {lm_head_weight.dtype}; "
            "expected one floating-point dtype (cast one, or use autocast)"
        )
    devices = {str(t.device) for t in (hidden_states, lm_head_weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise UsageError(f"tensors are on {' and '.join(sorted(devices))}; expected one device")
    if not 0.0 <= label_smoothing <= 1.0:
        raise UsageError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise UsageError(f"softcap must be above 0 (or None for no softcap), got {softcap}")
    if targets.device.type == "cpu" and targets.numel():
        bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if bad.any():
            raise UsageError(
                f"target {int(targets[bad][0])} is outside the vocabulary; expected 0 to {V - 1} or "
                f"ignore_index {ignore_index}"
            )
