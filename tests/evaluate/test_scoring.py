"""The scoring engine against the plainest way there is: one sequence at a time through model(input_ids)."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate import batches as batches_module
from calsmooth.evaluate import scoring as scoring_module
from calsmooth.evaluate.past import cache_sharing
from calsmooth.evaluate.requests import Request, shared_prefix
from calsmooth.evaluate.scoring import Scorer


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


# --- several groups at once -----------------------------------------------------------------------------------------


def make_groups(letters=False, prefixes=(40, 40, 21, 70, 0, 3), counts=(4, 3, 5, 2, 3, 2), alone=2):
    """(requests, groups): ragged groups with and without a shared prefix, and some of a single request."""
    requests, groups = [], []
    for number, (prefix, count) in enumerate([*zip(prefixes, counts, strict=True), *[(30, 1)] * alone]):
        groups.append([len(requests) + i for i in range(count)])
        requests += make_requests(100 + number, prefix, letters, count)
    # Not in the order in which they are given, and not next to each other.
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
    return [requests[i] for i in order], [[order.index(i) for i in group] for group in groups]


def counted(model):
    """The shapes (rows, tokens) of the model's forwards from now on."""
    shapes = []

    def note(module, arguments, named):
        shapes.append(tuple(named["input_ids"].shape))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def shared(requests, groups):
    """The length of each group's prefix."""
    return [len(shared_prefix([requests[i] for i in group])) for group in groups]


@pytest.fixture
def budget(monkeypatch):
    """`budget(tokens, call)`: what fills a batch of any model, and what a forward costs besides, as on a GPU."""

    def set_to(tokens, call=0):
        monkeypatch.setitem(batches_module.ENOUGH_WORK, "cpu", 0)
        monkeypatch.setitem(batches_module.ENOUGH_TOKENS, "cpu", tokens)
        monkeypatch.setattr(batches_module.Batches, "call", property(lambda _: call, lambda *_: None), raising=False)

    return set_to


@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mistral", "bloom", "lfm2"])
@pytest.mark.parametrize(("tokens", "call"), [(10_000, 0), (10_000, 150), (100, 0)])
def test_batches_across_groups_equal_one_at_a_time(build, budget, kind, letters, tokens, call):
    model = build(kind, torch.float64)
    budget(tokens, call)
    requests, groups = make_groups(letters)
    done = []
    found = Scorer(model).score(requests, done.append, groups)
    assert sum(done) == len(requests)
    for got, request in zip(found, requests, strict=True):
        # Gemma and Bloom take the softmax of their attention in float32.
        assert got == pytest.approx(one_at_a_time(model, request), abs=1e-5 if kind in ("gemma3", "bloom") else 1e-9)


@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
def test_company_and_batch_size_change_float32_by_rounding_only(build, letters):
    model = build()
    requests, groups = make_groups(letters)
    expected = [
        value for group in groups for values in Scorer(model).score([requests[i] for i in group]) for value in values
    ]
    for size in (None, 1, 3, 64):
        found = Scorer(model, batch_size=size).score(requests, groups=groups)
        got = [value for group in groups for i in group for value in found[i]]
        assert got == pytest.approx(expected, abs=2e-4)


def fifty_seven(letters=True):
    """As many groups as MMLU has subjects, with prefixes from 30 to 260 tokens."""
    return make_groups(letters, prefixes=[30 + 4 * i for i in range(57)], counts=[6] * 57, alone=0)


def test_many_small_groups_take_few_forwards_on_a_device_that_runs_many_tokens_at_once(build, budget):
    model = build(num_hidden_layers=1)
    requests, groups = fifty_seven()
    budget(20_000)
    scorer = Scorer(model)
    shapes = counted(model)
    scorer.score(requests, groups=groups)
    assert len(shapes) <= 2 * 4  # prefixes and contexts, of four lots: 260, 130, 65 and 32 tokens
    fed = sum(rows * width for rows, width in shapes)
    assert scorer.tokens_run > fed / 2
    skips = shared(requests, groups)
    own = sum(len(requests[i].context) - skip for group, skip in zip(groups, skips, strict=True) for i in group)
    assert scorer.tokens_run == sum(skips) + own


def test_a_processor_runs_one_prefix_at_a_time_and_pads_no_more_for_company(build, budget):
    requests, groups = fifty_seven()
    budget(64)
    model = build(num_hidden_layers=1)
    scorer = Scorer(model)
    shapes = counted(model)
    for group in groups:
        scorer.score([requests[i] for i in group])
    apart = shapes.copy()
    shapes.clear()
    scorer.score(requests, groups=groups)
    assert len(shapes) <= len(apart)
    assert sum(rows * width for rows, width in shapes) <= sum(rows * width for rows, width in apart)
    assert all(rows == 1 for rows, width in shapes if width > 32)


def test_prefixes_that_save_less_than_forwards_cost_are_run_in_full(build, budget):
    requests, groups = make_groups(letters=True)
    budget(10_000, call=150)
    model = build()
    scorer = Scorer(model)
    shapes = counted(model)
    scorer.score(requests, groups=groups)
    # Saved: 3 * 40 + 2 * 40 and (two tokens are shared by chance at most) 1 * 70 in one lot, 4 * 21 in the next.
    assert scorer.tokens_run == sum(len(r.context) for r in requests)
    assert len(shapes) == 1
    budget(10_000, call=120)
    scorer = Scorer(model)
    scorer.score(requests, groups=groups)
    assert scorer.tokens_run < sum(len(r.context) for r in requests)


def test_padding_never_lies_before_what_a_sliding_window_counts(build, budget):
    """There, prefixes of the same length run side by side, any others one after the other."""
    budget(10_000)
    requests, groups = make_groups(letters=True, prefixes=(40, 40, 39, 25), counts=(3, 3, 3, 3), alone=0)
    assert sorted(shared(requests, groups)) == [25, 39, 40, 40]
    model = build("mistral")
    scorer = Scorer(model)
    shapes = counted(model)
    scorer.score(requests, groups=groups)
    assert [rows for rows, _ in shapes] == [2, 6, 1, 3, 1, 3]


def test_keys_and_values_are_kept_once_and_no_longer_than_they_are_needed(build, budget, monkeypatch):
    kept, prefixes = [], []
    own_layers, forward = scoring_module.own_layers, Scorer._forward

    def recorded_layers(cache):
        layers = own_layers(cache)
        kept.append({(len(keys), keys.shape[2]) for keys, _ in layers})
        return layers

    def watched(self, rows, past, keep=False):
        if past is None and keep:
            gc.collect()
            assert all(reference() is None for reference in prefixes)
        found, made = forward(self, rows, past, keep)
        if past is None and keep:
            prefixes.append(weakref.ref(made))
        return found, made

    monkeypatch.setattr(scoring_module, "own_layers", recorded_layers)
    monkeypatch.setattr(Scorer, "_forward", watched)
    budget(170)
    requests, groups = make_groups(prefixes=(40, 40, 90, 80), counts=(3, 3, 3, 3), alone=0)
    assert sorted(shared(requests, groups)) == [40, 40, 80, 90]
    Scorer(build()).score(requests, groups=groups)
    # Prefixes three times (180 tokens are too many for a batch), once each; contexts without what is before them.
    assert [shape for shapes in kept for shape in shapes if shape[1] >= 40] == [(1, 90), (1, 80), (2, 40)]
    assert len(prefixes) == 3


@given(seed=st.integers(0, 10**6), prefix=st.integers(0, 60), count=st.integers(1, 5), size=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_any_batch_size_gives_the_same(build, seed, prefix, count, size):
    model = build("llama", torch.float64, num_hidden_layers=1)
    requests = make_requests(seed, prefix, count=count)
    for got, request in zip(Scorer(model, batch_size=size).score(requests), requests, strict=True):
        assert got == pytest.approx(one_at_a_time(model, request), abs=1e-9)
