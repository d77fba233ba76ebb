"""The door to the Triton kernels: what they take, and which of them takes it. Imports Triton only when it is used."""

import importlib.util

import torch
from torch import Tensor

from calsmooth.loss.problem import Problem

TRITON = importlib.util.find_spec("triton") is not None


def why_not(problem: Problem) -> str | None:
    """What keeps the kernels from taking this problem, in a few words; None if they take it."""
    E, C = problem.hidden_states, problem.lm_head_weight
    if E.device.type != "cuda":
        return "the tensors aren't on a CUDA device"
    if E.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden states are {E.dtype}, not bfloat16 or float16"
    if E.numel() == 0 or C.numel() == 0:
        return "there is nothing to compute"
    if not TRITON:
        return "Triton isn't installed"
    if torch.version.hip is not None:
        return "the kernels were never run on a ROCm device"
    major, minor = torch.cuda.get_device_capability(E.device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def linear_cross_entropy(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The loss, reduced, or (N,) with `problem.reduction == 'none'`; float32. And where asked for the (N,)
    log-sum-exps."""
    p = problem
    E, C, bias = _rows(p.hidden_states), _rows(p.lm_head_weight), p.bias
    grad_E, grad_C, grad_bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (E, C, bias))
    target_weights = p.target_weights()
    # What makes gradients in the forward, or from a list, takes one target a token, of weight 1 - beta.
    plain = target_weights is None and not p.return_logsumexp
    if p.mode == "filtered" and plain and (grad_E or grad_C or grad_bias or p.kept_mass is not None):
        loss = _filtered(p, E, C, bias, grad_C or grad_bias)
        if loss is not None:
            return loss, None
    if p.kept_mass is not None:
        p.kept_mass.fill_(1.0)
    if p.mode == "exact" and plain and (grad_E or grad_C) and _three_products_do(p, grad_bias):
        return _exact(p, E, C, bias, grad_E, grad_C), None
    return _token_by_token(p, E, C, bias, target_weights)


def _exact(p: Problem, E: Tensor, C: Tensor, bias: Tensor | None, grad_E: bool, grad_C: bool) -> Tensor:
    from calsmooth.loss.kernels.exact import loss_and_gradients

    loss, *_ = loss_and_gradients(
        E, C, bias, p.targets, p.weights(), p.smoothing(), p.ignore_index, p.label_smoothing,
        p.softcap, p.scale, p.z_loss, p.head_gradient_dtype, grad_E, grad_C,
    )  # fmt: skip
    return loss


def _filtered(p: Problem, E: Tensor, C: Tensor, bias: Tensor | None, grad_head: bool) -> Tensor | None:
    """None where the list would be larger than what it saves: the gradients are exact then."""
    from calsmooth.loss.kernels.filtered import filtered_losses
    from calsmooth.loss.kernels.listing import too_long

    if too_long(len(E), len(C), p.filter_eps, p.softcap):
        return None
    losses, kept_mass, *_ = filtered_losses(
        E, C, bias, p.targets, p.smoothing(), p.ignore_index, p.label_smoothing,
        p.softcap, p.scale, p.z_loss, p.head_gradient_dtype, p.filter_eps, grad_head,
    )  # fmt: skip
    if p.kept_mass is not None:
        p.kept_mass.copy_(kept_mass)
    return _reduced(p, losses)


def _token_by_token(
    p: Problem, E: Tensor, C: Tensor, bias: Tensor | None, target_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses first, gradients in the backward: takes everything."""
    from calsmooth.loss.kernels.lean import LEAN_BYTES, WIDE_BYTES, token_losses

    losses, logsumexp = token_losses(
        E, C, bias, p.targets, p.smoothing(), p.masses(target_weights), target_weights, p.ignore_index,
        p.label_smoothing, p.softcap, p.scale, p.z_loss, p.head_gradient_dtype,
        LEAN_BYTES if p.mode == "lean" else WIDE_BYTES,
    )  # fmt: skip
    return _reduced(p, losses), torch.where(p.has_target(), logsumexp, 0.0) if p.return_logsumexp else None


def _three_products_do(p: Problem, grad_bias: bool) -> bool:
    """Whether gradients can be made in the forward: see `kernels.exact`. float16 would need the loss scale for that."""
    from calsmooth.loss.kernels.capped import LARGEST

    short = p.softcap is None or p.softcap <= LARGEST
    return p.reduction != "none" and not grad_bias and p.hidden_states.dtype != torch.float16 and short


def _reduced(p: Problem, losses: Tensor) -> Tensor:
    if p.reduction == "none":
        return losses if p.token_weights is None and p.divisor is None else losses * p.weights()
    return (losses * p.weights()).sum()


def _rows(x: Tensor) -> Tensor:
    """With features one after the other, and no row inside another's (an expanded tensor's are)."""
    return x if x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or len(x) <= 1) else x.contiguous()
