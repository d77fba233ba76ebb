"""An evaluation that is killed and resumed, or shared by processes, gives what it gives in one go."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calsmooth.errors import UsageError
from calsmooth.evaluate import units as units_module
from calsmooth.evaluate.config import EvaluateConfig
from calsmooth.evaluate.run import run
from calsmooth.evaluate.scoring import Scorer
from calsmooth.evaluate.units import packed, parts

SMALL_UNITS = "import calsmooth.evaluate.units as u; u.UNIT, u.BATCHES = 4, 0"
KILLED_IN_THE_FOURTH_UNIT = f"""
import os, signal
{SMALL_UNITS}
from calsmooth.evaluate.scoring import Scorer
begun, score = [], Scorer.score
def scored(self, requests, *rest):
    begun.append(requests)
    found = score(self, requests, *rest)
    if len(begun) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Scorer.score = scored
"""
VOLATILE = ("seconds", "scoring_seconds", "peak_memory_bytes", "config")


@pytest.fixture(scope="module")
def arguments(model_folder, tmp_path_factory):
    """A command of six units of questions and two of rows."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("dev", 2), ("test", 7)):
        (root / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "astronomy", "virology"):
            rows = (f"Question {i} of {subject}?,red,blue,None,{i},{'ABCD'[i % 4]}\n" for i in range(count))
            (root / "mmlu" / split / f"{subject}_{split}.csv").write_text("".join(rows))
    rows = [{"instruction": f"Name color {i}.", "output": f"The color {i} is blue."} for i in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("evaluate", "--model", str(model_folder), "--task", "mmlu,responses", "--data-dir", str(root)),
        *("--dataset", str(root / "rows.jsonl"), "--device", "cpu", "--shots", "2"),
    ]


def command(arguments, output, setup=SMALL_UNITS, processes=1):
    """Runs `calsmooth` with `setup` executed first, under torchrun where there is more than one process."""
    script = output.parent / f"{output.name}.py"
    script.write_text(f"{setup}\nfrom calsmooth.cli.app import main\nmain()\n")
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # One thread each: how many there are decides the order of sums, and so the last digits.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(script), *arguments, "--output", str(output)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command(arguments, folder)
    assert done.returncode == 0, done.stderr
    return folder


def stable(results):
    return {name: value for name, value in results.items() if name not in VOLATILE}


def test_a_killed_evaluation_resumes_to_what_one_process_gives_in_one_go(arguments, whole, tmp_path):
    folder = tmp_path / "run"
    killed = command(arguments, folder, KILLED_IN_THE_FOURTH_UNIT)
    assert killed.returncode == -signal.SIGKILL
    kept = folder / "unfinished" / "process-0.jsonl"
    assert kept.read_text().count("\n") == 3
    assert not (folder / "predictions.jsonl").exists()
    with open(kept, "a") as file:
        file.write('{"unit": "mmlu/0-0", "logprobs": [[-1.2')  # what a crash may leave

    # Whoever goes on: here two processes, which share what is left.
    resumed = command([*arguments, "--resume", "--json"], folder, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())
    results, expected = (json.loads((f / "results.json").read_text()) for f in (folder, whole))
    assert json.loads(resumed.stdout) == results
    assert stable(results) == stable(expected)


def test_what_is_asked_must_be_the_same(arguments, model_folder, tmp_path):
    data, rows = Path(arguments[6]), arguments[8]
    asked = {"model": str(model_folder), "task": ("mmlu",), "data_dir": data, "device": "cpu", "shots": 2}
    asked |= {"output": tmp_path / "run", "resume": True}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calsmooth.evaluate.scoring.Scorer.score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(EvaluateConfig(**asked))  # a new folder: --resume starts one
    with pytest.raises(UsageError, match="holds an interrupted evaluation; go on with --resume"):
        run(EvaluateConfig(**(asked | {"resume": False})))
    for changes, named in (
        ({"shots": 1}, "task mmlu .*1 shots"),
        ({"prompt_style": "lm-eval"}, "task mmlu .*lm-eval"),
        ({"limit": 5}, "task mmlu .*5 questions"),
        ({"task": ("mmlu", "responses"), "dataset": rows}, "task responses null"),
        ({"dtype": "bfloat16"}, 'precision "float32", now it is "bfloat16"'),
        ({"max_length": 100}, "longest sequence 1024, now it is 100"),
        ({"model": "demo"}, "model "),
    ):
        with pytest.raises(UsageError, match=f"was begun with {named}"):
            run(EvaluateConfig(**(asked | changes)))
    # What changes speed only may differ.
    run(EvaluateConfig(**(asked | {"batch_size": 3})))
    with pytest.raises(UsageError, match="is complete; leave --resume out"):
        run(EvaluateConfig(**asked))


def test_resume_without_a_folder_takes_the_newest_of_its_name(arguments, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = EvaluateConfig(model=str(model_folder), task=("mmlu",), device="cpu", resume=True)
    config = dataclasses.replace(config, data_dir=Path(arguments[6]))
    with pytest.raises(UsageError, match="no interrupted evaluation in runs/evaluate-tiny"):
        run(config)
    (tmp_path / "runs" / "evaluate-tiny-longer" / "unfinished").mkdir(parents=True)
    with pytest.raises(UsageError, match="no interrupted evaluation in runs/evaluate-tiny"):
        run(config)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 1534])
def test_parts_are_few_and_even(count):
    cut = parts(range(count))
    assert [i for part in cut for i in part] == list(range(count))
    assert len(cut) == -(-count // 256)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@given(costs=st.lists(st.integers(1, 100), max_size=40), batch=st.integers(0, 60))
def test_small_parts_make_a_unit_together_and_large_ones_one_each(costs, batch):
    cut = packed(costs, batch)
    assert [number for unit in cut for number in unit] == list(range(len(costs)))
    most = units_module.BATCHES * batch
    loads = [sum(costs[number] for number in unit) for unit in cut]
    assert all(load <= most or len(unit) == 1 for load, unit in zip(loads, cut, strict=True))
    assert all(a + b > most for a, b in pairwise(loads)) or not batch


def test_units_of_another_cut_are_done_again_and_never_mixed_up(arguments, model_folder, tmp_path, monkeypatch):
    """As where an evaluation goes on on another device, which takes more at once."""
    asked = {"model": str(model_folder), "task": ("mmlu",), "data_dir": Path(arguments[6]), "device": "cpu", "shots": 2}
    whole = run(EvaluateConfig(**asked, output=tmp_path / "whole"))
    monkeypatch.setattr(units_module, "BATCHES", 0)
    with monkeypatch.context() as patch:
        patch.setattr("calsmooth.evaluate.scoring.Scorer.score", stopping_after(Scorer.score, 2))
        with pytest.raises(KeyboardInterrupt):
            run(EvaluateConfig(**asked, output=tmp_path / "run"))
    kept = [json.loads(line)["unit"] for line in (tmp_path / "run/unfinished/process-0.jsonl").read_text().splitlines()]
    assert len(kept) == 2
    monkeypatch.setattr(units_module, "BATCHES", 8)
    resumed = run(EvaluateConfig(**asked, output=tmp_path / "run", resume=True))
    for one, other in zip(resumed.predictions, whole.predictions, strict=True):
        assert (one.subject, one.id) == (other.subject, other.id)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def stopping_after(score, count):
    begun = []

    def scored(*arguments):
        begun.append(arguments)
        if len(begun) > count:
            raise KeyboardInterrupt
        return score(*arguments)

    return scored
