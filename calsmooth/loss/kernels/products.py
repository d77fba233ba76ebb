"""The products that cuBLAS does: low-precision factors, float32 sums."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, rounded once to total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once."""
    if out.dtype == b.dtype:
        torch.mm(a, b, out=out)
    else:
        out.zero_()
        accumulate(out, a, b)


def product_plus_row(out: Tensor, row: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b + row, row (D,) float32 added to each row before out is rounded."""
    if out.dtype == a.dtype:
        torch.addmm(row.to(out.dtype), a, b, out=out)
    else:
        out.copy_(row.expand_as(out))
        accumulate(out, a, b)
