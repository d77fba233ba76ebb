"""Prompts as token ids: the split into context and continuation, and what only some choices' contexts hold."""

import pytest
import torch

from calsmooth.evaluate.requests import Request
from calsmooth.evaluate.scoring import Scorer


def test_which_tokens_are_scored():
    assert list(Request([1], [[2, 3], [4]]).scored(0)) == [0, 1]
    request = Request([1], [[2, 3, 4], [5, 6]], given=(2, 0))
    assert list(request.scored(0)) == [2]
    assert list(request.scored(1)) == [0, 1]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("reuse", [True, False])
def test_given_tokens_are_read_and_not_scored(build, kind, reuse):
    model = build(kind, torch.float64)
    request = Request(list(range(5, 40)), [[41, 42, 43, 44], [50, 43, 44], [43, 44]], given=(2, 1, 0))
    for requests in ([request], [request, Request(request.context + [3], request.continuations)]):
        got = Scorer(model, reuse=reuse).score(requests)[0]
        for value, before in zip(got, ([41, 42], [50], []), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([request.context + before + [43, 44]])).logits[0].log_softmax(dim=-1)
            expected = logprobs[-3, 43] + logprobs[-2, 44]
            assert value == pytest.approx(float(expected), abs=1e-5)
