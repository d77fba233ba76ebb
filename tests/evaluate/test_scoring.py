"""The scoring engine against the plainest way there is: one sequence at a time through model(input_ids)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.requests import Request, shared_prefix
from calsmooth.evaluate.scoring import Scorer, cache_sharing


def one_at_a_time(model, request):
    """Sum of log-softmax over the continuation, from one full forward a continuation."""
    values = []
    for continuation in request.continuations:
        ids = torch.tensor([request.context + continuation])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        start = len(request.context) - 1
        values.append(sum(float(logprobs[start + j, token]) for j, token in enumerate(continuation)))
    return values


def make_requests(seed=0, prefix=40, letters=False, count=9):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, 340, (n,), generator=generator).tolist()

    shared = draw(prefix)
    requests = []
    for i in range(count):
        continuations = [[7], [8], [9], [10]] if letters else [draw(1 + (i + k) % 5) for k in range(2 + i % 4)]
        requests.append(Request(shared + draw(1 + 5 * i), continuations))
    return requests


KINDS = ["llama", "gpt2", "gemma2", "mamba"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
def test_reuse_equals_no_reuse_equals_one_at_a_time_in_float64(build, kind, letters):
    model = build(kind, torch.float64)
    requests = make_requests(letters=letters)
    expected = [one_at_a_time(model, request) for request in requests]
    for scorer in (
        Scorer(model),
        Scorer(model, reuse=False),
        Scorer(model, batch_size=1),
        Scorer(model, batch_size=4),
    ):
        for got, want in zip(scorer.score(requests), expected, strict=True):
            # Mamba turns its logits into float32, Gemma takes the softmax of its attention in it.
            assert got == pytest.approx(want, abs=1e-5 if kind in ("mamba", "gemma2") else 1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_float32_differs_by_rounding_only(build, kind):
    model = build(kind)
    requests = make_requests()
    expected = [one_at_a_time(model, request) for request in requests]
    for scorer in (Scorer(model), Scorer(model, reuse=False), Scorer(model, batch_size=2)):
        for got, want in zip(scorer.score(requests), expected, strict=True):
            assert got == pytest.approx(want, abs=2e-4)


def test_what_is_shared_and_what_is_not(build):
    assert cache_sharing(build("llama")).contexts
    assert cache_sharing(build("gpt2")).contexts
    sliding = cache_sharing(build("gemma2"))
    assert sliding.prefix
    assert not sliding.contexts
    recurrent = cache_sharing(build("mamba"))
    assert not recurrent.prefix
    assert "running state" in recurrent.reason


@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
@pytest.mark.parametrize(
    ("kind", "prefix", "contexts"),
    [
        ("gemma3", True, False),  # sliding windows in some layers
        ("mistral", True, False),  # in all
        ("bloom", True, False),  # takes no positions
        ("lfm2", False, False),  # convolutions
        ("llama4", False, False),  # attention within chunks
    ],
)
def test_windows_chunks_and_states_are_shared_only_where_it_is_right(build, kind, prefix, contexts, letters):
    model = build(kind, torch.float64)
    requests = make_requests(letters=letters, count=4)
    scorer = Scorer(model)
    for got, request in zip(scorer.score(requests), requests, strict=True):
        # Llama 4 norms in float32.
        assert got == pytest.approx(one_at_a_time(model, request), abs=1e-5 if kind == "llama4" else 1e-9)
    assert (scorer.sharing.prefix, scorer.sharing.contexts) == (prefix, contexts)
    assert scorer.sharing.reason


def test_every_token_is_run_once(build):
    model = build()
    requests = make_requests(letters=True)
    scorer, plain = Scorer(model), Scorer(model, reuse=False)
    scorer.score(requests)
    plain.score(requests)
    own = sum(len(r.context) - 40 for r in requests)
    assert scorer.tokens_run == 40 + own
    assert plain.tokens_run == sum(len(r.context) for r in requests)

    cloze = make_requests()
    scorer = Scorer(model)
    scorer.score(cloze)
    fed = sum(len(c) - 1 for r in cloze for c in r.continuations)
    assert scorer.tokens_run == 40 + own + fed


def test_a_prefix_is_held_once_and_never_copied_for_all_layers(build, monkeypatch):
    """Beside the prefix's own, at most one layer's keys and values exist while letters are scored."""
    kept = []
    monkeypatch.setattr(DynamicLayer, "update", recorded(DynamicLayer.update, kept))
    model = build()
    Scorer(model).score(make_requests(letters=True))
    assert kept == [1] * model.config.num_hidden_layers  # one sequence: the prefix


def recorded(update, kept):
    def wrapped(self, key_states, *rest, **named):
        kept.append(len(key_states))
        return update(self, key_states, *rest, **named)

    return wrapped


def test_a_model_with_a_head_of_its_own_kind_gives_its_own_logits(build):
    """What calsmooth.loss can't compute is asked of the model, and shared all the same."""
    model = build("llama", torch.float64)
    plain = model.lm_head
    model.lm_head = torch.nn.Sequential(plain, torch.nn.Tanh())
    requests = make_requests()
    scorer = Scorer(model)
    assert "a head of type Sequential" in scorer.readout.fallback
    for got, request in zip(scorer.score(requests), requests, strict=True):
        assert got == pytest.approx(one_at_a_time(model, request), abs=1e-9)


def test_progress_counts_every_request_once(build):
    for kind in ("llama", "gemma2"):
        done = []
        Scorer(build(kind), batch_size=2).score(make_requests(), done.append)
        assert sum(done) == 9


def test_a_model_that_gives_nan_is_an_error(build):
    model = build()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(CalsmoothError, match="not a number"):
        Scorer(model).score(make_requests())


def test_shared_prefix_leaves_each_context_a_token():
    requests = [Request([1, 2, 3], [[4], [5]]), Request([1, 2], [[4], [5]])]
    assert shared_prefix(requests) == [1]
    assert shared_prefix([Request([1], [[4], [5]]), Request([2], [[4], [5]])]) == []


@given(seed=st.integers(0, 10**6), prefix=st.integers(0, 60), count=st.integers(1, 5), size=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_any_batch_size_gives_the_same(build, seed, prefix, count, size):
    model = build("llama", torch.float64, num_hidden_layers=1)
    requests = make_requests(seed, prefix, count=count)
    for got, request in zip(Scorer(model, batch_size=size).score(requests), requests, strict=True):
        assert got == pytest.approx(one_at_a_time(model, request), abs=1e-9)
