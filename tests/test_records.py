"""predictions.jsonl: what is written is what is read, and every bad line is named."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calsmooth.errors import CalsmoothError
from calsmooth.records import Prediction, read_predictions, write_predictions

GOOD = {"task": "t", "subject": "s", "id": "1", "logprobs": [-1.0, -2.0], "gold": 1}
logprob_lists = st.lists(st.floats(-1e6, 0), min_size=2, max_size=6).map(tuple)


@given(
    st.lists(st.builds(Prediction, st.text(), st.text(), st.text(), logprob_lists, st.just(0)), min_size=1, max_size=5)
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path, predictions):
    assert read_predictions(write_predictions(tmp_path / "p.jsonl", predictions)) == predictions


def test_per_byte_is_optional_and_kept(tmp_path):
    rows = [
        Prediction("t", "s", "1", (-1.0, -2.0), 0),
        Prediction("t", "s", "2", (-1.0, -2.0), 0, logprobs_per_byte=(-0.5, -0.25)),
        Prediction("t", "s", "3", (-1.0, -2.0), 0, order=(3, 0)),
    ]
    file = write_predictions(tmp_path / "p.jsonl", rows)
    assert read_predictions(file) == rows
    assert [set(json.loads(line)) >= {"logprobs_per_byte"} for line in file.read_text().splitlines()] == [
        False,
        True,
        False,
    ]
    assert set(json.loads(file.read_text().splitlines()[0])) == set(GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 2}, "'gold' must be an index from 0 to 1, got 2"),
        ({"gold": True}, "'gold' must be"),
        ({"gold": "B"}, "'gold' must be"),
        ({"logprobs": [-1.0]}, "'logprobs' must be two or more"),
        ({"logprobs": [-1.0, 0.5]}, "'logprobs' must be two or more finite numbers of at most 0"),
        ({"logprobs": [-1.0, float("nan")]}, "'logprobs' must be"),
        ({"logprobs": "ab"}, "'logprobs' must be"),
        ({"logprobs_per_byte": [-1.0]}, "'logprobs_per_byte' must match"),
        ({"order": [0]}, "'order' must be an index of the data for each of 'logprobs', got "),
        ({"order": [0, 0]}, "'order' must be"),
        ({"order": [0, -1]}, "'order' must be"),
        ({"order": [1, "0"]}, "'order' must be"),
        ({"order": "10"}, "'order' must be"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, message):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(CalsmoothError, match=message) as caught:
        read_predictions(file)
    assert f"{file}, line 3" in str(caught.value)


def test_what_rounding_left_above_0_is_0(tmp_path):
    file = tmp_path / "p.jsonl"
    values = {"logprobs": [6.1e-5, 2.0**-18, -2.0], "logprobs_per_byte": [1e-5, -0.0, -1.0]}
    file.write_text(json.dumps(GOOD | values))
    (prediction,) = read_predictions(file)
    assert prediction.logprobs == (0.0, 0.0, -2.0)
    assert prediction.logprobs_per_byte == (0.0, 0.0, -1.0)


def test_missing_fields_and_empty_files(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({k: v for k, v in GOOD.items() if k != "gold"}))
    with pytest.raises(CalsmoothError, match="line 1: no field 'gold'"):
        read_predictions(file)
    file.write_text("[1]\n")
    with pytest.raises(CalsmoothError, match="line 1: expected an object"):
        read_predictions(file)
    file.write_text("\n")
    with pytest.raises(CalsmoothError, match="holds no predictions"):
        read_predictions(file)


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_predictions(tmp_path / "p.jsonl", [Prediction("t", "s", "1", (float("nan"), -1.0), 0)])
    assert not (tmp_path / "p.jsonl").exists()
