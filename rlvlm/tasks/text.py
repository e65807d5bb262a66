"""A short calculation written out, one glyph a cell: `3+4-2`. Every result on the way lies in 0..63."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from rlvlm.tasks.canvas import CELLS, STAMP, blank, dark, drawn_mask, picture, stamp
from rlvlm.tasks.generator import Generator, Scene, Split, Step


@functools.cache
def glyph_mask(glyph: str) -> NDArray[np.float32]:
    """A mask [14, 14] of a digit or a sign."""

    def draw(pen: ImageDraw.ImageDraw, scale: int) -> None:
        centre = STAMP * scale / 2
        if glyph == "-":  # the font has a short hyphen only, and no minus
            pen.rectangle((3 * scale, centre - scale, 11 * scale - 1, centre + scale - 1), fill=255)
            return
        pen.text((centre, centre), glyph, fill=255, font=ImageFont.load_default(16 * scale), anchor="mm")

    return drawn_mask(draw)


class TextCalculation(Generator[str]):
    """The value of a sum of 2 to 6 one-digit terms, read from left to right. The facts are the text itself."""

    name: ClassVar[str] = "text_calculation"

    def draw(self, rng: random.Random, level: int, split: Split) -> Scene[str]:
        value = rng.randint(0, 9)
        text = str(value)
        for _ in range(level):
            # The cap on what is taken away keeps the value >= 0; six nines are 54, so 63 is out of reach.
            minus = rng.random() < 0.5
            term = rng.randint(0, min(9, value) if minus else 9)
            value += -term if minus else term
            text += f"{'-' if minus else '+'}{term}"
        ink = dark(rng)
        canvas = blank()
        for cell, glyph in enumerate(text):
            stamp(canvas, glyph_mask(glyph), ink, cell, rng)
        return Scene(picture(canvas), text)

    def ask(self, scene: Scene[str]) -> str:
        return "value of calculation ?"

    def solve(self, scene: Scene[str]) -> str:
        return str(_running(scene.facts)[-1])

    def explain(self, scene: Scene[str]) -> Sequence[Step]:
        return [Step(*step) for step in zip(CELLS, scene.facts, _running(scene.facts), strict=False)]

    def identity(self, scene: Scene[str]) -> bytes:
        return scene.facts.encode()  # another ink does not make another calculation


def _running(text: str) -> list[int]:
    """The value after each glyph; a sign alone changes nothing."""
    values, sign = [int(text[0])], 1
    for glyph in text[1:]:
        if glyph in "+-":
            sign = 1 if glyph == "+" else -1
            values.append(values[-1])
        else:
            values.append(values[-1] + sign * int(glyph))
    return values
