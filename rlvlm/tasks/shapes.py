"""Coloured shapes, one a cell: how many are red, are circles, are red circles?"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from rlvlm.tasks.canvas import CELLS, STAMP, Colour, blank, drawn_mask, noisy, picture, stamp
from rlvlm.tasks.generator import Generator, Scene, Split, Step

COLOURS: dict[str, Colour] = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230)}
SHAPES = ("circle", "square", "triangle")
ITEMS = {1: 3, 2: 5, 3: 7, 4: 9, 5: 12}


class ShapeFacts(NamedTuple):
    """The (colour, shape) of each cell, and what is asked for; `any` matches everything."""

    items: tuple[tuple[str, str], ...]
    colour: str
    shape: str

    def matches(self) -> list[bool]:
        return [self.colour in ("any", colour) and self.shape in ("any", shape) for colour, shape in self.items]


@functools.cache
def shape_mask(shape: str, margin: int) -> NDArray[np.float32]:
    """A mask [14, 14] of the shape, `margin` pixels away from the border."""

    def draw(pen: ImageDraw.ImageDraw, scale: int) -> None:
        low, high = margin * scale, (STAMP - margin) * scale - 1
        if shape == "circle":
            pen.ellipse((low, low, high, high), fill=255)
        elif shape == "square":
            pen.rectangle((low, low, high, high), fill=255)
        else:
            pen.polygon([(low, high), (high, high), ((low + high) / 2, low)], fill=255)

    return drawn_mask(draw)


class ShapesCount(Generator[ShapeFacts]):
    """Counts 3, 5, 7, 9, 12 shapes by colour, by shape, or by both."""

    name: ClassVar[str] = "shapes_count"

    def draw(self, rng: random.Random, level: int, split: Split) -> Scene[ShapeFacts]:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        items = [
            (
                colour if rng.random() < 0.35 else rng.choice(list(COLOURS)),
                shape if rng.random() < 0.35 else rng.choice(SHAPES),
            )
            for _ in range(ITEMS[level])
        ]
        asked = rng.choice([(colour, "any"), ("any", shape), (colour, shape)])
        canvas = blank()
        for cell, (item_colour, item_shape) in enumerate(items):
            stamp(canvas, shape_mask(item_shape, rng.randint(1, 2)), noisy(COLOURS[item_colour], rng), cell, rng)
        return Scene(picture(canvas), ShapeFacts(tuple(items), *asked))

    def ask(self, scene: Scene[ShapeFacts]) -> str:
        return f"count {scene.facts.colour} {scene.facts.shape} ?"

    def solve(self, scene: Scene[ShapeFacts]) -> str:
        return str(sum(scene.facts.matches()))

    def explain(self, scene: Scene[ShapeFacts]) -> Sequence[Step]:
        seen = [f"{colour}-{shape}" for colour, shape in scene.facts.items]
        return [Step(*step) for step in zip(CELLS, seen, accumulate(map(int, scene.facts.matches())), strict=False)]

    def identity(self, scene: Scene[ShapeFacts]) -> bytes:
        return repr(scene.facts.items).encode()  # the same arrangement in a little other red is no new task
