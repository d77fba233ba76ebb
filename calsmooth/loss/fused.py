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


def linear_cross_entropy(problem: Problem) -> Tensor:
    """The loss, reduced; float32. `problem.reduction == 'none'` gives (N,)."""
    from calsmooth.loss.kernels.exact import loss_and_gradients
    from calsmooth.loss.kernels.filtered import filtered_losses
    from calsmooth.loss.kernels.lean import LEAN_BYTES, WIDE_BYTES, token_losses

    p = problem
    E, C, bias = _rows(p.hidden_states), _rows(p.lm_head_weight), p.bias
    targets = marked_targets(p.targets, p.ignore_index)
    grad_E, grad_C, grad_bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (E, C, bias))
    any_grad = grad_E or grad_C or grad_bias
    if p.mode == "filtered" and (any_grad or p.kept_mass is not None):
        losses, kept_mass, *_ = filtered_losses(
            E, C, bias, targets, p.label_smoothing, p.softcap, p.scale, p.z_loss, p.head_gradient_dtype, p.filter_eps
        )
        if p.kept_mass is not None:
            p.kept_mass.copy_(kept_mass)
        return _reduce(losses, targets, p.reduction)
    if p.kept_mass is not None:
        p.kept_mass.fill_(1.0)
    if p.mode == "exact" and (grad_E or grad_C) and _three_products_do(p, grad_bias):
        loss, *_ = loss_and_gradients(
            E, C, bias, targets, p.label_smoothing, p.softcap, p.scale, p.z_loss, p.reduction == "mean",
            p.head_gradient_dtype, grad_E, grad_C,
        )  # fmt: skip
        return loss
    buffer_bytes = LEAN_BYTES if p.mode == "lean" else WIDE_BYTES
    losses, _ = token_losses(
        E, C, bias, targets, p.label_smoothing, p.softcap, p.scale, p.z_loss, p.head_gradient_dtype, buffer_bytes
    )
    return _reduce(losses, targets, p.reduction)


def marked_targets(targets: Tensor, ignore_index: int) -> Tensor:
    """int32, -1 where ignored."""
    return torch.where(targets == ignore_index, -1, targets).int()


def _three_products_do(p: Problem, grad_bias: bool) -> bool:
    """Whether gradients can be made in the forward: see `kernels.exact`. float16 would need the loss scale for that."""
    return p.reduction != "none" and not grad_bias and p.hidden_states.dtype != torch.float16


def _reduce(losses: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
