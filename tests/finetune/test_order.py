"""The order of training examples, and how many of them go through the model at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calsmooth.finetune.fit import TOKENS_AT_ONCE, micro_batch_candidates
from calsmooth.finetune.order import EpochOrder


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_example_comes_once_and_alike_lengths_together(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = EpochOrder(lengths, batch_size, seed)
    order.set_epoch(epoch)
    indices = list(order)
    assert sorted(indices) == list(range(len(lengths))) == list(range(len(order)))
    for start in range(0, len(indices), batch_size):
        step = [lengths[i] for i in indices[start : start + batch_size]]
        assert step == sorted(step, reverse=True)


def test_seed_and_epoch_alone_decide() -> None:
    def steps(seed: int, epoch: int, lengths: list[int]) -> list[set[int]]:
        order = EpochOrder(lengths, 10, seed)
        order.set_epoch(epoch)
        indices = list(order)
        return [set(indices[start : start + 10]) for start in range(0, 100, 10)]

    same, other = [7] * 100, list(range(100))
    assert steps(1, 2, same) == steps(1, 2, other), "lengths may not decide what makes a step"
    assert len({str(steps(seed, epoch, same)) for seed in range(3) for epoch in range(3)}) == 9


@given(batch_size=st.integers(1, 300), longest=st.integers(1, 5000), device=st.sampled_from(["cpu", "cuda", "xpu"]))
def test_micro_batches_divide_the_batch_and_keep_to_the_budget(batch_size: int, longest: int, device: str) -> None:
    sizes = micro_batch_candidates(batch_size, longest, device)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(batch_size % size == 0 for size in sizes)
    assert sizes[-1] == 1
    assert sizes[0] == 1 or sizes[0] * longest <= TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cpu"])


@pytest.mark.parametrize(("batch_size", "longest", "first"), [(128, 128, 16), (32, 60, 32), (7, 300, 1), (6, 700, 2)])
def test_the_largest_comes_first(batch_size: int, longest: int, first: int) -> None:
    assert micro_batch_candidates(batch_size, longest, "cpu")[0] == first
