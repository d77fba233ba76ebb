"""Baked copies of models of several architectures: their logits, their files, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from calsmooth import metrics
from calsmooth.calibrate import bake as bake_module
from calsmooth.calibrate.bake import bake
from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError
from calsmooth.models import load_model
from calsmooth.records import Prediction, read_predictions, write_predictions

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
KINDS = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False}),
    "gemma2 capped": ("Gemma2", {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0}),
    "gemma3 adds one": ("Gemma3", GEMMA),
    "cohere scaled": ("Cohere", {"logit_scale": 0.25}),
    "granite scaled": ("Granite", {"logits_scaling": 4.0, "tie_word_embeddings": True}),
    "gpt2 layer norm": ("GPT2", {"n_positions": 64}),
    "phi head bias": ("Phi", {}),
    "olmo without weight, untied": ("Olmo", {"tie_word_embeddings": False}),
    "olmo without weight, tied": ("Olmo", {"tie_word_embeddings": True}),
}


def make(kind, folder, dtype=torch.float32, vocab_size=64, **save):
    name, extra = KINDS[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        **(SIZES | extra | {"vocab_size": vocab_size})
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms start at 0 and 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, **save)
    return folder


def logits(folder, dtype=torch.float32):
    tokens = torch.arange(20)[None] * 7 % 64
    with torch.no_grad():
        return load_model(str(folder), dtype=dtype)(input_ids=tokens).logits


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "olmo without weight, tied"])
def test_the_logits_are_divided_and_nothing_else_changes(kind, tmp_path):
    model = make(kind, tmp_path / "model")
    baked = bake(str(model), 1.7, tmp_path / "baked")
    expected = logits(model) / 1.7
    assert torch.allclose(logits(baked.folder), expected, atol=1e-5 * float(expected.abs().max()))
    assert baked.difference < 1e-5
    # The embeddings of both, and with them everything that is tied to them, are the same bits.
    before, after = (load_model(str(f), dtype=torch.float32).get_input_embeddings() for f in (model, baked.folder))
    assert torch.equal(before.weight, after.weight)
    note = json.loads((tmp_path / "baked" / "temperature.json").read_text())
    assert (note["temperature"], note["changed"]) == (1.7, baked.changed)


def test_what_changes_is_what_the_architecture_has(tmp_path):
    changed = {
        k: bake(str(make(k, tmp_path / k)), 2.0, tmp_path / f"{k} baked").changed for k in KINDS if "tied" not in k
    }
    assert changed["gemma2 capped"] == ["model.norm.weight", "final_logit_softcapping"]
    assert changed["gpt2 layer norm"] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert changed["phi head bias"][-1] == "lm_head.bias"
    config = json.loads((tmp_path / "gemma2 capped baked" / "config.json").read_text())
    assert (config["final_logit_softcapping"], config["attn_logit_softcapping"]) == (1.5, 3.0)


def test_a_bfloat16_checkpoint_keeps_the_temperature_exactly(tmp_path):
    model = make("llama tied", tmp_path / "model", torch.bfloat16)
    baked = bake(str(model), 1.2345, tmp_path / "baked")
    assert baked.difference < 1e-6  # bfloat16 would round the quotient to 2e-3
    assert bake(str(model), 1.2345, tmp_path / "again", dtype=torch.bfloat16).difference < 3e-2


def test_shards_and_other_files_are_copied(tmp_path):
    model = make("llama untied", tmp_path / "model", max_shard_size="4KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    (model / "tokenizer.json").write_text("{}")
    (model / "pytorch_model.bin").write_text("old")
    baked = bake(str(model), 0.5, tmp_path / "baked").folder
    names = {p.name for p in model.iterdir()} - {"pytorch_model.bin"} | {"temperature.json"}
    assert {p.name for p in baked.iterdir()} == names
    modes = {p.stat().st_mode & 0o777 for p in baked.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_a_model_in_which_nothing_can_be_scaled_is_refused(tmp_path):
    model = make("olmo without weight, tied", tmp_path / "model")
    with pytest.raises(CalsmoothError, match="no weight on the norm before its head, and its head is tied"):
        bake(str(model), 2.0, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_other_weight_formats_are_refused(tmp_path):
    model = make("llama tied", tmp_path / "model")
    torch.save(load_model(str(model), dtype=torch.float32).state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(CalsmoothError, match=r"has no model\.safetensors"):
        bake(str(model), 2.0, tmp_path / "baked")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_copy_that_gives_other_logits_is_not_kept(tmp_path, monkeypatch):
    model = make("llama tied", tmp_path / "model")
    monkeypatch.setattr(bake_module, "_rewrite_tensor", lambda *_: None)
    with pytest.raises(CalsmoothError, match="it was not kept"):
        bake(str(model), 2.0, tmp_path / "baked")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path):
    """A finished evaluation that says which model it was of."""
    model = make("llama tied", tmp_path / "model", vocab_size=300)
    save_tokenizer(model)
    rows = [Prediction("t", "s", str(i), (-0.1, -2.5), int(i % 3 == 0)) for i in range(300)]
    file = write_predictions(tmp_path / "run" / "predictions.jsonl", rows)
    (file.parent / "results.json").write_text(json.dumps({"model": str(model), "config": {"revision": None}}))
    return file


def calibrate(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_bakes_the_model_that_results_json_names(evaluation, tmp_path):
    done = calibrate(evaluation, "-o", tmp_path / "o", "--bake", tmp_path / "baked", "--device", "cpu")
    assert done.exit_code == 0, done.output
    temperature = json.loads((tmp_path / "o" / "calibration.json").read_text())["temperature"]
    assert "Baked the temperature into" in done.output
    expected = logits(tmp_path / "model") / temperature
    assert torch.allclose(logits(tmp_path / "baked"), expected, atol=1e-5 * float(expected.abs().max()))


def test_a_temperature_held_at_a_bound_is_reported_and_not_baked(evaluation, tmp_path):
    write_predictions(evaluation, [Prediction("t", "s", str(i), (-0.1, -2.5), 1) for i in range(60)])
    done = calibrate(evaluation, "-o", tmp_path / "o", "--bake", tmp_path / "baked")
    assert "--bake: nothing was baked, for there is no best temperature: the probabilities carry no" in str(
        done.exception
    )
    assert (tmp_path / "o" / "calibration.json").is_file()
    assert not (tmp_path / "baked").exists()


def test_a_temperature_that_is_not_worth_it_is_baked_by_force_only(evaluation, tmp_path):
    rows = [Prediction("t", "s", str(i), (-0.4, -1.1), int(i % 3 == 0)) for i in range(300)]  # two thirds, as said
    write_predictions(evaluation, rows)
    asked = [evaluation, "--bake", tmp_path / "baked", "--device", "cpu", "-o"]
    done = calibrate(*asked, tmp_path / "o")
    assert isinstance(done.exception, CalsmoothError)  # which `main` turns into a line and exit code 1
    message = str(done.exception)
    assert message.startswith("--bake: nothing was baked. T = ")
    assert message.endswith(
        "can't be told from 1 with 150 questions; don't apply it. To bake it all the same, add --force"
    )
    assert (tmp_path / "o" / "calibration.json").is_file()
    assert not (tmp_path / "baked").exists()
    done = calibrate(*asked, tmp_path / "forced", "--force")
    assert done.exit_code == 0, done.output
    temperature = json.loads((tmp_path / "forced" / "calibration.json").read_text())["temperature"]
    assert json.loads((tmp_path / "baked" / "temperature.json").read_text())["temperature"] == temperature


def test_an_evaluation_stays_where_its_temperature_is_not_baked(evaluation, tmp_path, monkeypatch):
    import calsmooth.evaluate.run as evaluate_room

    def evaluate(config):
        rows = [Prediction("t", "s", str(i), (-0.4, -1.1), i % 2) for i in range(300)]  # chance
        write_predictions(config.output / "predictions.jsonl", rows)

    monkeypatch.setattr(evaluate_room, "run", evaluate)
    asked = ["-m", tmp_path / "model", "--format", "letter", "--bake", tmp_path / "baked", "-o", tmp_path / "o"]
    done = calibrate(*asked)
    assert "--bake: nothing was baked" in str(done.exception)
    assert len(read_predictions(tmp_path / "o" / "evaluation" / "predictions.jsonl")) == 300
    assert (tmp_path / "o" / "calibration.json").is_file()
    assert not (tmp_path / "baked").exists()


def test_the_command_refuses_before_any_work(evaluation, tmp_path):
    (evaluation.parent / "results.json").unlink()
    done = calibrate(evaluation, "--bake", tmp_path / "baked")
    assert "has no results.json that names the model; name it with --model" in str(done.exception)
    done = calibrate(evaluation, "--bake", tmp_path / "model", "--model", "x")
    assert f"--bake {tmp_path / 'model'}: holds files already" in str(done.exception)
    done = calibrate(evaluation, "--bake", tmp_path / "baked", "--method", "vector")
    assert "--bake: only a temperature can be folded into a model's weights" in str(done.exception)


def test_cloze_temperatures_are_refused(evaluation, tmp_path):
    rows = [Prediction("t", "s", str(i), (-4.0, -9.0), i % 2, (-1.0, -1.5)) for i in range(40)]
    write_predictions(evaluation, rows)
    done = calibrate(evaluation, "-o", tmp_path / "o", "--bake", tmp_path / "baked")
    assert "--bake: these are cloze predictions" in str(done.exception)
    assert not (tmp_path / "o").exists()


def save_tokenizer(folder, letters=" A B C D"):
    """Bytes, and what `letters` holds: by default each letter with its space is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [letters] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="!").save_pretrained(folder)


def test_a_baked_model_evaluates_to_the_calibrated_predictions(tmp_path):
    model = make("gemma3 adds one", tmp_path / "model", vocab_size=300)
    save_tokenizer(model)
    for split, count in (("dev", 2), ("test", 20)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        rows = (f"Question {i * i}?,one,{i},red,{i % 7},{'ABCD'[i % 4]}\n" for i in range(count))
        (tmp_path / "mmlu" / split / f"sums_{split}.csv").write_text("".join(rows))

    def evaluate(folder):
        asked = ["--task", "mmlu", "--data-dir", str(tmp_path), "--shots", "2", "--device", "cpu"]
        done = CliRunner().invoke(app, ["evaluate", "-m", str(folder), *asked, "-o", str(folder) + "-run"])
        assert done.exit_code == 0, done.output
        return [p.logprobs for p in read_predictions(Path(str(folder) + "-run") / "predictions.jsonl")]

    before, after = evaluate(model), evaluate(bake(str(model), 1.7, tmp_path / "baked").folder)
    expected = metrics.log_softmax(before, temperature=1.7)
    assert np.abs(expected - metrics.log_softmax(before)).max() > 0.1
    assert metrics.log_softmax(after) == pytest.approx(expected, abs=1e-4)


def test_letters_of_several_tokens_are_refused_before_any_work(tmp_path):
    model = make("llama tied", tmp_path / "model", vocab_size=300)
    save_tokenizer(model, " A C D")
    done = calibrate("-m", model, "--format", "letter", "-o", tmp_path / "o", "--bake", tmp_path / "baked")
    assert f"--bake: {model}'s tokenizer writes A as [" in str(done.exception)
    assert "which differ in more than the last token" in str(done.exception)
    assert not (tmp_path / "o").exists()
