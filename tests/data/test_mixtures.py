"""Several sources, patterns, weights, revisions and splits: what is written is what is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calsmooth.config import load
from calsmooth.data import load_example_set
from calsmooth.data.sources import Source, open_source, parse_sources, source_text
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.finetune.config import FinetuneConfig

ROWS = {
    "alpaca": {"instruction": "Name a color.", "output": "Blue."},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Blue."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Blue."}]},
    "prompt": {"prompt": "Hi", "response": " Blue."},
    "text": {"text": "The sky is blue."},
}


@pytest.fixture
def write_rows(write_file, tmp_path):
    def write(name: str, *rows) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return write_file(name, "".join(json.dumps(row) + "\n" for row in rows))

    return write


class TestSyntax:
    @pytest.mark.parametrize(
        ("text", "source"),
        [
            ("org/name", Source("org/name")),
            ("name", Source("name")),
            ("org/name:en", Source("org/name:en")),
            ("org/name@v1.2", Source("org/name", revision="v1.2")),
            ("org/name@refs/pr/1#test=2", Source("org/name", revision="refs/pr/1", split="test", weight=2.0)),
            ("org/name:en#train[:10%]=0.25", Source("org/name:en", split="train[:10%]", weight=0.25)),
            ("org/name#train+test", Source("org/name", split="train+test")),
            ("demo=1e-1", Source("demo", weight=0.1)),
        ],
    )
    def test_a_hub_id(self, text, source):
        assert parse_sources([text, *([f"demo={source.weight}"] if source.weight else [])])[0] == source

    @pytest.mark.parametrize("name", ["a=0.5.jsonl", "a@b#c.jsonl", "a#train=2.jsonl", "a=1"])
    def test_a_file_of_exactly_that_name_is_a_file(self, write_file, name):
        place = write_file(name, "")
        assert parse_sources([place]) == (Source(place),)
        assert parse_sources([f"{place}=0.5"]) == (Source(place, weight=0.5),)

    @given(
        revision=st.none() | st.from_regex(r"[\w./-]{1,9}", fullmatch=True),
        split=st.none() | st.from_regex(r"[\w\[\]:%+]{1,9}", fullmatch=True),
        weight=st.floats(1e-6, 1e6),
    )
    def test_a_mapping_is_the_same_in_other_words(self, revision, split, weight):
        mapping = {"source": "org/name", "revision": revision, "split": split, "weight": weight}
        assert parse_sources([source_text(mapping, "x")]) == (Source("org/name", revision, split, weight),)

    def test_split_and_revision_are_for_those_that_dont_say_their_own(self, write_rows):
        place = write_rows("a.jsonl", ROWS["text"])
        sources = parse_sources([place, "org/a#mine@x", "org/b"], split="test", revision="v1")
        assert [s.split for s in sources] == [None, "mine@x", "test"]
        assert [s.revision for s in sources] == [None, "v1", "v1"]

    @pytest.mark.parametrize(
        ("texts", "options", "says"),
        [
            (["FILE=0.5", "FILE"], {}, "has no weight and others have"),
            (["FILE=0"], {}, "a weight must be a number above 0, got '0'"),
            (["FILE=1.2.3"], {}, "a weight must be a number above 0, got '1.2.3'"),
            (["FILE#train"], {}, "a file has no splits; leave '#train' out"),
            (["FILE"], {"split": "test"}, "--split test: only folders and hub ids have splits"),
            (["FILE"], {"revision": "v1"}, "--dataset-revision v1: only hub ids have revisions"),
            (["missing.jsonl=0.5"], {}, "--dataset missing.jsonl: no such file"),
            (["*.nothing"], {}, "--dataset *.nothing: no file matches; give a file, a pattern"),
            (["org/name with blank"], {}, "no such file"),
        ],
    )
    def test_what_cant_be_is_a_usage_error(self, write_rows, texts, options, says):
        place = write_rows("a.jsonl", ROWS["text"])
        with pytest.raises(UsageError) as caught:
            parse_sources([text.replace("FILE", place) for text in texts], **options)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_in_yaml_as_text_or_as_mappings(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text("dataset:\n- demo=0.25\n- source: org/name\n  split: train[:10%]\n  weight: 0.75\n")
        config = load(FinetuneConfig, {}, file)
        assert config.dataset == ("demo=0.25", "org/name#train[:10%]=0.75")
        file.write_text(config.to_yaml())
        assert load(FinetuneConfig, {}, file) == config

    @pytest.mark.parametrize(
        ("yaml", "says"),
        [
            ("- {source: demo, wieght: 1}", "unknown key 'wieght'; a source is text, or a mapping of source, config"),
            ("- {weight: 1}", "no text under the key 'source'"),
            ("- [demo]", "must be text, got ['demo']"),
        ],
    )
    def test_wrong_yaml_names_the_key(self, tmp_path, yaml, says):
        (tmp_path / "run.yaml").write_text(f"dataset:\n{yaml}\n")
        with pytest.raises(UsageError) as caught:
            load(FinetuneConfig, {}, tmp_path / "run.yaml")
        assert says in str(caught.value)

    def test_from_python_one_source_may_be_text(self):
        assert FinetuneConfig(dataset="a.jsonl").dataset == ("a.jsonl",)


class TestPatterns:
    def test_files_in_the_order_of_their_names(self, write_rows, tmp_path):
        for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
            write_rows(name, ROWS["text"])
        [source] = parse_sources([str(tmp_path / "*.jsonl")])
        assert [part.name.rsplit("/", 1)[-1] for part in open_source(source)] == ["a.jsonl", "b.jsonl"]
        [source] = parse_sources([str(tmp_path / "**/*.jsonl")])
        assert [part.name.rsplit("/", 1)[-1] for part in open_source(source)] == ["a.jsonl", "b.jsonl", "c.jsonl"]

    def test_every_file_has_its_own_format(self, chatml, write_rows, tmp_path):
        for name, row in ROWS.items():
            write_rows(f"{name}.jsonl", row, row)
        found = load_example_set(str(tmp_path / "*.jsonl"), chatml, max_length=999)
        assert (len(found.examples), found.format) == (10, "alpaca, messages, prompt, sharegpt, text")
        assert found.sources[0].examples == 10

    def test_a_file_of_an_unknown_type_among_them_is_named(self, chatml, write_rows, tmp_path):
        write_rows("a.txt", ROWS["text"])
        with pytest.raises(UsageError, match=r"a\.txt: unknown file type"):
            load_example_set(str(tmp_path / "*"), chatml, max_length=999)


class TestMixture:
    def test_sources_stand_one_after_another_with_their_counts(self, chatml, write_rows):
        a, b = write_rows("a.jsonl", *[ROWS["alpaca"]] * 3), write_rows("b.jsonl", *[ROWS["text"]] * 2)
        found = load_example_set([f"{b}=0.5", f"{a}=1.5"], chatml, max_length=999)
        assert [(s.name, s.examples, s.weight) for s in found.sources] == [(b, 2, 0.5), (a, 3, 1.5)]
        lengths = found.examples.lengths.tolist()
        assert lengths[0] == lengths[1] < lengths[2] == lengths[4]

    def test_a_limit_is_of_all_together(self, chatml, write_rows):
        a, b = write_rows("a.jsonl", *[ROWS["alpaca"]] * 30), write_rows("b.jsonl", *[ROWS["text"]] * 30)
        found = load_example_set([a, b], chatml, max_length=999, limit=20)
        assert (found.rows, sum(s.examples for s in found.sources)) == (20, 20)
        assert all(s.examples for s in found.sources)

    def test_a_source_that_gives_nothing_is_named(self, chatml, write_rows):
        a, b = write_rows("a.jsonl", ROWS["alpaca"]), write_rows("b.jsonl", {"text": ""})
        with pytest.raises(CalsmoothError, match=r"b\.jsonl: gives no example"):
            load_example_set([f"{a}=1", f"{b}=1"], chatml, max_length=999, on_bad_row="skip")


class TestLinesThatCantBeRead:
    LINES = b'{"text": "The sky"}\n{"text": \n\xff\xfe\n["blue"]\n\n{"text": "is blue"}\n' + b"[" * 100_000 + b"\n"

    def test_are_skipped_and_counted_with_what_was_wrong(self, chatml, write_file):
        found = load_example_set(write_file("a.jsonl", self.LINES), chatml, max_length=99, on_bad_row="skip")
        assert (found.rows, found.bad, len(found.examples)) == (6, 4, 2)
        assert [why.split(": ", 1)[1].split(" (")[0] for why in found.bad_rows] == [
            "not valid JSON",
            "not UTF-8 text",
            "expected an object with named columns, got a list",
        ]
        assert [why.split(", line ")[1][0] for why in found.bad_rows] == ["2", "3", "4"]

    def test_of_a_csv_file_too(self, chatml, write_file):
        path = write_file("a.csv", "prompt,response\nHi,Blue\nHi\nHi,Red\n")
        found = load_example_set(path, chatml, max_length=99, on_bad_row="skip")
        assert (found.rows, found.bad) == (3, 1)

    def test_a_byte_order_mark_is_none(self, chatml, write_file):
        path = write_file("a.jsonl", b"\xef\xbb\xbf" + b'{"text": "The sky"}\n')
        assert load_example_set(path, chatml, max_length=99).rows == 1

    def test_rows_one_a_line_in_a_json_file(self, chatml, write_file):
        path = write_file("a.json", '{"text": "a"}\n{"text": "b"}\n')
        with pytest.raises(CalsmoothError, match=r"Extra data.*; rows one a line are a \.jsonl file's"):
            load_example_set(path, chatml, max_length=99)

    def test_a_template_that_refuses_a_row_makes_it_bad(self, strict, write_rows):
        system = [{"role": "system", "content": "Be brief."}, *ROWS["messages"]["messages"]]
        path = write_rows("a.jsonl", ROWS["messages"], {"messages": system})
        found = load_example_set(path, strict, max_length=99, on_bad_row="skip")
        assert (found.rows, found.bad) == (2, 1)
        with pytest.raises(CalsmoothError, match=r"line 2: the chat template refuses this conversation"):
            load_example_set(path, strict, max_length=99)


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        calls = []

        def load_dataset(name, configuration, **options):
            calls.append((name, configuration, options))
            return datasets.Dataset.from_list([ROWS["alpaca"]])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr("calsmooth.data.sources.prepare_hub", lambda: True)
        return calls

    @pytest.mark.parametrize("streaming", [False, True])
    def test_is_asked_for_what_was_written(self, asked, streaming):
        for text in ("org/name", "org/name:en@v1#train[:10%]"):
            [part] = open_source(parse_sources([text])[0], streaming=streaming)
        assert asked == [
            ("org/name", None, {"split": "train", "revision": None, "streaming": streaming}),
            ("org/name", "en", {"split": "train[:10%]", "revision": "v1", "streaming": streaming}),
        ]
        [row] = part.read()
        assert (row.columns, row.where) == (ROWS["alpaca"], "org/name:en (train[:10%]), row 1")

    def test_its_sets_are_kept_by_the_fingerprint_of_datasets(self, asked, chatml, tmp_path, monkeypatch):
        monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path))
        monkeypatch.setattr("calsmooth.data.cache.WORTH_SECONDS", 0.0)
        found = [load_example_set("org/name", chatml, max_length=99, cache=True) for _ in range(2)]
        assert [s.from_cache for s in found] == [False, True]
