"""The loss on any device: a few tokens at a time, gradients made in the same pass.

For each chunk of tokens the logits are made (one product), turned in place into the gradient by the logits, and used
up at once for both gradients (two products): three products in all, as many as with full logits, and never more than
`CHUNK_BYTES` of logits. `mode="lean"` is this as well; `mode="filtered"` replaces what it must and saves nothing.
Without a softcap the smoothing term is rank one and needs no logits at all, s being what each class gets of it:

    sum_v s_v z_v = scale * (E_i . csum + sum_v s_v bias_v),  csum = sum_v s_v C_v
    dE_i -= g_i * scale * beta * csum
    dC_v -= scale * beta * s_v * sum_i g_i E_i

Products and sums are float32 (float64 for float64 inputs). Low-precision weights are widened a block of the
vocabulary at a time; on a GPU the matrix units take them as they are and accumulate in float32. With 'none', where
log-sum-exps are asked for, and in float16, whose gradients would come before the loss scale, the gradients are made in
the backward instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calsmooth.loss.derivatives import once_differentiable
from calsmooth.loss.problem import Problem, compute_dtype
from calsmooth.loss.tail import LEAST_SHARE, MOST_REPLACED, sample_tokens

CHUNK_BYTES = 256 * 2**20
"""Size of one chunk of logits: large enough for the products to run at full speed, small beside a head's gradient."""

WIDEN_BYTES = 64 * 2**20
"""Size of one block of low-precision head rows widened to float32."""

ROW_BLOCK_BYTES = 2 * 2**20
"""Elementwise passes go a few rows at a time, so that the passes after the first find them in the cache."""


def why_not(problem: Problem) -> str | None:
    """It takes everything."""
    return None


def linear_cross_entropy(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The loss, reduced, or (N,) with `problem.reduction == 'none'`; float32 or float64. And where asked for the (N,)
    log-sum-exps."""
    p = problem
    # Ignored tokens would cost three products each. Finding them synchronises a GPU, which this path may.
    has_target = p.has_target()
    kept = has_target.nonzero().squeeze(1)
    E = p.hidden_states if len(kept) == len(has_target) else p.hidden_states[kept]
    tokens = _Tokens.of(p, kept)
    filters = p.mode == "filtered" and p.class_weights is None and p.target_probabilities is None
    if filters and not p.return_logsumexp and len(kept) and len(p.lm_head_weight):
        tokens = _filtered(p, E, tokens, kept)
    elif p.kept_mass is not None:
        p.kept_mass.fill_(1.0)
    loss, logsumexp = _Loss.apply(E, p.lm_head_weight, p.bias, tokens)
    if len(kept) < len(has_target):
        nothing = torch.zeros(len(has_target), dtype=logsumexp.dtype, device=E.device)
        loss = nothing.index_put((kept,), loss) if p.reduction == "none" else loss
        logsumexp = nothing.index_put((kept,), logsumexp)
    return loss, logsumexp if p.return_logsumexp else None


@dataclass(frozen=True)
class _Tokens:
    """What a walk must know of the tokens that have a target, n of them, in the terms of `calsmooth.loss.problem`."""

    targets: Tensor  # (n, K) int64; 0 where there is none
    target_weights: Tensor  # (n, K); 0 where there is none
    masses: Tensor  # (n,)
    weights: Tensor  # (n,) shares of the result
    smoothing: Tensor | None  # (V,), None for 1 / V
    beta: float
    softcap: float | None
    scale: float
    z_loss: float
    reduction: str
    head_dtype: torch.dtype
    in_forward: bool  # whether gradients may be made there
    tail: "_Tail | None" = None

    @classmethod
    def of(cls, p: Problem, kept: Tensor) -> "_Tokens":
        dtype = compute_dtype(p.hidden_states)
        shape = (len(kept), 1 if p.targets.dim() == 1 else p.targets.shape[1])
        targets = p.targets[kept].long().view(shape)
        named = targets != p.ignore_index
        weights, masses = p.target_weights(), p.masses(p.target_weights())
        if weights is None:
            weights = torch.full(p.targets.shape, 1.0 - p.label_smoothing, dtype=dtype, device=targets.device)
        if masses is None:
            masses = torch.ones(len(p.targets), dtype=dtype, device=targets.device)
        made_before_scale = p.hidden_states.dtype == torch.float16
        return cls(
            targets=targets.masked_fill(~named, 0),
            target_weights=weights[kept].view(shape).masked_fill(~named, 0.0),
            masses=masses[kept],
            weights=p.weights()[kept],
            smoothing=p.smoothing(),
            beta=p.label_smoothing,
            softcap=p.softcap,
            scale=p.scale,
            z_loss=p.z_loss,
            reduction=p.reduction,
            head_dtype=p.head_gradient_dtype,
            in_forward=p.reduction != "none"
            and torch.is_grad_enabled()
            and not p.return_logsumexp
            and not made_before_scale,
        )

    def rows(self, chunk: slice | Tensor) -> "_Tokens":
        return replace(
            self,
            targets=self.targets[chunk],
            target_weights=self.target_weights[chunk],
            masses=self.masses[chunk],
            weights=self.weights[chunk],
        )

    def shares(self, V: int) -> Tensor | float:
        """What each class gets of the smoothed mass."""
        return 1.0 / V if self.smoothing is None else self.smoothing


@dataclass(frozen=True)
class _Tail:
    """See `calsmooth.loss.tail`."""

    eps: float
    sampled: Tensor  # (s,) places among the tokens that have a target
    stands_for: Tensor  # how many tokens each of them does
    shape: Tensor  # (V,) q

    def left_out(self, softmax: Tensor, targets: Tensor) -> Tensor:
        """(n, V) bool of (n, V) probabilities."""
        return (softmax < self.eps).scatter_(1, targets, False)

    def replacement(self, softmax: Tensor, left_out: Tensor) -> Tensor:
        """(n, V) d_i q_v."""
        mass = (softmax * left_out).sum(1, keepdim=True)
        share = left_out.to(softmax.dtype) @ self.shape.unsqueeze(1)
        heights = torch.where(share > LEAST_SHARE, mass / share.clamp(min=LEAST_SHARE), 0.0)
        return heights * self.shape


def _filtered(p: Problem, E: Tensor, tokens: _Tokens, kept: Tensor) -> _Tokens:
    """The tokens with their tail, or as they are where most of the softmax would be replaced; writes the kept mass."""
    C, bias = p.lm_head_weight.detach().to(E.dtype), None if p.bias is None else p.bias.detach()
    sampled, stands_for = sample_tokens(p.has_target(), p.targets)
    places = torch.searchsorted(kept, sampled)
    dtype = compute_dtype(E)
    tail = _Tail(p.filter_eps, places, stands_for.to(dtype), torch.zeros(len(C), dtype=dtype, device=E.device))
    for chunk, z, _ in logits_by_chunks(E.detach()[places], C, bias, tokens.scale, tokens.softcap):
        softmax = z.softmax(1)
        tail.shape.add_((softmax * tail.left_out(softmax, tokens.targets[places][chunk])).sum(0))
    tail.shape.div_(tail.shape.sum().clamp(min=torch.finfo(dtype).tiny))
    mass = torch.empty(len(E), dtype=dtype, device=E.device)
    for chunk, z, _ in logits_by_chunks(E.detach(), C, bias, tokens.scale, tokens.softcap):
        softmax = z.softmax(1)
        mass[chunk] = 1.0 - (softmax * tail.left_out(softmax, tokens.targets[chunk])).sum(1)
    exact = bool((1.0 - mass).mean() > MOST_REPLACED)
    if p.kept_mass is not None:
        p.kept_mass.fill_(1.0)
        if not exact:
            p.kept_mass[kept] = mass.float()
    return tokens if exact else replace(tokens, tail=tail)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, E: Tensor, C: Tensor, bias: Tensor | None, tokens: _Tokens) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(E, C, bias)
        ctx.set_materialize_grads(False)
        ctx.tokens = tokens
        ctx.gradients = None
        needed = ctx.needs_input_grad[:3]
        if tokens.in_forward and any(needed):
            losses, logsumexp, *ctx.gradients = _walk(E, C, bias, tokens, tokens.weights, None, needed)
        else:
            losses, logsumexp, *_ = _walk(E, C, bias, tokens, None, None, (False, False, False))
        losses = losses * tokens.weights
        return losses if tokens.reduction == "none" else losses.sum(), logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, logsumexp_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and logsumexp_grad is None:
            return None, None, None, None
        E, C, bias = ctx.saved_tensors
        tokens = ctx.tokens
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # Per-token gradients arrive only now; or the graph was kept and the gradients went out with the first
            # backward. Both walk the vocabulary again.
            grads = torch.zeros_like(tokens.weights) if grad is None else grad * tokens.weights
            _, _, *gradients = _walk(E, C, bias, tokens, grads, logsumexp_grad, ctx.needs_input_grad[:3])
        elif grad is not None and not (grad.device.type == "cpu" and grad.item() == 1.0):
            for g in gradients:
                if g is not None:
                    g.mul_(grad)
        return (*gradients, None)


def _walk(
    E: Tensor,  # (n, D)
    C: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: _Tokens,
    grads: Tensor | None,  # (n,) gradient of the result by each token's loss; None: losses only
    logsumexp_grads: Tensor | None,  # (n,) by each token's log-sum-exp
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(n,) losses, (n,) log-sum-exps and the gradients by E, C and bias, where needed."""
    C = C.to(E.dtype)
    n, V, dtype = len(E), len(C), compute_dtype(E)
    beta, scale, softcap, tail = tokens.beta, tokens.scale, tokens.softcap, tokens.tail
    need_E, need_C, need_bias = needed
    losses, logsumexp = (torch.empty(n, dtype=dtype, device=E.device) for _ in range(2))
    dE = torch.empty_like(E) if need_E else None
    dbias = torch.zeros(V, dtype=dtype, device=E.device) if need_bias else None
    rank_one = beta > 0 and softcap is None
    shares = tokens.shares(V) if V else 0.0
    head_mean = _weighted_rows(C, tokens.smoothing) if rank_one else None
    bias_mean = 0.0 if bias is None or not rank_one else _weighted_sum(bias.to(dtype), shares)

    # A sum over several chunks must not be rounded to low precision after each.
    several = chunk_rows(V, dtype, 1 if softcap is None else 2) < n
    dC_sum = None
    if need_C:
        dC_sum = torch.zeros(C.shape, dtype=dtype if several else tokens.head_dtype, device=C.device)
    if dC_sum is not None and rank_one and grads is not None:
        mean = (grads @ E.to(dtype)) * (-scale * beta)
        dC_sum += mean / V if tokens.smoothing is None else torch.outer(tokens.smoothing, mean)

    for chunk, z, slope in logits_by_chunks(E, C, bias, scale, softcap):
        e, t, token = E[chunk], tokens.targets[chunk], tokens.rows(chunk)
        z_target = z.gather(1, t)
        if head_mean is not None:
            z_mean = (e.to(dtype) @ head_mean + bias_mean) * scale
        else:
            z_mean = _weighted_sum(z, shares) if beta > 0 else torch.zeros_like(z_target[:, 0])
        z_max, z_sum = _exponentiate(z)
        lse = z_max + z_sum.log()
        logsumexp[chunk] = lse
        at_targets = torch.where(token.target_weights == 0, 0.0, token.target_weights * z_target).sum(1)
        losses[chunk] = token.masses * lse - at_targets - beta * z_mean + tokens.z_loss * lse * lse
        if grads is None:
            continue

        # z holds exp(z - max) from here on: softmax, then the gradient by the logits.
        g = grads[chunk].unsqueeze(1)
        z /= z_sum.unsqueeze(1)
        if tail is not None:
            left_out = tail.left_out(z, t)
            torch.where(left_out, tail.replacement(z, left_out), z, out=z)
            if slope is not None:
                slope.masked_fill_(left_out, 1.0)
        softmax_weights = g * (token.masses + 2.0 * tokens.z_loss * lse).unsqueeze(1)
        if logsumexp_grads is not None:
            softmax_weights = softmax_weights + logsumexp_grads[chunk].unsqueeze(1)
        z *= softmax_weights
        _subtract_at(z, t, g * token.target_weights)
        if slope is not None:
            z.sub_(g * beta * shares).mul_(slope)
        if dbias is not None:
            dbias += z.sum(0)
        scaled_e = e if scale == 1.0 else e * scale
        de = torch.zeros(len(e), E.shape[1], dtype=dtype, device=E.device)
        if head_mean is not None:
            de -= g * (scale * beta) * head_mean
        for block, c in blocks(C, dtype):
            gradient = z[:, block].to(c.dtype)
            if need_E:
                de.add_(matmul(gradient, c), alpha=scale)
            if dC_sum is not None:
                _accumulate(dC_sum[block], gradient.T, scaled_e.to(gradient.dtype))
        if dE is not None:
            dE[chunk] = de
    if grads is not None and tail is not None and (dC_sum is not None or dbias is not None):
        _add_corrections(dC_sum, dbias, E, C, bias, tokens, tail, grads)
    if dbias is not None:
        if rank_one and grads is not None:
            dbias -= beta * grads.sum() * shares
        dbias = (dbias * scale).to(C.dtype if bias is None else bias.dtype)
    return losses, logsumexp, dE, None if dC_sum is None else dC_sum.to(tokens.head_dtype), dbias


def _add_corrections(
    dC_sum: Tensor | None,
    dbias: Tensor | None,
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    tokens: _Tokens,
    tail: _Tail,
    grads: Tensor,
) -> None:
    """Exact less replaced gradient of the sampled tokens, times how many tokens each stands for."""
    own, e, g = tokens.rows(tail.sampled), E[tail.sampled], grads[tail.sampled]
    for chunk, z, slope in logits_by_chunks(e, C, bias, tokens.scale, tokens.softcap):
        lse = z.logsumexp(1, keepdim=True)
        softmax = (z - lse).exp()
        left_out = tail.left_out(softmax, own.targets[chunk])
        smoothing = tokens.beta * tokens.shares(len(C))
        weight = 1.0 + 2.0 * tokens.z_loss * lse
        exact, replaced = weight * softmax, weight * tail.replacement(softmax, left_out)
        if slope is not None:
            exact, replaced = (exact - smoothing) * slope, replaced - smoothing
        correction = torch.where(left_out, exact - replaced, 0.0) * (g[chunk] * tail.stands_for).unsqueeze(1)
        if dC_sum is not None:
            _accumulate(dC_sum, correction.T, e[chunk].to(correction.dtype) * tokens.scale)
        if dbias is not None:
            dbias += correction.sum(0)


def chunk_rows(V: int, dtype: torch.dtype, copies: int) -> int:
    """Tokens a chunk, `copies` of whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (max(V, 1) * dtype.itemsize * copies))


def logits_by_chunks(
    E: Tensor, C: Tensor, bias: Tensor | None, scale: float, softcap: float | None, *, copies: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some tokens at a time: their logits, which may be written to, and with a softcap its slope at each.

    copies: of a chunk's logits that are held at a time; one, and with a softcap the slopes, unless the caller makes
    more.
    """
    n, V, dtype = len(E), len(C), compute_dtype(E)
    rows = chunk_rows(V, dtype, copies or (1 if softcap is None else 2))
    buffer = torch.empty(min(rows, n), V, dtype=dtype, device=E.device)
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        z = buffer[: chunk.stop - start]
        for block, c in blocks(C, dtype):
            matmul(E[chunk], c.T, out=z[:, block])
        if bias is not None:
            z += bias
        if scale != 1.0:
            z *= scale
        slope = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1.0 - z * z
            z *= softcap
        yield chunk, z, slope


def _subtract_at(z: Tensor, targets: Tensor, weights: Tensor) -> None:
    """z[i, targets[i, k]] -= weights[i, k]; index_put_, since scatter_add_ isn't deterministic on a GPU."""
    rows = torch.arange(len(z), dtype=torch.int64, device=z.device).unsqueeze(1).expand_as(targets)
    z.index_put_((rows, targets), -weights, accumulate=True)


def _weighted_sum(x: Tensor, shares: Tensor | float) -> Tensor:
    """(...) of (..., V): sum_v share_v x_v; what has no share adds nothing, -inf included."""
    if isinstance(shares, float):
        return x.sum(-1) * shares
    return torch.where(shares > 0, shares * x, 0.0).sum(-1)


def _weighted_rows(C: Tensor, shares: Tensor | None) -> Tensor:
    """(D,) sum_v share_v C_v in the compute dtype."""
    dtype = compute_dtype(C)
    if shares is None:
        return C.sum(0, dtype=dtype) / max(len(C), 1)
    total = torch.zeros(C.shape[1], dtype=dtype, device=C.device)
    for block, c in blocks(C, dtype):
        total += shares[block] @ c.to(dtype)
    return total


def _exponentiate(z: Tensor) -> tuple[Tensor, Tensor]:
    """z becomes exp(z - max z) row by row; returns the maxima and the sums, (n,) each."""
    n, V = z.shape
    z_max, z_sum = z.new_empty(n), z.new_empty(n)
    rows = n if z.is_cuda else max(1, ROW_BLOCK_BYTES // (V * z.element_size()))
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        z_max[block] = z[block].amax(1)
        z[block] -= z_max[block].unsqueeze(1)
        z_sum[block] = z[block].exp_().sum(1)
    return z_max, z_sum


def blocks(C: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of head rows in a dtype that this device multiplies well: the whole head unless it must be widened."""
    V, D = C.shape
    if C.dtype == dtype or C.is_cuda:
        yield slice(0, V), C
        return
    rows = max(1, WIDEN_BYTES // (max(D, 1) * dtype.itemsize))
    for start in range(0, V, rows):
        block = slice(start, min(start + rows, V))
        yield block, C[block].to(dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in the compute dtype."""
    dtype = compute_dtype(b)
    if a.dtype == b.dtype == dtype:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a.to(dtype), b.to(dtype))
    return product if out is None else out.copy_(product)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's own dtype."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total.add_(matmul(a, b))
