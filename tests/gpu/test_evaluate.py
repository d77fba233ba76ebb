"""Scoring on a GPU: the kernels' log-probabilities, real lack of memory, the whole command."""

from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from transformers import LlamaConfig, LlamaForCausalLM

from calsmooth.evaluate import batches as batches_module
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.requests import Request
from calsmooth.evaluate.run import run
from calsmooth.evaluate.scoring import Scorer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture(autouse=True)
def even_small_prefixes_are_shared(monkeypatch):
    """For a model this small on a GPU they aren't worth it, and would stay untested."""
    monkeypatch.setitem(batches_module.CALL_WORK, "cuda", 0)


def make_requests(count, own, letters):
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(3, 8192, (n,), generator=generator).tolist()

    shared = draw(64)
    answers = [[[7], [8], [9], [10]] if letters else [draw(1 + k) for k in range(4)] for _ in range(count)]
    return [Request(shared + draw(own - i % 7), answers[i]) for i in range(count)]


@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
def test_reuse_and_kernels_give_the_models_own_log_probabilities(model, letters):
    requests = make_requests(12, 40, letters)
    reference = model.double()
    expected = []
    for request in requests:
        for continuation in request.continuations:
            ids = torch.tensor([request.context + continuation], device="cuda")
            with torch.no_grad():
                logprobs = reference(input_ids=ids).logits[0].log_softmax(dim=-1)
            start = len(request.context) - 1
            expected.append(sum(float(logprobs[start + j, t]) for j, t in enumerate(continuation)))
    model.bfloat16()  # back from float64, without loss
    for scorer in (Scorer(model), Scorer(model, reuse=False), Scorer(model, batch_size=5)):
        assert scorer.readout.fallback is None
        got = [value for values in scorer.score(requests) for value in values]
        # bfloat16 has 8 bits; a sum of four log-probabilities of around -9 each.
        assert got == pytest.approx(expected, abs=0.5)
        assert abs(sum(got) - sum(expected)) / len(got) < 0.05


@pytest.mark.parametrize("letters", [True, False], ids=["letter", "cloze"])
def test_batches_across_groups_give_what_each_group_gives_alone(model, letters):
    groups = [make_requests(count, own, letters) for count, own in ((5, 30), (1, 12), (7, 90), (3, 40))]
    groups[0] = [Request(r.context[20:], r.continuations) for r in groups[0]]  # a shorter prefix than the others'
    apart = [value for group in groups for values in Scorer(model).score(group) for value in values]
    requests = [request for group in groups for request in group]
    starts = [sum(map(len, groups[:i])) for i in range(len(groups) + 1)]
    calls = []
    with model.model.register_forward_pre_hook(lambda *_: calls.append(1)):
        scorer = Scorer(model)
        calls.clear()
        found = scorer.score(requests, groups=[list(range(a, b)) for a, b in pairwise(starts)])
    assert [value for values in found for value in values] == pytest.approx(apart, abs=0.3)
    assert len(calls) <= 4 if letters else 6


def test_a_batch_that_does_not_fit_is_halved(model):
    requests = make_requests(2048, 256, letters=True)
    few = Scorer(model, batch_size=128).score(requests[:100])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5e9) / total)
    try:
        scorer = Scorer(model, batch_size=2048)
        many = scorer.score(requests)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.batches.halvings > 0
    for one, other in zip(few, many[:100], strict=True):
        assert one == pytest.approx(other, abs=0.2)


def test_the_command(tmp_path):
    results = run(EvaluateConfig(task=("demo", "responses"), device="cuda", limit=200, output=tmp_path / "run")).results
    on_cpu = run(EvaluateConfig(task=("demo", "responses"), device="cpu", limit=200, output=tmp_path / "cpu")).results
    assert results["dtype"] == "bfloat16"
    assert results["peak_memory_bytes"] > 0
    for name in ("demo", "responses"):
        assert results["tasks"][name]["nll"] == pytest.approx(on_cpu["tasks"][name]["nll"], abs=0.03)
        assert results["tasks"][name]["n"] == on_cpu["tasks"][name]["n"]
