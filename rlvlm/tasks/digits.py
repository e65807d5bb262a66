"""Real handwritten digits: the 1,797 scans of 8x8 pixels that come with scikit-learn, one scan a cell.

A scan is either for training or held out, never both: a held-out task shows handwriting that no training picture has.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlvlm.tasks.canvas import CELLS, STAMP, blank, dark, picture, stamp
from rlvlm.tasks.generator import Generator, Scene, Split, Step


class Scans(NamedTuple):
    """ink: [1797, 14, 14] in [0, 1], 1 is dark. digit: [1797], 0..9. of: split -> digit -> the indices of its scans."""

    ink: NDArray[np.float32]
    digit: NDArray[np.int64]
    of: dict[Split, tuple[tuple[int, ...], ...]]


class DigitFacts(NamedTuple):
    """What each cell shows, which scan shows it, and the digit that is asked for (-1: none)."""

    digits: tuple[int, ...]
    scans: tuple[int, ...]
    asked: int = -1


def split_of_scan(index: int) -> Split:
    """One scan in five, by the hash of its index, is held out."""
    return "held_out" if hashlib.sha256(f"scan {index}".encode()).digest()[0] % 5 == 0 else "train"


@functools.cache
def load_scans() -> Scans:
    """All scans, enlarged to a stamp."""
    from sklearn.datasets import load_digits  # slow to import: only when digits are drawn

    raw = load_digits()
    scans = [Image.fromarray(scan) for scan in raw.images.astype(np.float32)]
    large_SHW = np.stack([np.asarray(scan.resize((STAMP, STAMP), Image.Resampling.BICUBIC)) for scan in scans])
    # Of the 16 grey steps, 3 count as paper and 15 as full ink: enlarging blurs, and this keeps strokes apart.
    ink_SHW = np.clip((large_SHW - 3) / 12, 0, 1).astype(np.float32)
    splits: tuple[Split, ...] = ("train", "held_out")
    indices = [np.flatnonzero(raw.target == digit).tolist() for digit in range(10)]
    of = {split: tuple(tuple(i for i in same if split_of_scan(i) == split) for same in indices) for split in splits}
    return Scans(ink_SHW, raw.target, of)


class DigitCells(Generator[DigitFacts]):
    """Digits in the cells a1, a2, ...; subclasses say which digits, and what is asked about them."""

    def values(self, rng: random.Random, level: int) -> tuple[list[int], int]:
        """The digits to show and the one that is asked for (-1: none)."""
        raise NotImplementedError

    def draw(self, rng: random.Random, level: int, split: Split) -> Scene[DigitFacts]:
        digits, asked = self.values(rng, level)
        scans = load_scans()
        chosen = [rng.choice(scans.of[split][digit]) for digit in digits]
        canvas = blank()
        for cell, index in enumerate(chosen):
            stamp(canvas, scans.ink[index], dark(rng), cell, rng)
        return Scene(picture(canvas), DigitFacts(tuple(digits), tuple(chosen), asked))

    def running(self, facts: DigitFacts) -> list[int]:
        """The result after each digit."""
        raise NotImplementedError

    def solve(self, scene: Scene[DigitFacts]) -> str:
        return str(self.running(scene.facts)[-1])

    def explain(self, scene: Scene[DigitFacts]) -> Sequence[Step]:
        digits = scene.facts.digits
        return [Step(*step) for step in zip(CELLS, digits, self.running(scene.facts), strict=False)]


class DigitsLargest(DigitCells):
    """The largest of 2, 4, 6, 8, 10 digits."""

    name: ClassVar[str] = "digits_largest"

    def values(self, rng: random.Random, level: int) -> tuple[list[int], int]:
        # The largest of ten even digits is a 9 in two of three pictures, and a guess would pay: draw the largest first.
        largest = rng.randint(1, 9)
        digits = [rng.randint(0, largest) for _ in range(2 * level - 1)] + [largest]
        rng.shuffle(digits)
        return digits, -1

    def running(self, facts: DigitFacts) -> list[int]:
        return list(accumulate(facts.digits, max))

    def ask(self, scene: Scene[DigitFacts]) -> str:
        return "largest digit ?"


class DigitsSum(DigitCells):
    """The sum of 2 to 6 digits."""

    name: ClassVar[str] = "digits_sum"

    def values(self, rng: random.Random, level: int) -> tuple[list[int], int]:
        return [rng.randint(0, 9) for _ in range(level + 1)], -1

    def running(self, facts: DigitFacts) -> list[int]:
        return list(accumulate(facts.digits))

    def ask(self, scene: Scene[DigitFacts]) -> str:
        return "sum of digits ?"


class DigitsCount(DigitCells):
    """How often one digit occurs among 3, 5, 7, 9, 11."""

    name: ClassVar[str] = "digits_count"

    def values(self, rng: random.Random, level: int) -> tuple[list[int], int]:
        asked = rng.randint(0, 9)
        others = [digit for digit in range(10) if digit != asked]
        return [asked if rng.random() < 0.35 else rng.choice(others) for _ in range(2 * level + 1)], asked

    def running(self, facts: DigitFacts) -> list[int]:
        return list(accumulate(int(digit == facts.asked) for digit in facts.digits))

    def ask(self, scene: Scene[DigitFacts]) -> str:
        return f"how many {scene.facts.asked} ?"
