"""`mode="lean"`: least memory. The forward keeps one number a token; the backward makes each logit again.

Four products in all. Beside the gradients there are a strip of logits' gradients, dE's float32 sum and a scaled copy
of E, and nothing lives between forward and backward. The exact mode falls back to this, with wider strips, for what
its own three products can't do: per-token incoming gradients, float16, and a bias that wants a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from calsmooth.loss.kernels.gradient import gradients
from calsmooth.loss.kernels.rows import target_logits
from calsmooth.loss.kernels.tiles import Operands, Semantics
from calsmooth.loss.kernels.walk import walk

LEAN_BYTES = 108 * 2**20
"""One strip's buffer in lean mode."""

WIDE_BYTES = 512 * 2**20
"""The same where the exact mode makes its gradients in the backward."""


@torch.library.custom_op("calsmooth::token_losses", mutates_args=())
def token_losses(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D); cast to E's dtype
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int32, -1: ignored
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    buffer_bytes: int,
) -> tuple[Tensor, Tensor]:
    """(N,) losses and (N,) log-sum-exps."""
    operands = Operands.make(E, C.to(E.dtype), bias, Semantics(beta, softcap, scale, z_loss), storing=False)
    walked = walk(operands, targets, target_logits(operands, targets))
    return walked.losses, walked.logsumexp


@token_losses.register_fake
def _(E: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return E.new_empty(len(E), dtype=torch.float32), E.new_empty(len(E), dtype=torch.float32)


@torch.library.custom_op("calsmooth::token_gradients", mutates_args=())
def token_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logsumexp: Tensor,  # (N,)
    weights: Tensor,  # (N,) incoming gradients
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
    operands = Operands.make(E, C.to(E.dtype), bias, Semantics(beta, softcap, scale, z_loss), storing=True)
    weights = torch.where(targets >= 0, weights.float(), 0.0)
    made = gradients(operands, targets, logsumexp, weights, head_dtype, (need_E, need_C, need_bias), buffer_bytes)
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
    E, C, bias, targets, *ctx.options = inputs
    _, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(E, C, bias, targets, logsumexp)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 10
    made = token_gradients(*ctx.saved_tensors, grad, *ctx.options, *needed)
    return (*(g if need else None for g, need in zip(made, needed, strict=True)), *(None,) * 7)


token_losses.register_autograd(_backward, setup_context=_setup)
