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


KINDS = {
    # what the names of its classes begin with, and what is particular to it
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {"n_positions": 1024}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "bloom": ("Bloom", {}),
    "mamba": ("Mamba", {"state_size": 4}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "llama4": (
        "Llama4Text",
        {"head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
    ),
}


def build_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    import transformers

    name, particular = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**(SIZES | particular | changes))
    of_text = name.removesuffix("Text")
    model = getattr(transformers, f"{of_text}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")
    torch.manual_seed(0)
    return model(config).to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer():
    """Without a chat template: what a base model has."""
    return build_tokenizer(chat=False)


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


def _arc(number, key, labels):
    texts = [f"choice {label} of {number}" for label in labels]
    return {"id": f"Mercury_{number}", "question": f"Which star is number {number}?",
            "choices": {"text": texts, "label": list(labels)}, "answerKey": key}  # fmt: skip


def _openbook(number):
    return {"id": f"7-{number}", "question_stem": f"The sun, the {number}th, is responsible for",
            "choices": {"text": ["puppies", "children growing", "plants", "wires"], "label": list("ABCD")},
            "answerKey": "ABCD"[number % 4]}  # fmt: skip


def _commonsense(number):
    choices = {"label": list("ABCDE"), "text": ["ignore", "enforce", "be harsh", "yell at", f"avoid {number}"]}
    return {"id": f"hash{number}", "question": f"What did the sanctions {number} seem to do?",
            "question_concept": "punishing", "choices": choices, "answerKey": "ABCDE"[number % 5]}  # fmt: skip


def _piqa(number):
    goal, first, second = f"How do I boil {number} eggs?", "Put them in water.", "Put them in the sink and wait"
    return {"goal": goal, "sol1": first, "sol2": second, "label": number % 2}


def _winogrande(number):
    return {"sentence": f"Sarah was a better surgeon than Maria so _ always got the {number} easier cases.",
            "option1": "Sarah", "option2": "Maria", "answer": str(1 + number % 2)}  # fmt: skip


def _truthful(number):
    choices = [f"Nothing happens to seed {number}", "They grow in you", "You become sick"][: 2 + number % 2]
    return {"question": f"What happens if you eat {number} seeds?",
            "mc1_targets": {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)},
            "mc2_targets": {"choices": choices, "labels": [1] * len(choices)}}  # fmt: skip


def _scene(number):
    return {"ind": number, "activity_label": "Roofing", "ctx_a": f"A man [substeps] is on roof {number}", "ctx_b": "he",
            "ctx": f"A man is on roof {number} he", "endings": ["sings [title] loud.", "falls.", "flies.", "sleeps."],
            "source_id": "activitynet~v_1", "split": "train", "split_type": "indomain",
            "label": str(number % 4)}  # fmt: skip


def _mmlu(number, subject):
    return {"question": f" What is {number} + 1 in {subject}? ", "subject": subject,
            "choices": ["one", "two", "None", "NA"], "answer": number % 4}  # fmt: skip


@pytest.fixture(scope="session")
def hub():
    """{(data set, configuration): {split: rows}}: a few rows of each in the columns that it has on the hub."""
    subjects = ("anatomy", "abstract_algebra")
    return {
        ("cais/mmlu", "all"): {
            split: [_mmlu(first + i, subject) for subject in subjects for i in range(count)]
            for split, first, count in (("test", 0, 4), ("dev", 50, 5))
        },
        ("Rowan/hellaswag", None): {s: [_scene(first + i) for i in range(7)] for s, first in SPLITS},
        ("allenai/ai2_arc", "ARC-Easy"): {
            "test": [_arc(1, "B", "ABCD"), _arc(2, "3", "1234"), _arc(3, "A", "ABC"), _arc(4, "E", "ABCDE")],
            "train": [_arc(50 + i, "D", "ABCD") for i in range(6)],
        },
        ("allenai/ai2_arc", "ARC-Challenge"): {
            "test": [_arc(i, "C", "ABCD") for i in range(4)],
            "train": [_arc(50 + i, "A", "ABCD") for i in range(6)],
        },
        ("allenai/openbookqa", "main"): {
            "test": [_openbook(i) for i in range(4)],
            "train": [_openbook(50 + i) for i in range(6)],
        },
        ("tau/commonsense_qa", None): {s: [_commonsense(first + i) for i in range(6)] for s, first in SPLITS},
        ("baber/piqa", None): {s: [_piqa(first + i) for i in range(6)] for s, first in SPLITS},
        ("allenai/winogrande", "winogrande_xl"): {s: [_winogrande(first + i) for i in range(6)] for s, first in SPLITS},
        ("truthfulqa/truthful_qa", "multiple_choice"): {"validation": [_truthful(i) for i in range(8)]},
    }


SPLITS = (("validation", 0), ("train", 50))


@pytest.fixture
def served(hub, monkeypatch):
    """`datasets.load_dataset` answers from `hub`; gives the list of what it was asked."""
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split=None, revision=None):
        asked.append((path, name, split, revision))
        splits = {s: datasets.Dataset.from_list(rows) for s, rows in hub[path, name].items()}
        return datasets.DatasetDict(splits) if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("calsmooth.evaluate.rows.prepare_hub", lambda: True)
    return asked
