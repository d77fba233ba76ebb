"""The public function: checks what it is given, then hands it to the first implementation that can take it."""

import functools
import math
import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked, fused
from calsmooth.loss.problem import Problem, compute_dtype
from calsmooth.loss.reference import normalized, shifted

MODES = ("exact", "filtered", "lean")

DEFAULT_FILTER_EPS = 2.0**-12
"""Softmax entries below this are what bfloat16 can't add to 1 anyway: cut-cross-entropy's choice too."""

# Fastest first. Each module says in `why_not(problem)` what keeps it from taking a problem (None: it can take it),
# before anything runs; an implementation that was chosen and fails is a bug, never a reason to try the next.
IMPLEMENTATIONS = (fused, chunked)


@overload
def linear_cross_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor, *, return_logsumexp: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(  # type: ignore[misc]  # the options are those below
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64 or int32; (..., K) with target_probabilities
    *,
    bias: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    smoothing_prior: Tensor | None = None,  # (V,)
    class_weights: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (...)
    target_probabilities: Tensor | None = None,  # (..., K)
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    divisor: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool | int = False,
    mode: Literal["exact", "filtered", "lean"] = "exact",
    filter_eps: float = DEFAULT_FILTER_EPS,
    kept_mass: Tensor | None = None,  # (...), float32, written
    head_gradient_dtype: torch.dtype | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
            hidden state i. Indices are checked on the CPU; on a GPU a check would stall it, and an index outside the
            vocabulary makes the loss NaN (with 'none', its own).
        bias: (V,), added to the raw logits.
        label_smoothing: beta in [0, 1]: the target distribution is (1 - beta) onehot + beta prior.
        smoothing_prior: (V,) floating point, not negative, of sum 1 (to 1e-3; the rest is divided out): the
            distribution smoothed towards (the unigram distribution of the targets, say); None for 1 / V each.
        class_weights: (V,) floating point, not negative: torch's `weight`. The target distribution is multiplied by
            it, and a mean with one target a token is weighted by the targets' own.
        token_weights: (...) floating point, shaped like the hidden states without D: each token's loss is multiplied by
            it, and a mean is weighted by it. Of the token that is predicted: `shift` shifts them with the targets.
        target_probabilities: (..., K) floating point, not negative: targets are then (..., K) too, and the onehot
            becomes sum_k probability_k onehot(target_k): a teacher's top K, say, or annotators' shares. Places that
            hold `ignore_index` are none; a token without any is ignored. Rows needn't sum to 1, as in torch.
        ignore_index: targets with this value give no loss and no gradient.
        reduction: 'mean' over the targets that aren't ignored (0, with a graph, if there is none), 'sum', or 'none'
            (shape of the tokens, 0 where ignored). With 'none' the backward pass walks the vocabulary again, since the
            incoming gradients are unknown before; 'mean' and 'sum' make their gradients in the forward pass.
        divisor: what a sum, or with 'none' each loss, is divided by: the number of targets in a whole batch, where
            this is a part of it. A number, or a tensor of one element, which may be on the GPU. Dividing the result
            afterwards would scale finished gradients once more. None for 1; not with 'mean'.
        softcap: t in z = t * tanh(z / t), as in Gemma 2; None for none.
        scale: factor on the raw logits before the softcap (Cohere's logit_scale, 1 / Granite's logits_scaling).
        z_loss: weight of logsumexp(logits)^2, added to each token's loss.
        shift: targets are the tokens themselves, (..., T): position i's label is position i + 1's token (i + shift's
            for an integer), and the last positions of each row have none.
        mode: how the gradients are made; the loss itself is the same in all three.
            'exact': every entry of the softmax, three products (four with a softcap, float16, 'none', class weights, or
            target probabilities).
            'lean': the same gradients, least memory, four products.
            'filtered': one product. Of each token's softmax the entries below `filter_eps` are replaced by their sum
            times one distribution for all tokens: the mean of such entries over a sample of tokens. For the sample the
            head's gradient is put right, weighted up so that over many batches it is right on average: entries
            that run away are called back. The target's entry and the smoothing term stay exact, the latter up to this:
            with a softcap its slope 1 - (z / softcap)^2 is taken as 1 at replaced entries of tokens outside the sample,
            an error of at most beta / V * (z / softcap)^2 each. Where more entries are to be kept than there is room
            for, and with class weights or target probabilities, the gradients are exact. The backward waits for one
            number from the GPU, so that it can't be captured in a CUDA graph.
        filter_eps: the smallest softmax probability that 'filtered' keeps, in (0, 1).
        kept_mass: shaped like the tokens; if given, filled with the probability mass that each token's kept entries
            hold: 1 - what 'filtered' replaced; 1 for ignored tokens and where the gradients are exact.
        head_gradient_dtype: dtype in which the head's gradient is summed and handed to autograd (default: the
            weight's). torch.float32 keeps small updates that bfloat16 sums lose; autograd rounds the result to the
            weight's dtype, unless the weight is float32 and autocast is on, or `lm_head_weight.grad_dtype` allows it.
        return_logsumexp: also return each token's log-sum-exp of the logits. Gradients are then made in the backward
            pass, exactly, in every mode: four products.

    Returns:
        The loss, float32, or float64 for float64 inputs; a scalar unless reduction is 'none'. With return_logsumexp
        (loss, logsumexp), the latter (...) for all tokens, 0 for ignored ones. Both are differentiable once in
        hidden_states, lm_head_weight and bias; what doesn't require a gradient costs nothing. Second derivatives
        raise, as do weights, priors and divisors that require a gradient; torch.func's transforms aren't supported.

    Raises:
        UsageError: shapes, dtypes or devices don't fit together, an option is outside its range, or (CPU) a target
            is outside [0, V) or a weight or probability is negative.
    """
    problem, shape = prepare(
        hidden_states,
        lm_head_weight,
        targets,
        bias=bias,
        label_smoothing=label_smoothing,
        smoothing_prior=smoothing_prior,
        class_weights=class_weights,
        token_weights=token_weights,
        target_probabilities=target_probabilities,
        ignore_index=ignore_index,
        reduction=reduction,
        divisor=divisor,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
        shift=shift,
        mode=mode,
        filter_eps=filter_eps,
        kept_mass=kept_mass,
        head_gradient_dtype=head_gradient_dtype,
        return_logsumexp=return_logsumexp,
    )
    reasons = [implementation.why_not(problem) for implementation in IMPLEMENTATIONS]
    implementation = IMPLEMENTATIONS[reasons.index(None)]
    if implementation is chunked and hidden_states.is_cuda and hidden_states.numel():
        _say_once(f"linear_cross_entropy runs chunk by chunk, without its Triton kernels: {reasons[0]}")
    # The implementations choose the precision of every product.
    with torch.autocast(hidden_states.device.type, enabled=False):
        loss, logsumexp = implementation.linear_cross_entropy(problem)
    loss = loss.view(shape) if reduction == "none" else loss
    return (loss, logsumexp.view(shape)) if return_logsumexp else loss


def prepare(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    smoothing_prior: Tensor | None = None,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    target_probabilities: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool | int = False,
    mode: str = "exact",
    filter_eps: float = DEFAULT_FILTER_EPS,
    kept_mass: Tensor | None = None,
    head_gradient_dtype: torch.dtype | None = None,
    return_logsumexp: bool = False,
    vocabulary: int | None = None,
) -> tuple[Problem, torch.Size]:
    """A call's arguments, checked, cast and flattened, and the shape of its tokens.

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
    _check(hidden_states, lm_head_weight, targets, bias, head_dtype, target_probabilities)
    _check_options(label_smoothing, reduction, softcap, scale, z_loss, shift, mode, filter_eps)
    shape = hidden_states.shape[:-1]
    _check_weights(
        hidden_states,
        {
            "smoothing_prior": (smoothing_prior, lm_head_weight.shape[:1]),
            "class_weights": (class_weights, lm_head_weight.shape[:1]),
            "token_weights": (token_weights, shape),
            "target_probabilities": (target_probabilities, targets.shape),
        },
    )
    if vocabulary is None and len(lm_head_weight) == 0 and targets.numel():
        raise UsageError(f"lm_head_weight {tuple(lm_head_weight.shape)} has no rows; expected one for each class")
    if smoothing_prior is not None and vocabulary is None:
        _check_prior(smoothing_prior)
    if divisor is not None:
        _check_divisor(divisor, reduction)
    if shift:
        steps = int(shift)
        targets = shifted(targets, steps, ignore_index, -1 if target_probabilities is None else -2)
        target_probabilities = None if target_probabilities is None else shifted(target_probabilities, steps, 0.0, -2)
        token_weights = None if token_weights is None else shifted(token_weights, steps, 0.0, -1)
    if targets.device.type == "cpu" and targets.numel():
        _check_targets(targets, vocabulary or len(lm_head_weight), ignore_index)
    if kept_mass is not None and (
        kept_mass.shape != shape or kept_mass.dtype != torch.float32 or not kept_mass.is_contiguous()
    ):
        contiguous = "" if kept_mass.is_contiguous() else " (not contiguous)"
        raise UsageError(
            f"kept_mass is {tuple(kept_mass.shape)} {kept_mass.dtype}{contiguous}; "
            f"expected {tuple(shape)} torch.float32, contiguous"
        )
    compute = compute_dtype(hidden_states)

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(compute)

    prior = plain(smoothing_prior)
    problem = Problem(
        hidden_states=hidden_states.flatten(0, -2),
        lm_head_weight=lm_head_weight,
        targets=targets.flatten() if target_probabilities is None else targets.flatten(0, -2),
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
        smoothing_prior=prior if prior is None or vocabulary is not None else normalized(prior),
        class_weights=plain(class_weights),
        token_weights=plain(None if token_weights is None else token_weights.flatten()),
        target_probabilities=plain(None if target_probabilities is None else target_probabilities.flatten(0, -2)),
        divisor=divisor.detach().reshape(()) if isinstance(divisor, Tensor) else divisor,
        return_logsumexp=return_logsumexp,
    )
    return problem, shape


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _check(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head_dtype: torch.dtype,
    target_probabilities: Tensor | None,
) -> None:
    def shape(t: Tensor) -> tuple[int, ...]:
        return tuple(t.shape)

    if lm_head_weight.dim() != 2 or hidden_states.dim() < 2 or hidden_states.shape[-1] != lm_head_weight.shape[1]:
        raise UsageError(
            f"hidden_states {shape(hidden_states)} and lm_head_weight {shape(lm_head_weight)} don't fit; "
            "expected (..., D) and (V, D)"
        )
    tokens = shape(hidden_states)[:-1]
    if target_probabilities is None and shape(targets) != tokens:
        raise UsageError(f"targets {shape(targets)} don't fit hidden_states {shape(hidden_states)}; expected {tokens}")
    if target_probabilities is not None and (targets.dim() != len(tokens) + 1 or shape(targets)[:-1] != tokens):
        raise UsageError(
            f"targets {shape(targets)} don't fit hidden_states {shape(hidden_states)}; with target_probabilities "
            f"expected {tokens} and one more dimension for the targets of a token"
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
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    scale: float,
    z_loss: float,
    shift: bool | int,
    mode: str,
    filter_eps: float,
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise UsageError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise UsageError(f"softcap must be above 0 and finite (or None for no softcap), got {softcap}")
    if not math.isfinite(scale):
        raise UsageError(f"scale must be a finite number, got {scale}")
    if not 0 <= z_loss < math.inf:
        raise UsageError(f"z_loss must be 0 or above and finite, got {z_loss}")
    if not isinstance(shift, int) or shift < 0:
        raise UsageError(f"shift must be True, False or a number of positions, got {shift!r}")
    if mode not in MODES:
        raise UsageError(f"mode must be 'exact', 'filtered' or 'lean', got {mode!r}")
    if not 0.0 < filter_eps < 1.0:
        raise UsageError(f"filter_eps must be between 0 and 1, got {filter_eps}")


def _check_weights(hidden_states: Tensor, weights: dict[str, tuple[Tensor | None, torch.Size]]) -> None:
    """Each optional tensor of weights: its shape, dtype and device, and (CPU) that none is negative or NaN."""
    for name, (weight, expected) in weights.items():
        if weight is None:
            continue
        if not isinstance(weight, Tensor):
            raise UsageError(f"{name} is a {type(weight).__name__}; expected a tensor {tuple(expected)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise UsageError(f"{name} requires a gradient, which this loss doesn't make; detach it")
        if weight.shape != expected or not weight.is_floating_point():
            raise UsageError(
                f"{name} is {tuple(weight.shape)} {weight.dtype}; expected {tuple(expected)}, floating point"
            )
        if weight.device != hidden_states.device:
            raise UsageError(f"{name} is on {weight.device}; expected {hidden_states.device}, as hidden_states")
        if weight.device.type == "cpu" and not (weight >= 0).all():
            raise UsageError(f"{name} holds {float(weight[~(weight >= 0)][0])}; expected nothing negative")


def _check_prior(prior: Tensor) -> None:
    """On the CPU: a distribution."""
    if prior.device.type == "cpu" and not abs(float(prior.double().sum()) - 1.0) < 1e-3:
        raise UsageError(f"smoothing_prior sums to {float(prior.double().sum()):.6g}; expected 1")


def _check_divisor(divisor: float | Tensor, reduction: str) -> None:
    if reduction == "mean":
        raise UsageError("divisor goes with reduction 'sum' or 'none'; a mean has its own")
    if isinstance(divisor, Tensor):
        if divisor.numel() != 1:
            raise UsageError(f"divisor has {divisor.numel()} elements; expected a number or a tensor of one")
        if divisor.requires_grad and torch.is_grad_enabled():
            raise UsageError("divisor requires a gradient, which this loss doesn't make; detach it")
    elif not isinstance(divisor, (int, float)) or not 0 < divisor < math.inf:
        raise UsageError(f"divisor must be above 0 and finite, got {divisor!r}")


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if bad.any():
        raise UsageError(
            f"target {int(targets[bad][0])} is outside the vocabulary; expected 0 to {V - 1} or "
            f"ignore_index {ignore_index}"
        )
