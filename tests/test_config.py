"""Settings: one declaration for YAML keys, flags and checks."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calsmooth.config import Settings, load, load_grid, setting
from calsmooth.errors import UsageError


@dataclass(frozen=True)
class Example(Settings):
    beta: float = setting(0.1, "Smoothing.", minimum=0.0, below=1.0)
    epochs: int = setting(2, "Passes.", above=0)
    task: tuple[str, ...] = setting(("demo",), "Tasks.", choices=("demo", "mmlu"))
    batch_size: int | None = setting(None, "Batch.", minimum=1)
    output: Path | None = setting(None, "Folder.")
    resume: bool = setting(False, "Go on.")


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "beta: 0.2\nepochs: 5\nbatch-size: 8\noutput: here\n")
    config = load(Example, {"epochs": 7, "beta": None}, file)
    assert config == Example(beta=0.2, epochs=7, batch_size=8, output=Path("here"))


def test_a_number_written_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load(Example, {}, write(tmp_path, "beta: 2e-5\n")).beta == 2e-5
    assert load(Example, {}, write(tmp_path, "epochs: 1e1\n")).epochs == 10


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert load(Example, {}, write(tmp_path, "task: mmlu\n")).task == ("mmlu",)
    assert load(Example, {}, write(tmp_path, "task: [mmlu, demo]\n")).task == ("mmlu", "demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bata: 0.1\n", "unknown key 'bata'; did you mean 'beta'"),
        ("zzz: 1\n", "unknown key 'zzz'; known keys: beta, epochs"),
        ("beta: fast\n", "'beta' must be a number, got 'fast'"),
        ("epochs: 1.5\n", "'epochs' must be a whole number, got 1.5"),
        ("resume: 1\n", "'resume' must be true or false, got 1"),
        ("beta: true\n", "'beta' must be a number, got True"),
        ("beta:\n", "'beta' is empty"),
        ("beta: [0.1, 0.2]\n", "'beta' must be a number"),
        ("- beta\n", "expected a mapping"),
        ("beta: 0.1\n  epochs: 2\n", "line 2: not valid YAML"),
        ("beta: 1.5\n", "--beta must be at least 0 and below 1, got 1.5"),
        ("epochs: 0\n", "--epochs must be above 0, got 0"),
        ("task: mmlo\n", "--task must be one of demo, mmlu, got 'mmlo'; did you mean 'mmlu'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Example, {}, write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_where_one_value_is_expected_make_a_grid(tmp_path: Path) -> None:
    path = write(tmp_path, "beta: [0, 0.1]\nepochs: [1, 2]\ntask: [demo, mmlu]\nbatch_size: [null, 8]\n")
    grid = load_grid(Example, {"epochs": 3}, path)
    assert [values for values, _ in grid] == [
        {"beta": 0.0, "batch_size": None},
        {"beta": 0.0, "batch_size": 8},
        {"beta": 0.1, "batch_size": None},
        {"beta": 0.1, "batch_size": 8},
    ]
    assert all(config.task == ("demo", "mmlu") and config.epochs == 3 for _, config in grid)
    assert [config.beta for _, config in grid] == [0.0, 0.0, 0.1, 0.1]


def test_a_list_is_swept_over_lists(tmp_path: Path) -> None:
    grid = load_grid(Example, {}, write(tmp_path, "task: [[demo], [demo, mmlu]]\n"))
    assert [config.task for _, config in grid] == [("demo",), ("demo", "mmlu")]


def test_without_lists_a_grid_is_one_configuration(tmp_path: Path) -> None:
    assert load_grid(Example, {"beta": 0.2}, None) == [({}, Example(beta=0.2))]
    assert load_grid(Example, {}, write(tmp_path, "beta: 0.3")) == [({}, Example(beta=0.3))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: []", "'beta' is []; expected a list of different values"),
        ("beta: [0.1, 0.2, 0.10]", "'beta' is [0.1, 0.2, 0.1]; expected a list of different values"),
        ("beta: [0.1, high]", "'beta' must be a number, got 'high'"),
        ("beta: [0.1, 2]", "--beta must be at least 0 and below 1, got 2"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load_grid(Example, {}, write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: can't be read"):
        load(Example, {}, tmp_path / "none.yaml")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("task: [café]".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml: not UTF-8 text .* at byte 10"):
        load(Example, {}, tmp_path / "latin.yaml")


def test_not_a_number_is_out_of_every_range() -> None:
    with pytest.raises(UsageError):
        Example(beta=float("nan"))


@given(
    st.builds(
        Example,
        beta=st.floats(0, 0.99),
        epochs=st.integers(1, 100),
        task=st.lists(st.sampled_from(["demo", "mmlu"]), min_size=1).map(tuple),
        batch_size=st.none() | st.integers(1, 10**6),
        output=st.none() | st.just(Path("runs/a b")),
        resume=st.booleans(),
    )
)
def test_to_yaml_reads_back(config: Example) -> None:
    values = yaml.safe_load(config.to_yaml())
    values["task"] = tuple(values["task"])
    values["output"] = values["output"] and Path(values["output"])
    assert Example(**values) == config
