"""Chosen places read through the fused forward, and through the model's own head, against a softmax of all logits."""

import pytest
import torch
from torch import nn

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate import readout as readout_module
from calsmooth.evaluate.readout import Readout

ROWS, POSITIONS = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 8, 8, 0])
PLACE = torch.tensor([0, 1, 1, 1, 2, 3, 3])
TOKEN = torch.tensor([5, 7, 8, 7, 0, 339, 4])


class Scaled(nn.Linear):
    """A head that isn't a plain linear layer."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).div(3)


def unusual(model):
    head = Scaled(32, 340, bias=False, dtype=model.dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(340, dtype=model.dtype))
    return model


MODELS = {
    "plain": lambda build: build("llama", torch.float64, tie_word_embeddings=False),
    "tied": lambda build: build("llama", torch.float64, tie_word_embeddings=True),
    "softcap": lambda build: build("gemma2", torch.float64),
    "bias": lambda build: with_bias(build("llama", torch.float64, tie_word_embeddings=False)),
    "unusual": lambda build: unusual(build("llama", torch.float64, tie_word_embeddings=False)),
}


@pytest.fixture(params=MODELS)
def model(request, build):
    return MODELS[request.param](build).requires_grad_(False)


@pytest.fixture
def inputs():
    ids = torch.randint(3, 340, (3, 9), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def full_softmax(model, inputs):
    return model(**inputs).logits[ROWS, POSITIONS].log_softmax(dim=-1)


@pytest.mark.parametrize("chunk", [None, 3 * 4 * 340], ids=["at once", "in chunks"])
def test_both_ways_are_the_full_softmax(model, inputs, chunk, monkeypatch):
    if chunk:
        monkeypatch.setitem(readout_module.CHUNK_BYTES, "cpu", chunk)
    expected = full_softmax(model, inputs)
    readout = Readout(model)
    got = readout.logprobs(inputs, ROWS, POSITIONS, PLACE, TOKEN)
    assert torch.allclose(got, expected[PLACE, TOKEN], atol=1e-9)

    target = TOKEN[[0, 1, 4, 5]]
    confidence, correct, nll, brier = readout.token_statistics(inputs, ROWS, POSITIONS, target).T
    top, predicted = expected.max(dim=-1)
    assert torch.allclose(confidence, top.exp(), atol=1e-9)
    assert torch.equal(correct, (predicted == target).double())
    assert torch.allclose(nll, nn.functional.nll_loss(expected, target, reduction="none"), atol=1e-9)
    errors = expected.exp() - nn.functional.one_hot(target, expected.shape[1])
    assert torch.allclose(brier, errors.square().sum(dim=-1), atol=1e-9)


def test_a_plain_head_is_never_called_and_another_only_for_what_is_asked(model, inputs):
    readout = Readout(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[-2]))
    readout.logprobs(inputs, ROWS, POSITIONS, PLACE, TOKEN)
    if isinstance(model.lm_head, Scaled):
        assert "a head of type Scaled" in readout.fallback
        assert seen == [len(ROWS)]
    else:
        assert readout.fallback is None
        assert seen == []


def test_nothing_asked_is_nothing_read(model, inputs):
    none = torch.zeros(0, dtype=torch.long)
    ran = []
    model.model.register_forward_hook(lambda *_: ran.append(True))
    readout = Readout(model)
    ran.clear()
    assert readout.logprobs(inputs, none, none, none, none).shape == (0,)
    assert ran == [True]


def test_a_model_without_a_head_is_refused(build):
    with pytest.raises(CalsmoothError, match="no output head"):
        Readout(build("llama").model)
