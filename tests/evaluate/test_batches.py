"""Batches follow the memory, and running out of it costs time and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calsmooth import environment
from calsmooth.environment import free_memory
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate import batches as batches_module
from calsmooth.evaluate.batches import Batches, Size
from calsmooth.evaluate.next_token import TokenPredictor
from calsmooth.evaluate.requests import Request
from calsmooth.evaluate.scoring import Scorer

ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried 8")


def limit_rows(model, most, error):
    """The model refuses more sequences at once than `most`; returns the batch sizes that were tried."""
    tried = []

    def refuse(module, arguments, named):
        tried.append(len(named["input_ids"]))
        if tried[-1] > most:
            raise error

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return tried


def requests(letters):
    shared = list(range(3, 43))
    answers = [[7], [8], [9]] if letters else [[7], [8, 9], [10, 11, 12]]
    return [Request([*shared, *range(50, 51 + 3 * i)], answers) for i in range(9)]


@pytest.mark.parametrize(
    ("error", "kind", "letters", "batch_size"),
    [
        (ON_A_GPU, "llama", True, None),
        (ON_A_CPU, "llama", False, None),
        (ON_A_GPU, "llama", False, 9),
        (ON_A_CPU, "gemma2", True, 9),
        (ON_A_GPU, "gemma2", False, None),
    ],
)
def test_running_out_of_memory_halves_the_batch_and_goes_on(build, error, kind, letters, batch_size):
    expected = Scorer(build(kind, torch.float64)).score(requests(letters))
    model = build(kind, torch.float64)
    scorer = Scorer(model, batch_size=batch_size)
    tried = limit_rows(model, 2, error)
    done = []
    for got, want in zip(scorer.score(requests(letters), done.append), expected, strict=True):
        assert got == pytest.approx(want, abs=1e-5 if kind == "gemma2" else 1e-9)
    assert scorer.batches.halvings >= 2
    assert sum(done) == 9
    failed = [rows for rows in tried if rows > 2]
    assert len(failed) <= scorer.batches.halvings
    # What was learnt is kept: the next task doesn't run into it again.
    before = len(tried)
    scorer.score(requests(letters=True))
    assert max(tried[before:]) <= 2


def test_next_tokens_go_on_as_well(build):
    from calsmooth.data import Example

    examples = [Example(list(range(3, 9 + i)), [-100, -100, *range(5, 9 + i)]) for i in range(7)]
    expected = TokenPredictor(build("llama", torch.float64)).predict(examples)
    model = build("llama", torch.float64)
    predictor = TokenPredictor(model)
    limit_rows(model, 3, ON_A_GPU)
    assert predictor.predict(examples).nll == pytest.approx(expected.nll, abs=1e-9)
    assert 1 <= predictor.batches.halvings <= 3


def test_a_single_sequence_that_is_too_much_is_an_error_in_one_line(build):
    model = build("llama")
    scorer = Scorer(model)
    limit_rows(model, 0, ON_A_GPU)
    with pytest.raises(
        CalsmoothError, match=r"not enough memory for a single sequence of 65 tokens; give .*max-length"
    ):
        scorer.score(requests(letters=True))


def test_other_errors_are_not_taken_for_it(build):
    model = build("llama")
    scorer = Scorer(model)
    limit_rows(model, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        scorer.score(requests(letters=True))


@given(lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=60), free=st.integers(2**20, 2**34))
def test_batches_hold_what_the_memory_does_and_never_nothing(build, lengths, free):
    lengths.sort(reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "free_memory", lambda device: free)
        batches = Batches(build("llama"))
        cut = [batch for batch, _ in batches.run(lengths, lambda n: Size(n, past=100), lambda batch: None)]
    assert [n for batch in cut for n in batch] == lengths
    bytes_of = batches._footprint.bytes
    for batch in cut:
        assert len(batch) == 1 or len(batch) * bytes_of(Size(batch[0], past=100)) <= free
        assert len(batch) == 1 or len(batch) * batch[0] <= batches.enough


def test_free_memory_is_what_is_there_and_what_is_allowed(monkeypatch):
    there = free_memory("cpu")
    assert there > 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory("cpu") < there / 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    allowed = {"/sys/fs/cgroup/memory.max": 5000, "/sys/fs/cgroup/memory.current": 2000}
    monkeypatch.setattr(environment, "_first_number", lambda path, key="": allowed.get(path))
    assert free_memory("cpu") == 3000
