"""Next-token statistics against a full softmax of every position."""

import pytest
import torch

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.next_token import TokenPredictor


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(7):
        ids = torch.randint(3, 340, (4 + 5 * i,), generator=generator).tolist()
        made.append(Example(ids, [-100] * (2 + i) + ids[2 + i :]))
    made.append(Example([5, 6], [-100, -100]))
    return made


def by_hand(model, examples):
    rows = []
    for number, example in enumerate(examples):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().softmax(dim=-1)
        for place, label in enumerate(example.labels):
            if label >= 0:
                q = p[place - 1]
                one_hot = torch.zeros_like(q)
                one_hot[label] = 1
                brier = float(((q - one_hot) ** 2).sum())
                rows.append((float(q.max()), float(q.argmax() == label), -float(q[label].log()), brier, number))
    return torch.tensor(rows, dtype=torch.float64).T.numpy()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_statistics_are_those_of_the_full_softmax_whatever_the_batch(build, examples, kind):
    model = build(kind, torch.float64)
    expected = by_hand(model, examples)

    def check(**arguments):
        got = TokenPredictor(model, **arguments).predict(examples)
        for values, want in zip((got.confidence, got.correct, got.nll, got.brier, got.row), expected, strict=True):
            # Gemma's attention takes its softmax in float32, whatever the model's own precision.
            assert values == pytest.approx(want, abs=1e-5 if kind == "gemma2" else 1e-9)

    check()
    check(batch_size=1)
    check(batch_size=3)


def test_nothing_to_predict_is_an_error(build):
    with pytest.raises(CalsmoothError, match="no response tokens"):
        TokenPredictor(build("llama")).predict([Example([1, 2], [-100, -100])])
