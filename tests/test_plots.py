"""Reliability diagrams: the numbers without pixels, and that the drawing shows them."""

import json

import numpy as np
import pytest

from calsmooth import metrics
from calsmooth.plots import new_figure, plot_reliability, prepare_reliability, save_figure


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


def test_one_point_can_be_drawn(tmp_path):
    path = save_figure(plot_reliability([prepare_reliability([1.0], [1])]), tmp_path / "one.png", dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_suffix_decides_the_format(tmp_path):
    figure, axes = new_figure(rows=2, columns=2, height_ratios=[2, 1])
    assert len(axes) == 4
    assert b"<svg" in save_figure(figure, tmp_path / "f.svg").read_bytes()
    assert save_figure(figure, tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
