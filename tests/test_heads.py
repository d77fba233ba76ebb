"""Heads are found and measured in models of every kind, and those that calsmooth can't describe are refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from calsmooth.errors import CalsmoothError
from calsmooth.heads import final_hidden_states, find_head

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def make(change: Any = lambda logits: logits) -> LlamaForCausalLM:
    """A Llama whose forward does `change` to its logits, as another architecture might."""

    class Changed(LlamaForCausalLM):
        def forward(self, *arguments: Any, **inputs: Any) -> Any:
            outputs = super().forward(*arguments, **inputs)
            outputs.logits = change(outputs.logits)
            return outputs

    torch.manual_seed(0)
    return Changed(CONFIG).eval()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), softcap=st.none() | st.floats(0.5, 100))
def test_scale_and_softcap_are_measured(scale: float, softcap: float | None) -> None:
    def change(logits: Tensor) -> Tensor:
        return logits * scale if softcap is None else torch.tanh(logits * scale / softcap) * softcap

    model = make(change)
    head = find_head(model)
    # Measured in float32.
    assert head.scale == pytest.approx(scale, rel=5e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=5e-6))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(head.logits(final_hidden_states(model, head, input_ids=ids)), model(ids).logits)


def test_padding_rows_of_the_head_are_left_out() -> None:
    head = find_head(make(lambda logits: logits[..., :50]))
    assert head.vocabulary == 50
    assert head.weight.shape == (50, 16)
    head.weight.sum().backward()
    assert head.module.weight.grad is not None
    assert head.module.weight.grad[:50].all()
    assert not head.module.weight.grad[50:].any()


def test_the_model_is_left_as_it_was() -> None:
    model = make()
    model.train()
    state = torch.random.get_rng_state()
    head = find_head(model)
    final_hidden_states(model, head, input_ids=torch.arange(4)[None])
    assert model.lm_head is head.module
    assert all(m.training for m in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.index_fill(-1, torch.tensor([7, 9]), -1e9), r"logits of 2 tokens \(the first is 7\)"),
        (lambda z: z + 1.0, "logits of all tokens what is neither a factor nor a softcap"),
        (lambda z: torch.sin(z), "neither a factor nor a softcap"),
        (lambda z: -z, "neither a factor nor a softcap"),
        (lambda z: z[:, -1:], r"makes logits \(1, 1, 61\) of its head's \(1, 3, 61\)"),
    ],
)
def test_what_cannot_be_described_is_refused(change: Any, message: str) -> None:
    with pytest.raises(CalsmoothError, match=message):
        find_head(make(change))


def test_models_without_a_linear_head_are_refused() -> None:
    model = make()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(CalsmoothError, match="a head of type Sequential; expected a plain linear"):
        find_head(model)
    model.set_output_embeddings(None)
    with pytest.raises(CalsmoothError, match="has no output head"):
        find_head(model)


def test_a_head_that_is_not_called_once_is_refused() -> None:
    model = make()
    model.lm_head, head = torch.nn.Linear(16, 61, bias=False), model.lm_head
    model.get_output_embeddings = lambda: head  # type: ignore[method-assign]
    with pytest.raises(CalsmoothError, match="calls its output head 0 times in a forward pass; expected once"):
        find_head(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = BartConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    with pytest.raises(CalsmoothError, match="is an encoder-decoder"):
        find_head(BartForConditionalGeneration(config))
