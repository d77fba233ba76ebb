"""`calsmooth calibrate` from a predictions file to calibration.json, and the split into parts."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from calsmooth import metrics
from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.calibrate.run import run
from calsmooth.calibrate.split import folds, split
from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.records import Prediction, read_predictions, write_predictions

FILES = ("calibration.json", "reliability.pdf", "reliability.png", "reliability.svg", "report.html")


def make_predictions(n=400, temperature=2.5, task="quiz", subjects=("a", "b", "c"), seed=0):
    """Over-confident predictions: the truth is what they say, softened by the temperature."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(n):
        k = 3 + i % 3  # ragged
        logits = generator.normal(size=k) * 3
        gold = int(generator.choice(k, p=np.exp(metrics.log_softmax(logits, temperature))))
        logprobs = tuple((metrics.log_softmax(logits) - 0.5).tolist())
        made.append(Prediction(task, subjects[i % len(subjects)], str(i), logprobs, gold))
    return made


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("calsmooth.calibrate.run.RESAMPLES", 50)


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that look at the numbers only."""
    monkeypatch.setattr("calsmooth.calibrate.run.write_report", lambda *_: None)


@pytest.fixture
def predictions(tmp_path):
    return write_predictions(tmp_path / "evaluation" / "predictions.jsonl", make_predictions())


def test_the_command_writes_its_files(predictions, tmp_path):
    command = [sys.executable, "-m", "calsmooth", "calibrate", str(predictions), "--output", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Verdict: Apply it: T = 2.")
    assert lines[0].endswith("on 200 held-out questions.")
    assert lines[1].startswith("Temperature 2.")
    assert "fitted on 200 questions; below, the other 200" in lines[1]
    assert [line.split()[:2] for line in lines[3:5]] == [["before", "200"], ["after", "200"]]
    folder = tmp_path / "here"
    assert sorted(p.name for p in folder.iterdir()) == [*FILES]
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "calibration.json").read_text())
    assert found["temperature"] == pytest.approx(2.5, rel=0.25)
    assert (found["n_fit"], found["n_report"]) == (200, 200)
    before, after = found["before"], found["after"]
    assert after["ece"] < before["ece"] / 2
    assert after["nll"] < before["nll"]
    assert after["accuracy"] == before["accuracy"]


def test_the_report_is_on_the_part_that_was_not_fitted(predictions, tmp_path, undrawn):
    found = run(CalibrateConfig(predictions=predictions, output=tmp_path / "o", seed=3)).results
    fit_part, report_part = split(read_predictions(predictions), 0.5, 3)
    assert {p.id for p in fit_part}.isdisjoint(p.id for p in report_part)

    def nll(part, temperature):
        scaled = metrics.log_softmax(metrics.pad_choices([p.logprobs for p in part]), temperature)
        return metrics.negative_log_likelihood(scaled, [p.gold for p in part])

    assert found["before"]["nll"] == pytest.approx(nll(report_part, 1.0), abs=1e-12)
    assert found["after"]["nll"] == pytest.approx(nll(report_part, found["temperature"]), abs=1e-12)
    assert found["fit"]["nll_after"] == pytest.approx(nll(fit_part, found["temperature"]), abs=1e-12)
    assert found["fit"]["nll_after"] < nll(fit_part, found["temperature"] * 1.001)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0.2, 0.8), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_parts_are_disjoint_stratified_and_complete(sizes, fraction, seed):
    pool = [Prediction("t", str(s), str(i), (-1.0, -2.0), 0) for s, size in enumerate(sizes) for i in range(size)]
    if min(len(pool) * fraction, len(pool) * (1 - fraction)) < 11:
        return
    fit_part, report_part = split(pool, fraction, seed)
    assert sorted(map(repr, fit_part + report_part)) == sorted(map(repr, pool))
    assert abs(len(fit_part) - fraction * len(pool)) <= 1
    counts = Counter(p.subject for p in fit_part)
    for subject, size in enumerate(sizes):
        assert abs(counts[str(subject)] - fraction * size) <= 1
    again = split(list(reversed(pool)), fraction, seed)
    assert len(again[0]) == len(fit_part)


@given(st.integers(11, 90), st.integers(2, 9), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_folds_cover_every_question_once_and_never_report_on_what_they_fit(n, number, seed):
    pool = make_predictions(n)
    if n - -(-n // number) < 10:
        return
    pairs = folds(pool, number, seed)
    assert sorted(p.id for _, part in pairs for p in part) == sorted(p.id for p in pool)
    for fit_part, report_part in pairs:
        assert {p.id for p in fit_part}.isdisjoint(p.id for p in report_part)
        assert len(fit_part) + len(report_part) == n
        counts = Counter(p.subject for p in report_part)
        assert all(abs(counts[s] - sum(p.subject == s for p in pool) / number) <= 1 for s in "abc")


def test_the_seed_decides_the_split():
    pool = make_predictions(100)
    assert split(pool, 0.5, 0) == split(pool, 0.5, 0)
    assert split(pool, 0.5, 0) != split(pool, 0.5, 1)


def test_folds_report_each_question_by_a_fit_without_it(predictions, tmp_path, undrawn):
    found = run(CalibrateConfig(predictions=predictions, output=tmp_path / "o", folds=4, seed=1)).results
    assert (found["n_fit"], found["n_report"]) == (400, 400)
    total = 0.0
    for (fit_part, report_part), fold in zip(folds(read_predictions(predictions), 4, 1), found["folds"], strict=True):
        assert (fold["n_fit"], fold["n_report"]) == (len(fit_part), len(report_part))
        scaled = metrics.log_softmax(metrics.pad_choices([p.logprobs for p in report_part]), fold["temperature"])
        total += metrics.negative_log_likelihood(scaled, [p.gold for p in report_part]) * len(report_part)
    assert found["after"]["nll"] == pytest.approx(total / 400, abs=1e-12)
    assert found["fit"]["nll_after"] < found["after"]["nll"]  # a fit looks better on what it was fitted to


@pytest.mark.parametrize("method", ["vector", "isotonic", "histogram"])
def test_the_other_methods_run_on_ragged_questions(method, predictions, tmp_path):
    done = CliRunner().invoke(app, ["calibrate", str(predictions), "--method", method, "-o", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"Verdict: Apply it: {method} lowers NLL by ")
    assert f"Method {method}, fitted on 200 questions; below, the other 200." in done.output
    found = json.loads((tmp_path / "o" / "calibration.json").read_text())
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["before"]["choice_mass"] == pytest.approx(np.exp(-0.5))
    assert "temperature" not in found


def test_cloze_is_calibrated_by_the_sum_and_by_the_byte(tmp_path):
    rows = [
        replace(p, logprobs_per_byte=tuple(x / (3 + k) for k, x in enumerate(p.logprobs))) for p in make_predictions(80)
    ]
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    done = CliRunner().invoke(app, ["calibrate", str(file), "-o", str(tmp_path / "o"), "--folds", "2"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "o" / "report.html").read_text()
    assert "https://" not in page
    assert all(f">{label}<" in page for label in ("summed, before", "per byte, after"))
    labels = [line.split("  ")[0] for line in done.output.splitlines()[4:8]]
    assert labels == ["summed, before", "summed, after", "per byte, before", "per byte, after"]
    found = json.loads((tmp_path / "o" / "calibration.json").read_text())
    by_byte = tmp_path / "by_byte.jsonl"
    write_predictions(by_byte, [replace(p, logprobs=p.logprobs_per_byte, logprobs_per_byte=None) for p in rows])
    alone = run(CalibrateConfig(predictions=by_byte, output=tmp_path / "alone", folds=2)).results
    assert found["per_byte"]["temperature"] == alone["temperature"]
    assert found["per_byte"]["after"]["ece"] == alone["after"]["ece"]
    assert found["temperature"] != found["per_byte"]["temperature"]
    assert found["per_byte"]["after"]["choice_mass"] is None


def test_a_choice_that_only_the_reported_part_has(tmp_path, undrawn):
    """Parts may differ in their largest number of choices."""
    rows = make_predictions(60)
    rows = [replace(p, logprobs=p.logprobs[:3], gold=min(p.gold, 2)) for p in rows]
    pairs = split(rows, 0.5, 0)
    wide = replace(pairs[1][0], logprobs=(*pairs[1][0].logprobs, -1.0))
    file = write_predictions(tmp_path / "p.jsonl", [wide if p.id == wide.id else p for p in rows])
    found = run(CalibrateConfig(predictions=file, output=tmp_path / "o", method="vector")).results
    assert (len(found["scale"]), found["bias"][3]) == (4, 0.0)


def test_several_tasks_share_one_temperature_and_are_reported_apart(tmp_path, undrawn):
    both = make_predictions(60, task="one") + make_predictions(60, task="two", seed=1)
    file = write_predictions(tmp_path / "predictions.jsonl", both)
    found = run(CalibrateConfig(predictions=file, output=tmp_path / "o")).results
    assert set(found["tasks"]) == {"one", "two"}
    assert found["tasks"]["one"]["before"]["n"] + found["tasks"]["two"]["before"]["n"] == 60
    assert "one temperature for all of one, two" in found["notes"]


def test_constant_predictions_end_bounded_and_say_why(tmp_path):
    rows = [Prediction("t", "s", str(i), (-1.0, -1.0), i % 2) for i in range(40)]
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    done = CliRunner().invoke(app, ["calibrate", str(file), "-o", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert "Temperature 1 (95 % interval 0 to infinity)," in done.output
    assert "no temperature matters" in done.output


def refused(tmp_path, rows, **changes):
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    with pytest.raises(CalsmoothError) as caught:
        run(CalibrateConfig(predictions=file, output=tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_predictions_are_refused(tmp_path):
    assert "19 predictions make parts of 10 and 9; fitting and reporting need at least 10 each" in refused(
        tmp_path, make_predictions(19)
    )
    assert "parts of 4 and 36" in refused(tmp_path, make_predictions(40), fit_fraction=0.1)


def test_too_few_predictions_for_folds_are_refused(tmp_path):
    assert "12 predictions in 2 folds leave 6 to fit on" in refused(tmp_path, make_predictions(12), folds=2)


def test_folds_and_a_fraction_exclude_each_other():
    with pytest.raises(UsageError, match="two ways to split"):
        CalibrateConfig(folds=5, fit_fraction=0.3)


def test_a_question_that_occurs_twice_is_refused(tmp_path):
    assert "'7' of quiz occurs twice" in refused(tmp_path, [*make_predictions(40), make_predictions(40)[7]])


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file; give the predictions"):
        run(CalibrateConfig(predictions=tmp_path / "nothing.jsonl"))


def test_json_is_alone_on_standard_output(predictions, tmp_path):
    done = CliRunner().invoke(app, ["calibrate", str(predictions), "-o", str(tmp_path / "o"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "o" / "calibration.json").read_text())


@pytest.mark.parametrize("flags", [["--model", "x"], ["--task", "mmlu"], ["--limit", "5"]])
def test_a_finished_evaluation_takes_no_evaluation_flags(predictions, flags):
    done = subprocess.run(
        [sys.executable, "-m", "calsmooth", "calibrate", str(predictions), *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"{flags[0]}: {predictions} is a finished evaluation" in done.stderr


def test_without_a_file_it_evaluates_first(tmp_path, monkeypatch):
    """The composition only: the evaluation itself has its own tests."""
    import calsmooth.evaluate.run as evaluation

    asked = []

    def evaluate(config):
        asked.append(config)
        write_predictions(config.output / "predictions.jsonl", make_predictions(80))
        return evaluation.EvaluateResult({}, [], {}, config.output)

    monkeypatch.setattr(evaluation, "run", evaluate)
    output = tmp_path / "o"
    done = CliRunner().invoke(app, ["calibrate", "--limit", "80", "--bins", "10", "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Evaluating the built-in model on the built-in task 'demo'.")
    assert (asked[0].model, asked[0].task, asked[0].limit, asked[0].bins) == ("demo", ("demo",), 80, 10)
    names = sorted([*FILES, "evaluation"])
    assert sorted(p.name for p in output.iterdir()) == names
    found = json.loads((output / "calibration.json").read_text())
    assert found["config"]["predictions"] == str(output / "evaluation" / "predictions.jsonl")


def test_an_interrupted_calibration_goes_on(tmp_path, monkeypatch):
    import calsmooth.evaluate.run as evaluation

    def evaluate(config):
        assert config.resume
        write_predictions(config.output / "predictions.jsonl", make_predictions(80))

    monkeypatch.setattr(evaluation, "run", evaluate)
    output = tmp_path / "o"
    arguments = ["calibrate", "--resume", "-o"]
    done = CliRunner().invoke(app, [*arguments, str(output)])
    assert "holds no interrupted calibration" in str(done.exception)
    (output / "evaluation" / "unfinished").mkdir(parents=True)
    # The hint of an interrupted evaluation names the evaluation's own folder.
    done = CliRunner().invoke(app, [*arguments, str(output / "evaluation")])
    assert done.exit_code == 0, done.output
    assert (output / "calibration.json").is_file()
    assert "name the folder" in str(CliRunner().invoke(app, ["calibrate", "--resume"]).exception)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["calibrate", "-o", str(tmp_path / "o")])
    assert isinstance(done.exception, UsageError)  # which `main` turns into a line and exit code 2
    assert "calibrate works in one process, 2 were started" in str(done.exception)
    assert not (tmp_path / "o").exists()
