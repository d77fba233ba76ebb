"""Runs from configuration to files: accumulation, resuming after a kill, and everything that can be wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune import run as run_module
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.plan import Plan, prepare
from calsmooth.finetune.run import run


def config(model_folder: Path, dataset: Path, output: Path | None, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(model_folder),
        "dataset": str(dataset),
        "output": output,
        "lr": 1e-3,
        "epochs": 2,
        "batch_size": 8,
        "max_length": 512,
        "device": "cpu",
        **changes,
    }
    return FinetuneConfig(**settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_its_files(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    result = run(config(model_folder, dataset, tmp_path / "run"))
    names = {p.name for p in result.folder.iterdir()}
    assert names == {
        "COMPLETED", "README.md", "checkpoints", "config.yaml", "data.json", "environment.json", "loss.png",
        "loss.svg", "loss.pdf", "metrics.jsonl", "model", "summary.json",
    }  # fmt: skip
    lines = metrics(result.folder)
    assert [line["step"] for line in lines] == list(range(1, 11))  # 40 rows, 8 a step, 2 epochs
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= lines[0].keys()
    plan, _ = prepare(config(model_folder, dataset, tmp_path / "x"))
    assert lines[-1]["tokens"] == 2 * plan.target_tokens
    assert lines[-1]["loss"] < lines[0]["loss"]
    settings = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert settings["batch_size"] == 8
    assert settings["beta"] == 0.1
    card = (result.model / "README.md").read_text()
    assert card.startswith("---\n")
    assert "beta = 0.1" in card
    assert [p.name for p in (result.folder / "checkpoints").iterdir()] == ["checkpoint-10"]


def test_the_saved_model_is_the_trained_one(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(config(model_folder, dataset, tmp_path / "run", epochs=1))
    model = AutoModelForCausalLM.from_pretrained(result.model)
    ids = AutoTokenizer.from_pretrained(result.model)("the cat eats", return_tensors="pt")
    assert model(**ids).logits.isfinite().all()
    old = load_file(model_folder / "model.safetensors")
    assert any(not torch.equal(old[name], tensor) for name, tensor in weights(result.folder).items())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation_does_not_change_the_run(
    model_folder: Path, dataset: Path, tmp_path: Path, reduction: str
) -> None:
    """1 x 8, 2 x 4 and 8 x 1 examples, with uneven numbers of targets, are one and the same batch."""
    losses, ends = [], []
    for micro in (8, 4, 1):
        # Dropout draws differently for other micro-batches; everything else has to agree.
        folder = tmp_path / str(micro)
        settings = config(
            model_folder, dataset, folder, micro_batch_size=micro, epochs=1, loss_reduction=reduction, lr=1e-4
        )
        run(without_dropout(settings, tmp_path / f"model-{micro}"))
        losses.append(torch.tensor([line["loss"] for line in metrics(folder)]))
        ends.append(weights(folder))
    for other in (1, 2):
        torch.testing.assert_close(losses[0], losses[other], rtol=1e-5, atol=1e-5)
        for name, tensor in ends[0].items():
            torch.testing.assert_close(tensor, ends[other][name], rtol=1e-4, atol=1e-5)


def without_dropout(settings: FinetuneConfig, folder: Path) -> FinetuneConfig:
    import dataclasses
    import shutil

    shutil.copytree(settings.model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_dropout": 0.0}))
    return dataclasses.replace(settings, model=str(folder))


def test_beta_changes_the_loss_and_the_weights(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    plain = run(config(model_folder, dataset, tmp_path / "a", beta=0.0, epochs=1))
    smooth = run(config(model_folder, dataset, tmp_path / "b", beta=0.2, epochs=1))
    assert metrics(plain.folder)[0]["loss"] != metrics(smooth.folder)[0]["loss"]
    assert any(not torch.equal(t, weights(smooth.folder)[n]) for n, t in weights(plain.folder).items())


def test_the_same_seed_gives_the_same_weights(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    first, second, third = (
        run(config(model_folder, dataset, tmp_path / name, epochs=1, seed=seed)).folder
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert all(torch.equal(t, weights(second)[n]) for n, t in weights(first).items())
    assert any(not torch.equal(t, weights(third)[n]) for n, t in weights(first).items())


def test_a_killed_run_resumes_to_the_same_bits(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = [
        "--model", str(model_folder), "--dataset", str(dataset), "--lr", "1e-3", "--epochs", "20", "--batch-size", "8",
        "--max-length", "512", "--device", "cpu", "--micro-batch-size", "4", "--save-every", "7", "--quiet",
    ]  # fmt: skip
    command = [sys.executable, "-m", "calsmooth", "finetune", *arguments, "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, timeout=300)
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    lines = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= 40):
        time.sleep(0.01)
    assert killed.poll() is None, "the run ended before it could be killed: give it more steps"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "COMPLETED").exists()
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], check=True, env=environment, timeout=300)

    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["resumed_at_step"] >= 35
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "killed"), strict=True):
        for timing in ("tokens_per_second", "peak_memory_bytes"):
            a.pop(timing), b.pop(timing)
        assert a == b


def test_a_half_written_checkpoint_is_never_taken(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(model_folder, dataset, tmp_path / "run", save_every=3, keep_last=2)
    original, saves = torch.save, [0]

    def full_disk(*args: Any, **kwargs: Any) -> None:
        saves[0] += 1
        if saves[0] > 7:  # some files into the third checkpoint
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CalsmoothError, match=r"checkpoint of step \d+ could not be written .* --resume"):
        run(settings)
    monkeypatch.undo()
    found = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert found
    assert all(name.startswith("checkpoint-") for name in found)
    whole = run(config(model_folder, dataset, tmp_path / "whole", save_every=3, keep_last=2))
    resumed = run(config(model_folder, dataset, tmp_path / "run", save_every=3, keep_last=2, resume=True))
    assert all(torch.equal(t, weights(resumed.folder)[n]) for n, t in weights(whole.folder).items())


def test_resuming_with_other_settings_is_refused(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    run(config(model_folder, dataset, tmp_path / "run", epochs=1))
    (tmp_path / "run" / "COMPLETED").unlink()
    with pytest.raises(UsageError, match=r"has lr = 0\.001, now 0\.002 is asked for"):
        run(config(model_folder, dataset, tmp_path / "run", epochs=1, lr=2e-3, resume=True))


def test_resuming_a_complete_run_changes_nothing(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    first = run(config(model_folder, dataset, tmp_path / "run", epochs=1))
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    again = run(config(model_folder, dataset, tmp_path / "run", epochs=1, resume=True))
    assert again.summary == first.summary
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}


def test_resume_finds_the_newest_unfinished_run(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(model_folder, dataset, None, epochs=1, resume=True)
    with pytest.raises(UsageError, match="no unfinished run of the name"):
        run(settings)
    first = run(config(model_folder, dataset, None, epochs=1))
    assert first.folder == Path("runs") / f"finetune-{model_folder.name}-beta0.1"
    (first.folder / "COMPLETED").unlink()
    assert run(settings).folder == first.folder
    assert (first.folder / "COMPLETED").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "probe", lambda *_: Plan)  # the probe would see it before
    settings = config(model_folder, dataset, tmp_path / "run", lr=1e30, max_grad_norm=0.0, save_every=1)
    with pytest.raises(CalsmoothError, match=r"step \d+: the loss is .*(nan|inf)"):
        run(settings)
    assert not (tmp_path / "run" / "COMPLETED").exists()


def test_a_folder_with_files_is_refused_before_work(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds files already"):
        run(config(model_folder, dataset, tmp_path))
    with pytest.raises(UsageError, match="holds no run to resume"):
        run(config(model_folder, dataset, tmp_path, resume=True))


def test_micro_batches_must_divide_the_batch(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--micro-batch-size 3 doesn't divide --batch-size 8"):
        prepare(config(model_folder, dataset, tmp_path, micro_batch_size=3))


def test_bad_data_is_named(model_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for content, message in (
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": \n',
            r"bad\.jsonl, line 2: not valid JSON",
        ),
        ('{"question": "a", "answer": "b"}\n', r"line 1: columns question, answer fit no known format"),
        ('{"instruction": "a", "output": ""}\n', r"line 1: column 'output' is empty"),
    ):
        bad.write_text(content)
        with pytest.raises(CalsmoothError, match=message):
            run(config(model_folder, bad, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_dry_run_shows_the_plan_and_writes_nothing(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "calsmooth", "finetune", "--model", str(model_folder), "--dataset", str(dataset),
        "--batch-size", "8", "--dry-run",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "10 steps of 8 examples" in done.stdout
    assert "### Response:" in done.stdout
    plan = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path).stdout)
    assert plan["config"]["lr"] == 2e-5
    assert plan["steps"] == 10
    assert list(tmp_path.iterdir()) == []


def test_no_gradient_that_is_not_a_number_reaches_weights_or_checkpoints(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """Also between two lines of metrics, and with nothing in the loss to show it yet."""
    settings = config(
        model_folder, dataset, tmp_path / "run", lr=1e30, max_grad_norm=0.0, save_every=1, log_every=100, keep_last=9
    )
    with pytest.raises(CalsmoothError, match=r"^step \d+: the loss is .* lower --lr"):
        run(settings)
    saved = list((tmp_path / "run" / "checkpoints").glob("*/model.safetensors"))
    assert saved
    assert all(t.isfinite().all() for path in saved for t in load_file(path).values())


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_metrics_lines_do_not_depend_on_where_a_run_was_resumed(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    settings = {"save_every": 3, "log_every": log_every}
    whole = run(config(model_folder, dataset, tmp_path / "whole", **settings))
    original, saves = torch.save, [0]

    def broken_disk(*arguments: Any, **options: Any) -> None:
        saves[0] += 1
        if saves[0] > 9:  # some files into the checkpoint of step 9
            raise OSError(28, "No space left on device")
        original(*arguments, **options)

    monkeypatch.setattr(torch, "save", broken_disk)
    with pytest.raises(CalsmoothError, match="checkpoint of step 9"):
        run(config(model_folder, dataset, tmp_path / "broken", **settings))
    monkeypatch.undo()
    resumed = run(config(model_folder, dataset, tmp_path / "broken", resume=True, **settings))
    assert resumed.summary["resumed_at_step"] == 6
    for a, b in zip(metrics(whole.folder), metrics(resumed.folder), strict=True):
        for timing in ("tokens_per_second", "peak_memory_bytes"):
            a.pop(timing), b.pop(timing)
        assert a == b
    assert metrics(whole.folder)[-1]["step"] == 10, "the last step is always logged"


def test_the_loss_is_a_tokens_under_either_reduction(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    lines = [
        metrics(run(config(model_folder, dataset, tmp_path / name, lr=1e-9, epochs=1, loss_reduction=name)).folder)
        for name in ("mean", "sum")
    ]
    for mean, total in zip(*lines, strict=True):
        assert total["loss"] == pytest.approx(mean["loss"], rel=1e-4)
        assert total["grad_norm"] > 10 * mean["grad_norm"]


def test_the_saved_model_generates_as_fast_as_before(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    result = run(config(model_folder, dataset, tmp_path / "run", epochs=1))
    assert json.loads((result.model / "config.json").read_text())["use_cache"] is True


def test_a_run_can_be_resumed_by_its_own_configuration(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calsmooth.config import load

    first = run(config(model_folder, dataset, tmp_path / "run", epochs=1, limit=24, beta=0.3))
    (first.folder / "COMPLETED").unlink()
    again = load(FinetuneConfig, {"resume": True}, first.folder / "config.yaml")
    assert run(again).folder == first.folder
    assert (first.folder / "COMPLETED").exists()
    stored = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert stored["micro_batch_size"] in (1, 2, 4, 8), "what was found is written down"
    assert stored["save_every"] == 1
    assert stored["output"] == str(first.folder)


def test_what_a_resumed_run_is_not_told_again_stays_as_it_was(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    first = run(config(model_folder, dataset, tmp_path / "run", limit=24, micro_batch_size=2))
    (first.folder / "COMPLETED").unlink()
    again = run(config(model_folder, dataset, tmp_path / "run", resume=True))  # no limit, no micro_batch_size
    assert again.summary["rows"] == 24


def test_resume_does_not_take_a_run_of_a_longer_name(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = run(config(model_folder, dataset, None, epochs=1, beta=0.15))
    (other.folder / "COMPLETED").unlink()
    with pytest.raises(UsageError, match="no unfinished run of the name"):
        run(config(model_folder, dataset, None, epochs=1, beta=0.1, resume=True))


def test_half_written_leftovers_of_a_killed_process_are_removed(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    first = run(config(model_folder, dataset, tmp_path / "run", epochs=1))
    (first.folder / "COMPLETED").unlink()
    (first.folder / ".model.abc").mkdir()
    (first.folder / "checkpoints" / ".checkpoint-4" / "checkpoint-4").mkdir(parents=True)
    run(config(model_folder, dataset, tmp_path / "run", epochs=1, resume=True))
    assert not [p for p in first.folder.rglob("*") if p.name.startswith(".")]


def test_requests_that_can_not_be_are_refused_before_the_data_are_read(model_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds files already"):
        run(config(model_folder, missing, tmp_path))
    with pytest.raises(UsageError, match="there is one process; start several"):
        run(config(model_folder, missing, tmp_path / "run", parallel="fsdp"))


def test_the_built_in_run_ends_with_before_and_after(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calsmooth", "finetune", "--epochs", "1", "--limit", "64", "--beta", "0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "runs" / "finetune-demo-beta0.2"
    lines = done.stdout.splitlines()
    assert lines[0] == "Fine-tuning the built-in model on the built-in data with label smoothing beta = 0.2."
    for row in ("questions, before", "questions, after", "responses, before", "responses, after"):
        assert any(line.startswith(row) for line in lines)
    assert lines[-1] == "Pictures: runs/finetune-demo-beta0.2/loss.png, runs/finetune-demo-beta0.2/calibration.png"
    results = {m: json.loads((folder / m / "results.json").read_text())["tasks"] for m in ("before", "after")}
    assert results["before"]["demo"]["n"] == results["after"]["demo"]["n"] > 100
    assert results["before"]["demo"]["nll"] != results["after"]["demo"]["nll"]
    again = subprocess.run(
        [*command, "--resume", "--output", str(folder), "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    answer = json.loads(again.stdout)
    assert answer["evaluation"]["after"]["demo"] == results["after"]["demo"]
    assert answer["steps"] == 2
