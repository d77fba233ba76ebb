"""Streams: every row once a pass, in an order that the seed decides, continued at any row."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calsmooth.data.stream import BARREN_ROWS, ExampleStream, Position, shuffled
from calsmooth.errors import CalsmoothError, UsageError


def stream(sources, tokenizer, **options) -> ExampleStream:
    settings = {"max_length": 50, "buffer": 8, "seed": 0} | options
    return ExampleStream([sources] if isinstance(sources, str) else sources, tokenizer, **settings)


def taken(from_stream: ExampleStream, count: int, start: Position | None = None):
    return list(itertools.islice(from_stream.examples(start), count))


@pytest.fixture
def numbered(write_file):
    """write(name, count) -> a file of texts that begin with the file's name and their number."""

    def write(name: str, count: int) -> str:
        rows = [{"text": f"{name} {n} the sky"} for n in range(count)]
        return write_file(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    return write


def numbers(tokenizer, found) -> list[str]:
    texts = [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example, _ in found]
    return [" ".join(text.split()[:2]) for text in texts]


@given(count=st.integers(0, 50), buffer=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_buffer_gives_every_row_once(count: int, buffer: int, seed: int) -> None:
    rows = [(f"{n}", None) for n in range(count)]
    found = list(shuffled(iter(rows), buffer, random.Random(seed)))  # type: ignore[arg-type]
    assert sorted(found) == sorted(rows)
    assert found == list(shuffled(iter(rows), buffer, random.Random(seed)))  # type: ignore[arg-type]
    for place, row in enumerate(found):
        assert int(row[0]) < place + buffer + 1, "no row comes before it was read"


def test_every_row_comes_once_a_pass_and_passes_differ(plain, numbered):
    names = numbers(plain, taken(stream(numbered("a", 20), plain), 60))
    passes = [names[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(p) == sorted(passes[0]) and len(set(p)) == 20 for p in passes)
    assert len({str(p) for p in passes}) == 3


def test_files_of_a_pattern_are_one_source(plain, numbered, tmp_path):
    numbered("a", 5), numbered("b", 5)
    names = numbers(plain, taken(stream(str(tmp_path / "*.jsonl"), plain), 10))
    assert Counter(name[0] for name in names) == {"a": 5, "b": 5}


@pytest.mark.parametrize("count", [1, 7, 64, 150])
def test_goes_on_at_the_exact_row(plain, numbered, count):
    sources = [f"{numbered('a', 13)}=1", f"{numbered('b', 40)}=2.5"]
    whole = taken(stream(sources, plain), count + 30)
    assert taken(stream(sources, plain), 30, whole[count - 1][1]) == whole[count:]


def test_rows_that_give_no_example_are_counted_and_passed_on_the_way(plain, write_file):
    lines = ['{"text": "the sky"}', '{"text": ""}', "{broken", '{"text": "blue"}']
    source = write_file("a.jsonl", "\n".join(lines))
    whole = taken(stream(source, plain, on_bad_row="skip"), 12)
    assert [at.rows - at.bad for _, at in whole] == list(range(1, 13))
    assert 10 <= whole[-1][1].bad <= 12
    assert taken(stream(source, plain, on_bad_row="skip"), 6, whole[5][1]) == whole[6:]


def test_weights_are_the_shares_in_the_long_run(plain, numbered):
    sources = [f"{numbered('a', 5)}=3", f"{numbered('b', 50)}=1"]
    names = numbers(plain, taken(stream(sources, plain), 1000))
    assert 700 < sum(name.startswith("a") for name in names) < 800


def test_the_seed_decides(plain, numbered):
    source = numbered("a", 30)

    def first(seed):
        return numbers(plain, taken(stream(source, plain, seed=seed), 30))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_the_beginning_is_a_set_to_look_at(plain, numbered):
    found = stream(numbered("a", 30), plain).beginning(5)
    assert (len(found.examples), found.rows, found.format, found.template) == (5, 5, "text", "none")


class TestErrors:
    def test_several_sources_need_weights(self, plain, numbered):
        with pytest.raises(UsageError, match="--streaming: of several sources each needs a weight"):
            stream([numbered("a", 3), numbered("b", 3)], plain)

    def test_a_bad_row_is_named(self, plain, write_file):
        source = write_file("a.jsonl", '{"text": "the sky"}\n{"text": 2}\n')
        with pytest.raises(CalsmoothError, match=r"a\.jsonl, line 2: column 'text' must be text, got 2"):
            taken(stream(source, plain), 5)

    def test_an_empty_file_isnt_read_for_ever(self, plain, write_file):
        with pytest.raises(CalsmoothError, match="holds no rows"):
            taken(stream(write_file("a.jsonl", "\n"), plain), 1)

    def test_nor_are_rows_that_give_no_example(self, plain, write_file):
        source = write_file("a.jsonl", '{"text": ""}\n' * 5000)
        with pytest.raises(CalsmoothError, match=f"{BARREN_ROWS:,} rows one after another gave no example"):
            taken(stream(source, plain, on_bad_row="skip"), 1)
