"""Tiny models with tokenizers, made here, whose heads are weak enough for the floor to bite."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the a red blue small big cat dog bird fish eats sees likes finds bread milk seed corn now then"


@pytest.fixture(scope="session")
def words() -> Callable[..., str]:
    """words(count, seed=0): so many of TEXT's, at random."""

    def draw(count: int, seed: int = 0) -> str:
        return " ".join(random.Random(seed).choices(TEXT.split(), k=count))

    return draw


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, and one that begins its sequences with a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", bos_token="<begin>")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """Two random Llamas; the second one's head is eighty times as strong."""
    folders = []
    for name, strength in (("weak", 0.01), ("strong", 0.8)):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=strength)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        folders.append(folder / name)
    return folders[0], folders[1]
