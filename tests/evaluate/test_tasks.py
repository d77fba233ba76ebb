"""Loading of the tasks: local files with their traps, the hub's columns, sampling."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import Question, sample
from calsmooth.evaluate.tasks import CHOICE_TASKS, TASK_NAMES

MMLU, HELLASWAG, ARC = (CHOICE_TASKS[name] for name in ("mmlu", "hellaswag", "arc_easy"))
ROW = '"Which, of these?",None,NA,"a, b",nan,{}\n'


def write_mmlu(folder: Path, test: str | None = None) -> Path:
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in ("anatomy", "world_religions"):
            (folder / split / f"{subject}_{split}.csv").write_text(ROW.format("B") * 6)
    if test is not None:
        (folder / "test" / "anatomy_test.csv").write_text(test)
    return folder


def test_mmlu_keeps_none_and_na_as_words(tmp_path):
    data = MMLU.load(write_mmlu(tmp_path), 5)
    assert len(data.questions) == 12
    question = data.questions[0]
    assert question == Question("anatomy/0", "anatomy", "Which, of these?", ("None", "NA", "a, b", "nan"), 1)
    assert [len(data.examples[s]) for s in ("anatomy", "world_religions")] == [6, 6]


def test_the_parent_folder_will_do(tmp_path):
    write_mmlu(tmp_path / "mmlu")
    assert len(MMLU.load(tmp_path, 5).questions) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW.format("B") + ROW.format("E"), "row 2: the answer must be A, B, C or D, got 'E'"),
        ("question,A,B,C,D,answer\n" + ROW.format("B"), "row 1: .*remove the header row"),
        (ROW.format("B") + "too,few\n", "row 2: expected 6 columns .* got 2"),
        (ROW.format("1"), "row 1: the answer must be A, B, C or D, got '1'"),
        (ROW.format(""), "row 1: the answer must be"),
        ("Which?,a,,c,d,A\n", "row 1: every choice must be text that isn't empty"),
        ("Which?,a,b,c,d,A\n\n\n,a,b,c,d,A\n", "row 4: the question must be text"),
    ],
)
def test_bad_mmlu_rows_are_named(tmp_path, content, message):
    with pytest.raises(CalsmoothError, match=message) as caught:
        MMLU.load(write_mmlu(tmp_path, content), 5)
    assert "anatomy_test.csv" in str(caught.value)


def test_missing_mmlu_files_say_what_was_expected(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        MMLU.load(tmp_path / "nothing", 5)
    with pytest.raises(UsageError, match="expected MMLU's official CSV files"):
        MMLU.load(tmp_path, 5)
    write_mmlu(tmp_path)
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(CalsmoothError, match=r"no solved examples .* 'anatomy'; give --shots 0"):
        MMLU.load(tmp_path, 5)
    assert len(MMLU.load(tmp_path, 0).questions) == 12


def scene(label="1", **changes):
    row = {
        "activity_label": "Roofing",
        "ctx_a": "A man [substeps] is on a roof.",
        "ctx_b": "he",
        "endings": ["sings [title] loud.", "falls.", "flies.", "sleeps."],
        "label": label,
    }
    return row | changes


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hellaswag_cleans_brackets_and_reads_train_for_shots(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", [scene(), scene(label=2)])
    write_jsonl(tmp_path / "train.jsonl", [scene("0")] * 7)
    data = HELLASWAG.load(tmp_path, 5)
    assert data.questions[0].text == "Roofing: A man is on a roof. He"
    assert data.questions[0].choices[0] == "sings. loud."
    assert [q.answer for q in data.questions] == [1, 2]
    assert len(data.examples["common sense"]) == 5


def test_hellaswag_without_train_holds_its_first_rows_back(tmp_path):
    rows = [scene() | {"ctx": f"Row {i}."} for i in range(8)]
    for row in rows:
        del row["ctx_a"], row["ctx_b"]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    data = HELLASWAG.load(tmp_path, 3)
    assert [q.text for q in data.examples["common sense"]] == [f"Roofing: Row {i}." for i in range(3)]
    assert [q.text for q in data.questions] == [f"Roofing: Row {i}." for i in range(3, 8)]
    assert "no train split" in data.notes[0]
    assert HELLASWAG.load(tmp_path, 0).notes == []
    with pytest.raises(CalsmoothError, match="too few"):
        HELLASWAG.load(tmp_path, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (scene(""), "line 1: 'label' must be the index"),
        (scene("4"), "line 1: the answer must be an index from 0 to 3"),
        (scene(endings="abc"), "line 1: 'endings' must be a list"),
        ({"label": "1"}, "line 1: no column 'endings'; it has label"),
        ([1], "line 1: expected an object"),
    ],
)
def test_bad_hellaswag_rows_are_named(tmp_path, row, message):
    write_jsonl(tmp_path / "validation.jsonl", [row])
    with pytest.raises(CalsmoothError, match=message):
        HELLASWAG.load(tmp_path, 0)


def science(key="C", labels="ABCD"):
    return {
        "id": "x1",
        "question": "Which star?",
        "choices": {"text": [f"choice {label}" for label in labels], "label": list(labels)},
        "answerKey": key,
    }


def test_arc_takes_three_or_five_choices_and_numbers(tmp_path):
    original = {
        "id": "o",
        "question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
        "answerKey": "B",
    }
    rows = [science(), science("3", "1234"), science("B", "ABC"), science("E", "ABCDE"), original]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "train.json").write_text(json.dumps([science()] * 9))
    data = ARC.load(tmp_path, 5)
    assert [(len(q.choices), q.answer) for q in data.questions] == [(4, 2), (4, 2), (3, 1), (5, 4), (2, 1)]
    assert len(data.examples["science"]) == 5


def test_bad_arc_rows_are_named(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([science(), science("F")]))
    with pytest.raises(CalsmoothError, match=r"test.json, row 2: 'answerKey' must be one of A, B, C, D, got 'F'"):
        ARC.load(tmp_path, 0)
    with pytest.raises(UsageError, match=r"no train.json"):
        ARC.load(tmp_path, 5)
    (tmp_path / "test.json").write_text("{}")
    with pytest.raises(CalsmoothError, match="expected a list of objects, got a dict"):
        ARC.load(tmp_path, 0)


def test_the_hub_is_asked_at_a_pinned_revision(monkeypatch):
    import datasets

    asked = []
    row = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}
    rows = {
        "cais/mmlu": [row] * 6,
        "Rowan/hellaswag": [scene(), scene()],
        "allenai/ai2_arc": [science()] * 6,
    }

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, len(revision)))
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("calsmooth.evaluate.questions.prepare_hub", lambda: True)
    assert MMLU.load(None, 5).questions[0] == Question("test/0", "anatomy", "Which?", ("a", "b", "c", "d"), 3)
    assert HELLASWAG.load(None, 1).questions[1].answer == 1
    assert ARC.load(None, 5).questions[0].choices[2] == "choice C"
    assert asked == [
        ("cais/mmlu", "all", "test", 40),
        ("cais/mmlu", "all", "dev", 40),
        ("Rowan/hellaswag", None, "validation", 40),
        ("Rowan/hellaswag", None, "train", 40),
        ("allenai/ai2_arc", "ARC-Easy", "test", 40),
        ("allenai/ai2_arc", "ARC-Easy", "train", 40),
    ]


@pytest.mark.parametrize("name", ["mmlu", "hellaswag", "arc_easy"])
def test_without_hub_and_folder_one_line_says_how_to_get_it(monkeypatch, name):
    import datasets

    def load_dataset(*arguments, **named):
        raise ConnectionError("Couldn't reach the hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("calsmooth.evaluate.questions.prepare_hub", lambda: False)
    with pytest.raises(CalsmoothError, match=rf"--task {name}: .*can't be reached.*--data-dir DIR") as caught:
        CHOICE_TASKS[name].load(None, 5)
    assert "\n" not in str(caught.value)


def questions(**counts):
    return [Question(f"{s}/{i}", s, "?", ("a", "b"), 0) for s, n in counts.items() for i in range(n)]


def test_sample_is_even_over_subjects_seeded_and_in_order():
    pool = questions(a=100, b=100, c=3)
    chosen = sample(pool, 20, 0)
    assert Counter(q.subject for q in chosen) in ({"a": 9, "b": 8, "c": 3}, {"a": 8, "b": 9, "c": 3})
    assert chosen == sample(pool, 20, 0)
    assert chosen != sample(pool, 20, 1)
    assert [pool.index(q) for q in chosen] == sorted(pool.index(q) for q in chosen)
    assert sample(pool, None, 0) == pool
    assert sample(pool, 500, 0) == pool
    assert len({q.subject for q in sample(questions(**dict.fromkeys("abcdefgh", 5)), 4, 0)}) == 4


def test_the_real_files_load():
    root = os.environ.get("CALSMOOTH_TEST_DATA")
    if not root:
        pytest.skip("CALSMOOTH_TEST_DATA doesn't name a folder with mmlu, hellaswag and arc_easy")
    mmlu = MMLU.load(Path(root), 5)
    assert len(mmlu.questions) == 14042
    assert len({q.subject for q in mmlu.questions}) == 57
    assert len(HELLASWAG.load(Path(root), 5).questions) in (10042, 10037)
    assert len(ARC.load(Path(root) / "arc_easy", 5).questions) == 2376


def test_names():
    assert TASK_NAMES == ("mmlu", "hellaswag", "arc_easy", "demo", "responses")
