"""The comparison's bookkeeping, on made-up numbers: fine-tuning itself is tested where it lives."""

import json
import sys
from types import SimpleNamespace

import pytest

from calsmooth.demo import compare


@pytest.fixture
def calls(monkeypatch):
    """Replaces the two commands: a run's ECE tells its beta and seed, the other metrics are 0.5."""
    made = []

    def finetune(config):
        made.append((config.beta, config.seed))
        return SimpleNamespace(model=f"{config.beta}/{config.seed}", summary={"seconds": 1.0})

    def evaluate(config):
        beta, seed = (0.0, 0) if config.model == "demo" else map(float, config.model.split("/"))
        tasks = {name: {"accuracy": 0.5, "ece": beta + seed / 100, "nll": 0.5, "n": 9} for name in config.task}
        return SimpleNamespace(results={"tasks": tasks})

    monkeypatch.setattr(compare, "finetune", finetune)
    monkeypatch.setattr(compare, "evaluate", evaluate)
    return made


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    return compare.main()


def test_runs_every_combination_and_averages_over_the_seeds(calls, monkeypatch, tmp_path, capsys):
    output = tmp_path / "runs"
    assert run(monkeypatch, "--seeds", "1,2", "--beta", "0,0.1,0.3", "--output", str(output), "--json") == 0
    assert calls == [(0.0, 1), (0.0, 2), (0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2)]
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / "compare.json").read_text())
    assert [m["beta"] for m in printed["mean"]] == [0.0, 0.1, 0.3]
    assert [m["demo"]["ece"] for m in printed["mean"]] == pytest.approx([0.015, 0.115, 0.315])
    assert printed["before"]["responses"] == {"accuracy": 0.5, "ece": 0.0, "nll": 0.5}
    assert printed["runs"][3] == {
        "beta": 0.1,
        "seed": 2,
        "seconds": 1.0,
        "demo": {"accuracy": 0.5, "ece": pytest.approx(0.12), "nll": 0.5},
        "responses": {"accuracy": 0.5, "ece": pytest.approx(0.12), "nll": 0.5},
    }


def test_the_table_has_before_means_and_seeds(calls, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--seeds", "1,2", "--beta", "0.1", "--output", str(tmp_path / "runs")) == 0
    lines = capsys.readouterr().out.splitlines()
    (mean,) = [line for line in lines if " mean " in line]
    assert "0.115" in mean
    assert any("before" in line and "0.000" in line for line in lines)
    assert lines[-1] == f"Runs and compare.json: {tmp_path / 'runs'}"


def test_a_folder_in_use_ends_in_one_line(calls, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(monkeypatch, "--output", str(tmp_path)) == 2
    assert "holds files already" in capsys.readouterr().err
    assert not calls


def test_seeds_that_are_no_numbers_are_refused(calls, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--seeds", "0,x")
    assert "--seeds" in capsys.readouterr().err
