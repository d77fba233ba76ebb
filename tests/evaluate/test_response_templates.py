"""A base model and the one that was fine-tuned from it are asked for responses in the same words."""

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from calsmooth.cli.app import app
from calsmooth.data.templates import as_chat_template
from calsmooth.errors import UsageError
from calsmooth.evaluate.comparison import compare
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.run import run
from calsmooth.evaluate.tasks.responses import load_responses

OPTIONS = {"split": None, "max_length": 300, "limit": None, "seed": 0}


@pytest.fixture(scope="module")
def base(build, plain_tokenizer, tmp_path_factory):
    """A base model, as most are published: without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    build(initializer_range=0.05).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two kinds of rows of Alpaca's format: every other one has an input."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"instruction": f"Name color {i}.", "input": "the sky" * (i % 2), "output": f"Color {i} is blue."}
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module", params=["alpaca", "tulu", "auto"])
def trained(request, base, rows, tmp_path_factory):
    """(template, folder of a finetune run)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["finetune", "--model", str(base), "--dataset", str(rows), "--template", request.param]
    arguments += ["--epochs", "1", "--batch-size", "6", "--device", "cpu", "--max-length", "300", "-o", str(folder)]
    arguments += ["--eval-task", "responses", "--eval-dataset", str(rows)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return {"auto": "alpaca"}.get(request.param, request.param), folder


def responses(model, rows, output, **options):
    config = EvaluateConfig(str(model), ("responses",), output, dataset=str(rows), device="cpu", **options)
    return run(config).results


def test_the_fine_tuned_model_is_asked_as_it_was_trained_and_the_base_model_can_be(base, rows, trained, tmp_path):
    template, folder = trained
    after = responses(folder / "model", rows, tmp_path / "after")
    before = responses(base, rows, tmp_path / "before", template=template)
    assert before["tasks"]["responses"]["key"] == after["tasks"]["responses"]["key"]
    assert before["tasks"]["responses"]["template"] == after["tasks"]["responses"]["template"] == template
    assert after["notes"] == [f"responses: asked with the template {template}, which {folder} was trained with"]
    assert before["notes"] == [f"responses: asked with the template {template}, as --template says"]
    assert compare([str(tmp_path / "before"), str(tmp_path / "after")], tmp_path / "both").results["notes"] == []


def test_what_finetune_measures_before_and_after_is_the_same(trained):
    template, folder = trained
    before, after = (
        json.loads((folder / moment / "results.json").read_text())["tasks"]["responses"]
        for moment in ("before", "after")
    )
    assert before["key"] == after["key"]
    assert before["template"] == after["template"] == template


def test_the_saved_tokenizer_alone_says_it_too(base, rows, trained, tmp_path):
    template, folder = trained
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "copy")
    copy = load_responses(
        str(rows), str(tmp_path), AutoTokenizer.from_pretrained(tmp_path / "copy"), template=None, **OPTIONS
    )
    original = load_responses(str(rows), str(base), AutoTokenizer.from_pretrained(base), template=template, **OPTIONS)
    assert list(copy.examples) == list(original.examples)
    assert copy.notes == [f"responses: asked with the template {template}, which the model carries"]


def test_runs_that_were_asked_in_other_words_are_named(base, rows, tmp_path):
    responses(base, rows, tmp_path / "one")
    responses(base, rows, tmp_path / "other", template="tulu")
    notes = compare([str(tmp_path / "one"), str(tmp_path / "other")], tmp_path / "both").results["notes"]
    assert notes[0] == (
        "responses: the runs differ in template (one: alpaca, other: tulu), so that their numbers don't compare like "
        "with like"
    )


def test_what_is_left_out_or_cut_is_said(base, plain_tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    lengths = [(1, 1), (1, 40), (60, 1)]
    lines = [{"instruction": "Name it. " * n, "output": "It is blue. " * m} for n, m in lengths]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_responses(str(file), str(base), plain_tokenizer, template=None, **OPTIONS)
    assert len(found.examples) == 2
    assert found.notes[1:] == [
        "responses: 1 of 3 rows were left out, whose response lies past 300 tokens",
        "responses: 2 of 3 rows were read only to their first 300 tokens",
    ]


def test_rows_that_are_text_already_have_no_template(base, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Q: Which color? A:", "response": " Blue."}) + "\n")
    found = load_responses(str(file), str(base), tokenizer, template=None, **OPTIONS)
    assert found.template == "none"
    assert found.notes == ["responses: the rows are text already, no template is used"]


def test_a_chat_model_is_asked_in_its_own_format(rows, base, tokenizer):
    found = load_responses(str(rows), str(base), tokenizer, template=None, **OPTIONS)
    assert (found.template, found.notes) == ("chat", ["responses: asked with the model's own chat template"])


def test_a_template_is_for_responses():
    with pytest.raises(UsageError, match="--template: goes with --task responses"):
        EvaluateConfig(task=("mmlu",), template="alpaca")
    with pytest.raises(UsageError, match="--template must be one of auto, chat, alpaca, tulu, got 'alpacca'; did you"):
        EvaluateConfig(task=("responses",), template="alpacca")


def test_a_template_that_an_earlier_version_saved_counts_as_what_the_run_says(base, rows, tmp_path):
    """Its layout of rows with an input wasn't that of training."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = as_chat_template("alpaca", tokenizer).replace("m.input", "false")
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("template: auto\n")
    (tmp_path / "summary.json").write_text('{"template": "alpaca"}')
    found = load_responses(str(rows), str(tmp_path / "model"), tokenizer, template=None, **OPTIONS)
    expected = load_responses(str(rows), str(base), tokenizer, template="alpaca", **OPTIONS)
    assert list(found.examples) == list(expected.examples)
