"""Figures as SVG: well-formed whatever they hold, data where they belong, round ticks, labels that hide nothing."""
import re
import xml.etree.ElementTree as ElementTree
from math import nan

import numpy as np
import pytest

from stats.plots import Frame, apart, bars, beside, extent, lines, log_ticks, overlap, scatter, size, ticks

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><b>&\"' \ud83d \x00 😀 \u202emalo"


def elements(svg, tag, kind=None):
    """The elements of an SVG with a tag, and a class if one is given."""
    root = ElementTree.fromstring(svg)
    return [each for each in root.iter(SVG + tag) if kind is None or kind in each.get("class", "").split()]


def texts(svg):
    """{text: (x, y)} of an SVG."""
    return {each.text: (float(each.get("x")), float(each.get("y"))) for each in elements(svg, "text")}


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d"))]


def figures(name="a", values=(1., 2., 3.)):
    """One of each kind, with this name and these numbers."""
    x = np.arange(len(values))
    pairs = {f"{name}{i}": (value, .5) for i, value in enumerate(values)}
    places = {key: (value, value, .5, (value - 1, value + 1)) for key, (value, _) in pairs.items()}
    return {"lines": lines({name: (x, values, values, values), "b": (x, x)}, name, name, name),
            "bars": bars(pairs, name, name, references={name: 1}),
            "scatter": scatter(places, name, name, name, kinds=dict.fromkeys(places, name), references={name: 2})}


@pytest.mark.parametrize("kind", ["lines", "bars", "scatter"])
@pytest.mark.parametrize("values", [(1., 2., 3.), (nan, 2., nan), (nan, nan), (), (5.,), (0., 0.), (-1e9, 1e9)])
def test_figures_are_well_formed_whatever_they_hold(kind, values):
    for name in ("a", HOSTILE):
        svg = figures(name, values)[kind]
        root = ElementTree.fromstring(svg)
        svg.encode()
        assert root.get("viewBox") and root.get("role") == "img" and root.get("aria-label") == root[0].text
        assert {each.tag for each in root.iter()} <= {SVG + tag for tag in ("svg", "title", "style", "text", "path")}
        for path in elements(svg, "path"):
            assert "nan" not in path.get("d") and "inf" not in path.get("d")


def test_a_line_goes_where_its_numbers_say():
    svg = lines({"a": ([0, 5, 10], [0, 10, 5]), "b": ([0, 10], [10, 0])}, "t", "x", "y")
    grid = {text: place for text, place in texts(svg).items() if text in ("0", "2", "4", "6", "8", "10")}
    (_, y0), (_, y10) = ([(float(e.get("x")), float(e.get("y"))) for e in elements(svg, "text", "end")
                          if e.text == tick][0] for tick in ("0", "10"))
    x0, x10 = ([float(e.get("x")) for e in elements(svg, "text", "mid") if e.text == tick][0] for tick in ("0", "10"))
    assert grid and y10 < y0 and x0 < x10
    path, = [each for each in elements(svg, "path") if "--c0);stroke-dasharray" in each.get("style", "")
             and len(points(each)) == 3]
    level = {0: y0 - 4.5, 10: y10 - 4.5, 5: (y0 + y10) / 2 - 4.5}
    for (x, y), (px, py) in zip([(0, 0), (5, 10), (10, 5)], points(path)):
        assert px == pytest.approx(x0 + (x10 - x0) * x / 10, abs=.11) and py == pytest.approx(level[y], abs=.11)


def test_equal_factors_are_equal_steps_on_a_logarithmic_axis():
    svg = lines({"": ([1, 4, 16, 64], [0, 1, 2, 3])}, "t", "n", "y", log_x=True)
    places = {each.text: float(each.get("x")) for each in elements(svg, "text", "mid")}
    assert list(places) == ["1", "4", "16", "64"]
    assert np.diff(list(places.values())) == pytest.approx([places["4"] - places["1"]] * 3, abs=.11)


def test_a_line_has_a_gap_where_a_number_is_not_finite():
    svg = lines({"a": (range(5), [1, 2, nan, 3, 4])}, "t", "x", "y")
    path, = [each for each in elements(svg, "path") if "stroke-dasharray" in each.get("style", "")]
    assert re.findall("[ML]", path.get("d")) == ["M", "L", "M", "L"]


def test_bars_start_at_zero_the_largest_first_with_whiskers_of_the_error():
    svg = bars({"small": (10, 2), "large": (40, None), "odd": (20, (15, 30))}, "t", "x")
    names = [each for each in elements(svg, "text", "end") if each.text in ("small", "large", "odd")]
    assert [each.text for each in sorted(names, key=lambda each: float(each.get("y")))] == ["large", "odd", "small"]
    ticks_at = {float(each.text): float(each.get("x")) for each in elements(svg, "text", "mid")}
    scale = (ticks_at[20] - ticks_at[0]) / 20
    bodies = [re.match(r"M([\d.]+) [\d.]+H([\d.]+)", each.get("d")) for each in elements(svg, "path")]
    found = [(float(each[1]), float(each[2])) for each in bodies if each]
    assert [start for start, _ in found] == [ticks_at[0]] * 3
    assert [(end - start) / scale for start, end in found] == pytest.approx([40, 20, 10], abs=.1)
    level = [points(each) for each in elements(svg, "path", "thin")]
    spans = [((a - ticks_at[0]) / scale, (b - ticks_at[0]) / scale) for (a, y), (b, z) in level if y == z]
    assert spans == [pytest.approx((15, 30), abs=.1), pytest.approx((8, 12), abs=.1)]
    assert {"10.0 ± 2.0", "40.0", "20.0 (15.0 to 30.0)"} <= texts(svg).keys()


@pytest.mark.parametrize("error", [nan, (nan, 3.), (1., float("inf"))])
def test_an_error_that_is_not_finite_is_none(error):
    assert bars({"a": (2., error), "b": (1., 1.)}, "t", "x") == bars({"a": (2., None), "b": (1., 1.)}, "t", "x")
    points = {"a": (1., 1., error, error), "b": (1.1, 1.)}
    assert scatter(points, "t", "x", "y") == scatter({**points, "a": (1., 1.)}, "t", "x", "y")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 100), (-.02, .37), (3.2e-5, 9e-4), (-12345, 98765), (48.3, 50.2)])
@pytest.mark.parametrize("most", [2, 4, 6])
def test_ticks_are_round_and_inside(low, high, most):
    found = ticks(low, high, most)
    assert len(found) <= most and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    for tick in found:
        assert len(f"{abs(tick):.10e}".partition("e")[0].rstrip("0").replace(".", "")) <= 3
    if len(found) > 1:
        step = np.diff(found)
        assert step == pytest.approx(step[0]) and f"{step[0]:.6e}"[0] in "125"


def test_ticks_by_hand():
    assert ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 41, 3) == [0, 20, 40] and ticks(0, 41, 2) == [0]
    assert ticks(.08, .52, 6) == [.1, .2, .3, .4, .5]
    assert log_ticks([250, 500, 1000, 2000]) == [250, 500, 1000, 2000]
    assert log_ticks(range(1, 1025), 6) == [1, 4, 16, 64, 256, 1024]
    assert log_ticks(np.linspace(9, 46.3, 18), 6) == [10, 20, 30, 40]
    assert log_ticks(np.linspace(1e-4, .1, 50), 6) == [1e-4, 1e-3, 1e-2, 1e-1]


def test_an_axis_has_room_around_its_data_and_never_no_length():
    assert extent([[0, 10], [nan]], .05) == (-.5, 10.5)
    for values in ([], [[nan]], [[7, 7]], [[0]]):
        low, high = extent(values)
        assert low < high


def test_labels_are_pushed_apart_no_further_than_needed():
    assert apart([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert apart([50, 50, 48], 10, 0, 100) == [58, 68, 48]
    assert apart([99, 98, 97], 10, 0, 100) == [100, 90, 80]
    svg = lines({f"line {i}": ([0, 1], [0, 5 + i / 100]) for i in range(8)}, "t", "x", "y")
    places = sorted(y for text, (_, y) in texts(svg).items() if text.startswith("line "))
    assert min(np.diff(places)) >= 16.9


def boxes(svg, names):
    return [(x, y - 11, x + size(text), y + 2) for text, (x, y) in texts(svg).items() if text in names]


@pytest.mark.parametrize("seed", range(5))
def test_names_in_a_scatter_plot_hide_neither_each_other_nor_a_point(seed):
    r = np.random.default_rng(seed)
    points = {f"method_{i}": (*(r.normal(size=2) * 5 + 50), .5, .5) for i in range(12)}
    svg = scatter(points, "t", "x", "y")
    found = boxes(svg, points)
    marks = [re.match(r"M([\d.]+) ([\d.]+)a", each.get("d")) for each in elements(svg, "path")]
    marks = [(float(m[1]), float(m[2]) - 4.5, float(m[1]) + 9, float(m[2]) + 4.5) for m in marks if m]
    assert len(found) == len(marks) == 12
    for i, box in enumerate(found):
        assert not any(overlap(box, other) for other in (*found[:i], *marks))
        assert box[0] >= 0 and box[2] <= 440


def test_long_names_and_all_labels_stay_in_the_figure():
    long = "a" * 60
    for svg in figures(long).values():
        width, height = map(float, ElementTree.fromstring(svg).get("viewBox").split()[2:])
        for each in elements(svg, "text"):
            x, y, wide = float(each.get("x")), float(each.get("y")), size(each.text)
            kind = each.get("class")
            left = x - (wide if "end" in kind else wide / 2 if "mid" in kind else 0)
            assert "head" in kind or "faint" in kind or -1 <= left and left + wide <= width + 1, (each.text, kind)
            assert 0 < y <= height


def test_series_differ_in_more_than_their_color():
    svg = lines({f"line {i}": ([0, 1], [i, i]) for i in range(12)}, "t", "x", "y")
    looks = {each.get("style") for each in elements(svg, "path") if "dasharray" in each.get("style", "")}
    assert len(looks) == 12


def test_colors_follow_light_and_dark_and_no_figure_asks_for_anything():
    svg = figures()["lines"]
    assert "prefers-color-scheme:dark" in svg and not re.search(r"url\(|href|@import|<script", svg)


def test_whole_numbers_have_whole_ticks():
    svg = lines({"": ([0, 1, 2, 3], [.1, .2, .3, .4])}, "t", "step", "y")
    assert [each.text for each in elements(svg, "text", "mid")] == ["0", "1", "2", "3"]


def test_ticks_of_a_logarithmic_axis_do_not_run_into_each_other():
    n = np.array([25, 50, 100, 200, 400, 500])
    svg = lines({"a": (n, n / 500)}, "t", "prompts", "y", log_x=True)
    places = [float(each.get("x")) for each in elements(svg, "text", "mid")]
    assert len(places) == 5 and min(np.diff(places)) > size("400")


def test_the_line_of_a_name_ends_at_the_name():
    """Also where the name has to move, because the figure ends: the best place is up and to the right of the mark."""
    frame = Frame((0, 0, 400, 400), (0, 1), (0, 1))
    marks = {"o": (300, 118), "p": (220, 134), "a_rather_long_name": (390, 200)}
    drawn = "".join(beside(marks, [(0, 142, 400, 400)], frame))
    (x, y, left, base), = re.findall(r'L(\S+) (\S+)" class="thin"[^>]*/><text x="(\S+)" y="(\S+)"[^>]*>a_rather', drawn)
    left, base = float(left), float(base)
    assert left + size("a_rather_long_name") == pytest.approx(400, abs=3)
    assert left - 3 <= float(x) <= 403 and base - 19 <= float(y) <= base + 3
