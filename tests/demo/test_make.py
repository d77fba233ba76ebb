"""The script that made the model, run for a few steps."""

import itertools
import sys

import pytest
import torch

from calsmooth.demo import make, world


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"STEPS": 3, "BATCH": 2, "WARMUP_STEPS": 1, "DOCUMENTS_FOR_TOKENIZER": 300}.items():
        monkeypatch.setattr(make, name, value)


@pytest.fixture(scope="module")
def truth():
    return world.make_world(3)


def test_it_writes_model_and_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make", "--output", str(tmp_path), "--seed", "3"])
    make.main()
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"train.jsonl", "heldout.jsonl", "questions.jsonl"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert len(tokenizer) == model.config.vocab_size


def test_data_only_leaves_the_model_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make", "--output", str(tmp_path), "--data-only"])
    make.main()
    assert not (tmp_path / "model").exists()


def test_blocks_hold_whole_documents_in_order(truth):
    tokenizer = make.train_tokenizer(truth, 3)
    documents = list(itertools.islice(world.corpus(truth, 3), 200))
    blocks = list(make.blocks(documents, tokenizer))
    assert {len(block) for block in blocks} == {make.LENGTH}
    encoded = [make.encode(document, tokenizer) for document in documents]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in encoded)
    # The last block waits for documents that don't come, so it isn't there; the padding is at the ends only.
    content = [id for block in blocks for id in block if id != tokenizer.pad_token_id]
    assert content == [id for ids in encoded for id in ids][: len(content)]
    for block in blocks:
        filled = [id for id in block if id != tokenizer.pad_token_id]
        assert block[: len(filled)] == filled
        assert filled[-1] == tokenizer.eos_token_id


def test_training_lowers_the_loss(truth, monkeypatch):
    monkeypatch.setattr(make, "STEPS", 20)
    torch.manual_seed(0)
    tokenizer = make.train_tokenizer(truth, 3)
    model = make.new_model(tokenizer)
    ids = torch.tensor(list(itertools.islice(make.blocks(world.corpus(truth, 4), tokenizer), 4)))

    def loss() -> float:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss.item()

    before = loss()
    make.pretrain(model, tokenizer, world.corpus(truth, 3))
    assert loss() < before - 1
    assert not model.training
