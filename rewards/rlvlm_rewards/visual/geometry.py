"""Rewards for places in a picture: boxes, points, polygons.

The recipe states the coordinates, and they are checked: what cannot be in them (see `places.py`) is wrong in an answer
and a failure of the data in a reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import shapely

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.visual.matching import repeats, soft_f1
from rlvlm_rewards.visual.places import (
    Coordinates,
    Place,
    Reader,
    Thing,
    check_coordinates,
    frames,
    read_answer,
    read_box,
    read_point,
    read_polygon,
    read_reference,
)
from rlvlm_rewards.visual.reading import MOST, Unreadable, answer_of, is_number, unparsable

V_TRIUNE = ((0.0, 0.85), (0.10, 0.95), (0.25, 0.99))
_ROUNDING = 1e-9  # of an IoU
_MOST_CORNERS = 500  # two combs of these take 0.4 s
_MOST_CROSSED = 256  # corners of a polygon that crosses itself: mending takes quadratic time, 0.1 s for these


@dataclass(frozen=True)
class Grounding:
    """Boxes: F1 with soft IoU. With n boxes in the answer, m in the reference, and S the largest sum of IoU over the
    one-to-one assignments of boxes (scipy's linear_sum_assignment): F1 = 2 S / (n + m). Parts: precision, recall.

    Boxes are a JSON list of [x1, y1, x2, y2] or of {"bbox_2d": [...], "label": "..."} (also `bbox`), or one of these.
    A box of the reference that has a label goes only with a box of the same label. A box that cannot be (outside the
    picture, inverted, without area) counts as found and wrong. The same box twice, or more than ten times as many boxes
    as the reference has, makes an answer worth 0. `[]` is the answer where the reference is `[]`. A reference has at
    most 500 boxes.

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
        threshold = max((pair for pair in self.schedule() if pair[0] <= sample.progress), default=(0.0, 0.0))[1]

        def likeness(found: Sequence[Place], wanted: Sequence[Place]) -> np.ndarray:
            iou = box_iou(found, wanted)
            return np.where(iou >= threshold - _ROUNDING, iou, 0.0)

        return _matched(sample, read_box, (self.coordinates, self.reference), likeness)


def _is_schedule(pairs: Any) -> bool:
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        return False
    if not all(len(pair) == 2 and all(is_number(one) and 0 <= one <= 1 for one in pair) for pair in pairs):
        return False
    return all(one[0] < other[0] for one, other in itertools.pairwise(pairs))


def box_iou(found: Sequence[Place], wanted: Sequence[Place]) -> np.ndarray:
    """found x wanted: intersection over union of boxes. Boxes do without GEOS, which takes 100 times as long."""
    ours, theirs = np.array(found)[:, None], np.array(wanted)[None]
    sides = np.minimum(ours[..., 2:], theirs[..., 2:]) - np.maximum(ours[..., :2], theirs[..., :2])
    shared = sides.clip(min=0.0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (ours, theirs)]
    return (shared / (areas[0] + areas[1] - shared)).clip(0.0, 1.0)


@dataclass(frozen=True)
class Points:
    """Points: F1 as for boxes (`Grounding`), with exp(-d^2 / (2 sigma^2)) in place of IoU; d is the distance.

    Points are a JSON list of [x, y] or of {"point_2d": [x, y], "label": "..."} (also `point`), or one of these.
    coordinates: of the answer; distances are measured in them. reference: of the reference; the same by default.
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
            distance = np.linalg.norm(np.array(found)[:, None] - np.array(wanted)[None], axis=-1)
            return np.exp(-0.5 * np.square(distance / self.sigma))

        return _matched(sample, read_point, (self.coordinates, self.reference), likeness)


def _matched(
    sample: Sample,
    read: Reader,
    systems: tuple[Coordinates, Coordinates | None],
    likeness: Callable[[Sequence[Place], Sequence[Place]], np.ndarray],
) -> Score:
    """Soft F1 of the answer's things against the reference's, where labels agree; see Grounding.

    read: one place. systems: coordinates of the answer and of the reference. likeness: found x wanted, in [0, 1].
    """
    try:
        frame, theirs = frames(sample, *systems)
        wanted = read_reference(sample, read, theirs, frame)
    except Unreadable as error:
        return unparsable(sample, error)
    found = read_answer(sample, read, frame, MOST * max(len(wanted), 1))
    readable = [one for one in found or () if one is not None]
    if found is None or repeats(readable, wanted):
        return Score(value=0.0)
    similarity = np.zeros((len(found), len(wanted)))  # a thing that cannot be keeps a row of zeros: found, and wrong
    if readable and wanted:
        near = likeness([place for place, _ in readable], [place for place, _ in wanted])
        similarity[: len(readable)] = near * _labels_agree(readable, wanted)
    return soft_f1(similarity)


def _labels_agree(found: Sequence[Thing], wanted: Sequence[Thing]) -> np.ndarray:
    ours, theirs = (np.array([label for _, label in things], dtype=object) for things in (found, wanted))
    return (theirs == None)[None] | (ours[:, None] == theirs[None])  # noqa: E711 (of each element)


@dataclass(frozen=True)
class Polygon:
    """Intersection over union of two polygons, each a JSON list of corners [[x, y], ...] or [x, y, x, y, ...], or
    {"polygon": corners}. One that crosses itself covers what its parts cover (GEOS's make_valid, method "structure").
    It may have 500 corners, and 256 if it crosses itself.

    coordinates: of the answer. reference: of the reference; the same by default.
    """

    coordinates: Coordinates
    reference: Coordinates | None = None

    def __post_init__(self) -> None:
        check_coordinates(self.coordinates, self.reference)

    def __call__(self, sample: Sample) -> Score:
        try:
            frame, theirs = frames(sample, self.coordinates, self.reference)
            wanted = covered(theirs.into(frame, read_polygon(sample.answer, theirs)))
        except Unreadable as error:
            return unparsable(sample, error)
        try:
            found = covered(read_polygon(answer_of(sample), frame))
        except Unreadable:
            return Score(value=0.0)
        return Score(value=polygon_iou(found, wanted))


def covered(corners: Place) -> shapely.Geometry:
    """The area that a polygon covers. Raises Unreadable where there is none, or it would take too long to find out."""
    count = len(corners) // 2
    if count > _MOST_CORNERS:
        raise Unreadable(f"it has {count} corners; give at most {_MOST_CORNERS}")
    polygon = shapely.Polygon(np.array(corners).reshape(-1, 2))
    if not polygon.is_valid:
        if count > _MOST_CROSSED:
            raise Unreadable(f"it crosses itself and has {count} corners; give at most {_MOST_CROSSED}")
        polygon = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    if not polygon.area > 0:
        raise Unreadable("it covers no area; give corners that do not lie on one line")
    return polygon


def polygon_iou(one: shapely.Geometry, other: shapely.Geometry) -> float:
    """Intersection over union of two areas."""
    shared = one.intersection(other).area
    return float(min(max(shared / (one.area + other.area - shared), 0.0), 1.0))
