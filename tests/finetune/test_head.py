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
from calsmooth.finetune.probe import every_parameter_takes_part, probe
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
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
STATE_SPACE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"tie_word_embeddings": False},
    "Qwen2": {},
    "Qwen3": {},
    "SmolLM3": {},
    "Olmo2": {},
    "Phi3": {},
    "GPT2": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"query_pre_attn_scalar": 8},
    "NanoChat": {},  # a softcap
    "Granite": {"logits_scaling": 4.0},  # divides the logits
    "HyperCLOVAX": {"logits_scaling": 4.0},  # multiplies them
    "MiniCPM3": {"num_key_value_heads": 4, "dim_model_base": 8, **LATENT},  # divides what goes into the head
    "Cohere": {"logit_scale": 0.5},
    "Cohere2": {"logit_scale": 0.5},
    "Phi": {},  # a bias in the head
    "ModernBertDecoder": {"cls_token_id": 1, "sep_token_id": 2},  # a dense layer before the head
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    "FalconH1": {"lm_head_multiplier": 0.5, **STATE_SPACE},
    "Lfm2": {},
    "Gemma3": {"text_config": SMALL, "vision_config": VISION},  # multi-modal, its text path
}


def make(name: str) -> PreTrainedModel:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this version of transformers has no {name}")
    extra = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(extra if "text_config" in extra else SMALL | extra))
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
    """The model's own float32 logits and torch's cross-entropy, and its own loss where experts add to it."""
    output = model(**inputs)
    logits = output.logits[:, :-1].flatten(0, 1)
    targets = inputs["labels"][:, 1:].flatten()
    loss = F.cross_entropy(logits, targets, label_smoothing=beta, reduction="sum")
    plain = F.cross_entropy(logits, targets)
    return (
        loss + (output.loss - plain if getattr(output, "aux_loss", None) is not None else 0) * (targets != -100).sum()
    )


def errors(name: str, beta: float) -> tuple[float, float]:
    """Relative errors of the loss, and of the worst parameter's gradient (against a thousandth of all at least)."""
    model, inputs = make(name), batch()
    expected = own_loss(model, inputs, beta)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with fused_loss(model, beta):
        loss = model(**inputs).loss
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    # A gradient that is 0 but for rounding, as an attention's key bias has, can't be asked to round alike.
    least = 1e-3 * torch.nn.utils.get_total_norm(wanted.values())
    worst = max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp(min=least)) for n in wanted)
    return float((loss - expected).detach() / expected.detach()), worst


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_every_gradient_equal_the_models_own(name: str, beta: float) -> None:
    loss, gradient = errors(name, beta)
    assert abs(loss) < 1e-5
    assert gradient < 1e-4


def test_a_multi_modal_model_trains_on_text_as_it_is_measured() -> None:
    model, inputs = make("Gemma3"), batch()
    losses = []
    for training in (False, True):  # in training, some versions want to be told which tokens are images
        model.train(training)
        with fused_loss(model, 0.1), torch.no_grad():
            losses.append(model(**inputs).loss)
    torch.testing.assert_close(*losses)


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
    next(model.base_model.children()).eval()  # as someone who freezes a part of it might
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


@pytest.mark.parametrize(("name", "all_do"), [("Llama", True), ("Mixtral", True), ("Gemma3", False)])
def test_what_text_gives_no_gradient_is_found(name: str, all_do: bool) -> None:
    model = make(name)
    assert every_parameter_takes_part(model, model, batch()) == all_do
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = make("Llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(CalsmoothError, match="plain linear language-model head"), fused_loss(model, 0.1):
        pass


if __name__ == "__main__":
    print("architecture        loss error  gradient error  scale  softcap")
    for name in ARCHITECTURES:
        head = find_head(make(name))
        loss, gradient = errors(name, 0.1)
        print(f"{name:18} {abs(loss):11.1e} {gradient:15.1e} {head.scale:6.3g} {head.softcap or '':>8}")
