"""Boxes, points and polygons, against areas in exact fractions, and matchings against all permutations."""

from __future__ import annotations

import itertools
import json
import math
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rlvlm_rewards import Failure, InvalidReward, Sample, load_reward

from tests.rewards.visual.scoring import judge, value

Box = tuple[int, int, int, int]
SPANS = st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted)
BOXES = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), SPANS, SPANS)
POINTS = st.tuples(st.integers(0, 1000), st.integers(0, 1000))


def iou(one: Box, other: Box) -> Fraction:
    """By counting unit squares."""
    squares, others = ({(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (one, other))
    return Fraction(len(squares & others), len(squares | others))


def best(likeness: list[list[float]]) -> float:
    """The largest sum over all one-to-one assignments, tried one by one."""
    if len(likeness) > len(likeness[0]):
        likeness = [list(column) for column in zip(*likeness, strict=True)]
    ways = itertools.permutations(range(len(likeness[0])), len(likeness))
    return max(sum(row[column] for row, column in zip(likeness, way, strict=True)) for way in ways)


def f1(likeness: list[list[float]]) -> float:
    return 2 * best(likeness) / (len(likeness) + len(likeness[0]))


def boxes(*all_of_them: Any) -> str:
    return json.dumps(all_of_them)


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(BOXES, min_size=1, max_size=4, unique=True),
    wanted=st.lists(BOXES, min_size=1, max_size=4, unique=True),
)
def test_grounding_is_f1_of_the_best_matching(found: list[Box], wanted: list[Box]) -> None:
    expected = f1([[float(iou(one, other)) for other in wanted] for one in found])
    for answer, reference in ((found, wanted), (wanted, found)):  # and symmetric
        got = value("grounding", json.dumps(answer), json.dumps(reference), coordinates="thousandths")
        assert got == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(POINTS, min_size=1, max_size=4, unique=True),
    wanted=st.lists(POINTS, min_size=1, max_size=4, unique=True),
    sigma=st.floats(1, 500),
)
def test_points_are_f1_of_the_best_matching(
    found: list[tuple[int, int]], wanted: list[tuple[int, int]], sigma: float
) -> None:
    expected = f1([[math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2)) for b in wanted] for a in found])
    for answer, reference in ((found, wanted), (wanted, found)):
        got = value("points", json.dumps(answer), json.dumps(reference), coordinates="thousandths", sigma=sigma)
        assert got == pytest.approx(expected, abs=1e-9)


def test_greedy_matching_would_give_less() -> None:
    # Greedy pairs x 1 to 11 with 0 to 10, at 9/11, and is left with 3/14. The best is 7/13 + 7/10.
    found, wanted = boxes([1, 0, 11, 5], [0, 0, 7, 5]), boxes([0, 0, 10, 5], [4, 0, 14, 5])
    assert value("grounding", found, wanted, coordinates="pixels") == pytest.approx((7 / 13 + 7 / 10) / 2)


def test_parts_are_precision_and_recall() -> None:
    score = judge(
        "grounding", boxes([0, 0, 1, 1], [5, 5, 6, 6], [8, 8, 9, 9]), boxes([0, 0, 1, 1]), coordinates="pixels"
    )
    assert score.value == pytest.approx(0.5)
    assert score.parts == {"precision": pytest.approx(1 / 3), "recall": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        "[[10, 20, 30, 40]]",
        "[10, 20, 30, 40]",
        "[[10.0, 2e1, 30, 40]]",
        "[[[10, 20], [30, 40]]]",
        '{"bbox_2d": [10, 20, 30, 40]}',
        '[{"bbox": [10, 20, 30, 40], "label": "dog"}]',
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]\n```',
        "Here it is:\n```\n[[10, 20, 30, 40]]\n```\nThere.",
        "it is there</think>\\boxed{[[10, 20, 30, 40]]}",
        'so</think>\\boxed{{"bbox_2d": [10, 20, 30, 40]}}',
    ],
)
def test_forms_of_a_box(answer: str) -> None:
    assert value("grounding", answer, "[[10, 20, 30, 40]]", coordinates="pixels") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "{}",
        "null",
        "10, 20, 30, 40",
        "[[10, 20, 30, 40]], or else [[1, 2, 3, 4]]",
        "one of [[10, 20, 30, 40]]",
        "```\n[[10, 20, 30, 40]]\n``` or ```\n[[1, 2, 3, 4]]\n```",
        '["[10, 20, 30, 40]"]',
        '[["10", "20", "30", "40"]]',
        "[[true, 20, 30, 40]]",
        "[[10, 20, 30]]",
        "[[10, 20, 30, 40, 50]]",
        "[[10, 20, 30], [40]]",
        "[[30, 40, 10, 20]]",
        "[[30, 20, 10, 40]]",
        "[[10, 20, 10, 40]]",
        "[[10, 20, 30, 1001]]",
        "[[-1, 20, 30, 40]]",
        "[[NaN, 20, 30, 40]]",
        "[[10, 20, 30, Infinity]]",
        "[[10, 20, 30, 1e999]]",
        "[[10, 20, 30, 1" + "0" * 400 + "]]",
        "[[10, 20, 30, 1" + "0" * 5000 + "]]",
        "[" * 100_000,
        "[" * 600 + "]" * 600,
        '{"bbox_2d": {"bbox_2d": [10, 20, 30, 40]}}',
        '{"bbox_2d": [10, 20, 30, 40], "label": ["dog"]}',
    ],
)
def test_what_is_no_box_earns_nothing(answer: str) -> None:
    assert value("grounding", answer, "[[10, 20, 30, 40]]", coordinates="thousandths") == 0.0


@pytest.mark.parametrize("wrong", ["[0, 0, 2000, 5]", "[9, 9, 1, 1]", '"cat"', "null", "[3, 3, 3, 3]"])
def test_a_box_that_cannot_be_counts_as_found_and_wrong(wrong: str) -> None:
    assert value("grounding", f"[[0, 0, 5, 5], {wrong}]", "[[0, 0, 5, 5]]", coordinates="thousandths") == pytest.approx(
        2 / 3
    )


def test_labels_decide_where_the_reference_has_them() -> None:
    def named(*labels: str | None) -> str:
        places = ([0, 0, 5, 5], [6, 6, 9, 9])
        return json.dumps([{"bbox_2d": box, "label": label} for box, label in zip(places, labels, strict=True)])

    def scored(answer: str, reference: str) -> float:
        return value("grounding", answer, reference, coordinates="pixels")

    assert scored(named("CAT", " dog"), named("cat", "dog")) == 1.0
    assert scored(named("dog", "cat"), named("cat", "dog")) == 0.0
    assert scored(named("cat", None), named("cat", "dog")) == 0.5
    assert scored(named("cat", "bird"), named(None, None)) == 1.0
    assert scored(named("cat", None), named(None, "cat")) == 0.5


def test_nothing_to_find() -> None:
    assert value("grounding", "[]", "[]", coordinates="pixels") == 1.0
    assert value("grounding", "", "[]", coordinates="pixels") == 0.0
    assert value("grounding", "[[0, 0, 1, 1]]", "[]", coordinates="pixels") == 0.0


GRID = [[x, y, x + 31, y + 31] for x in range(0, 992, 31) for y in range(0, 992, 31)]  # 1024 boxes


def test_repeated_boxes_and_a_thousand_boxes_earn_nothing() -> None:
    right = [0, 0, 31, 31]
    assert right in GRID
    for answer in ([right] * 2, [right] * 1000, GRID, [[0, 0, 31, 31], [0.0, 0, 31, 31.0]]):
        assert value("grounding", json.dumps(answer), json.dumps([right]), coordinates="thousandths") == 0.0
    # Ten times as many still count, for what little they are worth.
    assert value("grounding", json.dumps(GRID[:10]), json.dumps([right]), coordinates="thousandths") == pytest.approx(
        2 / 11
    )
    assert value("grounding", json.dumps(GRID[:11]), json.dumps([right]), coordinates="thousandths") == 0.0


def test_a_reference_that_repeats_a_box_can_be_answered() -> None:
    twice = boxes([0, 0, 5, 5], [0, 0, 5, 5])
    assert value("grounding", twice, twice, coordinates="pixels") == 1.0


def test_repeated_points_earn_nothing() -> None:
    assert value("points", "[[5, 5], [5, 5]]", "[[5, 5]]", coordinates="pixels") == 0.0
    spam = json.dumps([[x, y] for x in range(0, 1000, 40) for y in range(0, 1000, 40)])
    assert value("points", spam, "[[40, 40]]", coordinates="thousandths") == 0.0


@pytest.mark.parametrize(
    ("answer", "worth"),
    [('{"point_2d": [3, 4]}', 1.0), ('[{"point": [3, 4], "label": "x"}]', 1.0), ("[3, 4]", 1.0), ("[3, 4, 5]", 0.0)],
)
def test_forms_of_a_point(answer: str, worth: float) -> None:
    assert value("points", answer, "[[3, 4]]", coordinates="pixels") == worth


def test_points_by_hand() -> None:
    # A distance of 5 with sigma 5: exp(-1/2).
    assert value("points", "[[3, 4]]", "[[0, 0]]", coordinates="pixels", sigma=5) == pytest.approx(0.6065306597126334)


@pytest.mark.parametrize(
    ("progress", "worth"), [(0.0, 0.9), (0.0999, 0.9), (0.1, 0.0), (0.2499, 0.0), (0.25, 0.0), (1.0, 0.0)]
)
def test_the_threshold_of_v_triune_rises(progress: float, worth: float) -> None:
    got = value(
        "grounding",
        "[[0, 0, 9, 10]]",
        "[[0, 0, 10, 10]]",
        coordinates="pixels",
        threshold="v_triune",
        progress=progress,
    )
    assert got == pytest.approx(worth)


@pytest.mark.parametrize(
    ("width", "progress", "passes"),
    [(84, 0.0, False), (85, 0.0, True), (94, 0.1, False), (95, 0.1, True), (98, 0.25, False), (99, 0.25, True)],
)
def test_the_steps_of_v_triune(width: int, progress: float, passes: bool) -> None:
    answer, options = f"[[0, 0, {width}, 100]]", {"coordinates": "thousandths", "threshold": "v_triune"}
    got = value("grounding", answer, "[[0, 0, 100, 100]]", progress=progress, **options)
    assert got == pytest.approx(width / 100 if passes else 0.0)


def test_a_threshold_of_ones_own() -> None:
    def at(progress: float, threshold: Any) -> float:
        options = {"coordinates": "pixels", "threshold": threshold}
        return value("grounding", "[[0, 0, 6, 10]]", "[[0, 0, 10, 10]]", progress=progress, **options)

    assert at(1.0, 0.6) == pytest.approx(0.6) and at(1.0, 0.61) == 0.0
    assert at(0.49, [[0.5, 0.7]]) == pytest.approx(0.6) and at(0.5, [[0.5, 0.7]]) == 0.0
    assert value("grounding", "[[0, 0, 5, 5]]", "[[0, 0, 5, 5]]", coordinates="pixels", threshold=1.0) == 1.0


@pytest.mark.parametrize(
    "threshold",
    [
        "v-triune",
        1.1,
        -0.1,
        float("nan"),
        True,
        [0.5],
        [[0.5]],
        [[0.5, 2]],
        [[0, "a"]],
        [[0.2, 0.5], [0.1, 0.6]],
        {"a": 1},
    ],
)
def test_a_bad_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(InvalidReward, match=r"threshold is .*; give "):
        load_reward("grounding", coordinates="pixels", threshold=threshold)


@pytest.mark.parametrize("name", ["grounding", "points", "polygon"])
def test_the_coordinates_must_be_stated(name: str) -> None:
    with pytest.raises(InvalidReward, match="'coordinates' is missing; give 'pixels' or 'thousandths'"):
        load_reward(name)
    with pytest.raises(InvalidReward, match="coordinates is 'percent'; give 'pixels' or 'thousandths'"):
        load_reward(name, coordinates="percent")
    with pytest.raises(InvalidReward, match="reference is 'percent'; give 'pixels' or 'thousandths'"):
        load_reward(name, coordinates="pixels", reference="percent")


@pytest.mark.parametrize("sigma", [0, -1, float("inf"), float("nan")])
def test_a_bad_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(InvalidReward, match=r"sigma is .*; give a positive distance in pixels"):
        load_reward("points", coordinates="pixels", sigma=sigma)


def test_pixels_and_thousandths_are_turned_into_each_other() -> None:
    size = (640, 480)  # 64 pixels are 100 thousandths across, 48 pixels 100 down
    pixels, thousandths = "[[64, 48, 320, 240]]", "[[100, 100, 500, 500]]"
    one, other = (
        {"coordinates": "thousandths", "reference": "pixels"},
        {"coordinates": "pixels", "reference": "thousandths"},
    )
    assert value("grounding", thousandths, pixels, picture=size, **one) == pytest.approx(1.0)
    assert value("grounding", pixels, thousandths, picture=size, **other) == pytest.approx(1.0)
    assert value("points", "[[500, 500]]", "[[320, 240]]", picture=size, **one) == pytest.approx(1.0)
    assert value("points", "[[320, 245]]", "[[500, 500]]", picture=size, sigma=5, **other) == pytest.approx(
        math.exp(-0.5)
    )
    triangle, in_pixels = "[[0, 0], [500, 0], [0, 500]]", "[[0, 0], [320, 0], [0, 240]]"
    assert value("polygon", triangle, in_pixels, picture=size, **one) == pytest.approx(1.0)


def test_the_size_is_that_of_a_real_picture() -> None:
    reward = load_reward("grounding", coordinates="pixels")

    def score(answer: str) -> float | None:
        sample = Sample(answer, "[[0, 0, 50, 20]]", load_images=lambda: [Image.new("RGB", (50, 20))])
        return reward.now(sample).value

    assert score("[[0, 0, 50, 20]]") == 1.0
    assert score("[[0, 0, 51, 20]]") == 0.0  # beyond the right edge


def test_no_picture_is_loaded_for_thousandths() -> None:
    def load_images() -> list[Any]:
        raise AssertionError("loaded")

    box = "[[0, 0, 5, 5]]"
    assert (
        load_reward("grounding", coordinates="thousandths").now(Sample(box, box, load_images=load_images)).value == 1.0
    )


@pytest.mark.parametrize(
    ("name", "reference", "said"),
    [
        ("grounding", "[[0, 0, 5, 5], [0, 0, 200, 5]]", "item 2: x is 200, outside 0 to 100"),
        ("grounding", "[[0, 0, 5, 51]]", "item 1: y is 51, outside 0 to 50"),
        ("grounding", "[[5, 5, 0, 0]]", "item 1: [5, 5, 0, 0] is inverted or has no area"),
        ("grounding", "cat", "it is no JSON list or object"),
        ("grounding", "[[1, 2, 3, 4]", "it is no JSON (Expecting"),
        ("grounding", "[[1, 2, 3, NaN]]", "it is no JSON (NaN is no number of JSON)"),
        ("grounding", "[[1, 2, 3, 1e999]]", "1e999 is beyond the largest float"),
        ("grounding", '[{"box": [1, 2, 3, 4]}]', "item 1: None is no list of 4 numbers"),
        ("grounding", '[{"bbox": [1, 2, 3, 4], "label": 5}]', "item 1: label 5 is no text"),
        ("grounding", "[" * 600 + "]" * 600, "is no list of 4 numbers"),
        ("points", "[[101, 0]]", "item 1: x is 101, outside 0 to 100"),
        ("polygon", "[[0, 0], [5, 5]]", "give x and y of three corners or more"),
        ("polygon", "[0, 0, 5, 5, 9]", "give x and y of three corners or more"),
        ("polygon", "[[0, 0], [5, 5], [10, 10]]", "it covers no area"),
        ("polygon", "[[0, 0], [5, 5], [500, 0]]", "x is 500, outside 0 to 100"),
    ],
)
def test_a_reference_that_cannot_be_is_a_failure_that_says_why(name: str, reference: str, said: str) -> None:
    score = judge(name, "[[1, 1, 2, 2]]", reference, coordinates="pixels", picture=(100, 50))
    assert score.failure is Failure.UNPARSABLE_REFERENCE and score.value is None
    assert "row-7" in score.detail and said in score.detail and "; " in score.detail


def test_turning_pixels_into_thousandths_takes_a_picture() -> None:
    score = judge("grounding", "[]", "[]", coordinates="pixels", reference="thousandths")
    assert score.failure is Failure.UNPARSABLE_REFERENCE and "give the picture" in score.detail


SQUARE = "[[0, 0], [2, 0], [2, 2], [0, 2]]"
BOW = "[[0, 0], [2, 2], [2, 0], [0, 2]]"  # two triangles that meet in the middle, of area 1 each


@pytest.mark.parametrize(
    ("one", "other", "worth"),
    [
        (SQUARE, SQUARE, 1.0),
        (SQUARE, "[[0, 2], [2, 2], [2, 0], [0, 0]]", 1.0),  # the other way round
        (SQUARE, "[0, 0, 2, 0, 2, 2, 0, 2]", 1.0),
        (SQUARE, '{"polygon": [[0, 0], [2, 0], [2, 2], [0, 2]]}', 1.0),
        (SQUARE, "[[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]", 1.0),  # closed
        (SQUARE, "[[1, 0], [3, 0], [3, 2], [1, 2]]", 1 / 3),
        (SQUARE, "[[0, 0], [2, 0], [0, 2]]", 0.5),
        (SQUARE, "[[2, 0], [4, 0], [4, 2], [2, 2]]", 0.0),  # they share an edge
        (SQUARE, BOW, 0.5),
        (BOW, BOW, 1.0),
        (BOW, "[[0, 0], [1, 1], [2, 0], [0, 0]]", 0.0),
    ],
)
def test_polygons_by_hand(one: str, other: str, worth: float) -> None:
    assert value("polygon", one, other, coordinates="pixels") == pytest.approx(worth, abs=1e-12)
    assert value("polygon", other, one, coordinates="pixels") == pytest.approx(worth, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(one=BOXES, other=BOXES)
def test_polygons_that_are_boxes(one: Box, other: Box) -> None:
    corners, others = ([[x1, y1], [x2, y1], [x2, y2], [x1, y2]] for x1, y1, x2, y2 in (one, other))
    got = value("polygon", json.dumps(corners), json.dumps(others), coordinates="pixels")
    assert got == pytest.approx(float(iou(one, other)), abs=1e-9)


CORNERS = st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 1000)), min_size=3, max_size=12)


@settings(max_examples=100, deadline=None)
@given(one=CORNERS, other=CORNERS)
def test_any_polygon_with_any_is_symmetric(one: list[Any], other: list[Any]) -> None:
    there = judge("polygon", json.dumps(one), json.dumps(other), coordinates="thousandths")
    back = judge("polygon", json.dumps(other), json.dumps(one), coordinates="thousandths")
    for score in (there, back):
        assert score.failure in (None, Failure.UNPARSABLE_REFERENCE), score.detail
    if there.failure is None and back.failure is None:
        assert there.value == pytest.approx(back.value, abs=1e-9)


@pytest.mark.parametrize(
    "answer",
    ["[]", "[[0, 0], [1, 1]]", "[[0, 0], [2, 2], [1, 1]]", "[[0, 0], [2, 0], [2, 1e999]]", "[[0, 0], 2, 0]", "{}"],
)
def test_what_is_no_polygon_earns_nothing(answer: str) -> None:
    assert value("polygon", answer, SQUARE, coordinates="pixels") == 0.0


def test_a_knot_of_too_many_corners_earns_nothing_at_once() -> None:
    knot = json.dumps([[(7919 * i) % 997, (104729 * i * i) % 991] for i in range(5_000)])  # minutes to mend
    assert value("polygon", knot, SQUARE, coordinates="thousandths") == 0.0
    star = json.dumps([[500 + 400 * math.cos(k), 500 + 400 * math.sin(k)] for k in range(100)])  # crosses itself
    assert value("polygon", star, star, coordinates="thousandths") == pytest.approx(1.0)


def test_the_largest_that_is_matched_takes_no_time() -> None:
    crowd = [[x, y, x + 100, y + 100] for x in range(25) for y in range(20)]
    spam = [[x / 10, y / 10, 1000 - x, 1000 - y] for x in range(100) for y in range(50)]
    start = time.process_time()
    assert 0 < value("grounding", json.dumps(spam), json.dumps(crowd), coordinates="thousandths") < 0.25
    assert time.process_time() - start < 4.0
    assert judge("grounding", "[]", json.dumps([*crowd, [0, 0, 1, 1]]), coordinates="thousandths").failure


def test_two_combs_take_no_time() -> None:
    teeth = [corner for x in range(0, 248, 2) for corner in ([x, 1], [x, 999], [x + 1, 999], [x + 1, 1])]
    comb = [*teeth, [1000, 0], [0, 0]]  # 498 corners
    other = [[y, x] for x, y in comb]
    start = time.process_time()
    assert 0 <= value("polygon", json.dumps(comb), json.dumps(other), coordinates="thousandths") < 1
    assert time.process_time() - start < 4.0
    many = json.dumps([[500 + 400 * math.cos(k / 100), 500 + 400 * math.sin(k / 100)] for k in range(501)])
    assert value("polygon", many, SQUARE, coordinates="thousandths") == 0.0
