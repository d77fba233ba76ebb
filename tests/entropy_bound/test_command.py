"""`calsmooth entropy-bound` from the command line to its files."""

import csv
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from calsmooth.entropy_bound.bound import normalized_entropy_gap
from calsmooth.entropy_bound.families import FAMILIES
from calsmooth.entropy_bound.plot import plot_gap_curves, prepare_gap_curves


def calsmooth(*arguments, cwd):
    command = [sys.executable, "-m", "calsmooth", "entropy-bound", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_hidden_alone_writes_points_and_pictures(tmp_path):
    done = calsmooth("--hidden", "2048", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "256,000" in done.stdout
    assert "Gemma 2" in done.stdout
    folder = tmp_path / "runs" / "entropy-bound"
    points = json.loads((folder / "entropy_bound.json").read_text())
    assert [(p["vocab"], p["hidden"]) for p in points] == [(32_768, 2048), (128_256, 2048), (256_000, 2048)]
    rows = list(csv.DictReader((folder / "entropy_bound.csv").open()))
    assert [float(r["normalized_gap"]) for r in rows] == [p["normalized_gap"] for p in points]
    assert (folder / "entropy_bound.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(folder / "entropy_bound.svg").getroot().tag.endswith("svg")


def test_json_is_alone_on_standard_output(tmp_path):
    done = calsmooth("--vocab", "100,1000", "--hidden", "64", "--rho", "0.5", "--json", "--output", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    assert [p["vocab"] for p in points] == [100, 1000]
    point = points[0]
    gamma = np.exp(-0.5 * np.sqrt(64 * 100 / 99))
    floor = np.log(1 + 99 * gamma) + 0.5 * gamma * np.sqrt(64 * 100 * 99) / (1 + 99 * gamma)
    assert point["entropy_lower_bound"] == pytest.approx(floor, rel=1e-12)
    assert point["normalized_gap"] == pytest.approx(1 - floor / np.log(100), rel=1e-12)
    assert point["rho"] == 0.5
    assert 0 < point["max_probability"] < 1


@pytest.mark.parametrize("flags", [("--vocab", "1"), ("--rho", "-1"), ("--rho", "nan"), ("--hidden", "x")])
def test_bad_sizes_end_in_one_line(tmp_path, flags):
    done = calsmooth(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert len(done.stderr.strip().splitlines()) == 1
    assert flags[0] in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_curves_go_through_the_points():
    curves = prepare_gap_curves((32_768, 256_000), (512, 2048), 0.3)
    assert np.all(np.diff(curves.gaps, axis=1) <= 0)  # a larger vocabulary leaves less of the range
    assert np.all(np.diff(curves.gaps, axis=0) >= 0)  # a larger hidden size more
    between = [np.interp(np.log(32_768), np.log(curves.grid), gaps) for gaps in curves.gaps]
    assert between == pytest.approx(curves.marks[:, 0], rel=1e-3)
    assert curves.marks[1, 1] == pytest.approx(normalized_entropy_gap(256_000, 2048, 0.3))


def window_extents(figure, ax):
    """The boxes of the texts inside an axes and of its markers, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = {text.get_text(): text.get_window_extent(renderer) for text in ax.texts if text.get_text()}
    markers = []
    for line in ax.get_lines():
        if line.get_marker() == "o":
            radius = line.get_markersize() / 2 * figure.dpi / 72
            for x, y in ax.transData.transform(np.column_stack(line.get_data())):
                markers.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
    return texts, markers


@pytest.mark.parametrize("rho", [0.1, 0.25, 0.3])
def test_no_two_names_or_dots_of_the_map_meet(rho):
    figure = plot_gap_curves(prepare_gap_curves((49_152,), (576,), rho))
    texts, markers = window_extents(figure, figure.axes[1])
    assert len(texts) == len(markers) == sum(len(family.members) for family in FAMILIES)
    for (one, box), (other, other_box) in itertools.combinations(texts.items(), 2):
        assert not box.overlaps(other_box), (one, other)
    for box, other_box in itertools.combinations(markers, 2):
        assert not box.overlaps(other_box)
    for words, box in texts.items():
        assert not any(box.overlaps(marker) for marker in markers), words


@pytest.mark.parametrize("vocab", [(32_768, 128_256, 256_000), (128_256, 151_936, 152_064, 256_000, 262_144)])
def test_names_of_vocabularies_are_level_and_apart(vocab):
    figure = plot_gap_curves(prepare_gap_curves(vocab, (576,), 0.25))
    left = figure.axes[0]
    texts, _ = window_extents(figure, left)
    assert len(texts) == len(vocab)
    assert all(text.get_rotation() == 0 for text in left.texts)
    for (one, box), (other, other_box) in itertools.combinations(texts.items(), 2):
        assert not box.overlaps(other_box), (one, other)
    edges = left.get_window_extent()
    assert all(box.x0 >= edges.x0 - 1 and box.x1 <= edges.x1 + 1 for box in texts.values())


@pytest.mark.parametrize("rho", [0.0, 1e-9, 0.25, 1e6])
def test_the_figure_names_its_rho(rho):
    figure = plot_gap_curves(prepare_gap_curves((2, 10**8), (1, 100_000), rho))
    assert f"{rho:g}" in figure.get_suptitle()
