"""Packed examples: the same loss and gradients as one by one, in fewer tokens; refused where they'd see each other."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from calsmooth.data import IGNORED, Example
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.batches import Collator, PackedCollator, best_fit, pack, packed_size
from calsmooth.finetune.fit import micro_batch_candidates, packed_tokens
from calsmooth.finetune.head import fused_loss
from calsmooth.finetune.order import deal
from calsmooth.finetune.packing import check_packing

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEPT_APART: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 8},
    "Gemma3Text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GPTNeoX": {},
}
MIXED: dict[str, tuple[dict[str, Any], str]] = {
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "layers of the type conv"),
    "Qwen3Next": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "layers of the type linear_attention",
    ),
    "FalconH1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        "layers of the type hybrid",
    ),
    "Bloom": ({"n_head": 4, "n_layer": 2}, "change each other's logits"),
    "Llama4Text": (
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "layers of the type chunked_attention",
    ),
}

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def make(name: str, extra: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | extra)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def examples(*sizes: int) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    made = []
    for size in sizes:
        ids = torch.randint(3, 97, (size,), generator=g).tolist()
        made.append(Example(ids, [IGNORED] * (size // 3 + 1) + ids[size // 3 + 1 :]))
    return made


@pytest.mark.parametrize("name", KEPT_APART)
def test_loss_and_every_gradient_equal_the_padded_ones(name: str) -> None:
    model = make(name, KEPT_APART[name])
    batch = examples(30, 17, 9, 5, 12, 3)  # some longer than the sliding window
    found = []
    for collate in (Collator(0), PackedCollator(0), PackedCollator(0, one_row=True)):
        model.zero_grad()
        with fused_loss(model, 0.1):
            loss = model(**collate(batch)).loss
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for packed in found[1:]:
        assert len(packed) == len(found[0]) > 10
        for ours, padded in zip(packed, found[0], strict=True):
            assert float((ours - padded).norm()) <= 1e-5 * max(float(padded.norm()), 1e-3)


@pytest.mark.parametrize("name", KEPT_APART)
def test_the_check_lets_pass_and_touches_nothing(name: str) -> None:
    model = make(name, KEPT_APART[name])
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert check_packing(model) < 1e-5
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", MIXED)
def test_an_architecture_that_mixes_the_examples_of_a_row_is_refused(name: str) -> None:
    extra, reason = MIXED[name]
    with pytest.raises(CalsmoothError) as caught:
        check_packing(make(name, extra))
    assert str(caught.value).startswith("--packing: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("leave --packing out")
    assert "\n" not in str(caught.value)


@given(lengths=lengths)
def test_every_example_is_in_one_row_and_no_row_is_wider_than_twice_the_longest(lengths: list[int]) -> None:
    rows = pack(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 2 * max(lengths) + 8
    assert packed_size(lengths, rows) <= len(lengths) * (-(-max(lengths) // 8) * 8), "never more than padding"


@given(lengths=lengths, extra=st.integers(0, 100))
def test_best_fit_keeps_to_the_width_and_opens_no_row_in_vain(lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    filled = [sum(lengths[i] for i in row) for row in best_fit(lengths, width)]
    assert max(filled) <= width
    assert sum(fill <= width / 2 for fill in filled) <= 1


@given(lengths=lengths, size=st.integers(1, 20))
def test_dealt_micro_batches_hold_alike_numbers_of_tokens(lengths: list[int], size: int) -> None:
    lengths = lengths[: len(lengths) // size * size] or [5] * size
    dealt = deal(range(len(lengths)), lengths, size)
    assert sorted(dealt) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in dealt[start : start + size]) for start in range(0, len(dealt), size)]
    assert max(tokens) <= packed_tokens(sum(lengths), size, len(lengths), max(lengths))
    assert tokens[0] == max(tokens), "what doesn't fit into memory shows at once"


@given(lengths=lengths, size=st.integers(1, 20))
def test_what_is_left_over_for_a_smaller_micro_batch_comes_last(lengths: list[int], size: int) -> None:
    dealt = deal(range(len(lengths)), lengths, size)
    assert sorted(dealt) == list(range(len(lengths)))
    full = [sum(lengths[i] for i in dealt[s : s + size]) for s in range(0, len(dealt) - size + 1, size)]
    assert full == sorted(full, reverse=True)


def test_the_tensors_of_a_packed_batch() -> None:
    batch = PackedCollator(0)(examples(5, 3, 4, 2))
    assert [*batch] == ["input_ids", "position_ids", "labels"]
    assert all(tensor.shape == (2, 8) for tensor in batch.values())
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == IGNORED).all(), "no target is predicted from another example"


def test_larger_micro_batches_may_be_tried_where_examples_are_packed() -> None:
    assert micro_batch_candidates(128, 1024, "cpu") == [2, 1]
    assert micro_batch_candidates(128, 1024, "cpu", step_tokens=12_800)[0] == 8
    assert micro_batch_candidates(8, 4096, "cpu", step_tokens=4096 * 8) == [1]
