"""A tokenizer and models small enough to be made in the test: a byte-level BPE and randomly initialised layers."""

import pytest
import torch

TEXT = """The following are multiple choice questions (with answers) about the moon. Question: Which color is the sky?
A. red B. blue C. green D. none of the above Answer: B. A man is sitting on a roof. He starts pulling up roofing."""
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(chat: bool = True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


SIZES = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    import transformers

    extra = {
        "llama": {},
        "gpt2": {"n_positions": 1024},
        "gemma2": {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
        "mamba": {"state_size": 4},
    }[kind]
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    }[kind]
    torch.manual_seed(0)
    return classes[1](classes[0](**(SIZES | extra | changes))).to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def build():
    """`build(kind, dtype, **config)` makes a random model of a kind in `KINDS`."""
    return build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A model folder as a user would have one."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(initializer_range=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
