"""`calsmooth bench` from the command line to its files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calsmooth.bench import run as bench_run
from calsmooth.bench.config import BenchConfig
from calsmooth.bench.report import ROOFLINE, Row, plot_rows, prepare_panels, result_table
from calsmooth.bench.run import pick_tokens, resolve_shapes
from calsmooth.bench.shapes import PRESETS, Shape
from calsmooth.errors import CalsmoothError, UsageError

FAST = ("--hidden", "32", "--tokens", "48", "--method", "calsmooth,eager,chunked", "--repeats", "2")
DOCUMENTED = ("method", "mode", "beta", "tokens", "vocab", "hidden", "dtype", "device", "forward_ms", "backward_ms")
DOCUMENTED += ("total_ms", "peak_bytes", "grad_error")


def calsmooth(*arguments, cwd):
    command = [sys.executable, "-m", "calsmooth", "bench", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_sweep_writes_table_json_csv_and_picture(tmp_path):
    done = calsmooth(*FAST, "--vocab", "500,900", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|V| = 500" in done.stdout
    assert "top-1 probability" in done.stdout
    assert "calsmooth exact" in done.stdout
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert result["environment"]["versions"]["torch"]
    assert result["environment"]["matmul_tflops"] > 0
    assert result["config"]["vocab"] == [500, 900]
    assert [case["vocab"] for case in result["cases"]] == [500, 900]
    assert 0 < result["cases"][0]["statistics"]["top1"] < 1
    rows = result["rows"]
    assert len(rows) == 2 * 4
    assert all(name in row for row in rows for name in DOCUMENTED)
    for row in rows:
        assert row["error"] is None
        assert row["tokens"] == 48
        assert row["total_ms"] > 0
        if row["method"] == ROOFLINE:
            assert row["peak_bytes"] == 4 * 32 * (48 + row["vocab"])
        else:
            assert row["beta"] == 0.1
            assert row["repeats"] == 2
            assert row["grad_error"] < 1e-4
    table = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [float(row["total_ms"]) for row in table] == [row["total_ms"] for row in rows]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.count("### |V|") == 2
    assert text.count("\n| calsmooth exact | 0.1 | ") == 2
    assert result["environment"]["versions"]["torch"] in text


def test_json_is_alone_on_standard_output(tmp_path):
    done = calsmooth(*FAST, "--vocab", "300", "--beta", "0,0.5", "--json", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["beta"] for row in rows if row["method"] == "calsmooth"} == {0.0, 0.5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset", "gemma-2-2"), "did you mean 'gemma-2-2b'"),
        (("--beta", "1.5"), "--beta must be at least 0 and at most 1"),
        (("--model", "m"), "--text FILE"),
        (("--text", "t.txt"), "--model DIR"),
        (("--model", "m", "--text", "missing.txt"), "no such file"),
        (("--model", "m", "--text", "."), "is a folder; give a file"),
        (("--method", "eager", "--mode", "exact"), "--mode is for the method calsmooth"),
        (("--model", "m", "--text", "t.txt", "--vocab", "100"), "brings its own sizes"),
        (("--method", "liger-kernel", "--vocab", "100"), "no method is left"),
        (("--vocab", "16000000", "--hidden", "65536", "--tokens", "1"), "free; give smaller sizes"),
    ],
)
def test_a_wrong_request_ends_in_one_line(tmp_path, flags, words):
    (tmp_path / "t.txt").write_text("some text")
    done = calsmooth(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_cpu_gets_as_many_tokens_as_time_and_memory_allow(monkeypatch):
    def pick(rate=1e11, free=64 * 2**30, vocab=256_000, **options):
        monkeypatch.setattr(bench_run.memory, "available", lambda device: free)
        shapes = [Shape("", vocab, 640)]
        return pick_tokens(BenchConfig(**options), shapes, torch.device("cpu"), torch.float32, rate, 3)

    assert 16 <= pick() <= 128
    assert pick(rate=1e12) > pick()
    assert pick(method=("calsmooth",)) > pick()
    assert pick(vocab=2000) == 2048
    # Full logits in half of the free memory: 20 bytes for each.
    assert 20 * pick(rate=1e13, free=2**30) * 256_000 <= 2**29
    assert pick(rate=1.0, free=1) == 16
    assert pick_tokens(BenchConfig(), [], torch.device("cuda"), torch.float32, 1.0, 3) == 8192


def test_shapes_come_from_presets_and_flags():
    assert resolve_shapes(BenchConfig(), "cuda") == [PRESETS["paper"]]
    assert resolve_shapes(BenchConfig(), "cpu") == [PRESETS["gemma-3-270m"]]
    assert resolve_shapes(BenchConfig(preset=("all",)), "cpu") == list(PRESETS.values())
    assert resolve_shapes(BenchConfig(vocab=(256_000,)), "cpu") == [Shape("", 256_000, 640)]
    assert resolve_shapes(BenchConfig(preset=("gemma-2-2b",), softcap=0.0), "cuda")[0].softcap is None
    assert resolve_shapes(BenchConfig(preset=("gemma-2-2b",), hidden=64), "cuda") == [Shape("", 256_000, 64, 30.0)]
    assert resolve_shapes(BenchConfig(vocab=(262_144,)), "cpu")[0].name == "gemma-3-270m"
    (gemma,) = resolve_shapes(BenchConfig(preset=("llama-3-8b",), softcap=30.0), "cuda")
    assert (gemma.vocab, gemma.softcap) == (128_256, 30.0)


def test_the_files_survive_a_method_that_fails(tmp_path, monkeypatch):
    def refuse(inputs, contestant):
        return "needs about 9.0 GiB, 1.0 GiB are free" if contestant.method.name == "eager" else None

    monkeypatch.setattr("calsmooth.bench.measure._refusal", refuse)
    options = dict(vocab=(200,), hidden=8, tokens=(16,), repeats=1, device="cpu", output=tmp_path / "out")
    shown = []
    report = bench_run.run(BenchConfig(**options, method=("calsmooth", "eager")), shown.append)
    failed = next(row for row in report.rows if row.method == "eager")
    assert failed.error.startswith("needs about")
    assert failed.total_ms is failed.peak_bytes is None
    assert len(shown) == 1
    assert "needs about 9.0" in (tmp_path / "out" / "bench.csv").read_text()


def test_when_every_method_fails_the_command_does(tmp_path, monkeypatch):
    monkeypatch.setattr("calsmooth.bench.measure._refusal", lambda inputs, contestant: "needs more")
    config = BenchConfig(vocab=(200,), hidden=8, tokens=(16,), device="cpu", output=tmp_path / "out")
    with pytest.raises(CalsmoothError, match="no method got through"):
        bench_run.run(config, lambda case: None)
    assert (tmp_path / "out" / "bench.json").is_file()


def row(method="eager", tokens=64, vocab=1000, hidden=16, total=5.0, preset="", softcap=None, **more):
    return Row(
        preset=preset, method=method, mode="", label=method, beta=None if method == ROOFLINE else 0.1, tokens=tokens,
        vocab=vocab, hidden=hidden, softcap=softcap, dtype="float32", device="cpu", frozen="none", repeats=1,
        total_ms=total, peak_bytes=None if total is None else int(total * 1e6), **more,
    )  # fmt: skip


def test_a_sweep_of_one_size_is_a_curve_over_it():
    over_vocab = [row(m, vocab=v, total=t) for v, t in ((2000, 9.0), (1000, 5.0)) for m in ("eager", ROOFLINE)]
    (panel,) = prepare_panels(over_vocab)
    assert panel.x == [1000, 2000]
    assert panel.milliseconds["eager"] == [5.0, 9.0]
    assert panel.megabytes["eager"] == [5.0, 9.0]
    over_tokens = [row(tokens=n, vocab=v) for v in (1000, 2000) for n in (64, 128)]
    assert [(p.x, p.x_label) for p in prepare_panels(over_tokens)] == [([64, 128], "tokens")] * 2
    presets = [row(preset="a", vocab=1000), row(preset="b", vocab=2000)]
    assert [p.x for p in prepare_panels(presets)] == [[64], [64]]


def test_a_method_that_failed_leaves_a_gap():
    rows = [row(tokens=64), row(tokens=128, total=None, error="out of memory"), row("chunked", tokens=128)]
    (panel,) = prepare_panels(rows)
    assert panel.milliseconds == {"eager": [5.0, None], "chunked": [None, 5.0]}
    assert plot_rows(rows).axes


def test_no_two_methods_have_the_same_line():
    names = ["calsmooth exact", "calsmooth lean", *(f"peer {i}" for i in range(20))]
    rows = [row(name, tokens=n) for name in names for n in (64, 128)]
    lines = list(plot_rows(rows).axes[0].get_lines())
    assert len(lines) == len(names)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)
    widths = {line.get_label(): line.get_linewidth() for line in lines}
    assert widths["calsmooth exact"] > widths["peer 0"]


def test_the_table_tells_what_failed():
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(result_table([row(), row("chunked", total=None, error="needs [more]"), row(ROOFLINE, total=1.0)]))
    text = capture.get()
    assert "needs [more]" in text
    assert text.index(ROOFLINE) < text.index("eager") < text.index("chunked")


def test_a_models_text_must_exist():
    with pytest.raises(UsageError, match="no such file"):
        BenchConfig(model="m", text=Path("nowhere.txt"))


def test_autotune_needs_the_gpu_kernels(tmp_path):
    done = calsmooth(*FAST, "--vocab", "300", "--autotune", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --autotune is for the GPU kernels, which can't run: the tensors aren't on a CUDA device\n"
    )
    assert not (tmp_path / "out").exists()
