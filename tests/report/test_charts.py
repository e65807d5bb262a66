from __future__ import annotations

import json
import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvlm.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    dumbbell,
    line_chart,
    number,
    shares,
)


def drawn(chart: Chart) -> tuple[ElementTree.Element, dict]:
    root = ElementTree.fromstring(str(line_chart(chart)))
    return root, json.loads(root.attrib["data-chart"])


def ticks(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter("text") if text.attrib.get("text-anchor") == "end"]


def chart(*ys: float | None, **more: object) -> Chart:
    return Chart("Reward", (Line("reward", tuple(float(i) for i in range(1, len(ys) + 1)), ys),), **more)  # type: ignore[arg-type]


def test_points_lie_where_the_axes_say() -> None:
    root, data = drawn(chart(0.0, 0.5, 1.0))
    assert ticks(root) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    assert data["lines"][0]["points"] == [
        [1.0, 0.0, LEFT, bottom],
        [2.0, 0.5, (LEFT + WIDTH - RIGHT) / 2, middle],
        [3.0, 1.0, WIDTH - RIGHT, TOP],
    ]
    path = next(p for p in root.iter("path"))
    assert (
        path.attrib["d"]
        == f"M{LEFT:.1f} {bottom:.1f}L{(LEFT + WIDTH - RIGHT) / 2:.1f} {middle:.1f}L{WIDTH - RIGHT:.1f} {TOP:.1f}"
    )


def test_log_axis_has_decades_of_equal_height() -> None:
    root, data = drawn(chart(1e-6, 1e-5, 1e-4, 0.0, log=True, level=("limit", 1e-3)))
    assert ticks(root)[:4] == ["10−6", "10−5", "10−4", "10−3"]
    heights = [point[3] for point in data["lines"][0]["points"]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert heights[3] == HEIGHT - BOTTOM  # a parity of exactly 0 lies on the floor
    level = next(line for line in root.iter("line") if line.attrib["class"] == "level")
    assert float(level.attrib["y1"]) == TOP


def test_a_gap_lifts_the_pen_and_a_lone_point_is_seen() -> None:
    root, _ = drawn(chart(1.0, 2.0, None, 3.0, None, 4.0, 5.0))
    assert next(root.iter("path")).attrib["d"].count("M") == 3
    assert len(list(root.iter("circle"))) == 1


def test_one_iteration_is_a_chart_too() -> None:
    root, data = drawn(chart(0.5))
    assert len(list(root.iter("circle"))) == 1
    assert LEFT < data["lines"][0]["points"][0][2] < WIDTH - RIGHT


def test_band_is_drawn_around_the_line() -> None:
    root, data = drawn(chart(0.5, 0.5, band=(0.5, 0.25), floor=0.0, ceiling=1.0))
    corners = [tuple(map(float, c.split(","))) for c in next(root.iter("polygon")).attrib["points"].split()]
    centre = data["lines"][0]["points"][0][3]
    assert [c[1] for c in corners] == pytest.approx(
        [HEIGHT - BOTTOM, centre + (centre - TOP) / 2, centre - (centre - TOP) / 2, TOP]
    )


def test_thinning_keeps_every_peak() -> None:
    ys = [math.sin(i / 50) for i in range(5000)]
    ys[1234], ys[4321] = 9.0, -9.0
    _, data = drawn(chart(*ys))
    points = data["lines"][0]["points"]
    assert len(points) <= 420
    assert {9.0, -9.0} <= {p[1] for p in points}
    assert [p[0] for p in points] == sorted(p[0] for p in points)


FINITE = st.floats(-1e9, 1e9) | st.none()


@given(
    st.lists(FINITE, min_size=1, max_size=30).filter(lambda ys: any(y is not None for y in ys)),
    st.booleans(),
    st.booleans(),
)
def test_every_curve_stays_inside_its_frame(ys: list[float | None], log: bool, percent: bool) -> None:
    root, data = drawn(chart(*ys, log=log, percent=percent))
    for _, _, x, y in data["lines"][0]["points"]:
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    assert 2 <= len(ticks(root)) <= 8
    assert len(set(ticks(root))) == len(ticks(root))


def test_names_are_escaped() -> None:
    text = str(line_chart(Chart("<b>", (Line('"><script>', (1.0, 2.0), (0.1, 0.2)),), mark=("<i>", 1.0))))
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text
    assert '"><script>' in json.loads(unescape(re.search(r'data-chart="([^"]*)"', text)[1]))["lines"][0]["name"]  # type: ignore[index]


def test_dumbbell_places_both_shares() -> None:
    root = ElementTree.fromstring(str(dumbbell(0.25, 0.75)))
    assert [float(c.attrib["cx"]) for c in root.iter("circle")] == [7 + 34, 7 + 102]
    assert len(list(ElementTree.fromstring(str(dumbbell(None, 0.5))).iter("circle"))) == 1


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (None, False, "–"),
        (0.4567, True, "45.7%"),
        (0.0, False, "0"),
        (1.0, False, "1"),
        (0.00354, False, "0.00354"),
        (1.94e-5, False, "1.9e−5"),
        (-0.5, False, "−0.500"),
        (17.24, False, "17.2"),
        (83211.0, False, "83,211"),
        (1234.56, False, "1,235"),
    ],
)
def test_number(value: float | None, percent: bool, text: str) -> None:
    assert number(value, percent) == text


def test_shares_leave_out_what_took_no_time() -> None:
    assert shares([("sft", 30.0), ("reward", 0.0), ("rollout", 10.0)]) == [("sft", 30.0, 0.75), ("rollout", 10.0, 0.25)]
