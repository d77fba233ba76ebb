"""--report-to wandb (offline) and trackio (local), where they are installed: what they hold of a run, also resumed."""

import dataclasses
import importlib.util
import json
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calsmooth.errors import UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.run import run
from calsmooth.finetune.trackers import check_login, reported_name


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} isn't installed")


def config(model_folder: Path, dataset: Path, output: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_folder), dataset=str(dataset), output=output, device="cpu", lr=1e-3, batch_size=8,
        micro_batch_size=4, epochs=1, save_every=2, keep_last=9, eval_every=3, eval_rows=3, cache=False, **changes,
    )  # fmt: skip


def resumed_in_the_middle(asked: FinetuneConfig) -> None:
    """The run as it was behind its second step, gone on with."""
    folder = run(asked).folder
    for name in ("COMPLETED", "summary.json", "README.md", "loss.png"):
        (folder / name).unlink()
    for path in [folder / "model", *folder.glob("checkpoints/checkpoint-[!2]")]:
        shutil.rmtree(path)
    run(dataclasses.replace(asked, resume=True, report_to=()))  # as it was started


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@installed("trackio")
def test_trackio_holds_the_lines_of_metrics(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Read where trackio is first imported, so that what an earlier test left is looked for by the project's name.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "tracked")
    asked = config(model_folder, dataset, tmp_path / "run", report_to=("trackio",))
    resumed_in_the_middle(asked)
    from trackio.utils import TRACKIO_DIR

    with sqlite3.connect(Path(TRACKIO_DIR) / "tracked.db") as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    assert {(name, number) for name, number, *_ in rows} == {("run", rows[0][1])}  # one run, also when resumed
    found = [(step, json.loads(values)) for *_, step, values in rows]
    wanted = lines(tmp_path / "run")
    # Steps behind the checkpoint were done twice, and say the same twice.
    assert {step for step, _ in found} == {line["step"] for line in wanted}
    for line in wanted:
        name, value = ("eval/nll", line["eval_nll"]) if "eval_nll" in line else ("train/loss", line["loss"])
        assert {values[name] for step, values in found if step == line["step"] and name in values} == {value}
    assert capsys.readouterr().out.count("trackio:") <= 2


@installed("wandb")
def test_wandb_goes_on_with_its_run(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = config(model_folder, dataset, tmp_path / "run", report_to=("wandb",))
    resumed_in_the_middle(asked)
    assert not (tmp_path / "wandb").exists()  # its files are the run's
    begun, gone_on = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert begun.name.rsplit("-", 1)[1] == gone_on.name.rsplit("-", 1)[1]
    first, second = (next(folder.glob("*.wandb")).read_bytes() for folder in (begun, gone_on))
    for line in lines(tmp_path / "run"):
        value = json.dumps(line["eval_nll" if "eval_nll" in line else "loss"]).encode()
        assert value in first
        assert (value in second) == (line["step"] > 2)
    assert all(name in first for name in (b"train/loss", b"eval/ece", b"train/global_step", b"beta"))


@installed("wandb")
def test_wandb_without_a_key_is_refused_before_any_work(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    asked = config(model_folder, dataset, tmp_path / "run", report_to=("wandb",))
    with pytest.raises(UsageError, match=r"no API key; run `wandb login`, or set WANDB_MODE=offline"):
        check_login(asked)
    with pytest.raises(UsageError, match="no API key"):
        run(asked)
    assert not (tmp_path / "run").exists()


def test_a_value_has_the_name_that_tensorboard_shows() -> None:
    assert [reported_name(name) for name in ("loss", "eval_nll")] == ["train/loss", "eval/nll"]
