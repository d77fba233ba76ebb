"""`evaluate --compare` on run folders written here; no model, no torch."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.container import BarContainer
from typer.testing import CliRunner

from calsmooth import metrics
from calsmooth.cli.app import app
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.comparison import compare, pairs_of, read_runs
from calsmooth.evaluate.comparison_report import latex, markdown, prepare_bars, prepare_cells
from calsmooth.evaluate.report import write_report
from calsmooth.plots import FORMATS, plot_bars, prepare_reliability
from calsmooth.records import Prediction, TokenPredictions, write_predictions, write_token_predictions


def summary(rows, gold, **changes):
    """A task's part of results.json, through the functions that evaluate uses."""
    found = metrics.summarize(rows, gold, resamples=20)
    panel = prepare_reliability(*metrics.top_of(rows, gold))
    return {**found, "format": "letter", "prompt": "hendrycks", "shots": 5, "key": "k", **changes} | {
        "reliability": panel.to_dict()
    }


def make_run(folder, sharpen, tasks=("mmlu",), n=400, **changes):
    """A run whose stated probabilities are the true ones, sharpened."""
    results = {"model": f"models/{folder.name}", "tasks": {}, "notes": [], "config": {"bins": 15, "task": list(tasks)}}
    results |= {"versions": {"calsmooth": "0"}, "device": "cpu", "dtype": "float32", "model_hash": "sha256 0"}
    predictions = []
    for number, task in enumerate(tasks):
        generator = np.random.default_rng(number)
        truth = metrics.log_softmax(generator.normal(size=(n, 4)) * 1.5)
        gold = (generator.random((n, 1)) > np.exp(truth).cumsum(axis=1)).sum(axis=1).clip(max=3)
        rows = metrics.log_softmax(truth * sharpen)
        results["tasks"][task] = summary(rows, gold, **changes)
        predictions += [
            Prediction(task, "s", str(i), tuple(row), int(g))
            for i, (row, g) in enumerate(zip(rows.tolist(), gold, strict=True))
        ]
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    write_predictions(folder / "predictions.jsonl", predictions)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        make_run(root / "evaluate-honest", 1.0, ("mmlu", "arc_easy")),
        make_run(root / "evaluate-sure", 3.0, ("mmlu", "arc_easy")),
        make_run(root / "only_mmlu", 2.0, ("mmlu",)),
    ]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    return compare([str(run) for run in runs], tmp_path_factory.mktemp("compared") / "o")


def test_the_command_writes_its_files_without_torch(runs, tmp_path):
    program = (
        "import sys; from calsmooth.cli.app import main; sys.argv = ['calsmooth', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "evaluate", "--compare", f"base = 1={runs[0]}", str(runs[1]), "-o", "o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["mmlu", "arc_easy"]
    assert lines[1].split() == ["run", *["Acc.", "ECE", "RMS"] * 2]
    assert lines[2].startswith("base = 1 ")
    assert lines[3].startswith("sure ")
    assert "mmlu: sure against base = 1: ECE +" in done.stdout
    names = {p.name for p in (tmp_path / "o").iterdir()}
    pictures = {f"{n}.{s}" for n in ("comparison", "reliability", "reliability-together") for s in FORMATS}
    assert names == pictures | {"comparison.json", "report.html", "table.md", "table.csv", "table.tex"}


def test_differences_are_those_of_the_metrics_with_intervals_around_them(compared, runs):
    tasks = compared.results["tasks"]
    for task, pairs in compared.results["pairs"].items():
        for pair in pairs:
            one, other = tasks[task][pair["run"]], tasks[task][pair["against"]]
            for name in ("accuracy", "overconfidence", "nll", "brier"):
                value, low, high = pair[name]
                assert value == pytest.approx(one[name] - other[name], abs=1e-12)
                assert low <= value <= high or value == pytest.approx(low) == pytest.approx(high)
            value, low, high = pair["ece"]
            assert value == pytest.approx(one["ece_corrected"] - other["ece_corrected"], abs=1e-12)
            assert low <= value <= high
    # Sharpening changes no answer, so that a paired difference of accuracies is exactly nothing.
    assert compared.results["differences"]["mmlu"]["sure"]["accuracy"] == [0.0, 0.0, 0.0]
    assert compared.results["differences"]["mmlu"]["sure"]["ece"][1] > 0


def test_every_pair_of_runs_is_compared(compared):
    pairs = {task: [(p["run"], p["against"]) for p in of_task] for task, of_task in compared.results["pairs"].items()}
    assert pairs == {
        "mmlu": [("sure", "honest"), ("only_mmlu", "honest"), ("only_mmlu", "sure")],
        "arc_easy": [("sure", "honest")],
    }
    assert set(compared.results["differences"]["mmlu"]) == {"sure", "only_mmlu"}
    assert set(compared.results["differences"]["arc_easy"]) == {"sure"}
    html = (compared.folder / "report.html").read_text()
    for pair in compared.results["pairs"]["mmlu"]:
        value, low, high = pair["ece"]
        assert f"{value:+.3f} ({low:+.3f} to {high:+.3f})" in html
    many = pairs_of([str(i) for i in range(9)])
    assert many == [("1", "0")] + [(str(i), other) for i in range(2, 9) for other in ("0", str(i - 1))]


def test_an_interval_of_a_difference_knows_that_the_questions_are_the_same(tmp_path, undrawn):
    """Two models whose confidences differ by little, on questions that differ by much."""
    one, other = (make_run(tmp_path / name, sharpen, n=1000) for name, sharpen in (("a", 2.0), ("b", 2.2)))
    (pair,) = compare([str(one), str(other)], tmp_path / "o").results["pairs"]["mmlu"]
    own = json.loads((one / "results.json").read_text())["tasks"]["mmlu"]["overconfidence_interval"]
    assert pair["overconfidence"][1] > 0
    assert pair["overconfidence"][2] - pair["overconfidence"][1] < (own[1] - own[0]) / 4


def test_letters_have_a_column_and_a_difference_that_are_not_renormalised(tmp_path):
    """The second model gives the letters half of its probability: renormalised, nothing has changed."""
    folders = [make_run(tmp_path / name, 1.5) for name in ("all", "half")]
    for folder, mass in zip(folders, (1.0, 0.5), strict=True):
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for row in rows:
            row["logprobs"] = [value + np.log(mass) for value in row["logprobs"]]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = json.loads((folder / "results.json").read_text())
        raw = metrics.summarize_unnormalised([r["logprobs"] for r in rows], [r["gold"] for r in rows], resamples=20)
        results["tasks"]["mmlu"] |= raw
        (folder / "results.json").write_text(json.dumps(results))
    done = compare([str(f) for f in folders], tmp_path / "o")
    (pair,) = done.results["pairs"]["mmlu"]
    assert pair["ece"][0] == pytest.approx(0, abs=1e-6)
    assert pair["overconfidence"] == pytest.approx([0, 0, 0], abs=1e-9)
    confidence = [np.exp(max(row["logprobs"])) for row in rows]
    correct = [int(np.argmax(row["logprobs"]) == row["gold"]) for row in rows]
    by_hand = metrics.expected_calibration_error(confidence, correct)
    assert done.results["tasks"]["mmlu"]["half"]["ece_unnormalised"] == pytest.approx(by_hand, abs=1e-12)
    assert pair["ece_unnormalised"][1] > 0.05
    assert f"{by_hand:.3f}" in (done.folder / "table.md").read_text().splitlines()[3].split(" | ")[-1]
    assert "mmlu ECE raw" in (done.folder / "table.md").read_text()


def responses_run(folder, sharpen, key="k", rows=60):
    """A run of `responses` alone, whose tokens' truth is in part that of their row."""
    generator = np.random.default_rng(0)
    row = np.repeat(np.arange(rows), 25)
    logits = generator.normal(size=(len(row), 4)) * 1.5 + generator.normal(size=(rows, 4))[row]
    truth = metrics.log_softmax(logits)
    labels = (generator.random((len(row), 1)) > np.exp(truth).cumsum(axis=1)).sum(axis=1).clip(max=3)
    lp = metrics.log_softmax(truth * sharpen)
    p, y = metrics.top_choice(np.exp(lp), labels)
    losses = {"nll": metrics.negative_log_likelihoods(lp, labels), "brier": metrics.brier_scores(np.exp(lp), labels)}
    found = metrics.summarize_top(p, y, resamples=20, clusters=row, losses=losses)
    results = {"model": folder.name, "tasks": {"responses": {**found, "rows": rows, "key": key}}, "notes": []}
    results |= {"config": {"bins": 15}, "versions": {"calsmooth": "0"}}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    write_token_predictions(folder / "token_predictions.npz", TokenPredictions(p, y, **losses, row=row))
    return folder, (p, y), row


def test_responses_are_compared_by_row(tmp_path, undrawn):
    (first, one, row), (second, other, _) = (responses_run(tmp_path / n, s) for n, s in (("a", 1.0), ("b", 1.6)))
    done = compare([str(first), str(second)], tmp_path / "o").results
    (pair,) = done["pairs"]["responses"]
    change = (other[0] - other[1]) - (one[0] - one[1])
    assert pair["overconfidence"][0] == pytest.approx(change.mean())
    expected = metrics.bootstrap_interval(np.mean, change, clusters=row)
    assert pair["overconfidence"][1:] == pytest.approx(expected, abs=1e-12)
    assert pair["ece"] == list(metrics.infer_ece_difference(one, other, clusters=row))
    third, *_ = responses_run(tmp_path / "c", 1.0, key="other words")
    found = compare([str(first), str(third)], tmp_path / "p").results
    assert found["pairs"] == {}
    assert "responses: c and a predicted different tokens; no difference is given" in found["notes"]
    (first / "token_predictions.npz").write_bytes(b"PK")
    with pytest.raises(CalsmoothError, match=r"token_predictions\.npz: can't be read"):
        compare([str(first), str(second)], tmp_path / "q")


def test_the_tables_hold_the_same_numbers(compared):
    tasks = compared.results["tasks"]
    text = (compared.folder / "table.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["honest", "sure", "only_mmlu"]
    assert all(len(row) == 9 for row in rows)
    assert rows[2][2] == f"**{tasks['mmlu']['honest']['ece']:.3f}**"
    assert rows[4][5:] == ["-"] * 4
    with open(compared.folder / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["task"]) for line in lines][:3] == [(r, "mmlu") for r in ("honest", "sure", "only_mmlu")]
    for line in lines:
        one = tasks[line["task"]][line["run"]]
        assert float(line["ece"]) == one["ece"]
        assert [float(line["ece_low"]), float(line["ece_high"])] == one["ece_interval"]
    body = [line for line in (compared.folder / "table.tex").read_text().splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") == 8 or "multicolumn" in line for line in body)
    assert r"only\_mmlu" in body[-1]


def test_the_best_of_a_column_is_marked_both_ways_and_ties_twice():
    tasks = {"t": {"a": {"accuracy": 0.50004, "ece": 0.1}, "b": {"accuracy": 0.5, "ece": 0.2}, "c": {"accuracy": 0.4}}}
    rows = prepare_cells(["a", "b", "c"], tasks)
    assert [row[0].best for row in rows] == [True, True, False]
    assert [row[1].best for row in rows] == [True, False, False]
    assert [cell.text for cell in rows[2]] == ["0.400", "-", "-", "-"]
    alike = prepare_cells(["a", "b"], {"t": {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.5}}})
    assert not alike[0][0].best


def test_names_are_escaped():
    tasks = {"t_1": {"a|b_50%": {"accuracy": 0.5}}}
    assert r"a\|b_50%" in markdown(["a|b_50%"], tasks)
    assert r"a|b\_50\%" in latex(["a|b_50%"], tasks)
    assert r"\multicolumn{4}{c}{t\_1}" in latex(["a|b_50%"], tasks)


def test_bars_are_shares_with_gaps_for_what_is_missing():
    tasks = {
        "one": {"a": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.7], "ece": 0.1, "sce": None}},
        "two": {"a": {"accuracy": 0.25, "ece": 0.2}, "b": {"ece": 0.3}},
    }
    groups = {g.metric: g for g in prepare_bars(["a", "b"], tasks)}
    assert set(groups) == {"Accuracy", "ECE"}  # no run has the others
    assert groups["Accuracy"].values[0].tolist() == [0.5, 0.25]
    assert np.isnan(groups["Accuracy"].values[1]).all()
    assert (groups["Accuracy"].low[0, 0], groups["Accuracy"].high[0, 0]) == (0.4, 0.7)
    figure = plot_bars(list(groups.values()), ["a", "b"], list(tasks))
    bars = [c for c in figure.axes[1].containers if isinstance(c, BarContainer)]
    lengths = [bar.get_width() for container in bars for bar in container]
    assert np.array(lengths) == pytest.approx(np.array([0.1, 0.2, np.nan, 0.3]), nan_ok=True)


def test_the_page_is_self_contained_and_has_every_run(compared):
    html = (compared.folder / "report.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    metrics_tasks_key_and_panels = 6 + 2 + 1 + 5
    assert html.count("data:image/svg+xml;base64,") == html.count("<img") == metrics_tasks_key_and_panels
    assert "sure is over-confident by " in html
    for words in ("honest", "sure", "only_mmlu", "sha256 0", "models/evaluate-sure"):
        assert words in html


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("calsmooth.evaluate.comparison.write_files", lambda *_: None)


def test_runs_that_were_not_asked_alike_are_pointed_out(runs, tmp_path, undrawn):
    fewer = make_run(tmp_path / "fewer", 1.0, n=80, shots=0)
    notes = compare([str(runs[0]), str(fewer)], tmp_path / "o").results["notes"]
    assert "mmlu: the runs differ in shots (honest: 5, fewer: 0), so that" in notes[0]
    assert "mmlu: the runs differ in n" in notes[1]
    assert "mmlu: fewer and honest answered different questions; no difference is given" in notes
    coarse = make_run(tmp_path / "coarse", 1.0)
    results = json.loads((coarse / "results.json").read_text())
    results["config"]["bins"] = 10
    (coarse / "results.json").write_text(json.dumps(results))
    notes = compare([str(runs[0]), str(coarse)], tmp_path / "q").results["notes"]
    assert notes[0].startswith("the runs differ in bins (honest: 15, coarse: 10), so that their ECE")
    other = make_run(tmp_path / "other", 1.0, key="other")
    notes = compare([str(runs[0]), str(other)], tmp_path / "p").results["notes"]
    assert notes == ["mmlu: the runs were not asked the same questions in the same words (their task keys differ)"]


def test_cloze_tasks_appear_a_second_time_per_byte(tmp_path, undrawn):
    folders = [make_run(tmp_path / name, sharpen) for name, sharpen in (("a", 1.0), ("b", 2.0))]
    for folder, power in zip(folders, (0.5, 0.25), strict=True):
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for row in rows:
            row["logprobs_per_byte"] = [value * power for value in row["logprobs"]]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = json.loads((folder / "results.json").read_text())
        results["tasks"]["mmlu"]["per_byte"] = results["tasks"]["mmlu"] | {"ece": 0.5}
        (folder / "results.json").write_text(json.dumps(results))
    found = compare([str(f) for f in folders], tmp_path / "o").results
    assert list(found["tasks"]) == ["mmlu", "mmlu, per byte"]
    assert found["tasks"]["mmlu, per byte"]["a"]["ece"] == 0.5
    # 2.0 x 0.25 = 1.0 x 0.5: per byte the two say the same, and summed the second is surer.
    (summed,), (per_byte,) = found["pairs"]["mmlu"], found["pairs"]["mmlu, per byte"]
    assert summed["overconfidence"][1] > 0
    assert per_byte["overconfidence"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert per_byte["nll"] == pytest.approx([0, 0, 0], abs=1e-9)
    write_report(folders[0], results)
    assert "mmlu, per byte" in (folders[0] / "report.html").read_text()


def test_what_is_no_run_is_refused(runs, tmp_path):
    def refused(*given):
        with pytest.raises(CalsmoothError) as caught:
            compare([str(g) for g in given], tmp_path / "o")
        assert not (tmp_path / "o").exists()
        return str(caught.value)

    assert "expected two or more run folders, got 1" in refused(runs[0])
    assert "no results.json there; give the folder of an evaluation, or NAME=FOLDER" in refused(runs[0], tmp_path)
    assert "two runs are called x; name them" in refused(f"x={runs[0]}", f"x={runs[1]}")
    other = make_run(tmp_path / "piqa", 1.0, ("piqa",))
    assert "no task in common: only_mmlu has mmlu; piqa has piqa" in refused(runs[2], other)
    (tmp_path / "results.json").write_text("[]")
    assert "not the results of calsmooth evaluate" in refused(runs[0], tmp_path)


def test_names_and_folders_with_equals_signs(runs, tmp_path):
    odd = make_run(tmp_path / "beta=0.1", 1.0)
    labels = [run.label for run in read_runs([str(odd), f"a=b={odd}", f"x={runs[0]}/results.json"])]
    assert labels == ["beta=0.1", "a=b", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a"], "runs/a: RUN goes with --compare"),
        (["--compare", "a", "b", "--limit", "5"], "--limit: --compare reads finished runs"),
        (["--compare", "a", "b", "--model", "x"], "--model: --compare reads finished runs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith(message)
