"""Reliability diagrams and bars: the numbers without pixels, and that the drawing shows them, to every eye."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from calsmooth import metrics
from calsmooth.plots import (
    FEW,
    FORMATS,
    OVER,
    OVER_HATCH,
    RUN_STYLES,
    UNDER,
    UNDER_HATCH,
    BarGroup,
    draw_intervals,
    figure_bytes,
    new_figure,
    plot_bars,
    plot_reliability,
    plot_reliability_apart,
    plot_reliability_together,
    prepare_frame,
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


def tops(bars):
    return [bar.get_y() + bar.get_height() for bar in bars]


def test_bars_reach_accuracy_and_confidence(sample):
    panel = prepare_reliability(*sample)
    figure = plot_reliability([panel, panel])
    assert len(figure.axes) == 4
    filled = panel.bins.count > 0
    bars = [c for c in figure.axes[0].containers if c.get_label() == "over-confident"]
    bars += [c for c in figure.axes[0].containers if c.get_label() == "under-confident"]
    assert len(bars) == 4  # solid and faint
    reached = {}
    for container in bars:
        for bar, top in zip(container, tops(container), strict=True):
            reached[bar.get_x()] = max(top, reached.get(bar.get_x(), 0))
    expected = np.maximum(panel.bins.accuracy, panel.bins.confidence)[filled]
    assert [reached[left] for left in panel.bins.lower[filled]] == pytest.approx(expected)
    (shares,) = (patch for patch in figure.axes[2].patches if hasattr(patch, "get_data"))
    assert shares.get_data().values == pytest.approx(panel.bins.count / 500)
    assert f"ECE {panel.ece:.3f}" in figure.axes[0].get_title(loc="left")


def test_bins_with_few_answers_are_faint_and_have_wide_intervals():
    confidence = np.repeat([0.55, 0.95], [FEW - 1, 400])
    panel = prepare_reliability(confidence, np.ones(len(confidence)), bins=10)
    ax = plot_reliability([panel]).axes[0]
    alpha = {bar.get_x(): bar.get_alpha() for container in ax.containers[:1] + ax.containers[4:5] for bar in container}
    assert alpha[0.9] == 1.0
    assert alpha[0.5] < 0.5
    low, high = panel.accuracy_intervals()
    assert high[5] - low[5] > 5 * (high[9] - low[9])
    together = plot_reliability_together({"x": [panel]})
    (line,) = (line for line in together.axes[0].get_lines() if ":" in str(line.get_label()))
    assert line.get_xdata() == pytest.approx([0.95])  # the other bin isn't joined


def test_wilson_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 1), (1, 1), (3, 9), (50, 100), (399, 400)):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        low, high = metrics.wilson_interval(right / n, n)
        assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan(metrics.wilson_interval(np.nan, 0)).all()


def test_panels_have_equal_axes_and_near_chance_is_shown_larger(sample):
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.26, 0.5, 2000)
    chance = prepare_reliability(confidence, generator.random(2000) < 0.25)
    wide = prepare_reliability(*sample)
    axes = plot_reliability([chance, wide]).axes
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert axes[2].get_ylim() == axes[3].get_ylim()
    assert prepare_frame([wide]).confidence[1] == 1.0
    alone = plot_reliability([chance]).axes[0]
    low, high = alone.get_xlim()
    assert low <= confidence.min()
    assert high >= confidence.max()
    assert high - low < 0.6
    apart = plot_reliability_apart([chance, wide])
    assert len(apart) == 3
    assert apart[1].axes[0].get_xlim() == apart[2].axes[0].get_xlim()


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_the_legend_lies_inside_the_figure(sample, columns):
    confidence, correct = sample
    few = prepare_reliability([*confidence, 0.02], [*correct, 1])  # all marks occur
    figures = [plot_reliability([few] * columns), plot_reliability_apart([few])[0]]
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 7
        box, whole = legend.get_window_extent(renderer), figure.bbox
        assert box.x0 >= whole.x0
        assert box.x1 <= whole.x1
        assert box.y0 >= whole.y0
        assert box.y1 <= whole.y1


def test_tokens_have_their_unit_and_wider_intervals(sample):
    summary = metrics.summarize_top(*sample) | {"reliability": prepare_reliability(*sample).to_dict(), "rows": 40}
    reach = 2 * 1.96 * np.sqrt(summary["accuracy"] * (1 - summary["accuracy"]) / 500)
    summary["accuracy_interval"] = [summary["accuracy"] - reach, summary["accuracy"] + reach]
    panel = stored_reliability(summary)
    assert panel.size() == "n = 500 tokens of 40 rows"
    assert panel.design_effect == pytest.approx(4, rel=0.03)
    del summary["rows"]
    assert stored_reliability(summary).size() == "n = 500 questions"
    assert stored_reliability(summary).design_effect == 1


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
    upper, lower = plot_reliability([panel]).axes
    title = f"x\nECE {panel.ece:.3f} (0.100 to 0.200), accuracy {panel.accuracy:.3f}"
    assert upper.get_title(loc="left") == title
    assert lower.get_title(loc="left") == "n = 500 questions"


def test_panels_are_laid_out_in_rows_and_none_leaves_a_gap(sample):
    panel = prepare_reliability(*sample, title="x")
    figure = plot_reliability([panel, None, panel], columns=2)
    assert [ax.axison for ax in figure.axes] == [True, False, True, False, True, False, True, False]
    titled = [i for i, ax in enumerate(figure.axes) if ax.get_title(loc="left").startswith("x")]
    assert titled == [0, 4]  # two columns, each panel with its shares a row below


def test_runs_together_are_told_apart(sample):
    confidence, correct = sample
    runs = [prepare_reliability(confidence, correct, title="a"), prepare_reliability(confidence, ~correct, title="b")]
    figure = plot_reliability_together({"one": runs, "two": runs[:1]})
    lines = [line for line in figure.axes[0].get_lines() if ":" in str(line.get_label())]
    assert [line.get_label().split(":")[0] for line in lines] == ["a", "b"]
    for get in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(lines[0], get)() != getattr(lines[1], get)()
    many = runs[1].bins.count >= FEW
    assert lines[1].get_ydata() == pytest.approx(runs[1].bins.accuracy[many])
    assert figure.axes[1].get_legend().get_title().get_text() == "two"


def test_bars_reach_their_values_and_intervals():
    group = BarGroup("ECE", np.array([[0.1], [0.2]]), np.array([[0.08], [np.nan]]), np.array([[0.15], [np.nan]]))
    ax = plot_bars([group], ["a", "b"], ["t"]).axes[0]
    first, _, errors, second, *_ = ax.containers
    assert [bar.get_width() for bar in (*first, *second)] == [0.1, 0.2]
    (whisker,) = errors.lines[2]
    assert whisker.get_segments()[0][:, 0] == pytest.approx([0.08, 0.15])


def test_an_interval_that_misses_its_value_is_drawn_where_it_is():
    # The percentile interval of an ECE can lie wholly above it.
    group = BarGroup("ECE", np.array([[0.02]]), np.array([[0.03]]), np.array([[0.05]]))
    ax = plot_bars([group], ["a"], ["t"]).axes[0]
    (whisker,) = ax.containers[2].lines[2]
    assert whisker.get_segments()[0][:, 0] == pytest.approx([0.03, 0.05])
    _, (upright,) = new_figure()
    draw_intervals(upright, [1.0, 2.0], [0.1, np.nan], [0.2, 0.3])
    (whisker,) = upright.containers[0].lines[2]
    assert len(whisker.get_segments()) == 1
    assert whisker.get_segments()[0] == pytest.approx(np.array([[1.0, 0.1], [1.0, 0.2]]))


def test_errors_share_an_axis_and_what_is_missing_is_said():
    nothing = np.full((1, 2), np.nan)
    groups = [
        BarGroup("Accuracy", np.array([[0.9, 0.8]]), nothing, nothing, "accuracy"),
        BarGroup("ECE", np.array([[0.3, 0.1]]), np.array([[0.2, 0.05]]), np.array([[0.4, 0.15]]), "error"),
        BarGroup("SCE", np.array([[0.1, np.nan]]), nothing, nothing, "error"),
    ]
    accuracy, ece, sce = plot_bars(groups, ["a"], ["one", "two"]).axes
    assert ece.get_xlim() == sce.get_xlim() != accuracy.get_xlim()
    assert sce.get_title(loc="left") == "SCE (no interval)"
    assert ece.get_title(loc="left") == "ECE"
    assert [text.get_text() for text in sce.texts] == ["not measured"]


# --- colors ----------------------------------------------------------------------------------------------------------

# Linear RGB as seen with full protanopia and deuteranopia: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def cielab(color, sight):
    """L*, a*, b* (D65) of a color such as #0072b2, as it looks with this sight."""
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHT[sight] @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ seen / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def least_distance(colors, sight):
    return min(np.linalg.norm(cielab(a, sight) - cielab(b, sight)) for a, b in itertools.combinations(colors, 2))


def least_lightness_difference(colors):
    return min(abs(cielab(a, "full")[0] - cielab(b, "full")[0]) for a, b in itertools.combinations(colors, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_colors_differ_to_every_eye(sight):
    colors = [style.color for style in RUN_STYLES]
    assert least_distance([OVER, UNDER], sight) > 60
    assert least_distance(colors[:4], sight) > 20
    assert least_distance(colors, sight) > 15


def test_colors_differ_in_grey_print():
    assert least_lightness_difference([OVER, UNDER]) > 20
    assert least_lightness_difference([style.color for style in RUN_STYLES[:4]]) > 10


def test_color_is_never_the_only_difference():
    assert OVER_HATCH != UNDER_HATCH
    for part in ("color", "marker", "line", "hatch"):
        assert len({str(getattr(style, part)) for style in RUN_STYLES}) == len(RUN_STYLES)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_same_figure_gives_the_same_bytes(sample):
    one, two = (figure_bytes(plot_reliability([prepare_reliability(*sample)]), "svg") for _ in range(2))
    assert one == two


def test_one_point_can_be_drawn(tmp_path):
    paths = save_figure(plot_reliability([prepare_reliability([1.0], [1])]), tmp_path / "one", dpi=40)
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_saved_in_every_format(tmp_path):
    figure, axes = new_figure(rows=2, columns=2, height_ratios=[2, 1])
    assert len(axes) == 4
    paths = save_figure(figure, tmp_path / "beta0.1", dpi=40)
    assert (
        [path.name for path in paths]
        == [f"beta0.1.{format}" for format in FORMATS]
        == sorted((path.name for path in tmp_path.iterdir()), key=lambda name: FORMATS.index(name.rsplit(".")[-1]))
    )
    png, svg, pdf = (path.read_bytes() for path in paths)
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf  # publishers refuse such fonts
    with pytest.raises(ValueError, match="without the suffix"):
        save_figure(figure, tmp_path / "one.png")
