"""Fine-tuning on a GPU: a whole run in both precisions, and the micro-batch found by trying."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calsmooth.data import Example
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import largest_that_fits
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.run import run

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns_and_can_be_resumed(tmp_path: Path, dtype: str) -> None:
    config = FinetuneConfig(output=tmp_path / "run", epochs=2, limit=256, dtype=dtype, device="cuda")
    result = run(config)
    assert result.summary["final_loss"] < result.summary["first_loss"]
    assert result.summary["peak_memory_bytes"] > 0
    assert max(result.summary["probe"].values()) < 1e-4
    steps = [json.loads(line)["step"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    (result.folder / "COMPLETED").unlink()
    again = run(FinetuneConfig(output=tmp_path / "run", epochs=2, limit=256, dtype=dtype, device="cuda", resume=True))
    assert again.summary["resumed_at_step"] == 16


def test_the_largest_micro_batch_that_fits_is_found() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, max_position_embeddings=2048)).cuda().train()
    examples = [Example([5] * 2048, [-100] * 2040 + [5] * 8)] * 64
    state = torch.cuda.get_rng_state()

    def found() -> int:
        with fused_loss(model, 0.1):
            return largest_that_fits(model, lambda size: examples[:size], Collator(0), [64, 16, 4, 1], torch.float32)

    assert found() == 64
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total)
    try:
        assert found() in (4, 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("adapters", [False, True])
def test_held_out_rows_are_measured_in_bfloat16(tmp_path: Path, adapters: bool) -> None:
    if adapters:
        pytest.importorskip("peft")
    config = FinetuneConfig(
        output=tmp_path / "run", epochs=1, limit=256, dtype="bfloat16", device="cuda", eval_every=4,
        loss_mode="filtered", lora_rank=8 if adapters else None, gradient_checkpointing=True, optimizer="adamw",
    )  # fmt: skip
    result = run(config)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_nll" in line]
    assert [line["step"] for line in measured] == [0, 4, 8]
    assert measured[-1]["eval_nll"] < measured[0]["eval_nll"]
    assert all(0.9 < line["eval_kept_mass"] <= 1.0001 for line in measured)
    assert all(0 <= line["eval_ece"] <= 1 for line in measured)
    assert all(0.9 < line["kept_mass"] <= 1.0001 for line in lines if "loss" in line)


def test_compiled_layers_train_the_same_model(tmp_path: Path) -> None:
    losses = []
    for name, compiled in (("plain", False), ("compiled", True)):
        config = FinetuneConfig(
            output=tmp_path / name, max_steps=6, limit=256, dtype="bfloat16", device="cuda", compile=compiled
        )
        lines = (run(config).folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0]  # kernels of another kind round otherwise
