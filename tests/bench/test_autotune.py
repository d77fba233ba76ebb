"""`calsmooth bench --autotune` over several problems: searched first, kept where later runs look, told in words."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calsmooth import console
from calsmooth.bench import run as bench_run
from calsmooth.bench.config import BenchConfig
from calsmooth.errors import UsageError
from calsmooth.loss import tuning
from calsmooth.loss.kernels import configurations

DEFAULT = configurations.TABLE["interpreter", True, False]
FASTER = replace(DEFAULT, block_v=2 * DEFAULT.block_v)


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A CPU on which the kernels could run and `FASTER` takes half of the time; the file that a search writes."""
    monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "why_not", lambda *tensors: None)
    monkeypatch.setattr(tuning, "candidates", lambda device: [FASTER])

    def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        return 1.0 if FASTER in configurations.tuned().values() else 2.0, torch.tensor(1.0)

    monkeypatch.setattr(tuning, "on_device", timed)
    console.configure()
    configurations.tuned.cache_clear()
    yield tmp_path / "cache" / "kernels.json"
    configurations.tuned.cache_clear()


def config(tmp_path: Path) -> BenchConfig:
    sizes = dict(vocab=(200, 300), hidden=8, tokens=(16,), repeats=1, device="cpu", method=("calsmooth",))
    return BenchConfig(**sizes, autotune=True, output=tmp_path / "out")


def test_one_search_serves_all_shapes_and_comes_first(gpu_like, tmp_path, capsys):
    tuned_when_measured = []
    report = bench_run.run(config(tmp_path), lambda case: tuned_when_measured.append(gpu_like.is_file()))
    assert tuned_when_measured == [True, True]
    kept = json.loads(gpu_like.read_text())
    assert [(entry["short"], entry["storing"]) for entry in kept] == [(True, False), (True, True)]
    assert kept[0]["configuration"]["block_v"] == FASTER.block_v
    tuned = json.loads((tmp_path / "out" / "bench.json").read_text())["tuned"]
    assert tuned == json.loads(json.dumps(report.tuned))
    assert tuned["file"] == str(gpu_like)
    assert [found["problems"] for found in tuned["found"]] == [[[16, 200, 8], [16, 300, 8]]] * 2
    said = capsys.readouterr().out
    assert "loss alone, up to 1024 features: 0.500 of the time before over 2 problems (0.500 to 0.500)" in said
    assert f"Wrote {gpu_like}" in said


def test_what_is_no_faster_is_not_written(gpu_like, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "on_device", lambda run: (1.0, torch.tensor(1.0)))
    bench_run.run(config(tmp_path), lambda case: None)
    assert not gpu_like.exists()
    assert "loss and gradients, up to 1024 features: nothing faster than" in capsys.readouterr().out


def test_a_refusal_comes_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "matmul_rate", lambda *_: pytest.fail("nothing may be measured"))
    with pytest.raises(UsageError, match="aren't on a CUDA device"):
        bench_run.run(config(tmp_path), lambda case: None)
    assert not (tmp_path / "out").exists()
