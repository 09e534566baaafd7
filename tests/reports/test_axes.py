"""Numbers on axes, smoothing, lines and bands: what a reader sees is what was logged."""

import numpy as np
import pytest

from flashmhf.reports.heads import SHARES, draw_map, limits
from flashmhf.reports.lines import Frame, Line, Trace, common_grid, draw_lines, known
from flashmhf.reports.quantities import Chart, Quantity, by_step, losses_against, settled
from flashmhf.reports.smoothing import MIN_POINTS, outline, smoothed
from flashmhf.reports.style import BLUE, GREEN, legend_below, new_axes
from flashmhf.reports.ticks import logarithmic, plain_number, sizes, time_unit


def trace(values, seconds_per_step=0.5, tokens_per_step=64.0, first=1) -> Trace:
    steps = tuple(float(step) for step in range(first, first + len(values)))
    return Trace(
        values=tuple(map(float, values)),
        steps=steps,
        elapsed_s=tuple(step * seconds_per_step for step in steps),
        tokens=tuple(step * tokens_per_step for step in steps),
    )


def tick_labels(axis) -> list[str]:
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1.get_text()
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high and tick.label1.get_text()
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (4e-4, "0.0004"), (1e-8, "0.00000001"), (0.1 + 0.2, "0.3"), (5.5, "5.5"), (1500, "1,500"),
        (12345, "12,345"), (50_000, "50k"), (2_500_000, "2.5M"), (7e9, "7B"), (-0.25, "-0.25"), (-0.0, "0"),
    ],
)  # fmt: skip
def test_numbers_are_plain(value, expected):
    assert plain_number(value) == expected


@pytest.mark.parametrize("low", [0.0, 1e-7, 0.99995, 1e6, 123_456.7])
@pytest.mark.parametrize("span", [1e-6, 1e-3, 1.0, 1e5])
def test_linear_axes_have_neither_powers_nor_offsets_and_equal_decimals(low, span):
    _, axes = new_axes("x", "y")
    axes.plot([low, low + span], [low, low + span])
    for axis in (axes.xaxis, axes.yaxis):
        labels = [label for label in tick_labels(axis) if label != "0"]
        assert len(labels) >= 2
        assert not any(letter in label for label in labels for letter in "e$")
        assert axis.get_offset_text().get_text() == ""
        assert len({len(label.rstrip("kMB").partition(".")[2]) for label in labels}) == 1


@pytest.mark.parametrize(("low", "high"), [(80, 100), (1, 3), (0.5, 40), (20, 4000), (1, 1e7)])
def test_logarithmic_axes_have_plain_numbers(low, high):
    _, axes = new_axes("x", "y")
    axes.plot([low, high], [low, high])
    for which in ("x", "y"):
        logarithmic(axes, which)
    for axis in (axes.xaxis, axes.yaxis):
        labels = tick_labels(axis)
        assert 2 <= len(labels) <= 12, labels
        assert not any(letter in label for label in labels for letter in "e$^")


def test_an_axis_of_sizes_has_a_tick_at_each():
    _, axes = new_axes("tokens", "y")
    axes.plot([512, 1024, 16384], [1, 2, 3])
    sizes(axes, {512.0, 1024.0, 16384.0})
    assert tick_labels(axes.xaxis) == ["512", "1k", "16k"]


@pytest.mark.parametrize(("seconds", "unit"), [(20, "seconds"), (600, "minutes"), (20_000, "hours")])
def test_units_of_time(seconds, unit):
    assert time_unit(seconds)[1] == unit


def test_a_smoothed_curve_starts_where_the_raw_one_does_and_does_not_lag():
    raw = 8 - np.arange(400) / 50
    curve = smoothed(raw)
    assert curve[0] == raw[0]
    inside = slice(0, -20)
    assert np.allclose(curve[inside], raw[inside])  # a straight line stays, which one that lags would not
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise)[50:].std() < 0.4
    assert smoothed(noise)[-1] == pytest.approx(noise[-11:].mean())
    assert list(smoothed(raw[: MIN_POINTS - 1])) == list(raw[: MIN_POINTS - 1])


def test_long_lines_keep_both_ends_and_every_spike():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 50_000]] = 99, -99
    kept = outline(values, 600)
    assert len(kept) <= 600
    assert {0, 777, 50_000, 99_999} <= set(kept)
    assert list(outline(values[:10], 600)) == list(range(10))


def test_a_spike_does_not_set_the_scale_of_the_later_part():
    values = np.full(400, 5.0) + np.arange(400) / 1000
    values[300] = 900
    lines = [Line(name="a", traces=(trace(values),), colour=BLUE)]
    assert draw_lines(lines, "steps", Frame(label="loss")).axes[0].get_ylim()[1] > 900
    assert draw_lines(lines, "steps", Frame(label="loss", whole=False)).axes[0].get_ylim()[1] < 6


def test_one_run_is_drawn_raw_and_smoothed_from_the_same_point():
    values = 5 - np.arange(200) / 100 + np.random.default_rng(0).normal(size=200) / 10
    figure = draw_lines([Line(name="run", traces=(trace(values),), colour=BLUE)], "steps", Frame(label="loss"))
    raw, curve = figure.axes[0].get_lines()
    assert (raw.get_xdata()[0], raw.get_ydata()[0]) == (curve.get_xdata()[0], curve.get_ydata()[0]) == (1.0, values[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run"]


@pytest.mark.parametrize("against", ["steps", "tokens", "time"])
def test_seeds_are_a_mean_with_a_band(against):
    line = Line(name="swiglu", traces=(trace([5, 4, 3]), trace([6, 5, 4]), trace([7, 6, 5])), colour=BLUE)
    figure = draw_lines([line], against, Frame(label="loss"))
    (axes,) = figure.axes
    (mean,) = axes.get_lines()
    assert list(mean.get_ydata()) == [6, 5, 4]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (3, 7)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["swiglu, 3 seeds"]
    assert list(mean.get_xdata()) == {"steps": [1, 2, 3], "tokens": [64, 128, 192], "time": [0.5, 1, 1.5]}[against]


def test_seeds_of_different_speed_share_the_range_of_both():
    grid = common_grid([np.array([1.0, 2.0, 3.0]), np.array([1.5, 3.0, 4.5])])
    assert (grid[0], grid[-1]) == (1.5, 3.0)
    assert len(common_grid([np.array([1.0, 2.0]), np.array([3.0, 4.0])])) == 0
    apart = Line(name="a", traces=(trace([5, 4]), trace([5, 4], first=9)), colour=BLUE)
    assert len(draw_lines([apart], "steps", Frame(label="loss")).axes[0].get_lines()) == 2


def test_tokens_are_an_axis_if_all_runs_logged_them():
    one, other = trace([1, 2]), Trace(values=(1.0,), steps=(1.0,), elapsed_s=(1.0,))
    assert known([Line(name="a", traces=(one,), colour=BLUE)]) == ["steps", "tokens", "time"]
    assert known([Line(name="a", traces=(one, other), colour=BLUE)]) == ["steps", "time"]


def test_what_does_not_change_is_not_drawn():
    memory = Quantity(name="memory_mib", label="MiB", caption="Memory")

    def drawn(*values):
        return by_step(memory, [Line(name="", traces=(trace(values),), colour=BLUE, smooth=False)])

    assert drawn(890, 896, 897) is None
    assert drawn(0, 0) is None
    figure, _ = drawn(500, 896, 897)
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert high > 900  # the line is not on the frame
    assert figure.legends == []


@pytest.mark.parametrize("names", [("a",), ("swiglu, 3 seeds", "flashmhf, 3 seeds"), ("x" * 80,), tuple("abcdefghi")])
def test_legends_are_below_the_data_and_inside_the_figure(names):
    figure, axes = new_axes("x", "y")
    for number, name in enumerate(names):
        axes.plot([0, 1], [number, number + 1], color=GREEN, label=name)
    height = figure.get_figheight()
    legend_below(figure)
    assert figure.get_figheight() > height
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.y1 <= axes.get_tightbbox().y0 + 1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height > 0.5 * figure.bbox.height


def test_maps_have_colours_of_fixed_meaning():
    for name in SHARES:
        assert limits(name, np.array([0.4, 0.6])) == (0, 1)
    for values, top in (
        ([0.63, 0.68], 1),
        ([1.99, 2.03], 5),
        ([3.0, 7.0], 10),
        ([0.0, 0.0], 1),
        ([np.nan, 0.02], 0.02),
    ):
        assert limits("score_rms", np.array(values)) == (0, pytest.approx(top))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 2), (24, 16), (3, 40)])
def test_maps_number_layers_and_heads(layers, heads):
    _, axes = new_axes("x", "y")
    draw_map(axes, np.full((layers, heads), 0.5), "gate entropy", limits=(0.0, 1.0))
    for axis, number in ((axes.yaxis, layers), (axes.xaxis, heads)):
        labels = tick_labels(axis)
        assert labels[0] == "0"
        assert len(labels) <= 10
        assert all(label.isdecimal() and int(label) < number for label in labels)
    assert len(axes.texts) == (layers * heads if layers * heads <= 64 else 0)


def test_a_second_figure_leaves_out_where_losses_fall():
    chart = Chart(lines=[Line(name="a", traces=(trace(range(100, 0, -1)),), colour=BLUE)], name="Loss")
    (later,) = settled(chart)
    assert later.note == " from step 11 on"
    assert later.lines[0].traces[0].steps[0] == 11
    assert {what: len(figures) for what, figures in losses_against([chart, later]).items()} == {
        "steps": 2,
        "tokens": 2,
        "time": 2,
    }
    assert settled(Chart(lines=[Line(name="a", traces=(trace([1, 2]),), colour=BLUE)], name="Loss")) == []
