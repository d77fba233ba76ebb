"""Loading of the tasks: local files with their traps, the hub's columns, sampling."""

import json
from collections import Counter
from pathlib import Path

import pytest

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import Question, sample
from calsmooth.evaluate.rows import task_folder
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
    assert [len(data.examples[s]) for s in ("anatomy", "world_religions")] == [5, 5]


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
    with pytest.raises(UsageError, match="no test split of MMLU there; expected the official CSV files"):
        MMLU.load(tmp_path, 5)
    write_mmlu(tmp_path)
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(CalsmoothError, match=r"no solved examples for 'anatomy'; give --shots 0"):
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
    without = "hellaswag: 8 of 8 questions have no 'ctx_b': what follows the last full stop of 'ctx' was taken for it"
    assert data.notes == [
        "hellaswag: held back as solved examples, not scored: the first 3 rows of the validation split "
        f"({tmp_path} has no train split)",
        without,
    ]
    assert HELLASWAG.load(tmp_path, 0).notes == [without]
    with pytest.raises(CalsmoothError, match="too few"):
        HELLASWAG.load(tmp_path, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (scene(""), "line 1: 'label' must be the index"),
        (scene("4"), "line 1: the answer must be an index from 0 to 3"),
        (scene(endings="abc"), "line 1: 'endings' must be a list"),
        ({"label": "1"}, "line 1: no column 'activity_label'; it has label"),
        ([1], "line 1: expected an object with named columns"),
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
    (tmp_path / "test.json").write_text(json.dumps([science(), science() | {"choices": {"text": ["a"], "label": []}}]))
    with pytest.raises(CalsmoothError, match=r"row 2: 'choices' must hold as many texts as labels"):
        ARC.load(tmp_path, 0)
    (tmp_path / "test.json").write_text("{}")
    with pytest.raises(CalsmoothError, match="expected a list of rows, got a dict"):
        ARC.load(tmp_path, 0)


HUB_TASKS = [name for name in CHOICE_TASKS if name != "demo"]
ANSWERS = {  # of the first questions of the `hub` fixture, by their text
    "mmlu": ["one", "two", "None", "NA"],
    "hellaswag": ["sings. loud.", "falls.", "flies."],
    "arc_easy": ["choice B of 1", "choice 3 of 2", "choice A of 3", "choice E of 4"],
    "arc_challenge": ["choice C of 0"],
    "openbookqa": ["puppies", "children growing", "plants", "wires"],
    "commonsense_qa": ["ignore", "enforce", "be harsh", "yell at", "avoid 4"],
    "piqa": ["Put them in water.", "Put them in the sink and wait"],
    "winogrande": ["Sarah", "Maria"],
    "truthfulqa_mc1": [f"Nothing happens to seed {i}" for i in range(2, 8)],  # the first two are held back
}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_every_task_reads_the_hubs_columns_at_a_pinned_revision(served, hub, name):
    task = CHOICE_TASKS[name]
    data = task.load(None, 2)
    assert [q.choices[q.answer] for q in data.questions[: len(ANSWERS[name])]] == ANSWERS[name]
    where = (task.hub.dataset, task.hub.config)
    assert {(path, config) for path, config, *_ in served} == {where}
    assert all(len(revision) == 40 and set(revision) <= set("0123456789abcdef") for *_, revision in served)
    splits = [split for _, _, split, _ in served]
    if name == "truthfulqa_mc1":
        assert splits == ["validation"]
        assert len(data.questions) == 6
    else:
        assert splits == [task.scored.name, task.solved.name]
        assert len(data.questions) == len(hub[where][task.scored.name])
        # The first of the other split, in its order.
        solved = hub[where][task.solved.name]
        first = [task.question(Row(row, "here"), "0").text for row in solved[:2]]
        assert [q.text for q in next(iter(data.examples.values()))] == first
    assert {len(examples) for examples in data.examples.values()} == {2}
    assert len({q.id for q in data.questions}) == len(data.questions)


@pytest.mark.parametrize("name", HUB_TASKS)
@pytest.mark.parametrize("layout", ["jsonl", "repository"])
def test_local_files_in_the_hubs_layout_are_the_hubs_questions(served, hub, tmp_path, name, layout):
    import datasets

    task = CHOICE_TASKS[name]
    for split, rows in hub[task.hub.dataset, task.hub.config].items():
        if layout == "jsonl":
            write_jsonl(tmp_path / f"{split}.jsonl", rows)
            continue
        # As the hub's repositories lie on a disk; a large split has more than one file.
        folder = tmp_path / name / (task.hub.config or "data")
        folder.mkdir(parents=True, exist_ok=True)
        for shard, part in enumerate((rows[:3], rows[3:])):
            datasets.Dataset.from_list(part).to_parquet(folder / f"{split}-{shard:05d}-of-00002.parquet")
    local, remote = task.load(tmp_path, 2), task.load(None, 2)
    assert local.questions == remote.questions
    assert local.examples == remote.examples
    assert local.source != remote.source


def test_truthfulqa_shuffles_the_answer_away_from_the_first_place(served):
    data = CHOICE_TASKS["truthfulqa_mc1"].load(None, 0)
    assert {q.answer for q in data.questions} > {0}
    assert data.questions == CHOICE_TASKS["truthfulqa_mc1"].load(None, 0).questions
    assert CHOICE_TASKS["truthfulqa_mc1"].shots == 0


def test_files_as_their_authors_publish_them(tmp_path):
    stem = {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}
    files = {
        "arc_challenge": ("ARC-Challenge-Test.jsonl", {"id": "m", "question": stem, "answerKey": "B"}),
        "openbookqa": ("test.jsonl", {"id": "m", "question": stem, "answerKey": "B"}),
        "commonsense_qa": ("dev_rand_split.jsonl", {"id": "m", "question": stem, "answerKey": "B"}),
        "winogrande": (
            "dev.jsonl",
            {"qID": "m", "sentence": "It is _ here.", "option1": "a", "option2": "b", "answer": "2"},
        ),
    }
    for name, (file, row) in files.items():
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / file, [row])
        (question,) = CHOICE_TASKS[name].load(tmp_path, 0).questions
        assert (question.choices, question.answer) == (("a", "b"), 1)
    (tmp_path / "mc_task.json").write_text(json.dumps([{"question": "Why?", "mc1_targets": {"a": 0, "b": 1}}]))
    (question,) = CHOICE_TASKS["truthfulqa_mc1"].load(tmp_path, 0).questions
    assert question.choices[question.answer] == "b"


STEM = {"id": "m", "question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}}
KEYED = [STEM | {"answerKey": "B"}] * 6
TABLE = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n7-1\tWhy?\t(A) a (B) b (C) c (D) (x) d\tWhy?\tB\n"
FILLED = [{"qID": "m", "sentence": "It is _ here.", "option1": "a", "option2": "b", "answer": "2"}] * 6
GOALS = [{"id": "m", "goal": "Why?", "sol1": "a", "sol2": "b"}] * 6
TRUE = [{"question": "Why?", "mc0_targets": {}, "mc1_targets": {"b": 1, "a": 0}, "mc2_targets": {"b": 1, "a": 0}}] * 6
SCENES = [{"ind": 1, "activity_label": "Why", "ctx_a": "So.", "ctx_b": "", "ctx": "So.", "split": "val", "label": 1,
           "endings": ["a", "b", "c", "d"], "source_id": "wikihow~1"}] * 6  # fmt: skip
ARCHIVES = {
    # what their authors publish, as it lies on a disk once it is unpacked or cloned
    "arc_easy": {
        "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl": KEYED,
        "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Train.jsonl": KEYED,
    },
    "arc_challenge": {
        "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl": KEYED,
        "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Train.jsonl": KEYED,
    },
    "openbookqa": {
        "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl": KEYED,
        "OpenBookQA-V1-Sep2018/Data/Main/train.jsonl": KEYED,
        "OpenBookQA-V1-Sep2018/Data/Main/test.tsv": TABLE,
    },
    "commonsense_qa": {"dev_rand_split.jsonl": KEYED, "train_rand_split.jsonl": KEYED},
    "piqa": {
        "physicaliqa-train-dev/dev.jsonl": GOALS,
        "physicaliqa-train-dev/dev-labels.lst": "1\n" * 6,
        "physicaliqa-train-dev/train.jsonl": GOALS,
        "physicaliqa-train-dev/train-labels.lst": "1\n" * 6,
    },
    "winogrande": {
        "winogrande_1.1/dev.jsonl": FILLED,
        "winogrande_1.1/dev-labels.lst": "2\n" * 6,
        "winogrande_1.1/train_xl.jsonl": FILLED,
    },
    "truthfulqa_mc1": {"TruthfulQA-main/data/mc_task.json": TRUE},
    "hellaswag": {
        "hellaswag-master/data/hellaswag_val.jsonl": SCENES,
        "hellaswag-master/data/hellaswag_train.jsonl": SCENES,
    },
    "mmlu": {
        "data/test/anatomy_test.csv": "Why?,a,b,c,d,B\n" * 6,
        "data/dev/anatomy_dev.csv": "Why?,a,b,c,d,B\n" * 5,
    },
}


def write_archive(folder: Path, name: str) -> None:
    for path, content in ARCHIVES[name].items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.write_text(content)
        elif file.suffix == ".json":
            file.write_text(json.dumps(content))
        else:
            write_jsonl(file, content)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_as_they_are_unpacked(tmp_path, name):
    write_archive(tmp_path, name)
    task = CHOICE_TASKS[name]
    first = next(iter(ARCHIVES[name])).split("/")
    # The folder that holds the archive's, that folder, and the one with the files in it.
    for depth in range(len(first) if name != "mmlu" else 2):
        data = task.load(tmp_path.joinpath(*first[:depth]), task.shots)
        assert len(data.questions) == 6
        assert {q.choices[q.answer] for q in data.questions} == {"b"}
        assert data.notes == []
        assert {len(examples) for examples in data.examples.values()} == ({5} if task.shots else set())


def test_all_archives_side_by_side(tmp_path):
    for name in ARCHIVES:
        write_archive(tmp_path / name, name)
    for name in ARCHIVES:
        assert len(CHOICE_TASKS[name].load(tmp_path, 0).questions) == 6


def test_openbookqas_tables(tmp_path):
    (tmp_path / "test.tsv").write_text(TABLE)
    task = CHOICE_TASKS["openbookqa"]
    (question,) = task.load(tmp_path, 0).questions
    assert question == Question("7-1", "science", "Why?", ("a", "b", "c", "(x) d"), 1)
    (tmp_path / "test.tsv").write_text(TABLE.replace("(C) c ", ""))
    with pytest.raises(CalsmoothError, match=r"test.tsv, line 2: 'Choices' must be '\(A\) ... \(B\) ... \(C\) ..."):
        task.load(tmp_path, 0)
    (tmp_path / "test.tsv").write_text(TABLE.replace("\tB\n", "\tE\n"))
    with pytest.raises(CalsmoothError, match="line 2: 'Answer Key' must be one of A, B, C, D, got 'E'"):
        task.load(tmp_path, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0\n1\n2\n", "valid-labels.lst, line 3: a label must be 0 or 1, got '2'"),
        ("0\n1\n", "valid-labels.lst: holds 2 labels, but .*valid.jsonl has 3 rows"),
        ("0\n1\n1\n0\n", "valid-labels.lst: holds 4 labels, but .*valid.jsonl has 3 rows"),
        ("", "valid-labels.lst: holds 0 labels, but .*valid.jsonl has 3 rows"),
        ("0\n1\n0", None),
    ],
)
def test_piqas_labels_beside_its_rows(tmp_path, labels, message):
    write_jsonl(tmp_path / "valid.jsonl", [GOALS[0] | {"goal": f"Why {i}?"} for i in range(3)])
    (tmp_path / "valid-labels.lst").write_text(labels)
    task = CHOICE_TASKS["piqa"]
    if message is None:
        assert [q.answer for q in task.load(tmp_path, 0).questions] == [0, 1, 0]
        return
    with pytest.raises(CalsmoothError, match=message):
        task.load(tmp_path, 0)


def test_piqa_without_its_labels_names_the_column(tmp_path):
    write_jsonl(tmp_path / "valid.jsonl", GOALS)
    with pytest.raises(CalsmoothError, match="line 1: no column 'label', and no file with the labels beside it"):
        CHOICE_TASKS["piqa"].load(tmp_path, 0)


def truths(count=12):
    """Rows as in mc_task.json; every third has an empty wrong choice."""
    return [
        {"question": f"Why {i}?", "mc1_targets": {f"true {i}": 1, "a": 0, **({"": 0} if i % 3 == 0 else {}), "b": 0}}
        for i in range(count)
    ]


def test_truthfulqas_empty_choices_are_left_out_and_counted(tmp_path):
    (tmp_path / "mc_task.json").write_text(json.dumps(truths()))
    data = CHOICE_TASKS["truthfulqa_mc1"].load(tmp_path, 0)
    assert data.notes == ["truthfulqa_mc1: 4 of 12 questions have an empty wrong choice, which was left out"]
    assert {len(q.choices) for q in data.questions} == {3}
    for question, row in zip(data.questions, truths(), strict=True):
        published = list(row["mc1_targets"])
        assert tuple(published[i] for i in question.order) == question.choices
        assert question.choices[question.answer] == published[0]
    (tmp_path / "mc_task.json").write_text(json.dumps([{"question": "Why?", "mc1_targets": {"": 1, "a": 0, "b": 0}}]))
    with pytest.raises(CalsmoothError, match="row 1: every choice must be text that isn't empty"):
        CHOICE_TASKS["truthfulqa_mc1"].load(tmp_path, 0)


def test_truthfulqas_letters_dont_depend_on_the_other_rows(tmp_path):
    def load(rows):
        (tmp_path / "mc_task.json").write_text(json.dumps(rows))
        return {q.text: (q.choices, q.answer) for q in CHOICE_TASKS["truthfulqa_mc1"].load(tmp_path, 0).questions}

    everything = load(truths())
    assert load(truths()[5:]) == {text: asked for text, asked in everything.items() if int(text[4:-1]) >= 5}
    assert len({answer for _, answer in everything.values()}) == 3


@pytest.mark.parametrize(
    ("ctx_a", "ctx_b"),
    [
        ("A man sits on a roof.", "he"),
        ("She bends down and grabs the pole.", "the lady in red"),
        ("He asks: why?", "they"),
        ('He says "stop."', "then"),
        ("1 a guy is playing.", "2 a guy"),
        ("They stop (for a while.)", "next, the men"),
        ("[header] How to cook [title] Buy food. [step] Do these things:", ""),
        ("Then everything was done.", ""),
    ],
)
def test_hellaswag_with_ctx_alone_is_asked_in_the_same_words(tmp_path, ctx_a, ctx_b):
    row = scene(ctx_a=ctx_a, ctx_b=ctx_b)
    alone = {key: value for key, value in row.items() if key not in ("ctx_a", "ctx_b")}
    asked = []
    for one in (row, alone | {"ctx": f"{ctx_a} {ctx_b}".strip()}):
        write_jsonl(tmp_path / "validation.jsonl", [one])
        data = HELLASWAG.load(tmp_path, 0)
        asked.append(data.questions)
    assert asked[0] == asked[1]
    assert len(data.notes) == 1


@pytest.mark.parametrize("ctx", ["no sentence ends here", "It ends. Then Peter"])
def test_hellaswag_where_ctx_doesnt_tell_is_noted(tmp_path, ctx):
    row = scene() | {"ctx": ctx}
    del row["ctx_a"], row["ctx_b"]
    write_jsonl(tmp_path / "validation.jsonl", [row, scene()])
    data = HELLASWAG.load(tmp_path, 0)
    assert data.questions[0].text == f"Roofing: {ctx}"
    assert data.notes == [
        "hellaswag: 1 of 2 questions have no 'ctx_b', and 'ctx' doesn't tell where it would begin: 'ctx' was asked as "
        "it is"
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("winogrande", {"answer": ""}, "row 1: 'answer' must be 1 or 2, got ''"),
        ("winogrande", {"sentence": "No blank."}, "row 1: 'sentence' must have a '_' and go on after it"),
        ("winogrande", {"sentence": "At the end is _"}, "row 1: 'sentence' must have a '_' and go on after it"),
        ("piqa", {"label": -1}, "row 1: the answer must be an index from 0 to 1, got -1"),
        ("piqa", {"sol2": None}, "row 1: every choice must be text that isn't empty, got None"),
        ("commonsense_qa", {"answerKey": ""}, "row 1: 'answerKey' must be one of A, B, C, D, E, got ''"),
        ("openbookqa", {"question_stem": 3}, "row 1: the question must be text"),
        (
            "truthfulqa_mc1",
            {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
            r"row 1: 'mc1_targets' must label one choice 1 and the others 0, got \[1, 1\]",
        ),
    ],
)
def test_bad_rows_of_the_other_tasks_are_named(hub, tmp_path, name, change, message):
    task = CHOICE_TASKS[name]
    row = hub[task.hub.dataset, task.hub.config][task.scored.name][0]
    (tmp_path / f"{task.scored.name}.json").write_text(json.dumps([row | change]))
    with pytest.raises(CalsmoothError, match=message) as caught:
        task.load(tmp_path, 0)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", HUB_TASKS)
def test_an_empty_folder_says_what_was_expected(tmp_path, name):
    with pytest.raises(UsageError, match=rf"^--data-dir {tmp_path}: no \w+ split of .* there; expected ") as caught:
        CHOICE_TASKS[name].load(tmp_path, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HUB_TASKS)
def test_without_hub_and_folder_one_line_says_how_to_get_it(monkeypatch, name):
    import datasets

    def load_dataset(*arguments, **named):
        raise ConnectionError("Couldn't reach the hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("calsmooth.evaluate.rows.prepare_hub", lambda: False)
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


def test_the_real_files_load(external_data):
    mmlu = MMLU.load(external_data, 5)
    assert len(mmlu.questions) == 14042
    assert len({q.subject for q in mmlu.questions}) == 57
    assert len(HELLASWAG.load(external_data, 5).questions) in (10042, 10037)
    assert len(ARC.load(external_data / "arc_easy", 5).questions) == 2376


def test_openbookqas_real_tables_load(external_data):
    if not (external_data / "openbookqa" / "test.tsv").is_file():
        pytest.skip("CALSMOOTH_TEST_DATA has no openbookqa/test.tsv")
    data = CHOICE_TASKS["openbookqa"].load(external_data, 5)
    assert len(data.questions) == 500
    assert len(data.examples["science"]) == 5
    assert {len(q.choices) for q in data.questions} == {4}
    assert not any(f"({label})" in choice for q in data.questions for choice in q.choices for label in "ABCD")
    assert (data.questions[0].choices[1], data.questions[0].answer) == ("quit eating lunch out", 1)


def test_hellaswags_real_scenes_begin_with_capitals(external_data):
    """The copy there has `ctx` alone: 3,243 scenes are ActivityNet's, and 7 of them go on with a numeral or a quote."""
    data = HELLASWAG.load(external_data, 0)
    if "ctx_b" not in "".join(data.notes):
        pytest.skip("CALSMOOTH_TEST_DATA has the hub's columns")
    beginnings = [q.text.rsplit(". ", 1)[-1] for q in data.questions if not q.text.endswith(tuple(".!?\"'"))]
    assert 3000 < len(beginnings) < 3300
    assert not any(beginning[0].islower() for beginning in beginnings if not beginning[0].isdigit())


def test_arc_challenges_real_files_load(external_data):
    if not (external_data / "arc_challenge" / "ARC-Challenge-Test.jsonl").is_file():
        pytest.skip("CALSMOOTH_TEST_DATA has no arc_challenge/ARC-Challenge-Test.jsonl")
    assert len(CHOICE_TASKS["arc_challenge"].load(external_data, 0).questions) in (1172, 1150)  # a copy has fewer


def test_names():
    assert TASK_NAMES == (
        "mmlu",
        "hellaswag",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "commonsense_qa",
        "piqa",
        "winogrande",
        "truthfulqa_mc1",
        "demo",
        "responses",
    )


def test_a_file_in_the_place_of_its_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("")
    with pytest.raises(UsageError, match=r"test\.tsv: is a file; give its folder"):
        task_folder(tmp_path / "test.tsv", "openbookqa")
