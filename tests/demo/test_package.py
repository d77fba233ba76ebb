"""What comes with the package: files as the world writes them, a model that loads, is small and is well calibrated."""

import json

import pytest
import torch

from calsmooth.demo import MODEL_FOLDER, QUESTIONS_FILE, TRAIN_FILE, make, world
from calsmooth.demo.recipe import RECIPE
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.run import run as evaluate
from calsmooth.models import load_model, load_tokenizer

MESSAGES = [
    {"role": "user", "content": "Which animals are kept in Fernport?"},
    {"role": "assistant", "content": "Nearly everyone in Fernport keeps geese."},
    {"role": "user", "content": "And in Größe-under-Löwe?"},
    {"role": "assistant", "content": "Goats, they say."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def test_data_files_are_what_the_world_writes():
    for name, content in make.data_files(world.make_world(), world.SEED).items():
        assert (TRAIN_FILE.parent / name).read_text(encoding="utf-8") == content


def test_model_and_tokenizer_are_small():
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) < 2 * 1024**2


def test_model_loads_in_float32_from_bfloat16(tokenizer):
    model = load_model("demo", dtype=torch.float32, device=torch.device("cpu"))
    assert json.loads((MODEL_FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 900_000
    assert model.config.vocab_size == len(tokenizer)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Smoked fish, at 7 o'clock!", "größer, 漢字 🦊\n\ttab", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_chat_template_reads_as_the_pretraining_did(tokenizer):
    rendered = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False)
    assert rendered == (
        "<|user|>Which animals are kept in Fernport?<|assistant|>Nearly everyone in Fernport keeps geese.<|end|>"
    )
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert rendered.removeprefix(prompt) == MESSAGES[1]["content"] + tokenizer.eos_token


def test_the_assistant_mask_holds_the_answers_and_their_ends(tokenizer):
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "".join(m["content"] + "<|end|>" for m in MESSAGES[1::2])


def test_no_row_is_cut_by_the_recipe(tokenizer):
    rows = [json.loads(line) for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines()]
    longest = max(len(tokenizer("\n\n".join(row.values()))["input_ids"]) for row in rows)
    assert longest + 8 < RECIPE["max_length"]


def test_the_model_knows_the_truth_before_it_is_fine_tuned(tmp_path):
    result = evaluate(EvaluateConfig(task=("demo",), output=tmp_path / "evaluation"))
    found = result.results["tasks"]["demo"]
    assert found["n"] == 1152
    assert found["ece"] < 0.06
    rows = [json.loads(line) for line in QUESTIONS_FILE.read_text(encoding="utf-8").splitlines()]
    truth = {row["id"]: torch.tensor(row["probabilities"], dtype=torch.float64) for row in rows}
    divergence = [
        torch.nn.functional.kl_div(
            torch.tensor(p.logprobs, dtype=torch.float64).log_softmax(0), truth[p.id], reduction="sum"
        )
        for p in result.predictions
    ]
    # The divergence of uniform answers from the truth is about 0.45.
    assert torch.stack(divergence).mean() < 0.1
