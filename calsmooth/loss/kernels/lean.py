"""`mode="lean"`: least memory. The forward keeps one number a token; the backward makes each logit again.

Four products in all. Beside the gradients there are a strip of logits' gradients, dE's float32 sum and a scaled copy
of E, and nothing lives between forward and backward. The exact mode falls back to this, with wider strips, for what
its own three products can't do: per-token incoming gradients, float16, a bias that wants a gradient, class weights,
several targets a token, and gradients of the log-sum-exp.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calsmooth.loss.derivatives import once_differentiable
from calsmooth.loss.kernels.gradient import Terms, gradients
from calsmooth.loss.kernels.targets import marked_targets, row_targets, target_logits
from calsmooth.loss.kernels.tiles import Operands, Semantics, on_its_device
from calsmooth.loss.kernels.walk import walk

LEAN_BYTES = 108 * 2**20
"""One strip's buffer in lean mode."""

WIDE_BYTES = 512 * 2**20
"""The same where the exact mode makes its gradients in the backward."""


@torch.library.custom_op("calsmooth::token_losses", mutates_args=())
@on_its_device
def token_losses(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D); cast to E's dtype
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,), or (N, K) with (N, K) target_weights
    prior: Tensor | None,  # (V,) float32, where the smoothed mass isn't spread evenly
    masses: Tensor | None,  # (N,) float32; goes with target_weights
    target_weights: Tensor | None,  # shaped like targets, float32
    ignore_index: int,
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    buffer_bytes: int,
) -> tuple[Tensor, Tensor]:
    """(N,) losses and (N,) log-sum-exps."""
    semantics = Semantics(beta, softcap, scale, z_loss)
    operands = Operands.make(E, C.to(E.dtype), bias, semantics, storing=False, prior=prior)
    marked = marked_targets(targets, ignore_index, len(C))
    z_target = target_logits(operands, marked)
    if target_weights is not None:
        z_target = z_target * target_weights
    if marked.dim() == 2:
        marked, z_target = row_targets(marked), z_target.sum(1)
    walked = walk(operands, marked, z_target, masses=masses)
    return walked.losses, walked.logsumexp


@token_losses.register_fake
def _(E: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return E.new_empty(len(E), dtype=torch.float32), E.new_empty(len(E), dtype=torch.float32)


@torch.library.custom_op("calsmooth::token_gradients", mutates_args=())
@on_its_device
def token_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    prior: Tensor | None,
    masses: Tensor | None,
    target_weights: Tensor | None,
    logsumexp: Tensor,  # (N,)
    grads: Tensor,  # (N,) gradients by the losses
    logsumexp_grads: Tensor | None,  # (N,) by the log-sum-exps
    ignore_index: int,
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    buffer_bytes: int,
    need_E: bool,
    need_C: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dE, dC, dbias; empty where not needed."""
    semantics = Semantics(beta, softcap, scale, z_loss)
    operands = Operands.make(E, C.to(E.dtype), bias, semantics, storing=True, prior=prior)
    marked = marked_targets(targets, ignore_index, len(C))
    rows = row_targets(marked) if marked.dim() == 2 else marked
    grads = torch.where(rows >= 0, grads.float(), 0.0)
    terms = None
    if target_weights is not None or logsumexp_grads is not None:
        softmax = grads * ((1.0 if masses is None else masses) + 2.0 * z_loss * logsumexp)
        if logsumexp_grads is not None:
            softmax = softmax + torch.where(rows >= 0, logsumexp_grads.float(), 0.0)
        terms = Terms(torch.where(rows >= 0, softmax, 0.0), grads * (1.0 - beta), smoothing=grads)
        if target_weights is not None and marked.dim() == 2:
            terms = replace(terms, target=None, targets=marked, target_weights=target_weights * grads.unsqueeze(1))
        elif target_weights is not None:
            terms = replace(terms, target=target_weights * grads)
        grads = (rows >= 0).float()
    needed = (need_E, need_C, need_bias)
    made = gradients(operands, rows, logsumexp, grads, head_dtype, needed, buffer_bytes, terms=terms)
    dE, dC, dbias = (E.new_empty(0) if g is None else g for g in made)
    return dE, dC, dbias


@token_gradients.register_fake
def _(E: Tensor, C: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    head_dtype, _, need_E, need_C, need_bias = rest[-5:]
    return (
        E.new_empty(E.shape if need_E else 0),
        C.new_empty(C.shape if need_C else 0, dtype=head_dtype if need_C else E.dtype),
        E.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, ctx.buffer_bytes = inputs
    _, logsumexp = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, logsumexp)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, logsumexp_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if grad is None and logsumexp_grad is None:
        return (None,) * 14
    *tensors, logsumexp = ctx.saved_tensors
    grads = torch.zeros_like(logsumexp) if grad is None else grad
    made = token_gradients(
        *tensors, logsumexp, grads, logsumexp_grad, ctx.ignore_index,
        ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, ctx.buffer_bytes, *needed,
    )  # fmt: skip
    made = tuple(g if need else None for g, need in zip(made, needed, strict=True))
    return (*made, *(None,) * 11)


token_losses.register_autograd(_backward, setup_context=_setup)
