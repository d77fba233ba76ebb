"""`calsmooth evaluate` from the command line to the files that it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from calsmooth import metrics
from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate import run as run_module
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.questions import Question
from calsmooth.evaluate.run import run
from calsmooth.evaluate.tasks import CHOICE_TASKS
from calsmooth.records import read_predictions, read_token_predictions

DOCUMENTED = (
    "n accuracy ece rms_ce rms_ce_hendrycks_test mce sce ace brier nll mean_confidence auroc choice_mass "
    "ece_interval accuracy_interval ece_if_calibrated ece_corrected ece_p_value overconfidence overconfidence_interval "
    "brier_interval nll_interval"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MMLU with three subjects and ARC with ragged choices, in the tasks' own file layouts."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("dev", 5), ("test", 9)):
        (root / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "astronomy", "virology"):
            rows = (f"Question {i} of {subject}?,red,blue,None,{i},{'ABCD'[i % 4]}\n" for i in range(count))
            (root / "mmlu" / split / f"{subject}_{split}.csv").write_text("".join(rows))
    (root / "arc_easy").mkdir()
    colors = ["red", "light blue", "green", "none"]
    for split, count in (("train", 5), ("test", 12)):
        rows = [
            {
                "id": f"{split}{i}",
                "question": f"Which color is number {i}?",
                "choices": {"text": colors[: 3 + i % 2], "label": list("ABCD")[: 3 + i % 2]},
                "answerKey": "ABC"[i % 3],
            }
            for i in range(count)
        ]  # fmt: skip
        (root / "arc_easy" / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def config(model_folder, data, tmp_path):
    def make(**changes):
        defaults = {"model": str(model_folder), "task": ("mmlu",), "data_dir": data, "device": "cpu"}
        return EvaluateConfig(**(defaults | {"output": tmp_path / "out"} | changes))

    return make


def test_the_command_writes_its_files(model_folder, data, tmp_path):
    command = [sys.executable, "-m", "calsmooth", "evaluate", "--model", str(model_folder), "--device", "cpu"]
    command += ["--task", "mmlu,arc_easy", "--data-dir", str(data), "--output", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"Evaluating {model_folder} on mmlu, arc_easy."
    assert lines[1].split() == ["task", "n", "accuracy", "confidence", "ECE", "RMS", "Brier", "NLL"]
    assert [line.split()[:2] for line in lines[2:7]] == [
        ["mmlu", "27"],
        ["anatomy", "9"],
        ["astronomy", "9"],
        ["virology", "9"],
        ["arc_easy", "12"],
    ]
    folder = tmp_path / "here"
    names = ["predictions.jsonl", "reliability.pdf", "reliability.png", "reliability.svg"]
    names += ["report.html", "results.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")

    predictions = read_predictions(folder / "predictions.jsonl")
    assert len(predictions) == 39
    assert {len(p.logprobs) for p in predictions if p.task == "arc_easy"} == {3, 4}
    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= {"model", "tasks", "config", "versions"}
    for name, task in results["tasks"].items():
        assert set(DOCUMENTED.split()) <= set(task)
        own = [p for p in predictions if p.task == name]
        again = metrics.summarize([p.logprobs for p in own], [p.gold for p in own])
        assert task["nll"] == pytest.approx(again["nll"], abs=1e-12)
        assert task["ece"] == pytest.approx(again["ece"], abs=1e-12)
    assert set(results["tasks"]["mmlu"]["subjects"]) == {"anatomy", "astronomy", "virology"}
    assert all(0 < s["ece_p_value"] <= 1 for s in results["tasks"]["mmlu"]["subjects"].values())
    assert "subjects" not in results["tasks"]["arc_easy"]
    for name, task in results["tasks"].items():
        own = [p for p in predictions if p.task == name]
        confidence = [np.exp(max(p.logprobs)) for p in own]
        correct = [np.argmax(p.logprobs) == p.gold for p in own]
        assert task["ece_unnormalised"] == pytest.approx(metrics.expected_calibration_error(confidence, correct))
    told = " ".join(done.stdout.split())
    assert "of 3 subjects differ from calibrated (p <= 0.05); 0.15 would by chance" in told
    assert "mmlu: the letters' probabilities before they are renormalised have ECE" in told


def test_json_is_alone_on_standard_output(model_folder, data, tmp_path):
    arguments = ["evaluate", "--model", str(model_folder), "--task", "mmlu", "--data-dir", str(data)]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "-o", str(tmp_path / "o"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "o" / "results.json").read_text())


def test_a_tokenizer_of_another_model_is_named(config, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "small")
    with pytest.raises(CalsmoothError, match=r"small: its tokenizer gives token \d+ and the model knows 20"):
        run(config(model=str(tmp_path / "small")))


def test_results_do_not_depend_on_batch_size_or_company(config, tmp_path):
    one = run(config(batch_size=1, output=tmp_path / "1")).predictions
    many = run(config(batch_size=64, output=tmp_path / "64")).predictions
    alone = run(config(limit=1, output=tmp_path / "alone")).predictions
    for a, b in zip(one, many, strict=True):
        assert a.id == b.id
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    match = next(p for p in many if (p.subject, p.id) == (alone[0].subject, alone[0].id))
    assert alone[0].logprobs == pytest.approx(match.logprobs, abs=1e-5)


def test_predictions_are_the_models_own_log_probabilities(config, model_folder, data):
    """Rebuilt from the files and the published prompt, through nothing of ours but the model's files."""
    import torch

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)

    def ask(line, answered):
        question, *options, letter = line.split(",")
        text = question + "".join(f"\n{x}. {o}" for x, o in zip("ABCD", options, strict=True)) + "\nAnswer:"
        return f"{text} {letter}\n\n" if answered else text

    dev = (data / "mmlu" / "dev" / "virology_dev.csv").read_text().splitlines()
    test = (data / "mmlu" / "test" / "virology_test.csv").read_text().splitlines()
    header = "The following are multiple choice questions (with answers) about  virology.\n\n"
    prompt = header + "".join(ask(line, True) for line in dev) + ask(test[4], False)
    with torch.no_grad():
        last = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(dim=-1)
    expected = [float(last[tokenizer(prompt + f" {x}")["input_ids"][-1]]) for x in "ABCD"]
    predictions = run(config()).predictions
    found = next(p for p in predictions if p.id == "virology/4")
    assert found.logprobs == pytest.approx(expected, abs=1e-4)
    assert found.gold == 0


def test_cloze_reports_sum_and_per_byte(config):
    result = run(config(task=("arc_easy",), format="cloze", shots=2))
    task = result.results["tasks"]["arc_easy"]
    assert task["format"] == "cloze"
    assert task["shots"] == 2
    prediction = result.predictions[0]
    lengths = [len("red"), len("light blue"), len("green")]
    assert np.multiply(prediction.logprobs_per_byte, lengths) == pytest.approx(prediction.logprobs, abs=1e-9)
    per_byte = metrics.summarize(
        [p.logprobs_per_byte for p in result.predictions], [p.gold for p in result.predictions]
    )
    assert task["per_byte"]["ece"] == pytest.approx(per_byte["ece"], abs=1e-12)
    assert task["tokens_run"] < task["tokens_in_full"] / 2


def test_limit_and_dropped_shots_are_noted(config):
    result = run(config(limit=6, max_length=150))
    task = result.results["tasks"]["mmlu"]
    assert (task["n"], task["questions_available"]) == (6, 27)
    assert task["prompts_with_dropped_shots"] == 6
    assert "lost solved examples" in " ".join(result.results["notes"])
    assert {p.subject for p in result.predictions} == {"anatomy", "astronomy", "virology"}


def test_one_question_that_is_too_long_leaves_the_others_their_shared_examples(config, data, tmp_path):
    for split in ("dev", "test"):
        lines = (data / "mmlu" / split / f"virology_{split}.csv").read_text()
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        (tmp_path / "mmlu" / split / f"virology_{split}.csv").write_text(lines)
    with open(tmp_path / "mmlu" / "test" / "virology_test.csv", "a") as file:
        file.write(f"{'Which color is the sky and the roof? ' * 50},red,blue,None,9,B\n")
    task = run(config(data_dir=tmp_path, max_length=450)).results["tasks"]["mmlu"]
    assert (task["n"], task["prompts_with_dropped_shots"], task["prompts_truncated"]) == (10, 1, 1)
    assert task["tokens_run"] < task["tokens_in_full"] / 2


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("mamba", "prompts are run in full, because it keeps a running state instead of a key/value cache"),
        ("gemma2", "each choice is run with its question, because its sliding window would count padding"),
        ("llama", None),
    ],
)
def test_what_could_not_be_shared_is_noted(config, build, tokenizer, tmp_path, kind, note):
    build(kind, initializer_range=0.05).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    settings = {"model": str(tmp_path / kind), "task": ("arc_easy",), "format": "cloze", "limit": 3, "shots": 2}
    assert run(config(**settings)).results["notes"] == ([note] if note else [])


def test_predictions_hold_the_order_of_shuffled_choices(config, tmp_path):
    rows = [{"question": f"Why {i}?", "mc1_targets": {f"blue {i}": 1, "red": 0, "": 0, "none": 0}} for i in range(9)]
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    result = run(config(task=("truthfulqa_mc1",), data_dir=tmp_path, format="cloze"))
    note = "truthfulqa_mc1: 9 of 9 questions have an empty wrong choice, which was left out"
    assert note in result.results["notes"]
    predictions = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert predictions == result.predictions
    assert len({p.order for p in predictions}) > 2
    for p in predictions:
        assert sorted(p.order) == [0, 1, 3]
        assert p.order[p.gold] == 0
    # A choice's log-probability is that of its text, wherever it was put.
    own = tmp_path / "own.yaml"
    own.write_text("data: own.jsonl\nformat: cloze\nanswer_as: index\ncontext: '{question}'\n")
    context = CHOICE_TASKS["truthfulqa_mc1"].cloze_context
    lines = []
    for i, row in enumerate(rows):
        text = context(Question(str(i), "", row["question"], (), 0))
        lines.append({"question": text, "choices": [f"blue {i}", "red", "none"], "answer": 0})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    published = run(config(task=(str(own),), output=tmp_path / "published")).predictions
    for p, q in zip(predictions, published, strict=True):
        joined = dict(zip(p.order, p.logprobs, strict=True))
        assert [joined[i] for i in (0, 1, 3)] == pytest.approx(q.logprobs, abs=1e-4)


def test_responses_need_a_dataset(config):
    with pytest.raises(UsageError, match="--task responses: needs --dataset"):
        run(config(task=("responses",)))


def test_responses(config, tmp_path):
    file = tmp_path / "held-out.jsonl"
    rows = [{"instruction": f"Name color {i}.", "output": f"The color {i} is blue."} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(config(task=("responses", "mmlu"), dataset=str(file)))
    task = result.results["tasks"]["responses"]
    assert set(DOCUMENTED.split()) <= set(task)
    assert task["rows"] == 12
    assert task["n"] > 12 * 5
    assert task["nll"] > 0
    assert task["sce"] is None
    assert {p.task for p in result.predictions} == {"mmlu"}


def test_only_responses_write_no_predictions(config, tmp_path):
    file = tmp_path / "held-out.jsonl"
    file.write_text(json.dumps({"instruction": "Name a color.", "output": "The sky is blue."}) + "\n")
    folder = run(config(task=("responses",), dataset=str(file))).folder
    assert not (folder / "predictions.jsonl").exists()
    task = json.loads((folder / "results.json").read_text())["tasks"]["responses"]
    tokens = read_token_predictions(folder / "token_predictions.npz")
    assert len(tokens.row) == task["n"]
    assert metrics.expected_calibration_error(tokens.confidence, tokens.correct) == task["ece"]
    assert [tokens.nll.mean(), tokens.brier.mean()] == pytest.approx([task["nll"], task["brier"]], abs=1e-12)


def test_missing_data_shows_before_the_model_is_loaded(config, monkeypatch, tmp_path):
    def never(*arguments, **named):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_module, "load_model", never)
    with pytest.raises(CalsmoothError, match="no test split of MMLU there; expected the official CSV"):
        run(config(data_dir=tmp_path))


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--task must be one of .* did you mean 'mmlu'"):
        EvaluateConfig(task=("mlu",))


def test_a_used_folder_is_refused_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.delattr(run_module, "load_model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").write_text("")
    with pytest.raises(UsageError, match="holds files already"):
        run(config())


def test_the_demo_task_is_asked_as_a_conversation(config, tmp_path, monkeypatch):
    file = tmp_path / "questions.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "subject": "sky" if i % 2 else "roof",
            "question": f"Which color is number {i}?",
            "choices": ["blue", "light red"],
            "answer": i % 2,
            "probabilities": [0.7, 0.3],
        }
        for i in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("calsmooth.evaluate.tasks.demo.QUESTIONS_FILE", file)
    result = run(config(task=("demo",), data_dir=None))
    task = result.results["tasks"]["demo"]
    assert (task["format"], task["prompt"], task["shots"], task["n"]) == ("cloze", "conversation", 0, 10)
    assert set(task["subjects"]) == {"sky", "roof"}
    assert result.results["notes"] == []
    shot = run(config(task=("demo",), data_dir=None, shots=5, output=tmp_path / "shots"))
    assert "demo: only 0 of 5 solved examples exist" in shot.results["notes"]
    file.write_text(json.dumps(rows[0] | {"answer": 2}) + "\n")
    with pytest.raises(CalsmoothError, match=r"line 1: the answer must be an index from 0 to 1, got 2"):
        run(config(task=("demo",), data_dir=None, output=tmp_path / "bad"))
