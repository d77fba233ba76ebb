"""Rows from every kind of file; bad input ends in one line that names where it is."""

import json
import random

import pytest

from calsmooth.data.sources import load_rows
from calsmooth.errors import CalsmoothError, UsageError

ROWS = [
    {"instruction": "Say it, twice.", "output": 'He said "é, é".\n日本 😀'},
    {"instruction": "Add\n1 and 1", "output": "2"},
    {"instruction": "", "output": " kept as it is "},
]


def as_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path, rows, encoding="utf-8") -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_csv(path, index=False, encoding=encoding)


def write_parquet(path, rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def error_of(source, **options) -> CalsmoothError:
    with pytest.raises(CalsmoothError) as caught:
        load_rows(str(source), **options)
    assert "\n" not in str(caught.value)
    return caught.value


class TestFiles:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.JSONL"])
    def test_json_lines(self, write_file, name):
        rows = load_rows(write_file(name, "\n" + as_jsonl(ROWS) + "\n\n"))
        assert [row.columns for row in rows] == ROWS
        assert [row.where.rsplit("/", 1)[-1] for row in rows] == [f"{name}, line {n}" for n in (2, 3, 4)]

    def test_json(self, write_file):
        rows = load_rows(write_file("rows.json", json.dumps(ROWS, indent=1)))
        assert [row.columns for row in rows] == ROWS
        assert rows[2].where.endswith("rows.json, row 3")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(self, tmp_path, encoding):
        write_csv(tmp_path / "rows.csv", ROWS, encoding)
        rows = load_rows(str(tmp_path / "rows.csv"))
        assert [row.columns for row in rows] == ROWS
        assert rows[0].where.endswith("rows.csv, line 3")  # the row's text holds a line break

    def test_parquet(self, tmp_path):
        rows = [{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]}] * 2
        write_parquet(tmp_path / "rows.parquet", rows)
        loaded = load_rows(str(tmp_path / "rows.parquet"))
        assert [row.columns for row in loaded] == rows
        assert loaded[1].where.endswith("rows.parquet, row 2")

    def test_a_home_folder_is_expanded(self, write_file, tmp_path, monkeypatch):
        write_file("rows.jsonl", as_jsonl(ROWS))
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load_rows("~/rows.jsonl")) == 3

    def test_a_folder_and_its_splits(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "with:colon"
        folder.mkdir()
        (folder / "train.jsonl").write_text(as_jsonl(ROWS), encoding="utf-8")
        (folder / "test.jsonl").write_text(as_jsonl(ROWS[:1]), encoding="utf-8")
        rows = load_rows(str(folder))
        assert [row.columns for row in rows] == ROWS
        assert rows[1].where == f"{folder} (train), row 2"
        assert [row.columns for row in load_rows(str(folder), split="test")] == ROWS[:1]
        assert "nosuch" in str(error_of(folder, split="nosuch"))


class TestLimit:
    @pytest.fixture
    def source(self, write_file):
        return write_file("numbers.jsonl", as_jsonl({"n": n} for n in range(200)))

    def test_a_seeded_choice_in_the_files_own_order(self, source):
        def numbers(seed):
            return [row.columns["n"] for row in load_rows(source, limit=20, seed=seed)]

        first = numbers(seed=1)
        assert len(set(first)) == 20
        assert first == sorted(first)
        assert first == numbers(seed=1)
        assert first != numbers(seed=2)
        assert first != list(range(20)), "a random choice, not the beginning of the file"

    def test_rows_keep_their_line_numbers(self, source):
        for row in load_rows(source, limit=5):
            assert row.where.endswith(f"line {row.columns['n'] + 1}")

    def test_the_global_generator_is_left_alone(self, source):
        state = random.getstate()
        load_rows(source, limit=5)
        assert random.getstate() == state

    @pytest.mark.parametrize("limit", [200, 1000, None])
    def test_no_fewer_rows_than_asked_for(self, source, limit):
        assert len(load_rows(source, limit=limit)) == 200


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("rows.jsonl", '{"a": 1}\n{"a": 2\n', ", line 2: not valid JSON"),
            ("rows.jsonl", '{"a": 1}\n\n["a"]\n', ", line 3: expected an object with named columns, got a list"),
            ("rows.jsonl", "null\n", ", line 1: expected an object with named columns, got a NoneType"),
            ("rows.jsonl", b'{"a": "\xff"}\n', ", line 1: not UTF-8 text"),
            ("rows.json", '[{"a": 1},\n{"a" 2}]', ": not readable as JSON (Expecting ':' delimiter: line 2"),
            ("rows.json", '[{"a": 1}, "b"]', ", row 2: expected an object with named columns, got a str"),
            ("rows.json", '{"data": []}', ": expected a list of rows, got a dict"),
            ("rows.json", b'[{"a": "\xff"}]', ": not readable as JSON ('utf-8' codec can't decode"),
            ("rows.json", "", ": not readable as JSON"),
            ("rows.csv", "a,b\n1,2\n1\n", ", line 3: expected 2 columns, as in the header"),
            ("rows.csv", "a,b\n1,2,3\n", ", line 2: expected 2 columns, as in the header"),
            ("rows.csv", 'a,b\n1,2\n"x"y,2\n', ", line 3: not readable as CSV"),
            ("rows.csv", 'a,b\n"never closed,2\n', ", line 2: not readable as CSV"),
            ("rows.tsv", "a\tb\n1\t2\n1\n", ", line 3: expected 2 columns, as in the header"),
            ("rows.tsv", 'a\tb\n"x" he said\t2\n', ", line 2: not readable as TSV"),
            ("rows.csv", b"a,b\n\xff,2\n", ": not readable as CSV ('utf-8' codec can't decode"),
            ("rows.parquet", b"PAR1 it is not", ": not readable as parquet"),
            ("rows.parquet", b"", ": not readable as parquet"),
        ],
    )
    def test_is_named_with_its_place(self, write_file, name, content, says):
        error = error_of(write_file(name, content))
        assert f"/{name}{says}" in str(error)
        assert error.exit_code == 1

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "a,b\n")],
    )
    def test_no_rows(self, write_file, name, content):
        assert str(error_of(write_file(name, content))).endswith(f"/{name}: holds no rows")

    def test_no_rows_in_parquet(self, tmp_path):
        import pyarrow

        schema = pyarrow.schema([("prompt", pyarrow.string())])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([], schema=schema), tmp_path / "a.parquet")
        assert str(error_of(tmp_path / "a.parquet")).endswith("a.parquet: holds no rows")

    @pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.gz", "rows"])
    def test_unknown_file_type(self, write_file, name):
        error = error_of(write_file(name, as_jsonl(ROWS)))
        assert f"/{name}: unknown file type; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet" in str(error)
        assert isinstance(error, UsageError)

    @pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c", "~/missing.csv", ""])
    def test_missing_path_is_a_usage_error(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        error = error_of(source)
        assert str(error).startswith(f"--dataset {source}: no such file; give a file, a folder or a hub id")
        assert isinstance(error, UsageError)

    @pytest.mark.parametrize("source", ["no-such-org/no-such-data", "no-such-org/no-such-data:config"])
    def test_a_hub_id_without_a_network(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        error = error_of(source)
        assert str(error) == (
            f"--dataset {source}: could not be loaded: the hub can't be reached and the cache doesn't hold it; "
            "check the name, --split and the network, or give a local file"
        )
        assert error.exit_code == 1


class TestRealFiles:
    @pytest.mark.parametrize(
        ("path", "count", "columns"),
        [
            ("alpaca_random_9k/alpaca.json", 9229, {"instruction", "input", "output"}),
            ("messages_demo/messages.jsonl", 500, {"messages"}),
            ("dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl", 1000, {"prompt", "response"}),
        ],
    )
    def test_load(self, external_data, path, count, columns):
        rows = load_rows(str(external_data / path))
        assert len(rows) == count
        assert rows[0].columns.keys() == columns

    def test_a_file_with_malformed_lines_is_refused_at_the_first(self, external_data):
        path = external_data / "alpaca_libre" / "alpaca_libre_tasks_v2.jsonl"
        with open(path, encoding="utf-8") as file:
            first_bad = next(number for number, line in enumerate(file, 1) if not _is_json(line))
        assert f"{path}, line {first_bad}: not valid JSON" in str(error_of(path))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
