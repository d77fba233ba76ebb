"""The loss can be differentiated once: who asks for more is told so, instead of getting zeros."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calsmooth.errors import UsageError

Backward = Callable[..., tuple[Tensor | None, ...]]


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UsageError(
            "linear_cross_entropy can be differentiated once only; for second derivatives use "
            "linear_cross_entropy_reference, which holds all logits"
        )


def once_differentiable(backward: Backward) -> Backward:
    """For an autograd function's backward: no graph is made of it, and with create_graph=True its gradients are part of
    one that raises when it is differentiated (torch's own decorator does so only if the incoming gradient has a graph).
    The function's inputs are among ctx.saved_tensors.
    """

    @functools.wraps(backward)
    def without_graph(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        # Part of a graph that leads to the inputs: one that doesn't is left out when they are asked for.
        inputs = [t for t in ctx.saved_tensors if t is not None and t.requires_grad]
        return tuple(None if g is None else _OnceOnly.apply(g, *inputs) for g in gradients)

    return without_graph
