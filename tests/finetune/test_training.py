"""What can be asked of training: adapters, logits, dropout, optimizers and schedules, and measuring on the way."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calsmooth.data import Example, load_examples
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune import arguments as arguments_module
from calsmooth.finetune.batches import Collator
from calsmooth.finetune.compiled import compiled_layers
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.evaluation import choose_held_out, measure
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.logits import check_temperature, fold_temperature, set_dropout, set_softcap
from calsmooth.finetune.lora import add_adapters
from calsmooth.finetune.meter import Meter
from calsmooth.finetune.run import run
from calsmooth.metrics import expected_calibration_error
from calsmooth.models import load_model, load_tokenizer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def config(model_folder: Path, dataset: Path, output: Path | None, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(model_folder),
        "dataset": (str(dataset),),
        "output": output,
        "lr": 1e-3,
        "epochs": 1,
        "batch_size": 8,
        "max_length": 512,
        "device": "cpu",
        "cache": False,
        "save_every": 100,
        **changes,
    }
    return FinetuneConfig(**settings)


def lines(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    return AutoModelForCausalLM.from_config(kind(**(SMALL | changes)), dtype=torch.float32).eval()


def some_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 12:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_saved_alone_and_load_as_a_model(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {"lora_rank": 4, "lora_dropout": 0.1, "lora_targets": ("q_proj", "down_proj"), "lr": 1e-2}
    plain = run(config(model_folder, dataset, tmp_path / "plain", **settings))
    merged = run(config(model_folder, dataset, tmp_path / "merged", lora_merge=True, **settings))
    assert not (plain.model / "model.safetensors").exists()
    assert (merged.folder / "adapter" / "adapter_model.safetensors").exists()
    trained = sum(tensor.numel() for tensor in load_file(plain.model / "adapter_model.safetensors").values())
    assert plain.summary["trained_parameters"] == trained == 2 * 4 * (32 + 32 + 48 + 32)
    ids = torch.arange(5, 25)[None]
    logits = {}
    for name, folder in (("base", model_folder), ("plain", plain.model), ("merged", merged.model)):
        with torch.no_grad():
            logits[name] = load_model(str(folder), dtype=torch.float32)(ids).logits
    assert (logits["plain"] - logits["base"]).abs().max() > 5e-3
    torch.testing.assert_close(logits["plain"], logits["merged"], rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_model_with_adapters_is_that_of_its_own_logits() -> None:
    pytest.importorskip("peft")
    model, batch = make("Gemma2", final_logit_softcapping=3.0), some_batch()
    wrapped = add_adapters(model, FinetuneConfig(lora_rank=3), torch.float32)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # which begin at 0, where the gradients of the others are 0
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    own = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1, reduction="sum"
    )
    expected = torch.autograd.grad(own, trained)
    with fused_loss(model, 0.1):
        loss = wrapped(**batch).loss
    torch.testing.assert_close(loss, own)
    for gradient, other in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_activations_change_nothing_under_adapters(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    adapters = [
        load_file(run(config(model_folder, dataset, tmp_path / str(on), lora_rank=2, gradient_checkpointing=on)).model
                  / "adapter_model.safetensors")
        for on in (False, True)
    ]  # fmt: skip
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lm_head",), "is the head, on which the fused loss can't"),
        (("nowhere",), "no linear layer of that name.*q_proj"),
    ],
)
def test_layers_that_can_not_have_adapters_are_refused(targets: tuple[str, ...], message: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=message):
        add_adapters(make("Llama"), FinetuneConfig(lora_rank=2, lora_targets=targets), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2}, r"--lora-rank 2: peft isn't installed; pip install 'calsmooth\[lora\]'"),
        ({"report_to": ("wandb",)}, "--report-to wandb: wandb isn't installed; pip install wandb"),
        ({"optimizer": "lion"}, "--optimizer lion: bitsandbytes isn't installed"),
    ],
)
def test_a_missing_package_is_named_before_any_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert arguments_module.importlib.util is importlib.util
    with pytest.raises(UsageError, match=message):
        run(config(model_folder, tmp_path / "missing.jsonl", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_merge": True}, "--lora-merge: adapters need --lora-rank; add that, or leave it out"),
        ({"lora_alpha": 16.0}, "--lora-alpha: adapters need --lora-rank"),
        ({"eval_limit": 3}, "--eval-limit: tasks are named with --eval-task"),
        ({"decay": 0.1}, "--decay: goes with --scheduler warmup_stable_decay"),
        ({"shuffle_buffer": 7}, "--shuffle-buffer: goes with --streaming"),
        ({"lora_rank": 2, "logit_temperature": 2.0}, "adapters can't hold it; .*--lora-merge"),
        ({"eval_dataset": "x.jsonl"}, "--eval-dataset is measured by --eval-every"),
        ({"min_lr": 0.1}, "--min-lr: the linear schedule ends at 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneConfig(**changes)


# --- logits and dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Gemma3Text", {}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi3", {}),
    ],
)
def test_a_temperature_is_folded_in_exactly_and_out_again(name: str, changes: dict[str, Any]) -> None:
    model, ids = make(name, **changes), some_batch()["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        undo = fold_temperature(model, 0.4)
        torch.testing.assert_close(model(ids).logits, before / 0.4, rtol=1e-4, atol=1e-5)
        undo()
        assert torch.equal(model(ids).logits, before)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    check_temperature(model, 3.0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_temperature_that_the_model_can_not_hold_is_refused() -> None:
    model = make("Llama", tie_word_embeddings=True)
    norm = model.model.norm
    norm.forward = lambda x: torch.nn.functional.rms_norm(x, (32,)) + norm.weight  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="can't hold a temperature"):
        check_temperature(model, 2.0)


def test_a_model_trained_with_a_temperature_scores_the_same_elsewhere(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    settings = {"logit_temperature": 0.5, "eval_every": 2, "eval_rows": 4, "eval_dataset": str(dataset)}
    result = run(config(model_folder, dataset, tmp_path / "run", **settings))
    examples = load_examples(str(dataset), load_tokenizer(str(model_folder)), max_length=512, limit=4, seed=0)
    model = AutoModelForCausalLM.from_pretrained(result.model).eval()
    assert own_statistics(model, examples)["eval_nll"] == pytest.approx(
        lines(result.folder, "eval_nll")[-1]["eval_nll"], rel=1e-5
    )


def test_a_softcap_goes_where_the_configuration_has_one() -> None:
    gemma = transformers.Gemma2Config(**SMALL)
    set_softcap(gemma, 5.0)
    model = AutoModelForCausalLM.from_config(gemma)
    assert model(some_batch()["input_ids"]).logits.abs().max() <= 5.0
    set_softcap(gemma, 0.0)
    assert gemma.final_logit_softcapping is None
    with pytest.raises(UsageError, match="--logit-softcap 5: the configuration of llama can't hold a softcap"):
        set_softcap(transformers.LlamaConfig(**SMALL), 5.0)


def test_dropout_is_set_where_there_is_some() -> None:
    llama = transformers.LlamaConfig(**SMALL)
    assert set_dropout(llama, 0.1) == ["attention_dropout"]
    assert llama.attention_dropout == 0.1
    gpt2 = transformers.GPT2Config()
    assert set_dropout(gpt2, 0.2) == ["attn_pdrop", "embd_pdrop", "resid_pdrop"]
    assert gpt2.summary_first_dropout == 0.1
    with pytest.raises(UsageError, match=r"--dropout 0\.1: mamba has no dropout"):
        set_dropout(transformers.MambaConfig(), 0.1)


# --- measuring on the way ---------------------------------------------------------------------------------------------


def own_statistics(model: Any, examples: list[Example]) -> dict[str, float]:
    """From the model's own logits, with nothing of ours but the binning of the ECE."""
    logprob, confidence, correct, entropy, distance = [], [], [], [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels[1:])
        logits, labels = logits[labels != -100], labels[labels != -100]
        p = logits.softmax(-1)
        logprob += p[range(len(labels)), labels].log().tolist()
        confidence += p.max(-1).values.tolist()
        correct += (p.argmax(-1) == labels).double().tolist()
        entropy += (-(p * p.log()).sum(-1)).tolist()
        # Definition 3.2: the distances of all logits from the top one.
        distance += (logits.max(-1, keepdim=True).values - logits).mean(-1).tolist()
    return {
        "eval_nll": -float(np.mean(logprob)),
        "eval_ece": expected_calibration_error(confidence, correct),
        "eval_accuracy": float(np.mean(correct)),
        "eval_confidence": float(np.mean(confidence)),
        "eval_entropy": float(np.mean(entropy)),
        "eval_logit_distance": float(np.mean(distance)),
        "eval_tokens": len(correct),
    }


@pytest.mark.parametrize(("name", "changes"), [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 3.0})])
@pytest.mark.parametrize("mode", ["exact", "filtered"])
def test_what_is_measured_is_what_the_logits_say(name: str, changes: dict[str, Any], mode: str) -> None:
    model = make(name, **changes)
    with torch.no_grad():  # a model with something to say
        model.get_output_embeddings().weight.normal_(std=0.5)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (9, 17, 5):
        ids = torch.randint(1, 96, (length,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 3 + ids[3:]))
    with fused_loss(model, 0.1, mode=mode):
        found = measure(model, examples, Collator(0), 2, torch.device("cpu"), mode == "filtered")
    if mode == "filtered":
        assert 0.5 < found.pop("eval_kept_mass") < 1.0
    assert found == pytest.approx(own_statistics(model, examples), rel=1e-4)


def test_held_out_rows_are_measured_and_not_trained_on(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    result = run(config(model_folder, dataset, tmp_path / "run", eval_every=2, loss_mode="filtered"))
    found = lines(result.folder, "eval_nll")
    assert [line["step"] for line in found] == [0, 2, 4, 5]  # 36 of 40 rows, 8 a step
    assert found[-1]["eval_nll"] < found[0]["eval_nll"]
    assert all("eval_kept_mass" in line for line in found)
    assert all(0 < line["kept_mass"] <= 1 for line in lines(result.folder))
    examples = load_examples(str(dataset), load_tokenizer(str(model_folder)), max_length=512)
    held_out = choose_held_out(len(examples), 256, 0)
    assert len(held_out) == 4
    assert found[0]["eval_tokens"] == sum(examples[i].target_tokens for i in held_out)
    trained = sum(e.target_tokens for i, e in enumerate(examples) if i not in held_out)
    assert result.summary["tokens"] == trained
    assert result.summary["held_out"]["after"]["eval_nll"] == found[-1]["eval_nll"]


def test_measuring_does_not_change_the_run(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Not a bit, in spite of dropout."""
    ends = [
        load_file(run(config(model_folder, dataset, tmp_path / name, **changes)).model / "model.safetensors")
        for name, changes in (("a", {}), ("b", {"eval_every": 1, "eval_dataset": str(dataset), "eval_rows": 5}))
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_tensorboard_gets_the_lines_of_metrics(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(config(model_folder, dataset, tmp_path / "run", report_to=("tensorboard",), eval_every=5))
    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    values = [scalar.value for scalar in events.Scalars("train/loss")]
    assert values == pytest.approx([line["loss"] for line in lines(result.folder)])
    assert {"eval/nll", "eval/ece", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_batch_has_one_gradient_however_it_is_cut(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    """1 x 8, 2 x 4 and 8 x 1 examples with uneven numbers of targets: the same to 1e-6 in float32."""
    found: list[list[torch.Tensor]] = []
    check = Meter.on_pre_optimizer_step

    def keep(self: Meter, *args: Any, **given: Any) -> None:
        found.append([p.grad.double() for p in given["model"].parameters() if p.grad is not None])
        check(self, *args, **given)

    monkeypatch.setattr(Meter, "on_pre_optimizer_step", keep)
    for micro in (8, 4, 1):
        settings = {"micro_batch_size": micro, "loss_reduction": reduction, "max_steps": 1, "dropout": 0.0}
        run(config(model_folder, dataset, tmp_path / str(micro), **settings))
    size = sum(float(g.norm()) ** 2 for g in found[0]) ** 0.5
    for other in found[1:]:
        difference = sum(float((a - b).norm()) ** 2 for a, b in zip(found[0], other, strict=True)) ** 0.5
        assert difference / size < 1e-6


def test_schedules_end_where_they_should(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    def rates(**changes: Any) -> list[float]:
        folder = run(config(model_folder, dataset, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)).folder
        return [line["lr"] / 1e-3 for line in lines(folder)]

    stable = rates(scheduler="warmup_stable_decay", epochs=2, warmup=0.2, decay=0.3, min_lr=0.1)
    assert len(stable) == 10
    assert stable[:7] == pytest.approx([0.1, 0.55, 1, 1, 1, 1, 1])
    assert stable[-1] < 0.6
    cosine = rates(scheduler="cosine", min_lr=0.25, optimizer="adafactor")
    assert min(cosine[1:]) >= 0.25
    assert len(rates(max_steps=2, optimizer="sgd")) == 2


# --- compiled layers --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_compiled_layers_train_the_same_model(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "dropout": 0.0}
    plain = run(config(model_folder, dataset, tmp_path / "plain", **settings))
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    found = run(config(model_folder, dataset, tmp_path / "compiled", compile=True, **settings))
    assert compiled["unique_graphs"] > before
    for line, other in zip(lines(plain.folder), lines(found.folder), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    weights = load_file(found.model / "model.safetensors")
    for name, tensor in load_file(plain.model / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_compile_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    expected = r"could not compile the layers of LlamaForCausalLM.*leave --compile out"
    with pytest.raises(CalsmoothError, match=expected), compiled_layers(model), fused_loss(model, 0.1):
        model(**some_batch())
    assert all(module._compiled_call_impl is None for module in model.modules())
    with fused_loss(model, 0.1):
        model(**some_batch())


def test_a_model_without_layers_is_not_compiled() -> None:
    model = make("Llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UsageError, match="--compile: LlamaForCausalLM has no layers"), compiled_layers(model):
        pass
