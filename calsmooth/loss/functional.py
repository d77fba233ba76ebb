"""The public function: checks what it is given, then hands it to the first implementation that can take it."""

import functools
import warnings
from typing import Literal

import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked, fused
from calsmooth.loss.problem import Problem
from calsmooth.loss.reference import next_token_labels

MODES = ("exact", "filtered", "lean")

DEFAULT_FILTER_EPS = 2.0**-12
"""Softmax entries below this are what bfloat16 can't add to 1 anyway: cut-cross-entropy's choice too."""

# Fastest first. Each module says in `why_not(problem)` what keeps it from taking a problem (None: it can take it),
# before anything runs; an implementation that was chosen and fails is a bug, never a reason to try the next.
IMPLEMENTATIONS = (fused, chunked)


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
    z_loss: float = 0.0,
    shift: bool = False,
    mode: Literal["exact", "filtered", "lean"] = "exact",
    filter_eps: float = DEFAULT_FILTER_EPS,
    kept_mass: Tensor | None = None,  # (...), float32, written
    head_gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """Label-smoothed cross-entropy of `softcap(scale * (hidden_states @ lm_head_weight.T + bias))`.

    Equal in value and gradients to `torch.nn.functional.cross_entropy(logits, targets, label_smoothing=beta)` on
    those logits (see `linear_cross_entropy_reference`, the definition), but the logits never exist as a whole: peak
    memory above inputs and gradients is one chunk of them. Source: section 5 and equation 15 of the paper, with
    torch's sign. On CUDA devices of compute capability 8.0 and above, bfloat16 and float16 inputs go to Triton kernels;
    everything else runs chunk by chunk in PyTorch, with the same results.

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
        z_loss: weight of logsumexp(logits)^2, added to each token's loss.
        shift: targets are the tokens themselves, (..., T): position i's label is position i + 1's token, and the
            last position of each row has none.
        mode: how the gradients are made; the loss itself is the same in all three.
            'exact': every entry of the softmax, three products (four with a softcap, float16, or 'none').
            'lean': the same gradients, least memory, four products.
            'filtered': softmax entries below `filter_eps` are replaced by their mean over the token's such entries, one
            product. The target's entry and the smoothing term stay exact, the latter up to this: with a softcap its
            slope 1 - (z / softcap)^2 is taken as 1 at replaced entries, an error of at most
            beta / V * (z / softcap)^2 each. Where more entries are to be kept than there is room for, the gradients are
            exact. The backward waits for one number from the GPU.
        filter_eps: the smallest softmax probability that 'filtered' keeps, in (0, 1).
        kept_mass: shaped like targets; if given, filled with the probability mass that each token's kept entries hold:
            1 - what 'filtered' replaced; 1 for ignored tokens and in the other modes.
        head_gradient_dtype: dtype in which the head's gradient is summed and handed to autograd (default: the
            weight's). torch.float32 keeps small updates that bfloat16 sums lose; autograd rounds the result to the
            weight's dtype, unless the weight is float32 and autocast is on, or `lm_head_weight.grad_dtype` allows it.

    Returns:
        float32, or float64 for float64 inputs; a scalar unless reduction is 'none'. Differentiable once in
        hidden_states, lm_head_weight and bias; what doesn't require a gradient costs nothing.

    Raises:
        UsageError: shapes, dtypes or devices don't fit together, an option is outside its range, or (CPU) a target
            is outside [0, V).
    """
    problem, shape = prepare(
        hidden_states,
        lm_head_weight,
        targets,
        bias=bias,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
        shift=shift,
        mode=mode,
        filter_eps=filter_eps,
        kept_mass=kept_mass,
        head_gradient_dtype=head_gradient_dtype,
    )
    reasons = [implementation.why_not(problem) for implementation in IMPLEMENTATIONS]
    implementation = IMPLEMENTATIONS[reasons.index(None)]
    if implementation is chunked and hidden_states.is_cuda and hidden_states.numel():
        _say_once(f"linear_cross_entropy runs chunk by chunk, without its Triton kernels: {reasons[0]}")
    # The implementations choose the precision of every product.
    with torch.autocast(hidden_states.device.type, enabled=False):
        loss = implementation.linear_cross_entropy(problem)
    return loss.view(shape) if reduction == "none" else loss


def prepare(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool = False,
    mode: str = "exact",
    filter_eps: float = DEFAULT_FILTER_EPS,
    kept_mass: Tensor | None = None,
    head_gradient_dtype: torch.dtype | None = None,
    vocabulary: int | None = None,
) -> tuple[Problem, torch.Size]:
    """A call's arguments, checked, cast and flattened, and the shape of its targets.

    `vocabulary` bounds the targets where `lm_head_weight` is a shard of the head.
    """
    device_type = hidden_states.device.type
    head_dtype = head_gradient_dtype or lm_head_weight.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_states = hidden_states.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # A float32 weight whose gradient is wanted in float32 is cast where it is multiplied: its gradient would be
        # rounded on its way back through a cast here.
        if not head_gradient_dtype == lm_head_weight.dtype == torch.float32:
            lm_head_weight = lm_head_weight.to(dtype)
            head_dtype = head_gradient_dtype or dtype
    _check(hidden_states, lm_head_weight, targets, bias, head_dtype)
    _check_options(label_smoothing, reduction, softcap, z_loss, mode, filter_eps)
    if shift:
        targets = next_token_labels(targets, ignore_index)
    if targets.device.type == "cpu" and targets.numel():
        _check_targets(targets, vocabulary or len(lm_head_weight), ignore_index)
    if kept_mass is not None and (kept_mass.shape != targets.shape or kept_mass.dtype != torch.float32):
        raise UsageError(
            f"kept_mass is {tuple(kept_mass.shape)} {kept_mass.dtype}; expected {tuple(targets.shape)} torch.float32"
        )
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
        z_loss=float(z_loss),
        mode=mode,
        filter_eps=float(filter_eps),
        head_gradient_dtype=head_dtype,
        kept_mass=None if kept_mass is None else kept_mass.view(-1),
    )
    return problem, targets.shape


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _check(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, bias: Tensor | None, head_dtype: torch.dtype
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
    cast_later = head_dtype == lm_head_weight.dtype == torch.float32 and torch.is_autocast_enabled(
        hidden_states.device.type
    )
    if not hidden_states.is_floating_point() or (hidden_states.dtype != lm_head_weight.dtype and not cast_later):
        raise UsageError(
            f"hidden_states are {hidden_states.dtype} and lm_head_weight is {lm_head_weight.dtype}; "
            "expected one floating-point dtype (cast one, or use autocast)"
        )
    if head_dtype not in (lm_head_weight.dtype, torch.float32):
        raise UsageError(
            f"head_gradient_dtype must be {lm_head_weight.dtype} (the weight's) or torch.float32, got {head_dtype}"
        )
    devices = {str(t.device) for t in (hidden_states, lm_head_weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise UsageError(f"tensors are on {' and '.join(sorted(devices))}; expected one device")


def _check_options(
    label_smoothing: float, reduction: str, softcap: float | None, z_loss: float, mode: str, filter_eps: float
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise UsageError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise UsageError(f"softcap must be above 0 (or None for no softcap), got {softcap}")
    if not z_loss >= 0:
        raise UsageError(f"z_loss must not be negative, got {z_loss}")
    if mode not in MODES:
        raise UsageError(f"mode must be 'exact', 'filtered' or 'lean', got {mode!r}")
    if not 0.0 < filter_eps < 1.0:
        raise UsageError(f"filter_eps must be between 0 and 1, got {filter_eps}")


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if bad.any():
        raise UsageError(
            f"target {int(targets[bad][0])} is outside the vocabulary; expected 0 to {V - 1} or "
            f"ignore_index {ignore_index}"
        )
