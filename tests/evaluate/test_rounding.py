"""Token statistics that rounding left a hair above what is possible, from the readout to what reads our files.

On a GPU the log-sum-exp, the target's logit and the top token's are rounded apart: a certain token's log-probability
was seen at +2e-6 (the top token) and +6e-5 (the target), its Brier score at -1e-4.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.calibrate.run import run as calibrate
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate import readout as readout_module
from calsmooth.evaluate.comparison import compare
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.readout import Readout
from calsmooth.evaluate.run import run as evaluate
from calsmooth.finetune import head as head_module
from calsmooth.finetune.evaluation import summarize
from calsmooth.heads import find_head
from calsmooth.loss import token_statistics
from calsmooth.models import BUILT_IN

ULP = 2.0**-18
ROWS, POSITIONS = torch.tensor([0, 1, 2]), torch.tensor([3, 8, 5])


def certain(top: float, target: float):
    """`token_statistics` of a model that is certain everywhere, as rounding may give them; squares lie 1e-4 off."""

    def rounded(hidden_states, weight, targets, **options):
        found = token_statistics(hidden_states, weight, targets, **options)
        doubled = options.get("scale") == 2.0
        return dataclasses.replace(
            found,
            top_logprob=torch.full_like(found.top_logprob, top),
            target_logprob=torch.full_like(found.target_logprob, target),
            logsumexp=torch.full_like(found.logsumexp, -1e-4 if doubled else 0.0),
        )

    return rounded


@pytest.fixture
def inputs():
    ids = torch.randint(3, 340, (3, 9), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@pytest.mark.parametrize("above", [ULP, 1e-5])
def test_the_readout_gives_probabilities(build, inputs, above, monkeypatch):
    readout = Readout(build())
    monkeypatch.setattr(readout_module, "token_statistics", certain(above, 6 * above))
    place = torch.tensor([0, 1, 2])
    assert readout.logprobs(inputs, ROWS, POSITIONS, place, torch.tensor([5, 6, 7])).tolist() == [0.0] * 3
    confidence, _, nll, brier = readout.token_statistics(inputs, ROWS, POSITIONS, torch.tensor([5, 6, 7])).T
    assert confidence.tolist() == [1.0] * 3
    assert nll.tolist() == brier.tolist() == [0.0] * 3


def test_a_target_that_is_the_top_token_is_as_probable_and_another_no_more_so(build, inputs, monkeypatch):
    readout = Readout(build())
    top = token_statistics(torch.zeros(3, 32), torch.zeros(340, 32), torch.zeros(3, dtype=torch.long)).top_token
    monkeypatch.setattr(readout_module, "token_statistics", certain(-0.5, -0.5 + 1e-5))
    confidence, _, nll, _ = readout.token_statistics(inputs, ROWS, POSITIONS, top).T
    assert confidence.tolist() == (-nll).exp().tolist()


@pytest.mark.parametrize("above", [0.02, float("inf"), float("nan")])
def test_more_than_rounding_is_no_probability(build, inputs, above, monkeypatch):
    readout = Readout(build())
    monkeypatch.setattr(readout_module, "token_statistics", certain(above, above))
    assert readout.logprobs(inputs, ROWS, POSITIONS, torch.arange(3), torch.tensor([5, 6, 7])).isnan().all()
    assert readout.token_statistics(inputs, ROWS, POSITIONS, torch.tensor([5, 6, 7]))[:, 0].isnan().all()


def raised(above: float):
    """`token_statistics` as they are, with `above` nats more for the top token and for a target that it is."""

    def rounded(hidden_states, weight, targets, **options):
        found = token_statistics(hidden_states, weight, targets, **options)
        more = above * (found.top_token == targets) - found.target_logprob * (found.top_token == targets)
        return dataclasses.replace(
            found,
            top_logprob=torch.full_like(found.top_logprob, above),
            target_logprob=found.target_logprob + more,
        )

    return rounded


@pytest.mark.parametrize("above", [ULP, 1e-5])
def test_all_that_reads_our_files_takes_them(above, monkeypatch, tmp_path):
    monkeypatch.setattr(readout_module, "token_statistics", raised(above))

    def config(folder):
        return EvaluateConfig(
            BUILT_IN, ("demo", "responses"), tmp_path / folder, limit=40, device="cpu", format="letter"
        )

    result = evaluate(config("one"))
    responses = result.results["tasks"]["responses"]
    assert responses["mean_confidence"] == 1.0
    assert responses["brier"] >= 0
    assert responses["nll"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert max(max(line["logprobs"]) for line in lines) <= 0
    calibrate(CalibrateConfig(predictions=tmp_path / "one" / "predictions.jsonl", output=tmp_path / "calibrated"))
    evaluate(config("other"))
    compared = compare([str(tmp_path / "one"), str(tmp_path / "other")], tmp_path / "compared")
    assert compared.results["differences"]["demo"]["other"]["ece"][0] == 0


def test_a_model_far_above_1_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(readout_module, "token_statistics", raised(0.5))
    with pytest.raises(CalsmoothError, match="not a number from 0 to 1"):
        evaluate(EvaluateConfig(BUILT_IN, ("responses",), tmp_path / "one", limit=4, device="cpu"))


@pytest.mark.parametrize("above", [ULP, 1e-5])
def test_finetunes_own_evaluation_has_no_confidence_above_1(build, above, monkeypatch):
    monkeypatch.setattr(head_module, "token_statistics", raised(above))
    head = find_head(build())
    hidden_states = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    targets = token_statistics(hidden_states, head.weight, torch.zeros(6, dtype=torch.long)).top_token
    rows = head_module.measured(head, hidden_states, targets).double().numpy()
    values = summarize(dict(zip(head_module.STATISTICS, rows, strict=True)), filtered=False)
    assert values["eval_confidence"] == values["eval_accuracy"] == 1.0
    assert values["eval_nll"] == values["eval_ece"] == 0.0
    assert np.isfinite(list(values.values())).all()
