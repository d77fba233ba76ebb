"""bitsandbytes' optimizers on a CPU: moments of 8 bits, resumed to the same bits, refused where there is no step."""

import dataclasses
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calsmooth.errors import UsageError
from calsmooth.finetune.arguments import FROM_BITSANDBYTES, check_optimizer
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.run import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model with matrices that are large enough (4,096 values) to be kept in 8 bits."""
    folder = tmp_path_factory.mktemp("wider")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(model: Path, dataset: Path, output: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model), dataset=str(dataset), output=output, device="cpu", lr=1e-3, batch_size=8,
        micro_batch_size=8, epochs=1, save_every=2, keep_last=9, cache=False, **changes,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def tensors(value: Any) -> list[torch.Tensor]:
    inside = value.values() if isinstance(value, dict) else [value]
    return [tensor for tensor in inside if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(FROM_BITSANDBYTES))
def test_an_optimizer_of_bitsandbytes_trains_and_resumes(wider: Path, dataset: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    asked = config(wider, dataset, tmp_path / "run", optimizer=name)
    folder = run(asked).folder
    state = torch.load(folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=False)["state"]
    # Quantised moments lie one level deeper.
    held = [tensor for moments in state.values() for value in moments.values() for tensor in tensors(value)]
    assert any(tensor.dtype == torch.uint8 and tensor.numel() >= 4096 for tensor in held) == ("8bit" in name)
    whole, start = weights(folder), load_file(wider / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert any(not torch.equal(tensor, start[n]) for n, tensor in whole.items())
    for path in (folder / "COMPLETED", folder / "summary.json"):
        path.unlink()
    for path in [folder / "model", *folder.glob("checkpoints/checkpoint-[!2]")]:
        shutil.rmtree(path)
    run(dataclasses.replace(asked, resume=True))
    assert all(torch.equal(tensor, whole[n]) for n, tensor in weights(folder).items())


@pytest.mark.parametrize("name", sorted(FROM_BITSANDBYTES))
def test_an_optimizer_without_a_step_on_this_device_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As bitsandbytes 0.46 is on a CPU."""

    class WithoutStep:
        def __init__(self, parameters: list[torch.nn.Parameter], optim_bits: int, is_paged: bool) -> None:
            assert (optim_bits == 8, is_paged) == ("8bit" in name, "paged" in name)

        def step(self) -> None:
            raise AttributeError("'NoneType' object has no attribute 'shape'")

    kinds = SimpleNamespace(AdamW=WithoutStep, Lion=WithoutStep)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=kinds, __version__="0.46.1"))
    with pytest.raises(UsageError, match=rf"--optimizer {name}: bitsandbytes 0.46.1 has no such step on cpu"):
        check_optimizer(FinetuneConfig(optimizer=name), CPU)


def test_an_optimizer_of_torch_needs_no_trial() -> None:
    check_optimizer(FinetuneConfig(optimizer="adafactor"), CPU)
