"""Reliability diagrams: the numbers without pixels, and that the drawing shows them."""

import json

import numpy as np
import pytest

from calsmooth import metrics
from calsmooth.plots import (
    BarGroup,
    figure_bytes,
    new_figure,
    plot_bars,
    plot_reliability,
    plot_reliability_together,
    prepare_reliability,
    save_figure,
    stored_reliability,
)


@pytest.fixture
def sample():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 1.0, 500)
    return confidence, generator.random(500) < confidence**2


def test_prepare_gives_the_metrics(sample):
    panel = prepare_reliability(*sample, bins=10, title="x")
    assert panel.n == 500
    assert panel.ece == metrics.expected_calibration_error(*sample, bins=10)
    assert panel.accuracy == pytest.approx(np.mean(sample[1]))
    assert panel.bins.count.sum() == 500


def test_a_panel_as_json_has_null_for_empty_bins(sample):
    panel = prepare_reliability(*sample).to_dict()
    assert json.loads(json.dumps(panel, allow_nan=False)) == panel
    assert panel["accuracy"][0] is None
    assert panel["count"][0] == 0
    assert len(panel["lower"]) == len(panel["accuracy"]) == 15


def test_bars_reach_accuracy_and_confidence(sample):
    panel = prepare_reliability(*sample)
    figure = plot_reliability([panel, panel])
    assert len(figure.axes) == 4
    filled = panel.bins.count > 0
    bars = {c.get_label(): c for c in figure.axes[0].containers}
    tops = {name: [b.get_y() + b.get_height() for b in bars[name]] for name in ("over-confident", "under-confident")}
    reached = np.maximum(tops["over-confident"], tops["under-confident"])
    assert reached == pytest.approx(np.maximum(panel.bins.accuracy, panel.bins.confidence)[filled])
    shares = [b.get_height() for b in figure.axes[2].containers[0]]
    assert shares == pytest.approx(panel.bins.count / 500)
    assert f"ECE {panel.ece:.3f}" in figure.axes[0].get_title()


def test_a_stored_panel_is_the_panel(sample):
    panel = prepare_reliability(*sample, title="x", ece_interval=[0.1, 0.2])
    summary = metrics.summarize_top(*sample) | {"ece_interval": [0.1, 0.2], "reliability": panel.to_dict()}
    stored = stored_reliability(json.loads(json.dumps(summary)), "x")
    assert (stored.title, stored.n, stored.ece, stored.ece_interval) == ("x", 500, panel.ece, (0.1, 0.2))
    for name in ("lower", "upper", "count", "accuracy", "confidence"):
        assert np.array_equal(getattr(stored.bins, name), getattr(panel.bins, name), equal_nan=True)
    assert stored.accuracy == pytest.approx(panel.accuracy)


def test_titles_name_the_interval(sample):
    panel = prepare_reliability(*sample, title="x", ece_interval=(0.1, 0.2))
    title = plot_reliability([panel]).axes[0].get_title()
    assert title == f"x\nECE {panel.ece:.3f} (0.100 to 0.200)\naccuracy {panel.accuracy:.3f}, n = 500"


def test_panels_are_laid_out_in_rows_and_none_leaves_a_gap(sample):
    panel = prepare_reliability(*sample, title="x")
    figure = plot_reliability([panel, None, panel], columns=2)
    assert [ax.axison for ax in figure.axes] == [True, False, True, False, True, False, True, False]
    titled = [i for i, ax in enumerate(figure.axes) if ax.get_title()]
    assert titled == [0, 4]  # two columns, each panel with its shares a row below


def test_runs_together_are_told_apart(sample):
    confidence, correct = sample
    runs = [prepare_reliability(confidence, correct, title="a"), prepare_reliability(confidence, ~correct, title="b")]
    figure = plot_reliability_together({"one": runs, "two": runs[:1]})
    lines = [line for line in figure.axes[0].get_lines() if ":" in str(line.get_label())]
    assert [line.get_label().split(":")[0] for line in lines] == ["a", "b"]
    assert lines[0].get_color() != lines[1].get_color()
    filled = runs[1].bins.count > 0
    assert lines[1].get_ydata() == pytest.approx(runs[1].bins.accuracy[filled])
    assert figure.axes[1].get_legend().get_title().get_text() == "two"


def test_bars_reach_their_values_and_intervals():
    group = BarGroup("ECE", np.array([[10.0], [20.0]]), np.array([[8.0], [np.nan]]), np.array([[15.0], [np.nan]]))
    figure = plot_bars([group], ["a", "b"], ["t"])
    first, errors, second = figure.axes[0].containers
    assert [bar.get_height() for bar in (*first, *second)] == [10.0, 20.0]
    (whisker,) = errors.lines[2]
    assert whisker.get_segments()[0][:, 1].tolist() == [8.0, 15.0]


def test_the_same_figure_gives_the_same_bytes(sample):
    one, two = (figure_bytes(plot_reliability([prepare_reliability(*sample)]), "svg") for _ in range(2))
    assert one == two


def test_one_point_can_be_drawn(tmp_path):
    path = save_figure(plot_reliability([prepare_reliability([1.0], [1])]), tmp_path / "one.png", dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_suffix_decides_the_format(tmp_path):
    figure, axes = new_figure(rows=2, columns=2, height_ratios=[2, 1])
    assert len(axes) == 4
    assert b"<svg" in save_figure(figure, tmp_path / "f.svg").read_bytes()
    assert save_figure(figure, tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
