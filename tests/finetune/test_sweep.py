"""Sweeps: lists in the file become runs, their comparison is right, and what is finished isn't done again."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from calsmooth.cli.app import app
from calsmooth.config import load_grid
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.stopping import StoppedError
from calsmooth.finetune.sweep import Row, children, prepare_sweep, run_sweep


def grid(folder: Path, **settings: Any) -> Any:
    file = folder / "asked.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / "sweep"), **settings}, sort_keys=False))
    return load_grid(FinetuneConfig, {}, file)


def measured(config: FinetuneConfig) -> Row:
    """What a run might come to: ECE falls with beta, accuracy with the learning rate."""
    metrics = {
        "accuracy": 0.8 - (config.lr or 0.0), "ece": 0.2 - config.beta / 2, "nll": 1.0, "ece_interval": [0.0, 0.3],
    }  # fmt: skip
    return Row("", {}, final_loss=1.0, seconds=1.0, measured={"task": metrics}, before={"task": {"ece": 0.1}})


def test_runs_are_named_after_what_distinguishes_them(tmp_path: Path) -> None:
    models, targets = ["demo", "org/other-1B"], [["q"], ["a", "b"]]
    asked = grid(tmp_path, beta=[0, 0.1], lr=["2e-5", 1e-3], model=models, lora_targets=targets, lora_rank=2)
    names = [child.name for child in children(asked, tmp_path)]
    assert len(names) == len(set(names)) == 16
    assert names[0] == "beta0-lr2e-05-modeldemo-lora_targetsq"
    assert names[-1] == "beta0.1-lr0.001-modelorg_other-1B-lora_targetsa+b"


def test_the_comparison_holds_every_run(tmp_path: Path) -> None:
    asked = grid(tmp_path, beta=[0, 0.1, 0.2], lr=[0.01, 0.1])
    result = run_sweep(asked, measured)
    assert result.folder == tmp_path / "sweep"
    assert {p.name for p in result.folder.iterdir()} == {
        "sweep.yaml",
        "sweep.json",
        "sweep.csv",
        "sweep.png",
        "sweep.svg",
        "sweep.pdf",
        "COMPLETED",
    }
    rows = list(csv.DictReader((result.folder / "sweep.csv").open()))
    assert [(row["beta"], row["lr"], row["task.ece"]) for row in rows[:2]] == [
        ("0.0", "0.01", "0.2"),
        ("0.0", "0.1", "0.2"),
    ]
    assert json.loads((result.folder / "sweep.json").read_text())[5]["varied"] == {"beta": 0.2, "lr": 0.1}
    # The file says what was asked for, and can be asked for again.
    again = load_grid(FinetuneConfig, {}, result.folder / "sweep.yaml")
    assert [values for values, _ in again] == [values for values, _ in asked]


def test_the_figure_has_a_line_for_each_other_setting(tmp_path: Path) -> None:
    rows = run_sweep(grid(tmp_path, lr=[0.01, 0.1], beta=[0.2, 0, 0.1]), measured).rows
    plot = prepare_sweep(rows)
    assert plot is not None
    assert plot.key == "beta"
    assert [others for others, _ in plot.lines] == ["lr 0.01", "lr 0.1"]
    assert [row.varied["beta"] for row in plot.lines[0][1]] == [0, 0.1, 0.2]
    assert plot.values(plot.lines[0][1], "task", "ece") == pytest.approx([0.2, 0.15, 0.1])
    _, high = plot.intervals(plot.lines[0][1], "task", "ece")
    assert np.array(high) - plot.values(plot.lines[0][1], "task", "ece") == pytest.approx([0.1, 0.15, 0.2])
    assert np.isnan(plot.intervals(plot.lines[0][1], "task", "accuracy")).all()
    assert plot.before["task"]["ece"] == 0.1
    assert prepare_sweep([Row("a", {"beta": 0.1}, final_loss=1.0)]) is None


def test_a_run_that_fails_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    def explodes(config: FinetuneConfig) -> Row:
        if config.lr == 10:
            raise CalsmoothError("step 3: the loss is nan")
        return measured(config)

    result = run_sweep(grid(tmp_path, lr=[10, 0.1], beta=[0.0, 0.1]), explodes)
    assert [row.error for row in result.rows] == ["step 3: the loss is nan"] * 2 + [None] * 2
    assert json.loads((result.folder / "sweep.json").read_text())[0]["error"] == "step 3: the loss is nan"
    with pytest.raises(CalsmoothError, match=r"every run of the sweep .* failed; the first: step 3"):
        run_sweep(grid(tmp_path, lr=[10], output=str(tmp_path / "other")), explodes)


def test_a_run_that_is_asked_to_stop_stops_the_sweep(tmp_path: Path) -> None:
    def stopped(config: FinetuneConfig) -> Row:
        raise StoppedError("stopped by SIGTERM", 15)

    with pytest.raises(StoppedError):
        run_sweep(grid(tmp_path, beta=[0, 0.1]), stopped)
    assert not (tmp_path / "sweep" / "COMPLETED").exists()


def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="'resume' is a list"):
        run_sweep(grid(tmp_path, resume=[True, False]), measured)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process, and 2 were started"):
        run_sweep(grid(tmp_path, beta=[0.1]), measured)
    monkeypatch.delenv("WORLD_SIZE")
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds files already"):
        run_sweep(grid(tmp_path, beta=[0, 0.1]), measured)
    with pytest.raises(UsageError, match="holds no sweep to resume"):
        run_sweep(grid(tmp_path, beta=[0, 0.1], resume=True), measured)


def test_a_sweep_from_the_command_line_is_resumed_and_extended(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    def sweep(*flags: str, beta: list[float]) -> Any:
        file = tmp_path / "sweep.yaml"
        settings = {
            "model": str(model_folder), "dataset": str(dataset), "lr": 1e-3, "batch_size": 8, "epochs": 1,
            "max_length": 512, "device": "cpu", "eval_every": 100, "eval_rows": 4, "cache": False,
        }  # fmt: skip
        file.write_text(yaml.safe_dump({**settings, "beta": beta}))
        output = ["--config", str(file), "--output", str(tmp_path / "sweep"), *flags]
        return CliRunner().invoke(app, ["finetune", *output])

    done = sweep("--quiet", beta=[0.0, 0.1])
    assert done.exit_code == 0, done.output
    folders = [tmp_path / "sweep" / name for name in ("beta0", "beta0.1", "beta0.2")]
    assert [folder.exists() for folder in folders] == [True, True, False]
    untouched = {p: p.stat().st_mtime_ns for p in folders[0].rglob("*")}
    (folders[1] / "COMPLETED").unlink()  # as if it had been killed

    resumed = sweep("--resume", "--json", beta=[0.0, 0.1, 0.2])
    assert resumed.exit_code == 0, resumed.output
    runs = json.loads(resumed.stdout)["runs"]
    assert [run["name"] for run in runs] == ["beta0", "beta0.1", "beta0.2"]
    assert all(0 <= run["measured"]["held-out tokens"]["ece"] <= 1 for run in runs)
    assert untouched == {p: p.stat().st_mtime_ns for p in folders[0].rglob("*")}
    assert json.loads((folders[1] / "summary.json").read_text())["resumed_at_step"] == 5
    assert (folders[2] / "COMPLETED").exists()
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    other = sweep("--resume", "--epochs", "2", beta=[0.0, 0.1])
    assert isinstance(other.exception, UsageError)
    assert "has epochs = 1, now 2 is asked for" in str(other.exception)
    assert "give each one value by its flag" in str(sweep("--dry-run", beta=[0.0, 0.1]).exception)
