"""Two GPUs train as one does: DDP, FSDP2, and DeepSpeed's ZeRO-3 where it is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ARGUMENTS = [
    "finetune", "--max-steps", "6", "--micro-batch-size", "4", "--eval-every", "3", "--eval-rows", "16",
    "--eval-task", "demo", "--eval-limit", "32", "--quiet",
]  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_nll")) for line in lines]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("one") / request.param
    command = [sys.executable, "-m", "calsmooth", *ARGUMENTS, "--dtype", request.param, "--output", str(folder)]
    subprocess.run(command, check=True, timeout=300)
    return request.param, folder


@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero3"])
def test_two_gpus_train_as_one(one: tuple[str, Path], tmp_path: Path, way: str) -> None:
    if way == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed isn't installed")
    dtype, alone = one
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "calsmooth"]
    output = ["--dtype", dtype, "--parallel", way, "--output", str(tmp_path / way)]
    subprocess.run([*launch, *ARGUMENTS, *output], check=True, timeout=300)
    rel = 1e-3 if dtype == "float32" else 2e-2  # of the sums' orders, TF32 and bfloat16's rounding
    assert losses(tmp_path / way) == pytest.approx(losses(alone), rel=rel)
    assert (tmp_path / way / "COMPLETED").exists()
    assert (tmp_path / way / "model" / "model.safetensors").exists()
