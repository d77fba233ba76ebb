"""sigma_C: the largest singular value of a head, without a factorisation of its V x D numbers.

Lanczos on C^T C, D x D, which is never formed: each step reads C once, a cache-sized block of rows at a time, in
float32, and the D-vectors are kept orthogonal in float64. A handful of steps is enough, because real heads have one
singular value far above the rest.

Softmax doesn't see what is common to all logits, so that the rows' mean may be taken off the head first. What remains,
(I - 1 1^T / V) C, has a smaller largest singular value, and Theorem 4.2 holds with it, too: for the logits with their
mean taken off, which have the same softmax.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calsmooth.entropy_bound.bound import Array
from calsmooth.errors import CalsmoothError

BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class SingularValue:
    """The largest singular value.

    value: from above: the converged estimate plus what its residual leaves open.
    residual: |C^T C v - s^2 v| / s^2 at the end, measured with one product more.
    products: how often C was read.
    """

    value: float
    residual: float
    products: int


@torch.no_grad()
def largest_singular_value(
    matrix: Tensor,  # (V, D)
    *,
    centred: bool = False,
    tolerance: float = 1e-5,
    max_products: int = 500,
    seed: int = 0,
) -> SingularValue:
    """The spectral norm of a matrix, or (centred) of the matrix without its rows' mean.

    Args:
        matrix: any floating dtype and device; products are in float32 (float64 for float64).
        tolerance: the relative residual at which it stops; the value's own relative error is at most half of that.

    Raises:
        CalsmoothError: the matrix has entries that aren't finite, or max_products were not enough.
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    blocks = matrix.split(max(1, BLOCK_BYTES.get(matrix.device.type, 2**21) // (dtype.itemsize * matrix.shape[1])))
    mean = row_mean(matrix) if centred else np.zeros(matrix.shape[1])
    if not np.isfinite(mean).all():
        raise CalsmoothError("the head has entries that are not finite; its singular values don't exist")
    # Of rows that are all alike, taking the mean off leaves rounding.
    nothing = len(matrix) * (16 * torch.finfo(dtype).eps * float(np.linalg.norm(mean))) ** 2
    read = 0

    def gram(v: Array) -> Array:
        """C^T C v. With the mean taken off, C v sums to 0, and the mean takes what rounding leaves of that back."""
        nonlocal read
        read += 1
        v_there = torch.from_numpy(v).to(matrix.device, dtype)
        common = float(mean @ v)
        total, left = np.zeros(matrix.shape[1]), 0.0
        for block in blocks:
            c = block.to(dtype)
            y = c @ v_there - common
            total += (c.T @ y).cpu().double().numpy()
            left += float(y.sum())
        return total - left * mean

    basis = [_unit(np.random.default_rng(seed).normal(size=matrix.shape[1]))]
    diagonal: list[float] = []
    beside: list[float] = []
    while read < max_products:
        w = gram(basis[-1])
        if not np.isfinite(w).all():
            raise CalsmoothError("the head has entries that are not finite; its singular values don't exist")
        diagonal.append(float(w @ basis[-1]))
        stacked = np.stack(basis)
        for _ in range(2):  # once isn't enough (Kahan, Parlett)
            w -= stacked.T @ (stacked @ w)
        beside.append(float(np.linalg.norm(w)))
        ritz, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        square = float(ritz[-1])
        exhausted = len(basis) == matrix.shape[1] or beside[-1] <= 1e-12 * square
        if square <= nothing:
            return SingularValue(0.0, 0.0, read)
        if exhausted or beside[-1] * abs(vectors[-1, -1]) < 0.5 * tolerance * square:
            # The estimate so far trusts the recurrence; the answer is checked against the matrix.
            v = _unit(vectors[:, -1] @ stacked)
            residual = float(np.linalg.norm(gram(v) - square * v)) / square
            if residual <= tolerance:
                return SingularValue(float(np.sqrt(square * (1 + residual))), residual, read)
            if exhausted:
                break
        basis.append(w / beside[-1])
    raise CalsmoothError(f"the head's largest singular value didn't converge to {tolerance:g} in {read} products")


def row_mean(matrix: Tensor) -> Array:
    """(D,) the mean of a matrix's rows, summed in float64."""
    total = np.zeros(matrix.shape[1])
    for block in matrix.split(8192):
        total += block.cpu().double().sum(0).numpy()
    return total / len(matrix)


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v)
