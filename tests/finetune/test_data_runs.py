"""Runs on packed, streamed and mixed data, and the memory that a run is said to need."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma3TextConfig, LlamaConfig

from calsmooth.config import load
from calsmooth.errors import UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.fit import fastest
from calsmooth.finetune.memory import estimate_memory, saved_bytes
from calsmooth.finetune.plan import prepare
from calsmooth.finetune.run import run


def config(model_folder: Path, dataset: Any, output: Path, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(model_folder),
        "dataset": dataset if isinstance(dataset, tuple) else str(dataset),
        "output": output,
        "lr": 1e-3,
        "batch_size": 8,
        "max_length": 512,
        "dropout": 0.0,
        "device": "cpu",
        **changes,
    }
    return FinetuneConfig(**settings)


def metrics(folder: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "tokens", "grad_norm")} for line in kept]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_packing_changes_no_step(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    padded, packed = (
        run(config(model_folder, dataset, tmp_path / str(packing), epochs=1, packing=packing, micro_batch_size=size))
        for packing, size in ((False, 2), (True, 8))
    )
    for a, b in zip(metrics(padded.folder), metrics(packed.folder), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for name, weight in weights(padded.folder).items():
        torch.testing.assert_close(weights(packed.folder)[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumes_to_the_same_bits(model_folder: Path, dataset: Path, tmp_path: Path, packing: bool) -> None:
    settings = {
        "dataset": (f"{dataset}=2", "demo=1"),
        "streaming": True,
        "shuffle_buffer": 7,
        "max_steps": 6,
        "save_every": 2,
        "keep_last": 9,
        "packing": packing,
        "micro_batch_size": 4,
    }
    whole = run(config(model_folder, output=tmp_path / "whole", **settings))
    assert whole.summary["rows"] == 48
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder, stopped)
    for leftover in ("COMPLETED", "checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "model"):
        path = stopped / leftover
        path.unlink() if path.is_file() else shutil.rmtree(path)
    resumed = run(config(model_folder, output=stopped, resume=True, **settings))
    assert resumed.summary["resumed_at_step"] == 2
    assert metrics(whole.folder) == metrics(resumed.folder)
    assert resumed.summary["rows"] == 48
    for name, weight in weights(whole.folder).items():
        assert torch.equal(weight, weights(resumed.folder)[name])


def test_a_stream_of_fewer_rows_than_a_batch_begins_again(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(dataset.read_text().splitlines(keepends=True)[:3]))
    result = run(config(model_folder, short, tmp_path / "run", streaming=True, max_steps=2))
    assert (result.summary["steps"], result.summary["rows"]) == (2, 16)


def test_held_out_rows_of_a_stream_come_from_elsewhere(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing can be held out of a stream; give --eval-dataset"):
        config(model_folder, dataset, tmp_path / "run", streaming=True, max_steps=2, eval_every=1)


def test_the_epochs_of_a_mixture(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    mixture = (f"{dataset}=3", f"{dataset}=1")
    plan, _ = prepare(config(model_folder, mixture, tmp_path / "run", epochs=2))
    assert plan.order.quotas == [60, 20]
    assert plan.steps == 20
    plan, _ = prepare(config(model_folder, mixture, tmp_path / "run", epochs=2, eval_every=1))
    assert sum(plan.order.quotas) == 80 - len(plan.held_out)


def test_a_model_is_left_the_template_that_it_was_trained_with(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    result = run(config(model_folder, dataset, tmp_path / "run", epochs=1, template="tulu", limit=8))
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|user|>\nthe cat\n<|assistant|>\n"


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


class TestMemory:
    @pytest.mark.parametrize("kind", [LlamaConfig, Gemma3TextConfig])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_activations_are_those_that_a_real_model_keeps(self, kind: Any, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        settings = kind(**SHAPE, sliding_window=8) if kind is Gemma3TextConfig else kind(**SHAPE)
        found = estimate_memory(settings, FinetuneConfig(dtype=dtype), rows=3, width=96, targets=100)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).train()
        real = saved_bytes(model, 3, 96, getattr(torch, dtype))
        # Without padding Llama's attention needs no mask, which the estimate counts.
        assert real <= found.activations + found.low_precision <= 1.1 * real
        parameters = sum(p.numel() for p in model.parameters())
        assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
        assert (found.low_precision > parameters) == (dtype == "bfloat16")
        assert found.full_logits == 100 * 300 * 8

    def test_checkpointing_and_adapters_take_less(self) -> None:
        def total(**options: Any) -> Any:
            return estimate_memory(LlamaConfig(**SHAPE), FinetuneConfig(dtype="bfloat16", **options), 8, 96, 100)

        plain, checkpointed = total(), total(gradient_checkpointing=True)
        assert checkpointed.activations < plain.activations / 2
        assert checkpointed.weights == plain.weights
        pytest.importorskip("peft")
        adapters = total(lora_rank=2)
        assert adapters.gradients < plain.gradients / 10
        assert adapters.weights < plain.weights * 0.6

    def test_what_cant_be_counted_is_left_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def data_dependent(*_: Any) -> int:
            raise RuntimeError("no fake version")

        monkeypatch.setattr("calsmooth.finetune.memory.saved_bytes", data_dependent)
        found = estimate_memory(LlamaConfig(**SHAPE), FinetuneConfig(dtype="float32"), 2, 16, 10)
        assert found.activations is None
        assert found.total > found.weights


def test_the_fastest_micro_batch_holds_little_padding_and_keeps_the_processor_busy() -> None:
    tokens = {8: [8000], 4: [4000, 400], 2: [2000, 400, 100, 100], 1: [1000, 900, 200, 200, 50, 50, 50, 50]}
    assert fastest([8, 4, 2, 1], tokens.__getitem__, "cpu") == [2, 1]
    assert fastest([8, 4, 2, 1], tokens.__getitem__, "cuda") == [8, 4, 2, 1]


def test_the_example_of_a_mixture_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    plan, _ = prepare(load(FinetuneConfig, {}, Path("examples/finetune-mixture/mixture.yaml")))
    assert plan.config.packing
    few, many = sorted(plan.order.quotas)
    assert few / (few + many) == pytest.approx(0.1, abs=0.01)
