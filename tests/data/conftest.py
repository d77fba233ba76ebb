"""Tokenizers small enough to be made in the test: a byte-level BPE, and the chat templates of the common families."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Which color is the sky? Answer: blue. Which river is the longest? Answer: the Nile, by a little.",
    "### Instruction: Name a color. ### Input: the sky ### Response: The sky is blue, and sometimes it is red.",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the beginning-of-text token itself, trims each message, and has no line break after its end-of-turn mark.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# Drops what the assistant said before the last turn, as templates of reasoning models do with its thoughts.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Says itself what is the assistant's: its whole turn, or all but the end-of-turn mark.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# Knows no system role.
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>"]


def build_tokenizer(chat_template: str | None, adds_bos: bool = False, eos: str | None = "<|im_end|>"):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def chatml():
    return build_tokenizer(CHATML)


@pytest.fixture(scope="session")
def llama():
    return build_tokenizer(LLAMA, adds_bos=True)


@pytest.fixture(scope="session", params=[MARKED, MARKED_SHORT], ids=["whole turn", "without its end"])
def marked(request):
    return build_tokenizer(request.param)


@pytest.fixture(scope="session")
def forgetful():
    return build_tokenizer(FORGETFUL)


@pytest.fixture(scope="session")
def strict():
    return build_tokenizer(STRICT)


@pytest.fixture(scope="session")
def plain():
    """No chat template: what a base model has."""
    return build_tokenizer(None, adds_bos=True, eos="</s>")


@pytest.fixture(scope="session")
def sentencepiece():
    """As Llama 2's and Mistral's: a space is read before a text's first word, and not behind a token in it."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *octets, *SPECIAL], show_progress=False)
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def endless():
    """Has no end-of-sequence token."""
    return build_tokenizer(None, eos=None)


@pytest.fixture
def write_file(tmp_path) -> Callable[..., str]:
    """write_file(name, text or bytes) -> path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return str(path)

    return write
