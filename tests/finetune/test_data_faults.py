"""Everything that can be wrong with the data, as the command says it: one line, and the exit code."""

import json
import sys
from pathlib import Path

import pytest

from calsmooth.cli.app import main

GOOD = {"instruction": "Name a color.", "output": "Blue."}
FILES = {
    "good.jsonl": json.dumps(GOOD),
    "text.jsonl": json.dumps({"text": "The sky is blue."}),
    "column.jsonl": f'{json.dumps(GOOD)}\n{{"instruction": "Name a color."}}',
    "line.jsonl": f'{json.dumps(GOOD)}\n{{"instruction": "Name',
    "type.jsonl": '{"instruction": "Name a color.", "output": ["Blue."]}',
    "empty.jsonl": "\n\n",
    "nobody.jsonl": '{"messages": [{"role": "robot", "content": "Hi"}]}',
    "silent.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}',
    "unknown.jsonl": '{"question": "Which color?", "answer": "Blue."}',
    "array.json": '{"data": []}',
    "table.csv": "instruction,output\nName a color.\n",
    "table.parquet": "it is none",
    "rows.txt": "Blue.",
}
FAULTS = [
    ("missing.jsonl", 2, "--dataset missing.jsonl: no such file; give a file, a folder or a hub id such as org/name"),
    ("*.nothing", 2, "--dataset *.nothing: no file matches; give a file, a pattern, a folder or a hub id"),
    (
        "rows.txt",
        2,
        "--dataset rows.txt: unknown file type; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
    ),
    ("good.jsonl=0", 2, "--dataset good.jsonl=0: a weight must be a number above 0, got '0'"),
    ("good.jsonl=1,text.jsonl", 2, "--dataset text.jsonl: has no weight and others have; give all one (=0.5) or none"),
    ("good.jsonl#test", 2, "--dataset good.jsonl#test: a file has no splits; leave '#test' out"),
    (
        "org/name",
        1,
        "--dataset org/name: could not be loaded: the hub can't be reached and the cache doesn't hold it; check the "
        "name, --split and the network, or give a local file",
    ),
    ("empty.jsonl", 1, "--dataset empty.jsonl: holds no rows"),
    (
        "column.jsonl",
        1,
        "column.jsonl, line 2: no column 'output'; found instruction; mend or remove such rows (finetune: "
        "--on-bad-row skip)",
    ),
    ("line.jsonl", 1, "line.jsonl, line 2: not valid JSON (Unterminated string starting at: line 1 column 17"),
    ("type.jsonl", 1, "type.jsonl, line 1: column 'output' must be text, got ['Blue.']; mend"),
    (
        "nobody.jsonl",
        1,
        "nobody.jsonl, line 1: messages, message 1: 'role' must be one of system, user, assistant, got 'robot'; mend",
    ),
    ("silent.jsonl", 1, "silent.jsonl, line 1: no assistant turn, so nothing to learn; mend"),
    ("unknown.jsonl", 1, "unknown.jsonl, line 1: columns question, answer fit no known format (messages: messages; "),
    ("array.json", 1, "array.json: expected a list of rows, got a dict"),
    ("table.csv", 1, "table.csv, line 2: expected 2 columns, as in the header; mend"),
    ("table.parquet", 1, "table.parquet: not readable as parquet (Parquet magic bytes not found in footer."),
    ("good.jsonl --max-length 4", 1, "--dataset good.jsonl: no response fits --max-length 4; raise it"),
    ("good.jsonl --split test", 2, "--split test: only folders and hub ids have splits, good.jsonl has none"),
    ("good.jsonl --streaming", 2, "--streaming: a stream has no end; say with --max-steps how many steps to train"),
    ("good.jsonl --streaming --max-steps 2 --limit 5", 2, "--limit 5: goes with data that has an end, not with"),
    ("good.jsonl --streaming --max-steps 2 --epochs 5", 2, "--epochs 5: goes with data that has an end, not with"),
    (
        "good.jsonl,text.jsonl --streaming --max-steps 2",
        2,
        "--streaming: of several sources each needs a weight, since none is read to its end; give --dataset "
        "good.jsonl=0.5, ...",
    ),
    ("column.jsonl --format messages --on-bad-row skip", 1, "--dataset column.jsonl: every row is bad, the first one"),
    ("good.jsonl --format aplaca", 2, "--format must be one of alpaca, messages, sharegpt, prompt, text, got 'aplaca'"),
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["calsmooth", "finetune", *words, "--device", "cpu"])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.mark.parametrize(("words", "code", "says"), FAULTS, ids=[words for words, _, _ in FAULTS])
def test_one_line_says_what_is_wrong(command, words: str, code: int, says: str, tmp_path: Path) -> None:
    found, out, err = command("--dataset", *words.split())
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1
    assert (found, out.count("Traceback")) == (code, 0)
    assert not (tmp_path / "runs").exists()


def test_what_was_skipped_is_said(command) -> None:
    code, out, err = command("--dataset", "line.jsonl", "--on-bad-row", "skip", "--dry-run")
    assert code == 0
    assert err.startswith("warning: 1 bad row is left out, the first: line.jsonl, line 2: not valid JSON")
    assert "2 rows (1 bad left out), format alpaca, template chat" in out


def test_a_dry_run_says_what_a_run_needs(command) -> None:
    code, out, _ = command("--dataset", "good.jsonl=3,text.jsonl=1", "--dry-run", "--template", "tulu")
    assert code == 0
    lines = out.splitlines()
    assert "dataset:" in lines
    assert "- good.jsonl=3" in lines
    assert "«Blue.<|end|>»" in lines
    assert lines[lines.index("«Blue.<|end|>»") - 1] == "<|assistant|>"
    assert "  good.jsonl: 2 examples an epoch, of 1" in lines
    assert any(line.startswith("5 steps of 32 examples") and "is padding" in line for line in lines)
    assert any(line.startswith("Memory, at micro-batches of ") for line in lines)
    bound = "The activations are those of uncompiled layers: with --compile, an upper bound."
    assert bound not in lines
    code, out, _ = command("--dataset", "good.jsonl", "--dry-run", "--compile")
    assert bound in out.splitlines()
    code, out, _ = command("--dataset", "good.jsonl", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["memory"]["total"] >= 16 * 700_000, "16 bytes a parameter and the activations"
    assert plan["config"]["dataset"] == ["good.jsonl"]
    assert plan["sources"] == [{"name": "good.jsonl", "examples": 1, "weight": None}]
