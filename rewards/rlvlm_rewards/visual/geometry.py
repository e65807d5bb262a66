"""Rewards for places in a picture: boxes, points, polygons.

Coordinates are `pixels` of the sample's first picture, or `thousandths` of its sides (0 to 1000); x goes right, y down.
Which of them, the recipe says. It is checked: what cannot be in the stated system is wrong in an answer, and a failure
of the data in a reference. The picture is loaded for pixels only; a sample without one goes unchecked at the far edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import shapely

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.visual.matching import is_spam, soft_f1
from rlvlm_rewards.visual.reading import Unreadable, answer_of, is_number, normalise, read_json, unparsable

Coordinates: TypeAlias = Literal["pixels", "thousandths"]
Place: TypeAlias = tuple[float, ...]  # x, y of a point; x1, y1, x2, y2 of a box; x1, y1, x2, y2, x3, ... of a polygon
Thing: TypeAlias = tuple[Place, str | None]  # with its label
Read = TypeVar("Read")
V_TRIUNE = ((0.0, 0.85), (0.10, 0.95), (0.25, 0.99))
_FAR = 1e6  # pixels; no picture is larger
_MOST_CORNERS = 256  # of a polygon that crosses itself: mending takes quadratic time, 0.1 s for these
_PLACES = ("bbox_2d", "bbox", "point_2d", "point", "polygon")
_MEND = "give it in the recipe's coordinates, or mend those"


@dataclass(frozen=True, slots=True)
class Frame:
    """The largest x and y that coordinates can have."""

    width: float
    height: float

    def check(self, place: Place) -> Place:
        """The same place. Raises Unreadable for what lies outside."""
        for name, side, values in (("x", self.width, place[0::2]), ("y", self.height, place[1::2])):
            for value in values:
                if not 0 <= value <= side:
                    raise Unreadable(f"{name} is {value:g}, outside 0 to {side:g}; {_MEND}")
        return place

    def into(self, other: Frame, place: Place) -> Place:
        if self == other:
            return place
        scales = (other.width / self.width, other.height / self.height)
        return tuple(value * scales[index % 2] for index, value in enumerate(place))


_THOUSANDTHS = Frame(1000, 1000)


def frames(sample: Sample, answer: Coordinates, reference: Coordinates | None) -> tuple[Frame, Frame]:
    """Those of the answer and of the reference. Raises Unreadable where one has to be turned into the other and there
    is no picture."""
    kinds = (answer, reference or answer)
    pixels = _THOUSANDTHS
    if "pixels" in kinds:
        images = sample.images
        if not images and kinds[0] != kinds[1]:
            raise Unreadable(
                "pixels and thousandths meet and there is no picture; give its coordinates as the answer's"
            )
        pixels = Frame(*images[0].size) if images else Frame(_FAR, _FAR)
    first, second = (pixels if kind == "pixels" else _THOUSANDTHS for kind in kinds)
    return first, second


def check_coordinates(answer: str, reference: str | None) -> None:
    """Raises ValueError for the options `coordinates` and `reference` of all rewards here."""
    if answer not in ("pixels", "thousandths"):
        raise ValueError(f"coordinates is {answer!r}; give 'pixels' or 'thousandths'")
    if reference not in ("pixels", "thousandths", None):
        raise ValueError(f"reference is {reference!r}; give 'pixels', 'thousandths' or null")


def numbers(value: Any, count: int | None = None) -> Place:
    """A JSON list of numbers, pairs of them allowed. Raises Unreadable, also for another count of them."""
    flat = [one for part in value for one in (part if isinstance(part, list) else [part])] if _is_list(value) else []
    if not flat or not all(is_number(one) and abs(one) < 1e300 for one in flat) or len(flat) != (count or len(flat)):
        raise Unreadable(f"{value!r:.100} is no list of {count or 'pairs of'} numbers; give x and y in turn")
    return tuple(map(float, flat))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def read_box(value: Any, frame: Frame) -> Place:
    """[x1, y1, x2, y2] with the upper left corner first. Raises Unreadable."""
    box = frame.check(numbers(value, 4))
    if not (box[0] < box[2] and box[1] < box[3] and (box[2] - box[0]) * (box[3] - box[1]) > 0):
        raise Unreadable(f"{value!r:.100} is inverted or has no area; give the upper left corner, then the lower right")
    return box


def read_point(value: Any, frame: Frame) -> Place:
    """[x, y]. Raises Unreadable."""
    return frame.check(numbers(value, 2))


def read_polygon(value: Any, frame: Frame) -> Place:
    """[[x, y], ...] or [x, y, ...], three corners at least. Raises Unreadable."""
    corners = frame.check(numbers(value))
    if len(corners) < 6 or len(corners) % 2:
        raise Unreadable(f"{value!r:.100} is no polygon; give three corners or more, x and y of each")
    return corners


def things(text: str) -> list[Any]:
    """The items of a JSON list; a list of four or two numbers, or an object, is one item. Raises Unreadable."""
    value = read_json(text)
    if isinstance(value, dict) or (value and all(map(is_number, value))):
        return [value]
    return list(value)


def read_thing(item: Any, read: Callable[[Any, Frame], Place], frame: Frame) -> Thing:
    """A place, or an object {"bbox_2d" or "bbox" or "point_2d" or "point": place, "label": text}. Raises Unreadable."""
    if not isinstance(item, dict):
        return read(item, frame), None
    place = next((item[name] for name in _PLACES if name in item), None)
    label = item.get("label")
    if label is not None and not isinstance(label, str):
        raise Unreadable(f"label {label!r:.100} is no text; give a text or leave it out")
    return read(place, frame), None if label is None else normalise(label)


def read_answer(sample: Sample, read: Callable[[Any, Frame], Place], frame: Frame) -> list[Thing | None] | None:
    """Each thing that the answer names, None for one that cannot be; None if the answer names nothing at all."""
    try:
        items = things(answer_of(sample))
    except Unreadable:
        return None
    return [_or_none(read_thing, item, read, frame) for item in items]


def _or_none(read: Callable[..., Read], *arguments: Any) -> Read | None:
    try:
        return read(*arguments)
    except Unreadable:
        return None


def read_reference(sample: Sample, read: Callable[[Any, Frame], Place], frame: Frame, into: Frame) -> list[Thing]:
    """Each thing that the reference names, in the answer's coordinates. Raises Unreadable, which counts from one."""
    wanted: list[Thing] = []
    for number, item in enumerate(things(sample.answer), 1):
        try:
            place, label = read_thing(item, read, frame)
        except Unreadable as error:
            raise Unreadable(f"item {number}: {error}") from error
        wanted.append((frame.into(into, place), label))
    return wanted


def labels_agree(found: Sequence[Thing], wanted: Sequence[Thing]) -> np.ndarray:
    """found x wanted: whether the label is that of the reference, or the reference has none."""
    return np.array([[theirs in (None, ours) for _, theirs in wanted] for _, ours in found], dtype=bool)


def box_iou(found: Sequence[Place], wanted: Sequence[Place]) -> np.ndarray:
    """found x wanted: intersection over union of boxes."""
    boxes, others = (shapely.box(*np.array(places).T) for places in (found, wanted))
    rows, columns = shapely.STRtree(others).query(boxes, predicate="intersects")
    shared = shapely.area(shapely.intersection(boxes[rows], others[columns]))
    iou = np.zeros((len(found), len(wanted)))
    iou[rows, columns] = shared / (shapely.area(boxes)[rows] + shapely.area(others)[columns] - shared)
    return iou.clip(0.0, 1.0)


def matched(
    sample: Sample,
    read: Callable[[Any, Frame], Place],
    systems: tuple[Coordinates, Coordinates | None],
    likeness: Callable[[Sequence[Place], Sequence[Place]], np.ndarray],
) -> Score:
    """Soft F1 of the answer's things against the reference's, with labels; a failure for an unreadable reference.

    read: one thing. systems: coordinates of the answer and of the reference. likeness: found x wanted, in [0, 1].
    """
    try:
        frame, theirs = frames(sample, *systems)
        wanted = read_reference(sample, read, theirs, frame)
    except Unreadable as error:
        return unparsable(sample, error)
    found = read_answer(sample, read, frame)
    readable = [one for one in found or () if one is not None]
    if found is None or is_spam(readable, wanted) or is_spam(range(len(found)), wanted):
        return Score(value=0.0)
    similarity = np.zeros((len(found), len(wanted)))  # what cannot be stays a row of zeros: found, and wrong
    if readable and wanted:
        similarity[: len(readable)] = likeness([place for place, _ in readable], [place for place, _ in wanted])
        similarity[: len(readable)] *= labels_agree(readable, wanted)
    return soft_f1(similarity)


@dataclass(frozen=True)
class Grounding:
    """Boxes: F1 with soft IoU. With n boxes in the answer, m in the reference, and S the largest sum of IoU over the
    one-to-one assignments of boxes (scipy's linear_sum_assignment): F1 = 2 S / (n + m). Parts: precision, recall.

    Boxes are a JSON list of [x1, y1, x2, y2] or of {"bbox_2d": [...], "label": "..."} (also `bbox`), or one of these.
    A box of the reference that has a label goes only with a box of the same label. A box that cannot be (outside the
    picture, inverted, without area) counts as found and wrong. The same box twice, or more than ten times as many boxes
    as the reference has, makes an answer worth 0. `[]` is the answer where the reference is `[]`.

    coordinates: of the answer. reference: of the reference; the same by default.
    threshold: an IoU below it counts as 0. Either one number, or pairs [progress, IoU], each in force from that share
    of training on, or "v_triune": 0.85, from 10 % of training 0.95, from 25 % 0.99. Default: none.
    """

    coordinates: Coordinates
    reference: Coordinates | None = None
    threshold: Literal["v_triune"] | float | Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        check_coordinates(self.coordinates, self.reference)
        if not _is_schedule(self.schedule()):
            mend = "give a number from 0 to 1, 'v_triune', or pairs [progress, iou] from 0 to 1 with rising progress"
            raise ValueError(f"threshold is {self.threshold!r:.100}; {mend}")

    def schedule(self) -> Any:
        """The thresholds as pairs (progress, IoU)."""
        if self.threshold == "v_triune":
            return V_TRIUNE
        if self.threshold is None:
            return ()
        return ((0.0, self.threshold),) if is_number(self.threshold) else self.threshold

    def __call__(self, sample: Sample) -> Score:
        floor = max((pair for pair in self.schedule() if pair[0] <= sample.progress), default=(0.0, 0.0))[1]

        def likeness(found: Sequence[Place], wanted: Sequence[Place]) -> np.ndarray:
            iou = box_iou(found, wanted)
            return np.where(iou >= floor, iou, 0.0)

        return matched(sample, read_box, (self.coordinates, self.reference), likeness)


def _is_schedule(pairs: Any) -> bool:
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        return False
    if not all(len(pair) == 2 and all(is_number(one) and 0 <= one <= 1 for one in pair) for pair in pairs):
        return False
    return all(one[0] < other[0] for one, other in zip(pairs, pairs[1:], strict=False))


@dataclass(frozen=True)
class Points:
    """Points: F1 as for boxes (`Grounding`), with exp(-d^2 / (2 sigma^2)) in place of IoU, d the distance of two points.

    Points are a JSON list of [x, y] or of {"point_2d": [x, y], "label": "..."} (also `point`), or one of these.
    coordinates: of the answer, in which distances are measured. reference: of the reference; the same by default.
    sigma: in the unit of the coordinates.
    """

    coordinates: Coordinates
    reference: Coordinates | None = None
    sigma: float = 20.0

    def __post_init__(self) -> None:
        check_coordinates(self.coordinates, self.reference)
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma!r}; give a positive distance in {self.coordinates}")

    def __call__(self, sample: Sample) -> Score:
        def likeness(found: Sequence[Place], wanted: Sequence[Place]) -> np.ndarray:
            difference = (np.array(found)[:, None] - np.array(wanted)[None]) / self.sigma
            return np.exp(-0.5 * (difference**2).sum(axis=-1))

        return matched(sample, read_point, (self.coordinates, self.reference), likeness)


@dataclass(frozen=True)
class Polygon:
    """Intersection over union of two polygons, each a JSON list of corners [[x, y], ...] or [x, y, x, y, ...], or
    {"polygon": corners}. One that crosses itself covers what its parts cover (GEOS's make_valid, method "structure"),
    and may have 256 corners.

    coordinates: of the answer. reference: of the reference; the same by default.
    """

    coordinates: Coordinates
    reference: Coordinates | None = None

    def __post_init__(self) -> None:
        check_coordinates(self.coordinates, self.reference)

    def __call__(self, sample: Sample) -> Score:
        try:
            frame, theirs = frames(sample, self.coordinates, self.reference)
            wanted = shape(theirs.into(frame, _one_polygon(sample.answer, theirs)))
        except Unreadable as error:
            return unparsable(sample, error)
        try:
            return Score(value=polygon_iou(shape(_one_polygon(answer_of(sample), frame)), wanted))
        except Unreadable:
            return Score(value=0.0)


def _one_polygon(text: str, frame: Frame) -> Place:
    value = read_json(text)
    return read_polygon(value.get("polygon") if isinstance(value, Mapping) else value, frame)


def shape(corners: Place) -> shapely.Geometry:
    """The area that a polygon covers. Raises Unreadable where there is none, or it would take too long to find out."""
    polygon = shapely.Polygon(np.array(corners).reshape(-1, 2))
    if not polygon.is_valid:
        if len(corners) > 2 * _MOST_CORNERS:
            raise Unreadable(f"it crosses itself and has {len(corners) // 2} corners; give at most {_MOST_CORNERS}")
        polygon = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    if not polygon.area > 0:
        raise Unreadable("it covers no area; give corners that do not lie on a line")
    return polygon


def polygon_iou(one: shapely.Geometry, other: shapely.Geometry) -> float:
    """Intersection over union of two areas."""
    shared = one.intersection(other).area
    return float(min(max(shared / (one.area + other.area - shared), 0.0), 1.0))
