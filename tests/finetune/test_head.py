"""The fused loss inside real architectures equals the model's own logits and torch's cross-entropy."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from calsmooth.errors import CalsmoothError
from calsmooth.finetune.fit import enable_gradient_checkpointing
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.probe import probe
from calsmooth.heads import find_head

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"tie_word_embeddings": False},
    "Qwen2": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.5},
}


def make(name: str, **extra: Any) -> PreTrainedModel:
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    config = config_class(**SMALL, **ARCHITECTURES[name], **extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # logits large enough for a softcap to bite
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch(rows: int = 3, width: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 97, (rows, width), generator=g)
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def own_logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def own_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    logits = own_logits(model, inputs)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=beta, reduction="sum"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_every_gradient_equal_the_models_own(name: str, beta: float) -> None:
    model, inputs = make(name), batch()
    expected = own_loss(model, inputs, beta)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with fused_loss(model, beta):
        loss = model(**inputs).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert wanted.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for n, p in model.named_parameters():
        if n in wanted:
            difference = (p.grad - wanted[n]).norm() / wanted[n].norm().clamp(min=1e-12)
            assert difference < 1e-4, (n, float(difference))


def test_the_model_is_itself_again_afterwards() -> None:
    model, inputs = make("Gemma2"), batch()
    before = model(input_ids=inputs["input_ids"]).logits
    with fused_loss(model, 0.1):
        pass
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.get_output_embeddings())
    torch.testing.assert_close(model(input_ids=inputs["input_ids"]).logits, before)


def test_the_head_module_is_called_so_that_wrappers_see_it() -> None:
    model, inputs = make("Llama"), batch()
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
    with fused_loss(model, 0.1):
        model(**inputs)
    hook.remove()
    assert seen == [(int((inputs["labels"][:, 1:] != -100).sum()), SMALL["hidden_size"])]


def test_a_batch_without_targets_gives_zero_with_a_graph() -> None:
    model, inputs = make("Llama"), batch()
    inputs["labels"].fill_(-100)
    with fused_loss(model, 0.1):
        loss = model(**inputs).loss
        loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    model, inputs = make("Llama"), batch()
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(model)
        model.zero_grad()
        with fused_loss(model, 0.1):
            model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probe_passes_and_touches_nothing(name: str) -> None:
    model = make(name)
    model.train()
    model.base_model.layers[0].eval()  # as someone who freezes a part of it might
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    result = probe(model, batch(), 0.1)
    assert result.loss < 1e-5
    assert max(result.head_gradient, result.decoder_gradient) < 1e-4
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_probe_is_no_stricter_where_the_vocabulary_is_large() -> None:
    """torch's label smoothing in float32 is off by more than the probe allows, which isn't the fused loss's fault."""
    config = transformers.LlamaConfig(**(SMALL | {"vocab_size": 262_144, "num_hidden_layers": 1}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    inputs = batch()
    with torch.no_grad():  # a model that is sure, and right: its gradient is small, and rounding weighs more
        model.get_output_embeddings().weight.normal_(std=6.0)
        sure = own_logits(model, inputs).argmax(-1)
    inputs["labels"][:, 1:] = torch.where(inputs["labels"][:, 1:] == -100, -100, sure[:, :-1])
    result = probe(model, inputs, 0.1)
    assert max(result.head_gradient, result.decoder_gradient) < 1e-4


@pytest.mark.parametrize("name", ["Granite", "Gemma2"])
def test_the_probe_refuses_a_scale_or_cap_that_the_loss_was_not_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    plain = dataclasses.replace(find_head(model), scale=1.0, softcap=None)
    monkeypatch.setattr("calsmooth.finetune.head.find_head", lambda model: plain)
    with pytest.raises(CalsmoothError, match="doesn't equal the model's own"):
        probe(model, batch(), 0.1)


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = make("Llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(CalsmoothError, match="plain linear language-model head"), fused_loss(model, 0.1):
        pass
