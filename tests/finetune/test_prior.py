"""Smoothing towards something else than the uniform distribution, from the command line to the loss."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calsmooth import linear_cross_entropy_reference
from calsmooth.errors import UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.plan import prepare
from calsmooth.finetune.prior import read_prior, smoothing_prior
from calsmooth.finetune.run import run


def config(model: Path, dataset: Path, output: Path | None = None, **changes: Any) -> FinetuneConfig:
    settings = {"lr": 1e-3, "epochs": 1, "batch_size": 8, "max_length": 512, "device": "cpu", **changes}
    return FinetuneConfig(model=str(model), dataset=str(dataset), output=output, **settings)


@pytest.fixture(scope="module")
def vocabulary(model_folder: Path) -> int:
    return int(json.loads((model_folder / "config.json").read_text())["vocab_size"])


def test_unigram_counts_the_targets_that_are_trained_on(model_folder: Path, dataset: Path, vocabulary: int) -> None:
    settings = config(model_folder, dataset, smoothing_prior="unigram", eval_every=1, eval_rows=4)
    plan, _ = prepare(settings)
    assert plan.held_out
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for i, example in enumerate(plan.examples.examples):
        if i not in plan.held_out:
            for label in example.labels:
                if label != -100:
                    counts[label] += 1
    prior = smoothing_prior(plan, vocabulary, torch.device("cpu"))
    assert prior is not None
    torch.testing.assert_close(prior, (counts / counts.sum()).float())
    uniform, _ = prepare(config(model_folder, dataset))
    assert smoothing_prior(uniform, vocabulary, torch.device("cpu")) is None


def test_the_models_loss_smooths_towards_it(model_folder: Path, vocabulary: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    prior = torch.rand(vocabulary)
    prior /= prior.sum()
    hidden = model.model(ids).last_hidden_state
    expected = linear_cross_entropy_reference(
        hidden[:, :-1], model.lm_head.weight, ids[:, 1:], label_smoothing=0.3, smoothing_prior=prior, reduction="sum"
    )
    with fused_loss(model, 0.3, smoothing_prior=prior):
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
        torch.testing.assert_close(model(ids, labels=ids, divisor=torch.tensor(7.0)).loss, expected / 7)
        logits = model(ids).logits  # to generate, say: as it is outside of the block
        generated = model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(logits, model(ids).logits)
    assert torch.equal(generated, model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0))


def test_a_file_of_the_uniform_distribution_trains_as_the_default(
    model_folder: Path, dataset: Path, vocabulary: int, tmp_path: Path
) -> None:
    np.save(tmp_path / "uniform.npy", np.full(vocabulary, 1 / vocabulary))
    runs = {}
    for name, choice in (("default", "uniform"), ("file", str(tmp_path / "uniform.npy")), ("unigram", "unigram")):
        result = run(config(model_folder, dataset, tmp_path / name, smoothing_prior=choice))
        runs[name] = [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert runs["file"] == pytest.approx(runs["default"], rel=1e-4)
    assert runs["unigram"] != pytest.approx(runs["default"], rel=1e-3)
    assert "towards the unigram distribution" in (tmp_path / "unigram" / "README.md").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 160), 1 / 320), r"holds float64 \(2, 160\); expected numbers of shape \(320,\)"),
        (np.full(7, 1 / 7), "holds 7 probabilities; expected 320"),
        (np.full(320, 1.0), "sums to 320; expected 1"),
        (np.linspace(-1, 1, 320), "holds a negative number, NaN or infinity"),
        (np.array(["a"]), "expected numbers of shape"),
    ],
)
def test_a_file_that_holds_no_distribution_is_named(values: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "prior.npy", values)
    with pytest.raises(UsageError, match=message):
        read_prior(tmp_path / "prior.npy", 320)


def test_mistakes_end_in_one_line_before_the_model_is_loaded(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "short.npy", np.full(7, 1 / 7))
    for choice, message in (
        ("unigramm", "can't be read as an array"),
        ("", "--smoothing-prior is empty"),
        (str(tmp_path / "text.npy"), "isn't a .npy file of numbers"),
        (str(tmp_path / "short.npy"), "holds 7 probabilities; expected 768"),
        ("unigram", "a stream's targets can't be counted"),
    ):
        command = [sys.executable, "-m", "calsmooth", "finetune", "--smoothing-prior", choice]
        command += ["--output", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]
        if choice == "unigram":
            command += ["--streaming", "--max-steps", "1", "--dataset", str(dataset)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_changed_file_isnt_gone_on_with(
    model_folder: Path, dataset: Path, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prior.npy"
    np.save(path, np.full(vocabulary, 1 / vocabulary))
    settings = config(model_folder, dataset, tmp_path / "run", smoothing_prior=str(path))
    run(settings)
    (tmp_path / "run" / "COMPLETED").unlink()
    values = np.arange(vocabulary, dtype=np.float64)
    np.save(path, values / values.sum())
    with pytest.raises(UsageError, match=r"prior.npy \(smoothing_prior\) isn't what the run in .* began with"):
        run(config(model_folder, dataset, tmp_path / "run", smoothing_prior=str(path), resume=True))
