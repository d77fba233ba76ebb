"""Tokenised data on disk: found again only when nothing has changed, and never half of it."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from calsmooth import console
from calsmooth.data import cache, load_example_set
from calsmooth.data.examples import Example, Examples, ExampleSet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_SECONDS", 0.0)


@pytest.fixture
def source(write_file) -> str:
    rows = [{"instruction": f"Add {n}.", "output": "Blue."} for n in range(20)]
    return write_file("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def load(source, tokenizer, **options) -> ExampleSet:
    return load_example_set(source, tokenizer, cache=True, **{"max_length": 99} | options)


def entries(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


def test_the_second_time_nothing_is_tokenised(chatml, source, tmp_path):
    first, second = load(source, chatml), load(source, chatml)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert list(first.examples) == list(second.examples)
    without = [{k: v for k, v in vars(s).items() if k not in ("examples", "from_cache")} for s in (first, second)]
    assert without[0] == without[1]
    assert isinstance(second.examples.tokens, np.memmap), "a set that doesn't fit into memory is read where it lies"
    [entry] = entries(tmp_path)
    assert {p.name for p in entry.iterdir()} == {"about.json", "learned.npy", "starts.npy", "tokens.npy"}


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 98},
        {"template": "alpaca"},
        {"limit": 5},
        {"limit": 5, "seed": 1},
        {"on_bad_row": "skip"},
        {"format": "alpaca"},
    ],
)
def test_other_settings_are_another_entry(chatml, source, change, tmp_path):
    load(source, chatml), load(source, chatml, limit=5)
    count = len(entries(tmp_path))
    assert load(source, chatml, **change).from_cache == (change == {"limit": 5})
    assert len(entries(tmp_path)) == count + (change != {"limit": 5})


def test_other_data_or_another_tokenizer_is_another_entry(chatml, llama, plain, source):
    load(source, chatml)
    assert not load(source, llama).from_cache
    assert not load(source, plain).from_cache
    chatml.chat_template, before = "{# another #}" + chatml.chat_template, chatml.chat_template
    try:
        assert not load(source, chatml).from_cache
    finally:
        chatml.chat_template = before
    content = Path(source).read_text()
    Path(source).write_text(content.replace("Blue.", "Red.."))  # as long as before
    os.utime(source, (0, 0))
    assert not load(source, chatml).from_cache
    Path(source).write_text(content)
    assert load(source, chatml).from_cache


def test_what_was_quick_to_make_isnt_kept(chatml, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_SECONDS", 60.0)
    assert not load(source, chatml).from_cache
    assert entries(tmp_path) == []


def test_a_damaged_entry_is_made_again(chatml, source, tmp_path, capsys):
    good = list(load(source, chatml).examples)
    [entry] = entries(tmp_path)
    for name in ("tokens.npy", "about.json", "starts.npy"):
        (entry / name).write_bytes((entry / name).read_bytes()[:20])
        again = load(source, chatml)
        assert not again.from_cache
        assert list(again.examples) == good
        assert "damaged, made again" in capsys.readouterr().err
        assert load(source, chatml).from_cache


def test_leftovers_of_killed_writers_are_no_entries_and_go_after_a_day(chatml, source, tmp_path):
    tokens = tmp_path / "cache" / "tokens"
    old, new = tokens / ".abc.old", tokens / ".abc.new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    assert not load(source, chatml).from_cache
    assert not old.exists()
    assert new.exists(), "another run may be writing it"


def test_a_cache_that_cant_be_written_costs_a_warning(chatml, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert len(load(source, chatml).examples) == 20
    assert "tokenised data can't be kept there" in capsys.readouterr().err


def test_an_error_is_raised_and_not_kept(chatml, write_file, tmp_path):
    source = write_file("bad.jsonl", '{"instruction": "a"}\n')
    for _ in range(2):
        with pytest.raises(Exception, match="fit no known format"):
            load(source, chatml)
    assert entries(tmp_path) == []


def _slowly(folder: str, key: str, made) -> None:
    os.environ["CALSMOOTH_CACHE"] = folder
    cache.WORTH_SECONDS = 0.0
    console.configure(quiet=True)

    def make() -> int:
        with made.get_lock():
            made.value += 1
        time.sleep(0.5)
        return 7

    def save(value: int, entry: Path) -> None:
        (entry / "value").write_text(str(value))

    assert cache.cached(key, make, save, lambda entry: int((entry / "value").read_text())) == 7


def test_of_runs_that_start_together_one_works_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    runs = [context.Process(target=_slowly, args=(str(tmp_path), "key", made)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert made.value == 1


def test_a_killed_run_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    victim = context.Process(target=_slowly, args=(str(tmp_path), "key", made))
    victim.start()
    while not made.value:
        time.sleep(0.01)
    victim.kill()
    victim.join(60)
    _slowly(str(tmp_path), "key", made)
    assert made.value == 2


def test_examples_are_a_sequence():
    made = [Example([1, 2, 3], [-100, 2, 3]), Example([4], [-100]), Example([5, 6], [-100, -100])]
    examples = Examples.of(made)
    assert list(examples) == made
    assert examples[-1] == made[2]
    assert examples[1:] == made[1:]
    assert examples.lengths.tolist() == [3, 1, 2]
    assert examples.targets.tolist() == [2, 0, 0]
    assert examples.target_tokens == 2
    with pytest.raises(IndexError):
        examples[3]
