"""What can go wrong in a long run, what it says, what it leaves on the disk, and that it can be gone on with."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune import recording, results
from calsmooth.finetune import run as run_module
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.run import FinetuneResult, run
from calsmooth.finetune.stopping import StoppedError, stop_requests
from calsmooth.finetune.trainer import SFTTrainer


def config(model_folder: Path, dataset: Path, output: Path, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(model_folder),
        "dataset": (str(dataset),),
        "output": output,
        "lr": 1e-3,
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 512,
        "device": "cpu",
        "cache": False,
        "save_every": 4,
        "keep_last": 2,
        **changes,
    }
    return FinetuneConfig(**settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    other = weights(b)
    return all(torch.equal(tensor, other[name]) for name, tensor in weights(a).items())


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, dataset: Path) -> FinetuneResult:
    """An uninterrupted run of ten steps, with dropout and evaluations."""
    return run(config(model_folder, dataset, tmp_path_factory.mktemp("whole") / "run", eval_every=3))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call `act` when the line of that step is shown."""
    original = recording.training_note

    def note(values: dict[str, Any]) -> str:
        if values["step"] == step:
            act()
        return original(values)

    monkeypatch.setattr(recording, "training_note", note)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_behind_a_checkpoint_and_the_run_ends_with_the_same_bits(
    model_folder: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: FinetuneResult,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "run"
    at_step(monkeypatch, 5, lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    with pytest.raises(
        StoppedError, match=f"stopped by {number.name} after step 6 of 10, behind a checkpoint; go on"
    ) as stopped:
        run(config(model_folder, dataset, folder, eval_every=3))
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    assert kept(folder) == ["checkpoint-4", "checkpoint-6"]
    assert not (folder / "COMPLETED").exists()
    monkeypatch.undo()
    resumed = run(config(model_folder, dataset, folder, eval_every=3, resume=True))
    assert resumed.summary["resumed_at_step"] == 6
    assert same(whole.folder, folder)
    lines = [(r.folder / "metrics.jsonl").read_text().splitlines() for r in (whole, resumed)]
    for a, b in zip(*(map(json.loads, each) for each in lines), strict=True):
        for timing in ("tokens_per_second", "peak_memory_bytes"):
            a.pop(timing, None), b.pop(timing, None)
        assert a == b


def test_a_second_interrupt_ends_at_once() -> None:
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_ends_the_command_with_143(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "calsmooth", "finetune", "--model", str(model_folder), "--dataset", str(dataset),
        "--batch-size", "4", "--epochs", "200", "--device", "cpu", "--save-every", "5000", "--no-cache",
        "--output", str(folder),
    ]  # fmt: skip
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = folder / "metrics.jsonl"
    while child.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= 3):
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 143
    assert [line.split(":")[0] for line in errors.splitlines()] == ["warning", "error"]
    assert "go on with --resume" in errors
    [checkpoint] = kept(folder)
    assert lines.read_text().count("\n") == int(checkpoint.removeprefix("checkpoint-"))


def test_a_loss_that_explodes_stops_before_the_step_is_taken(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def explode() -> None:
        """The model's head grows a hundredfold between two steps."""
        model[0].get_output_embeddings().weight.data.mul_(100.0)

    model: list[Any] = []
    load = run_module.load_model

    def keep(*args: Any, **given: Any) -> Any:
        model.append(load(*args, **given))
        return model[-1]

    monkeypatch.setattr(run_module, "load_model", keep)
    at_step(monkeypatch, 5, explode)
    with pytest.raises(
        CalsmoothError,
        match=r"step 6: the loss is \S+ a token, above \S+ \(--max-loss\).* not taken.*last good .*checkpoint-4;",
    ):
        run(config(model_folder, dataset, folder))
    assert kept(folder) == ["checkpoint-4"]
    found = json.loads((folder / "bad-step.json").read_text())
    assert found["step"] == 6
    assert len(found["micro_batches"]) == 2
    assert sum(len(m["rows"]) for m in found["micro_batches"]) == 8
    assert all("### Response:" in row for m in found["micro_batches"] for row in m["rows"])


def test_a_batch_whose_loss_is_not_a_number_is_named(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = SFTTrainer.compute_loss, [0]

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:  # the second micro-batch of the sixth step
            model.get_output_embeddings().weight.data[0, 0] = float("nan")
        return original(self, model, inputs, *args, **given)

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    with pytest.raises(
        CalsmoothError, match=r"step 6: the loss is nan a token .*in micro-batch 2 of 2; the step was not"
    ):
        run(config(model_folder, dataset, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "bad-step.json").read_text())
    assert [m["loss"] is None for m in found["micro_batches"]] == [False, True]
    saved = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model.safetensors", "garbled"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "garbled"),
        ("trainer_state.json", "missing"),
        ("meter.json", "garbled"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_takes_over(
    model_folder: Path, dataset: Path, tmp_path: Path, whole: FinetuneResult, file: str, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for gone in ("COMPLETED", "model"):
        path = folder / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert kept(folder) == ["checkpoint-10", "checkpoint-8"]
    damaged = folder / "checkpoints" / "checkpoint-10" / file
    content = damaged.read_bytes()
    if how == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(content[: len(content) // 2] if how == "cut" else b"\xff" * len(content))
    settings = config(model_folder, dataset, folder, eval_every=3, resume=True)
    with pytest.raises(
        CalsmoothError,
        match=r"checkpoint-10: not a readable checkpoint .*this folder and --resume will go on from checkpoint-8",
    ):
        run(settings)
    if (file, how) != ("optimizer.pt", "cut"):
        return  # the rest is the same for all, and once is enough
    shutil.rmtree(damaged.parent)
    assert run(settings).summary["resumed_at_step"] == 8
    assert same(whole.folder, folder)


def test_a_run_is_not_gone_on_with_on_other_data(
    model_folder: Path, dataset: Path, tmp_path: Path, whole: FinetuneResult
) -> None:
    changed, rows = tmp_path / "train.jsonl", dataset.read_text().splitlines()
    changed.write_text("\n".join(rows) + "\n")
    folder = tmp_path / "run"
    run(config(model_folder, changed, folder, max_steps=1))
    (folder / "COMPLETED").unlink()
    changed.write_text("\n".join([rows[0].replace('instruction": "', 'instruction": "the '), *rows[1:]]) + "\n")
    with pytest.raises(UsageError, match=r"the data isn't what the run in .* began with .*40 examples"):
        run(config(model_folder, changed, folder, max_steps=1, resume=True))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """The system refuses files above a size, as a full disk does: the first checkpoint doesn't fit."""
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "calsmooth", "finetune", "--model", str(model_folder), "--dataset", str(dataset),
        "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--save-every", "4", "--no-cache", "--quiet",
        "--output", str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: checkpoint of step 4 could not be written")
    assert done.stderr.count("\n") == 1
    assert "make room and go on with --resume" in done.stderr
    assert kept(folder) == []
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]


def test_a_model_that_can_not_be_written_leaves_the_checkpoints(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(results, "_save", full)
        with pytest.raises(CalsmoothError, match=r"model can't be written .*No space left.* checkpoints are whole"):
            run(config(model_folder, dataset, folder, max_steps=4))
    assert kept(folder) == ["checkpoint-4"]
    assert run(config(model_folder, dataset, folder, max_steps=4, resume=True)).summary["resumed_at_step"] == 4
    assert (folder / "COMPLETED").exists()


def test_resume_on_an_empty_folder_starts_and_says_so(
    model_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(config(model_folder, dataset, tmp_path / "run", max_steps=1, resume=True))
    assert f"{tmp_path / 'run'} holds no run yet; starting one." in "".join(capsys.readouterr())
    assert result.summary["steps"] == 1
