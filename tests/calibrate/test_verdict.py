"""The verdict: its differences, its rules, and what the command says and refuses."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from calsmooth import metrics
from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.calibrate.interval import TemperatureInterval
from calsmooth.calibrate.run import run
from calsmooth.calibrate.verdict import (
    Difference,
    difference_text,
    differences,
    judge_method,
    judge_temperature,
    paired_difference,
    tasks_made_worse,
)
from calsmooth.cli.app import app
from calsmooth.errors import UsageError
from calsmooth.records import Prediction, write_predictions

FALLS, RISES, UNCLEAR = Difference(-0.2, -0.3, -0.1), Difference(0.2, 0.1, 0.3), Difference(-0.1, -0.2, 0.1)
SURE = TemperatureInterval(1.5, 2.5, 90.0, 4.0)


def make_predictions(n, temperature=2.5, scale=3.0, task="quiz", seed=0, prefix=""):
    """Predictions whose truth is what they say, softened by the temperature; infinity: the truth is uniform."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(n):
        logits = generator.normal(size=4) * scale
        gold = int(generator.choice(4, p=np.exp(metrics.log_softmax(logits, temperature))))
        made.append(Prediction(task, task, f"{prefix}{i}", tuple(metrics.log_softmax(logits).tolist()), gold))
    return made


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that look at the numbers only."""
    monkeypatch.setattr("calsmooth.calibrate.run.write_report", lambda *_: None)
    monkeypatch.setattr("calsmooth.calibrate.run.RESAMPLES", 20)


def calibrated(tmp_path, rows, **changes):
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    return run(CalibrateConfig(predictions=file, output=tmp_path / "o", **changes)).results


# --- differences ------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_metrics():
    generator = np.random.default_rng(0)
    before, after = (metrics.log_softmax(generator.normal(size=(80, 3))) for _ in range(2))
    gold = generator.integers(0, 3, 80)
    found = differences(before, after, gold)
    expected = metrics.negative_log_likelihood(after, gold) - metrics.negative_log_likelihood(before, gold)
    assert found["nll"].value == pytest.approx(expected, abs=1e-12)
    expected = metrics.brier_score(np.exp(after), gold) - metrics.brier_score(np.exp(before), gold)
    assert found["brier"].value == pytest.approx(expected, abs=1e-12)
    sides = [metrics.top_choice(np.exp(lp), gold) for lp in (before, after)]
    assert found["ece"] == metrics.infer_ece_difference(*sides, 15)
    assert all(d.low < d.value < d.high for d in found.values())


def test_many_normal_changes_have_the_textbook_interval():
    stats = pytest.importorskip("scipy.stats")
    change = np.random.default_rng(0).normal(0.3, 1.0, 400)
    found = paired_difference(np.zeros(400), change)
    expected = stats.t.interval(0.95, 399, loc=change.mean(), scale=stats.sem(change))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)


def test_equal_changes_and_few_questions_keep_an_interval():
    assert paired_difference(np.zeros(5), np.full(5, 0.5)) == (0.5, 0.5, 0.5)
    found = paired_difference(np.zeros(2), np.array([0.1, 0.4]))
    assert np.isfinite(found).all()


def test_a_task_that_gets_worse_is_named_and_luck_isnt():
    generator = np.random.default_rng(0)
    task = np.repeat([f"t{i:02}" for i in range(50)], 40)
    before = np.log(np.full((2000, 2), 0.5))
    p = 0.5 + 0.3 * generator.uniform(-1, 1, 2000)
    p[task == "t07"] = 0.35
    after = np.log(np.stack([p, 1 - p], axis=1))
    gold = np.where(generator.random(2000) < p, 0, 1)
    gold[task == "t07"] = np.arange(40) % 10 == 0
    assert tasks_made_worse(task, before, after, gold) == ["t07"]


def test_differences_in_words():
    assert difference_text(Difference(-0.2104, -0.25, -0.17)) == "-0.210 (-0.250 to -0.170)"
    assert difference_text(Difference(-0.00021, -0.00032, 0.00004)) == "-0.000210 (-0.000320 to 0.000040)"
    assert difference_text(Difference(0.0, 0.0, 0.0)) == "0.000 (0.000 to 0.000)"


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_temperature_that_helps():
    verdict = judge_temperature(2.0, SURE, None, 150, FALLS, 1200)
    assert verdict.apply
    assert verdict.sentence == (
        "Apply it: T = 2 (1.5 to 2.5) lowers NLL by 0.200 (0.100 to 0.300) on 1,200 held-out questions."
    )


@pytest.mark.parametrize(
    ("interval", "note", "nll", "words"),
    [
        (SURE, None, RISES, "Don't apply it: T = 2 (1.5 to 2.5) raises NLL by 0.200 (0.100 to 0.300) on 60"),
        (SURE, None, UNCLEAR, "changes NLL by -0.100 (-0.200 to 0.100) on 60 held-out questions, which can't be told"),
        (TemperatureInterval(0.8, 2.5, 9.0, 4.0), None, FALLS, "T = 2 (0.8 to 2.5) can't be told from 1 with 150"),
        (
            TemperatureInterval(1.5, np.inf, 3.0, 4.0),
            None,
            FALLS,
            "Can't be told from chance with 150 questions: T isn't identified (1.5 to infinity)",
        ),
        (TemperatureInterval(1.5, np.inf, 0.0, 4.0), "bound", FALLS, "Can't be told from chance with 150 questions"),
        (TemperatureInterval(np.inf, np.inf, 9.0, 4.0), "bound", FALLS, "Worse than chance"),
        (TemperatureInterval(0.0, 0.9, 9.0, 4.0), "all right", FALLS, "there is no best temperature"),
    ],
)
def test_temperatures_not_to_apply(interval, note, nll, words):
    verdict = judge_temperature(2.0, interval, note, 150, nll, 60)
    assert not verdict.apply
    assert words in verdict.sentence


def test_other_methods():
    assert judge_method("vector", FALLS, FALLS, 60).sentence.startswith("Apply it: vector lowers NLL by 0.200")
    assert "raises NLL" in judge_method("vector", RISES, FALLS, 60).sentence
    assert "can't be told from 0" in judge_method("vector", UNCLEAR, FALLS, 60).sentence
    near_chance = judge_method("isotonic", FALLS, UNCLEAR, 60)
    assert not near_chance.apply
    assert near_chance.sentence.startswith("Can't be told from chance: after isotonic, NLL on 60 held-out questions")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_an_overconfident_model_is_worth_a_temperature(tmp_path, undrawn):
    results = calibrated(tmp_path, make_predictions(1000))
    low, high = results["temperature_interval"]
    assert low < 2.5 < high
    assert results["verdict"]["apply"]
    change = results["after"]["nll"] - results["before"]["nll"]
    assert results["differences"]["nll"][0] == pytest.approx(change, abs=1e-12)
    change = results["after"]["brier"] - results["before"]["brier"]
    assert results["differences"]["brier"][0] == pytest.approx(change, abs=1e-12)


def test_a_calibrated_model_is_left_alone(tmp_path, undrawn):
    results = calibrated(tmp_path, make_predictions(300, temperature=1.0))
    assert not results["verdict"]["apply"]
    assert "can't be told from 1 with 150 questions; don't apply it" in results["verdict"]["sentence"]


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic", "histogram"])
@pytest.mark.parametrize("folds", [None, 4])
def test_chance_is_called_chance_by_every_method(method, folds, tmp_path, undrawn):
    results = calibrated(tmp_path, make_predictions(400, temperature=np.inf, seed=3), method=method, folds=folds)
    assert results["differences"]["nll"][2] < 0  # which alone would say: apply it
    assert not results["verdict"]["apply"]
    assert results["verdict"]["sentence"].startswith("Can't be told from chance")
    if method == "temperature":
        assert results["temperature_interval"][1] is None
        assert results["against_uniform"]["likelihood_ratio"] < results["against_uniform"]["critical"]


@pytest.mark.parametrize("folds", [11, None])
def test_the_fewest_questions_that_are_taken_get_a_verdict(folds, tmp_path, undrawn):
    results = calibrated(tmp_path, make_predictions(11 if folds else 20), folds=folds)
    assert not results["verdict"]["apply"] or results["temperature_interval"][0] > 1
    assert np.isfinite(results["differences"]["nll"]).all()


def test_tasks_have_their_own_differences(tmp_path, undrawn):
    rows = make_predictions(300, task="over") + make_predictions(300, temperature=0.5, scale=1.0, task="under", seed=1)
    rows += make_predictions(8, task="tiny", seed=2)
    results = calibrated(tmp_path, rows)
    assert results["tasks"]["over"]["differences"]["nll"][2] < 0
    assert "differences" not in results["tasks"]["tiny"]
    assert "NLL clearly rises on under" in results["notes"]


def test_a_few_cloze_questions_among_letters_are_told(tmp_path, undrawn):
    rows = make_predictions(100)
    rows[0] = Prediction("quiz", "quiz", "cloze", (-3.0, -9.0), 0, (-1.0, -2.0))
    results = calibrated(tmp_path, rows)
    assert "per_byte" not in results
    assert "too few questions have scores per byte to calibrate these as well" in results["notes"]


# --- the command ------------------------------------------------------------------------------------------------------


def calibrate(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_verdict_is_on_top_in_the_file_and_on_the_page(tmp_path):
    file = write_predictions(tmp_path / "p.jsonl", make_predictions(200))
    done = calibrate(file, "-o", tmp_path / "o")
    sentence = json.loads((tmp_path / "o" / "calibration.json").read_text())["verdict"]["sentence"]
    assert done.output.splitlines()[0] == f"Verdict: {sentence}"
    assert f"<li><b>Verdict</b>: {sentence}</li>" in (tmp_path / "o" / "report.html").read_text()


def test_force_needs_bake():
    with pytest.raises(UsageError, match="there is no --bake"):
        CalibrateConfig(force=True)


def test_five_questions_are_refused_in_one_line(tmp_path):
    file = write_predictions(tmp_path / "p.jsonl", make_predictions(5))
    done = calibrate(file, "-o", tmp_path / "o")
    assert "5 predictions make parts of 3 and 2; fitting and reporting need at least 10 each" in str(done.exception)
    assert not (tmp_path / "o").exists()
