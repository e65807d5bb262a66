"""Reads places in a picture: boxes, points and polygons, in coordinates that are stated and checked.

Coordinates are `pixels` of the sample's first picture, or `thousandths` of its sides (0 to 1000); x goes right, y down.
The picture is loaded for pixels only; without one, pixels go unchecked at the far edge.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rlvlm_rewards.records import Sample
from rlvlm_rewards.visual.reading import Unreadable, answer_of, is_number, normalise, read_json

Coordinates: TypeAlias = Literal["pixels", "thousandths"]
Place: TypeAlias = tuple[float, ...]  # x, y of a point; x1, y1, x2, y2 of a box; x1, y1, x2, y2, x3, ... of a polygon
Thing: TypeAlias = tuple[Place, str | None]  # with its label
Reader: TypeAlias = Callable[[Any, "Frame"], Place]
_FAR = 1e6  # pixels; no picture is larger
_MOST_THINGS = 500  # of a reference: matching them with ten times as many takes up to a second
_KEYS = ("bbox_2d", "bbox", "point_2d", "point")
_MEND = "give it in the coordinates that the recipe states, or state the others"


@dataclass(frozen=True, slots=True)
class Frame:
    """The largest x and y that coordinates can have."""

    width: float
    height: float

    def check(self, place: Place) -> Place:
        """The same place. Raises Unreadable for one outside."""
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
    reference = reference or answer
    pixels = _THOUSANDTHS
    if "pixels" in (answer, reference):
        images = sample.images
        if not images and answer != reference:
            raise Unreadable(
                "to compare pixels with thousandths takes the picture, and there is none; give the picture"
            )
        pixels = Frame(*images[0].size) if images else Frame(_FAR, _FAR)
    return (
        pixels if answer == "pixels" else _THOUSANDTHS,
        pixels if reference == "pixels" else _THOUSANDTHS,
    )


def check_coordinates(answer: str, reference: str | None) -> None:
    """Raises ValueError for wrong options `coordinates` and `reference`."""
    if answer not in ("pixels", "thousandths"):
        raise ValueError(f"coordinates is {answer!r}; give 'pixels' or 'thousandths'")
    if reference not in ("pixels", "thousandths", None):
        raise ValueError(f"reference is {reference!r}; give 'pixels', 'thousandths' or null")


def _numbers(value: Any, count: int | None = None) -> Place:
    """[x, y, x, y, ...] or [[x, y], ...]. Raises Unreadable, also for another count of numbers."""
    flat = value if isinstance(value, list) else []
    if all(isinstance(pair, list) and len(pair) == 2 for pair in flat):
        flat = [one for pair in flat for one in pair]
    if not flat or len(flat) != (count or len(flat)) or not all(is_number(one) and abs(one) < 1e300 for one in flat):
        raise Unreadable(f"{reprlib.repr(value)} is no list of {count or 'pairs of'} numbers; give x and y in turn")
    return tuple(map(float, flat))


def read_box(value: Any, frame: Frame) -> Place:
    """[x1, y1, x2, y2] with the upper left corner first. Raises Unreadable."""
    x1, y1, x2, y2 = frame.check(_numbers(value, 4))
    if not (x1 < x2 and y1 < y2 and (x2 - x1) * (y2 - y1) > 0):
        raise Unreadable(f"{value} is inverted or has no area; give the upper left corner, then the lower right")
    return x1, y1, x2, y2


def read_point(value: Any, frame: Frame) -> Place:
    """[x, y]. Raises Unreadable."""
    return frame.check(_numbers(value, 2))


def read_polygon(text: str, frame: Frame) -> Place:
    """The corners of JSON [[x, y], ...] or [x, y, x, y, ...] or {"polygon": corners}. Raises Unreadable."""
    value = read_json(text)
    if isinstance(value, dict):
        value = value.get("polygon")
    corners = frame.check(_numbers(value))
    if len(corners) < 6 or len(corners) % 2:
        raise Unreadable(f"{reprlib.repr(value)} is no polygon; give x and y of three corners or more")
    return corners


def _items(text: str) -> list[Any]:
    """Those of a JSON list; an object or a list of numbers is one item. Raises Unreadable."""
    value = read_json(text)
    one = isinstance(value, dict) or (value and all(map(is_number, value)))
    return [value] if one else value


def _read_thing(item: Any, read: Reader, frame: Frame) -> Thing:
    if not isinstance(item, dict):
        return read(item, frame), None
    label = item.get("label")
    if label is not None and not isinstance(label, str):
        raise Unreadable(f"label {reprlib.repr(label)} is no text; give a text or leave it out")
    place = next((item[key] for key in _KEYS if key in item), None)
    return read(place, frame), None if label is None else normalise(label)


def read_answer(sample: Sample, read: Reader, frame: Frame, most: int) -> list[Thing | None] | None:
    """The things that an answer names, None for each that cannot be. None if it names nothing readable at all, or more
    than `most` things."""
    try:
        items = _items(answer_of(sample))
    except Unreadable:
        return None
    return [_thing_or_none(item, read, frame) for item in items] if len(items) <= most else None


def _thing_or_none(item: Any, read: Reader, frame: Frame) -> Thing | None:
    try:
        return _read_thing(item, read, frame)
    except Unreadable:
        return None


def read_reference(sample: Sample, read: Reader, frame: Frame, into: Frame) -> list[Thing]:
    """The things that a reference names, turned into another frame. Raises Unreadable, naming the item from one on."""
    items = _items(sample.answer)
    if len(items) > _MOST_THINGS:
        raise Unreadable(f"it has {len(items)} items; give at most {_MOST_THINGS}")
    wanted: list[Thing] = []
    for number, item in enumerate(items, 1):
        try:
            place, label = _read_thing(item, read, frame)
        except Unreadable as error:
            raise Unreadable(f"item {number}: {error}") from error
        wanted.append((frame.into(into, place), label))
    return wanted
