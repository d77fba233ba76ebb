"""Two gloo processes on CPUs do what one does: DDP, FSDP2, ZeRO-3 where DeepSpeed is installed, and tensor parallelism;
they resume; gradients are alike.

One launch of two processes does everything, because starting them costs more than what they do.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.loading import own_share
from calsmooth.finetune.run import run
from calsmooth.finetune.zero3 import check_checkpoint
from calsmooth.processes import Processes, joined

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
with_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed isn't installed")
WAYS = ("ddp", "fsdp", pytest.param("zero3", marks=with_deepspeed))
EXAMPLES = 37  # the last step of an epoch has 5 of 8: three micro-batches of 2, and a blank


def config(folder: Path, output: Path, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(folder / "model"), "dataset": str(folder / "train.jsonl"), "output": output, "lr": 1e-3,
        "epochs": 2, "batch_size": 8, "micro_batch_size": 2, "max_length": 512, "device": "cpu", "save_every": 4,
        "keep_last": 9, "dropout": 0.0, "eval_every": 6, "eval_rows": 3, "cache": False, **changes,
    }  # fmt: skip
    return FinetuneConfig(**settings)


def one_step(folder: Path, output: Path, **changes: Any) -> FinetuneConfig:
    """Whose weights move by a thousand times the gradient."""
    options = {
        "optimizer": "sgd",
        "lr": 1000.0,
        "max_grad_norm": 0.0,
        "warmup": 0.0,
        "scheduler": "constant_with_warmup",
    }
    return config(folder, output, max_steps=1, eval_every=None, **options, **changes)


def in_two_processes(folder: Path) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        for way in ("ddp", "fsdp", "zero3") if DEEPSPEED else ("ddp", "fsdp"):
            whole = config(folder, folder / way, parallel=way)
            run(whole)
            # As if it had been killed between the checkpoints of steps 4 and 8.
            killed = folder / f"{way}-killed"
            processes.by_first(lambda killed=killed, whole=whole: interrupted(whole.output, killed))
            run(dataclasses.replace(whole, output=killed, resume=True))
        for micro in (4, 1):
            run(one_step(folder, folder / f"two-by-{micro}", micro_batch_size=micro))
        if DEEPSPEED:
            run(one_step(folder, folder / "zero3-by-1", micro_batch_size=1, parallel="zero3"))
            with suppress(CalsmoothError, SystemExit):  # refused before it is taken
                run(one_step(folder, folder / "zero3-bad", parallel="zero3", max_loss=0.1))
        found = tensor_parallel(folder)
        if processes.first:
            (folder / "tensor-parallel.json").write_text(json.dumps(found))


def interrupted(whole: Path, killed: Path) -> None:
    shutil.copytree(whole, killed)
    for name in ("COMPLETED", "summary.json", "README.md", "loss.png"):
        (killed / name).unlink()
    for name in ("model", "checkpoints/checkpoint-8", "checkpoints/checkpoint-10"):
        shutil.rmtree(killed / name)


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """The loss and gradients of a model whose head is sharded, against the whole model's own."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    logits, targets = whole(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    own = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    own.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    sharded = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32, tp_plan="auto")
    forward = vars(sharded.lm_head).get("forward")
    with fused_loss(sharded, 0.1):
        loss = sharded(input_ids=ids, labels=labels).loss
        loss.backward()
        logprob = sharded(input_ids=ids, labels=labels, measure=True).statistics[0]
    found = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in sharded.named_parameters()
    }
    expected = -F.cross_entropy(logits, targets, reduction="none")[targets != -100]
    return {
        "shard": list(sharded.lm_head.weight.to_local().shape),
        "loss": float((loss - own).detach() / own.detach()),
        "gradient": max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted),
        "logprob": float((logprob - expected).detach().abs().max()),
        "forward_is_back": vars(sharded.lm_head).get("forward") is forward,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with the runs of one process and of two."""
    from transformers import GraniteConfig, GraniteForCausalLM

    rows = _conftest_rows()
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(model_folder, folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(EXAMPLES + 3)))
    torch.manual_seed(0)
    GraniteForCausalLM(
        GraniteConfig(
            # Older versions of transformers share out even heads only.
            vocab_size=91 if Version(transformers.__version__) >= Version("5.23") else 92,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            logits_scaling=4.0,
        )
    ).save_pretrained(folder / "untied")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    # In the meantime, one process.
    run(config(folder, folder / "one"))
    for micro in (8, 4, 1):
        run(one_step(folder, folder / f"one-by-{micro}", micro_batch_size=micro))
    for process in ranks:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return folder


def _conftest_rows() -> Any:
    """Loaded by its path: the tests aren't a package."""
    spec = importlib.util.spec_from_file_location("finetune_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Inside an epoch, its number counts a process's micro-batches, blanks too.
    volatile = ("tokens_per_second", "peak_memory_bytes", "epoch")
    return [{name: value for name, value in line.items() if name not in volatile} for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(done: Path, way: str) -> None:
    for ours, theirs in zip(metrics(done / way), metrics(done / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    expected = weights(done / "one")
    found = weights(done / way)
    assert found.keys() == expected.keys()
    # DeepSpeed sums each micro-batch over the processes: where a gradient is all but zero, AdamW shows the rounding.
    tolerance = 1e-5 if way == "zero3" else 1e-6
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=tolerance)
    assert json.loads((done / way / "summary.json").read_text())["processes"] == 2


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_resume_to_the_same_bits(done: Path, way: str) -> None:
    assert json.loads((done / f"{way}-killed" / "summary.json").read_text())["resumed_at_step"] == 4
    assert metrics(done / f"{way}-killed") == metrics(done / way)
    for name, tensor in weights(done / f"{way}-killed").items():
        assert torch.equal(tensor, weights(done / way)[name])


def test_a_gathered_model_loads_anywhere(done: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(done / "fsdp" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_the_gradient_is_the_same_however_the_batch_is_cut(done: Path) -> None:
    """8 examples with 1 to 12 words of response: at once, 2 x 4, 8 x 1, and over two processes."""
    start = load_file(done / "model" / "model.safetensors")
    cuts = ["one-by-8", "one-by-4", "one-by-1", "two-by-4", "two-by-1", *(["zero3-by-1"] if DEEPSPEED else [])]
    gradients = {cut: {n: start[n] - w for n, w in weights(done / cut).items()} for cut in cuts}
    reference = torch.cat([g.flatten() for g in gradients["one-by-8"].values()])
    assert reference.norm() > 0
    for cut in cuts[1:]:
        gradient = torch.cat([g.flatten() for g in gradients[cut].values()])
        assert float((gradient - reference).norm() / reference.norm()) < 1e-6, cut


@with_deepspeed
def test_deepspeed_does_not_take_a_bad_step(done: Path) -> None:
    bad = json.loads((done / "zero3-bad" / "bad-step.json").read_text())
    assert bad["step"] == 1
    assert "above 0.1 (--max-loss)" in bad["why"]
    assert not list((done / "zero3-bad" / "checkpoints").glob("checkpoint-*"))


@with_deepspeed
def test_a_checkpoint_of_other_processes_is_refused(done: Path) -> None:
    checkpoint = done / "zero3" / "checkpoints" / "checkpoint-8"
    check_checkpoint(checkpoint, Processes(0, 2))
    with pytest.raises(UsageError, match="checkpoint-8 is of 2 processes, here are 4; resume with as many"):
        check_checkpoint(checkpoint, Processes(0, 4))


def test_a_head_that_is_sharded_over_processes_gives_the_models_own_loss(done: Path) -> None:
    found = json.loads((done / "tensor-parallel.json").read_text())
    assert found["shard"] == [46, 32]
    assert abs(found["loss"]) < 1e-6
    assert found["gradient"] < 1e-5
    assert found["logprob"] < 1e-5
    assert found["forward_is_back"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [0, 1, 5, 6])
def test_every_micro_batch_is_someones_and_all_have_equally_many(count: int, micro_batches: int) -> None:
    shares = [own_share(range(micro_batches), Processes(rank, count), -1) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i != -1) == list(range(micro_batches))


def test_what_processes_cannot_share_is_refused(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = FinetuneConfig(model=str(model_folder), dataset=str(dataset), device="cpu", output=tmp_path / "run")
    with pytest.raises(UsageError, match="--parallel fsdp: there is one process; start several, as with torchrun"):
        run(dataclasses.replace(asked, parallel="fsdp"))
    with pytest.raises(UsageError, match=r"--parallel zero3: (deepspeed isn't installed|there is one process)"):
        run(dataclasses.replace(asked, parallel="zero3"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"accelerate launch asks for DeepSpeed.*give --parallel zero3"):
        run(asked)
    from calsmooth.finetune.plan import prepare

    with pytest.raises(UsageError, match="--batch-size 9: can't be shared evenly by 2 processes"):
        prepare(dataclasses.replace(asked, batch_size=9), processes=2)
    with pytest.raises(UsageError, match="--micro-batch-size 3 doesn't divide --batch-size 8 over 2 processes"):
        prepare(dataclasses.replace(asked, batch_size=8, micro_batch_size=3), processes=2)


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]))
