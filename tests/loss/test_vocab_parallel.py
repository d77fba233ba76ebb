"""The vocabulary-parallel loss on two processes, against the whole head on one."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from calsmooth.errors import UsageError
from calsmooth.loss import fused, linear_cross_entropy
from calsmooth.loss.vocab_parallel import vocab_parallel_linear_cross_entropy

OPTIONS: list[dict[str, Any]] = [
    dict(label_smoothing=0.1, z_loss=1e-2),
    dict(label_smoothing=0.3, softcap=3.0, scale=0.5, reduction="sum"),
    dict(label_smoothing=0.1, reduction="none", shift=True),
    dict(label_smoothing=0.2, smoothing_prior=True, token_weights=True),
    dict(label_smoothing=0.2, smoothing_prior=True, softcap=3.0, reduction="sum", divisor=7.0),
    dict(token_weights=True, shift=2, reduction="none", divisor=torch.tensor([5])),
    dict(impossible=True),
    dict(impossible=True, label_smoothing=0.1, smoothing_prior=True),
]
V = 53
CUTS = (20, V, 0)  # the first shard's rows: the others', none of them for the other


def check(rank: int, port: int, kernels: bool) -> None:
    dtype = torch.float32 if kernels else torch.float64
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(0)
    E = torch.randn(3, 7, 6, generator=g, dtype=dtype).requires_grad_()
    C = torch.randn(V, 6, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=dtype)
    prior = torch.rand(V, generator=g, dtype=dtype)
    prior[: CUTS[0]] = 0.0
    token_weights = torch.rand(3, 7, generator=g, dtype=dtype)
    y = torch.randint(CUTS[0], V, (3, 7), generator=g)
    y[0, 0] = -100
    y[1, :2] = -100
    some = y.clone()
    some[2] = torch.arange(7)  # in the first shard
    for cut, case in itertools.product(CUTS, OPTIONS):
        options = dict(case)
        biases = bias.clone()
        # A whole shard of classes that can't be, and aren't asked for.
        if options.pop("impossible", False):
            biases[: CUTS[0]] = -torch.inf
            targets = y
        else:
            targets = some
        if options.pop("token_weights", False):
            options["token_weights"] = token_weights
        with_prior = dict(smoothing_prior=prior / prior.sum()) if options.pop("smoothing_prior", False) else {}
        biases.requires_grad_()
        mine = slice(0, cut) if rank == 0 else slice(cut, V)
        shard, bias_shard = (t.detach()[mine].clone().requires_grad_() for t in (C, biases))
        whole = linear_cross_entropy(E, C, targets, bias=biases, **with_prior, **options)
        incoming = torch.rand(whole.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            if kernels:  # whatever the door says of CPU tensors
                patch.setattr(fused, "why_not", lambda problem: None if problem.lm_head_weight.numel() else "no rows")
            loss = vocab_parallel_linear_cross_entropy(
                E, shard, targets, first=mine.start, vocabulary=V, bias_shard=bias_shard,
                smoothing_prior_shard=with_prior["smoothing_prior"][mine] if with_prior else None, **options,
            )  # fmt: skip
            got = torch.autograd.grad(loss, [E, shard, bias_shard], incoming)
        torch.testing.assert_close(loss, whole)
        assert loss.isfinite().all()
        wanted = torch.autograd.grad(whole, [E, C, biases], incoming)
        for a, b in zip(got, (wanted[0], wanted[1][mine], wanted[2][mine]), strict=True):
            torch.testing.assert_close(a, b)
    dist.destroy_process_group()


@pytest.mark.parametrize("kernels", [False, True])
def test_two_processes_equal_the_whole_head(kernels: bool) -> None:
    if kernels and (os.environ.get("TRITON_INTERPRET") != "1" or not fused.TRITON):
        pytest.skip("the kernels take CPU tensors only through Triton's interpreter")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # This file as a program, twice: a child of multiprocessing would have to find the tests as a package.
    command = [sys.executable, __file__, str(port), str(int(kernels))]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors


def test_a_shard_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="a shard of 4 rows from row 8 on doesn't lie in a vocabulary of 10"):
        vocab_parallel_linear_cross_entropy(
            torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), first=8, vocabulary=10
        )


def test_gradients_of_gradients_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        E, C = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        loss = vocab_parallel_linear_cross_entropy(E, C, torch.tensor([0, 1]), first=0, vocabulary=4)
        (dC,) = torch.autograd.grad(loss, C, create_graph=True)
        with pytest.raises(UsageError, match="can be differentiated once only"):
            (loss + (dC**2).sum()).backward()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    check(port=int(sys.argv[1]), kernels=bool(int(sys.argv[2])), rank=int(sys.argv[3]))
