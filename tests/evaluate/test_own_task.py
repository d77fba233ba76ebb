"""A user's own task: a YAML file and its data, from the command line to the predictions; every mistake in one line."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.prompts import cloze, letters, plain_prompt
from calsmooth.evaluate.tasks import choice_tasks
from calsmooth.evaluate.tasks.own import TaskFile, read_task
from calsmooth.records import read_predictions

CSV = """no,prompt,a,b,c,d,correct,region
1,What is the capital of France?,Paris,Lyon,Nice,Lille,A,west
2,What is the capital of Italy?,Milan,Rome,Turin,,B,south
3,What is the capital of Spain?,Seville,Bilbao,Madrid,None,C,south
4,What is the capital of Ireland?,Cork,Galway,Limerick,Dublin,D,west
"""
KEYS = {
    "data": "capitals.csv",
    "question": "prompt",
    "choices": ["a", "b", "c", "d"],
    "answer": "correct",
    "answer_as": "letter",
}


@pytest.fixture
def task_file(tmp_path):
    """`task_file(key=value, ...)` writes a good task with these keys changed (None: left out) and gives its path."""
    (tmp_path / "capitals.csv").write_text(CSV)

    def write(file="capitals.yaml", **changes):
        content = {key: value for key, value in (KEYS | changes).items() if value is not None}
        (tmp_path / file).write_text(yaml.safe_dump(content))
        return tmp_path / file

    return write


def test_a_table_with_tabs_is_read_as_one_with_commas(task_file, tmp_path):
    (tmp_path / "capitals.tsv").write_text(CSV.replace(",", "\t"))
    from_tabs = read_task(task_file(data="capitals.tsv")).load(None, 0).questions
    assert from_tabs == read_task(task_file()).load(None, 0).questions


def test_columns_of_choices_and_letters(task_file):
    task = read_task(task_file(subject="European capitals", id="no"))
    assert (task.name, task.format, task.shots) == ("capitals", "letter", 0)
    data = task.load(None, 0)
    found = [(q.id, q.answer, len(q.choices)) for q in data.questions]
    assert found == [("1", 0, 4), ("2", 1, 3), ("3", 2, 4), ("4", 3, 4)]
    assert data.questions[2].choices[3] == "None"
    prompt = plain_prompt(letters(task, "lm-eval"), data.questions[1], [])
    assert prompt.text(0) == (
        "The following are multiple choice questions (with answers) about European capitals.\n\n"
        "What is the capital of Italy?\nA. Milan\nB. Rome\nC. Turin\nAnswer:"
    )
    assert prompt.continuations == (" A", " B", " C")


@pytest.mark.parametrize(
    ("kind", "right"), [("index", [1, 0]), ("number", [2, 1]), ("letter", ["B", "A"]), ("text", ["4", "5"])]
)
def test_a_list_of_choices_and_every_kind_of_answer(tmp_path, kind, right):
    rows = [{"q": "2+2?", "c": ["3", "4"], "r": right[0]}, {"q": "2+3?", "c": ["5", "4", "6"], "r": str(right[1])}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yml").write_text(f"data: sums.jsonl\nquestion: q\nchoices: c\nanswer: r\nanswer_as: {kind}\n")
    data = read_task(tmp_path / "sums.yml").load(None, 0)
    assert [q.answer for q in data.questions] == [1, 0]
    assert [q.id for q in data.questions] == ["0", "1"]


def test_labels_of_the_datas_own(tmp_path):
    row = {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": 2}
    (tmp_path / "t.json").write_text(json.dumps([row]))
    (tmp_path / "t.yaml").write_text("data: t.json\nanswer_as: letter\n")
    (question,) = read_task(tmp_path / "t.yaml").load(None, 0).questions
    assert (question.choices, question.answer) == (("x", "y"), 1)


def test_description_context_and_subjects(task_file):
    keys = {"subject_column": "region", "description": "On the {subject} of Europe.\n", "context": "Q: {question} A:"}
    task = read_task(task_file(format="cloze", **keys))
    data = task.load(None, 1)
    assert [q.subject for q in data.questions] == ["south", "west"]
    assert data.notes == [
        "capitals: held back as solved examples, not scored: the first row of each subject (no 'shots_data')"
    ]
    prompt = plain_prompt(cloze(task), data.questions[0], data.examples["south"])
    assert prompt.text(1) == (
        "On the south of Europe.\n\nQ: What is the capital of Italy? A: Rome\n\nQ: What is the capital of Spain? A:"
    )
    assert prompt.continuations[0] == " Seville"
    text = plain_prompt(letters(task, "hendrycks"), data.questions[0], []).text(0)
    assert text.startswith("On the south of Europe.\n\nWhat is the capital of Spain?\nA. Seville")


def test_solved_examples_of_its_own(task_file, tmp_path):
    rows = CSV.splitlines(keepends=True)
    (tmp_path / "solved.csv").write_text("".join([rows[0], *rows[3:]]))
    task = read_task(task_file(shots_data="solved.csv"))
    assert task.shots == 5
    data = task.load(None, 5)
    assert len(data.questions) == 4
    assert [q.text[-9:] for q in data.examples[""]] == ["of Spain?", " Ireland?"]
    assert data.notes == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, r"capitals.yaml: no key 'data'; it names the file of the questions"),
        ({"data": "other.csv"}, r"capitals.yaml: 'data': no file .*other.csv; paths are relative to the YAML file"),
        ({"data": "capitals.yaml"}, r"capitals.yaml: 'data': unknown file type capitals.yaml; expected .jsonl"),
        ({"shots_data": "other.csv"}, r"capitals.yaml: 'shots_data': no file"),
        ({"anwser": "x"}, r"capitals.yaml: unknown key 'anwser'; did you mean 'answer'\?"),
        ({"answer_as": "word"}, r"capitals.yaml: 'answer_as' must be one of index, number, letter, text, got 'word'"),
        (
            {"format": "close"},
            r"capitals.yaml: 'format' must be one of letter, cloze, got 'close'; did you mean 'cloze'",
        ),
        ({"shots": -1}, r"capitals.yaml: 'shots' must be at least 0, got -1"),
        ({"id": False}, r"capitals.yaml: 'id' must be text, got False; YAML takes yes, no, .*: quote the word"),
        ({"context": "Answer:"}, r"capitals.yaml: 'context' must hold {question}, got 'Answer:'"),
        ({"subject": "x", "subject_column": "region"}, r"capitals.yaml: 'subject' and 'subject_column' exclude"),
    ],
)
def test_a_bad_task_file_is_named_with_its_key(task_file, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_task(task_file(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"question": "text"},
            r"line 2: no column 'text' \(key 'question' of .*capitals.yaml\); it has no, prompt, a,",
        ),
        ({"choices": ["a", "e"]}, r"line 2: no column 'e' \(key 'choices' of"),
        ({"choices": ["a"]}, r"line 2: column 'a' \(key 'choices' of .*\) must hold a list .* name them all"),
        (
            {"answer": "a"},
            r"line 2: column 'a' must hold the letter of the right choice .*one of A, B, C, D; got 'Paris'",
        ),
        ({"answer_as": "index"}, r"line 2: column 'correct' must hold the index .*one of 0, 1, 2, 3; got 'A'"),
        (
            {"answer_as": "text"},
            r"line 2: column 'correct' must hold the text .*one of Paris, Lyon, Nice, Lille; got 'A'",
        ),
        ({"subject_column": "x"}, r"line 2: no column 'x' \(key 'subject_column' of"),
        ({"choices": ["a", "prompt", "d", "c", "b"]}, r"line 3: every choice must be text that isn't empty"),
    ],
)
def test_bad_rows_are_named_with_file_line_and_key(task_file, changes, message):
    with pytest.raises(CalsmoothError, match=f"capitals.csv, {message}"):
        read_task(task_file(**changes)).load(None, 0)


def test_too_few_rows_for_their_own_examples(task_file):
    with pytest.raises(CalsmoothError, match=r"capitals.yaml: 4 rows are too few for 4 solved examples"):
        read_task(task_file()).load(None, 4)
    with pytest.raises(CalsmoothError, match=r"2 rows of 'west' are too few for 2 solved examples"):
        read_task(task_file(subject_column="region")).load(None, 2)


def test_names_must_differ(task_file):
    with pytest.raises(UsageError, match="another task is called 'mmlu' too; give it another 'name'"):
        choice_tasks((str(task_file("mine.yaml", name="mmlu")),))
    first, second = task_file("a.yaml"), task_file("b.yaml", name="a")
    with pytest.raises(UsageError, match=r"--task .*b.yaml: another task is called 'a' too"):
        choice_tasks((str(first), str(second)))
    assert [task.name for task in choice_tasks((str(first), str(first), "piqa"))] == ["a", "piqa"]
    with pytest.raises(UsageError, match=r"--task nothing.yaml: no such file"):
        choice_tasks(("nothing.yaml",))


def test_a_task_name_that_is_none_is_refused():
    with pytest.raises(
        UsageError, match=r"--task must be one of .* or your own YAML file, got 'mlu'; did you mean 'mmlu'"
    ):
        EvaluateConfig(task=("mlu",))


@pytest.mark.parametrize("format", ["letter", "cloze"])
def test_from_the_command_line(model_folder, task_file, tmp_path, format):
    task = task_file(subject_column="region")
    arguments = ["evaluate", "--model", str(model_folder), "--task", str(task), "--device", "cpu", "--shots", "1"]
    arguments += ["--format", format, "--chat-template", "--json", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["tasks"]["capitals"]
    assert (results["n"], results["shots"], results["format"], results["chat_template"]) == (2, 1, format, "turns")
    assert set(results["subjects"]) == {"south", "west"}
    predictions = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [(p.task, p.subject, len(p.logprobs), p.gold) for p in predictions] == [
        ("capitals", "south", 4, 2),
        ("capitals", "west", 4, 3),
    ]


EXAMPLE = Path(__file__).parents[2] / "examples" / "own-task"


def test_the_example_is_a_good_task():
    task = read_task(EXAMPLE / "capitals.yaml")
    data = task.load(None, task.shots)
    capitals = ["Paris", "Dublin", "Brussels", "Amsterdam", "Rome", "Madrid", "Lisbon", "Athens"]
    assert [q.choices[q.answer] for q in data.questions] == capitals
    prompt = plain_prompt(letters(task, "hendrycks"), data.questions[2], data.examples["western Europe"])
    assert prompt.text(1) == (
        "Questions about the capitals of western Europe, with answers.\n\n"
        "What is the capital of Luxembourg?\nA. Luxembourg\nB. Esch\nC. Differdange\nD. Dudelange\nAnswer: A\n\n"
        "What is the capital of Belgium?\nA. Brussels\nB. Ghent\nC. Antwerp\nAnswer:"
    )


def test_the_examples_table_names_every_key():
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == {f.name for f in fields(TaskFile)}
