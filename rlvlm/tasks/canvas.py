"""The canvas of the built-in generators: 64x64 RGB on white, a 4x4 grid of cells of 16 pixels.

One cell is one image token of the tiny policy (patches of 8 pixels, merged 2x2), so that its perception can be learned
in a few hundred steps. Cells are named a1..a4 (first row) to d1..d4, and items fill them in this order.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
CELL = 16
STAMP = 14  # a stamp leaves one pixel on every side of its cell: room for the jitter
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in range(1, 5))

Colour = tuple[int, int, int]


def blank() -> NDArray[np.uint8]:
    """A white canvas, [64, 64, 3]."""
    return np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)


def picture(canvas_HWC: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(canvas_HWC)


def stamp(
    canvas_HWC: NDArray[np.uint8], mask_HW: NDArray[np.float32], colour: Colour, cell: int, rng: random.Random
) -> None:
    """Inks a white cell (0..15) in place: mask [14, 14] in [0, 1] is how much of `colour`, moved by up to one pixel."""
    row, column = divmod(cell, SIDE // CELL)
    top = row * CELL + 1 + rng.randint(-1, 1)
    left = column * CELL + 1 + rng.randint(-1, 1)
    missing_light = 255 - np.array(colour, dtype=np.float32)
    area = canvas_HWC[top : top + STAMP, left : left + STAMP]
    area -= np.rint(mask_HW[..., None] * missing_light).astype(np.uint8)


def drawn_mask(draw: Callable[[ImageDraw.ImageDraw, int], None], oversampling: int = 4) -> NDArray[np.float32]:
    """A smooth mask [14, 14] in [0, 1] of what `draw(pen, scale)` paints in white at `scale` times the size."""
    large = Image.new("L", (STAMP * oversampling, STAMP * oversampling))
    draw(ImageDraw.Draw(large), oversampling)
    small = large.resize((STAMP, STAMP), Image.Resampling.BOX)
    return np.asarray(small).astype(np.float32) / np.float32(255)


def noisy(colour: Colour, rng: random.Random, spread: int = 20) -> Colour:
    """The colour with every channel moved by up to `spread`, within 0..255."""
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def dark(rng: random.Random) -> Colour:
    """A random dark ink: every channel in 0..90."""
    return rng.randint(0, 90), rng.randint(0, 90), rng.randint(0, 90)
