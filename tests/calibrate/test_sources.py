"""Reading lm-evaluation-harness's samples. The lines are written here as its version 0.4.13 writes them."""

import json

import numpy as np
import pytest

from calsmooth.calibrate.sources import load_predictions, read_samples
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.records import Prediction, write_predictions

DATED = "samples_{}_2026-01-02T03-04-05.678901.jsonl"


def sample(i, logprobs, target, texts=("A", "B", "C", "D"), **changes):
    """A line of a multiple-choice task, numbers as text, as the harness has them."""
    answers = [[str(value), "False"] for value in logprobs]
    right = target if isinstance(target, int) else texts.index(target)
    return {
        "doc_id": i,
        "doc": {"question": f"Question {i}?"},
        "target": str(target),
        "arguments": {
            f"gen_args_{k}": {"arg_0": f"Question {i}?\nAnswer:", "arg_1": f" {t}"} for k, t in enumerate(texts)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": "0",
        "acc": float(int(np.argmax(logprobs)) == right),
        **changes,
    }


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LETTERS = [sample(i, np.roll([-0.5, -1.5, -2.0, -3.0], i), i % 3) for i in range(12)]


def test_letters(tmp_path):
    file = write(tmp_path / DATED.format("mmlu_anatomy"), LETTERS)
    predictions = load_predictions(file)
    assert predictions[1] == Prediction("mmlu_anatomy", "mmlu_anatomy", "1", (-3.0, -0.5, -1.5, -2.0), 1)
    assert [p.gold for p in predictions] == [i % 3 for i in range(12)]


def test_texts_are_also_scored_by_the_byte(tmp_path):
    lines = [sample(i, (-6.0, -4.0), i % 2, ("Zürich", "Bern")) for i in range(4)]
    lines[0]["doc"]["subject"] = "towns"
    predictions = read_samples(write(tmp_path / DATED.format("towns_of_x"), lines))
    assert predictions[0].logprobs_per_byte == (-6.0 / 7, -1.0)
    assert [p.subject for p in predictions[:2]] == ["towns", "towns_of_x"]


def test_targets_that_are_texts_even_where_they_look_like_numbers(tmp_path):
    digits = ("1", "2", "3", "4")
    lines = [sample(i, np.roll([-1.0, -2.0, -3.0, -4.0], i), digits[i % 4], digits) for i in range(8)]
    assert [p.gold for p in read_samples(write(tmp_path / "a.jsonl", lines))] == [0, 1, 2, 3] * 2
    for line in lines:
        line["target"] = str(int(line["target"]) - 1)
    assert [p.gold for p in read_samples(write(tmp_path / "b.jsonl", lines))] == [0, 1, 2, 3] * 2


def test_mutual_information_and_filters_do_not_double_anything(tmp_path):
    texts = ("red", "blue")
    lines = []
    for i in range(3):
        line = sample(i, (-1.0, -2.0, -5.0, -6.0), 0, texts * 2, metrics=["acc", "acc_mutual_info"])
        lines += [line, line | {"filter": "other"}]
    predictions = read_samples(write(tmp_path / "s.jsonl", lines))
    assert [(p.id, p.logprobs) for p in predictions] == [(str(i), (-1.0, -2.0)) for i in range(3)]


def test_a_folder_is_its_predictions_or_its_samples(tmp_path):
    for task in ("one", "two"):
        write(tmp_path / "model" / DATED.format(task), LETTERS)
    assert {p.task for p in load_predictions(tmp_path)} == {"one", "two"}
    write_predictions(tmp_path / "predictions.jsonl", [Prediction("own", "s", "0", (-1.0, -2.0), 0)])
    assert [p.task for p in load_predictions(tmp_path)] == ["own"]


def test_two_runs_in_a_folder_are_refused(tmp_path):
    write(tmp_path / "a" / DATED.format("one"), LETTERS)
    write(tmp_path / "b" / DATED.format("one"), LETTERS)
    with pytest.raises(CalsmoothError, match="are both of one; give the files of one run"):
        load_predictions(tmp_path)


def test_nothing_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_predictions(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds neither"):
        load_predictions(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filtered_resps": ["Paris"] * 4}, "line 2: expected a multiple-choice sample"),
        ({"filtered_resps": [["-1.0", "False"]] * 3}, "line 2: expected a multiple-choice sample"),
        ({"filtered_resps": [["nan", "False"]] * 4}, "line 2: log-likelihoods must be finite"),
        ({"target": "[0, 2]"}, "line 2: 'target' must be the number or the text of one of the 4 choices"),
        ({"target": "9"}, "line 2: 'target' must be the number"),
        ({"target": "3", "acc": 1.0}, "line 2: 'acc' is 1, but the most probable choice is number 1"),
    ],
)
def test_a_line_that_is_no_such_sample_is_named(tmp_path, change, message):
    lines = [LETTERS[0], LETTERS[1] | change, *LETTERS[2:]]
    with pytest.raises(CalsmoothError) as caught:
        read_samples(write(tmp_path / "s.jsonl", lines))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
