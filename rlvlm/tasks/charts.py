"""Bar charts: up to four bars of height 0 to 8, named by the cells of the axis, d1 to d4. A unit is 8 pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

from rlvlm.tasks.canvas import CELL, CELLS, SIDE, Colour, blank, noisy, picture
from rlvlm.tasks.generator import Generator, Scene, Split, Step

UNIT = 8
HIGHEST = SIDE // UNIT
BAR = 10  # width in pixels
COLUMNS = CELLS[-4:]
PALETTE: tuple[Colour, ...] = ((200, 60, 50), (50, 90, 200), (40, 140, 70), (150, 70, 170), (200, 120, 20))
GRID: Colour = (215, 215, 215)
AXIS: Colour = (60, 60, 60)

QUESTIONS = {"tallest": "tallest bar ?", "sum": "sum of bars ?", "difference": "difference tallest shortest bar ?"}
LEVELS = {1: (2, "tallest"), 2: (3, "tallest"), 3: (3, "sum"), 4: (4, "sum"), 5: (4, "difference")}


class ChartFacts(NamedTuple):
    """The bars' heights from left to right, and the kind of question."""

    values: tuple[int, ...]
    kind: str


class BarChart(Generator[ChartFacts]):
    """The tallest of 2 or 3 bars, the sum of 3 or 4, the difference between the tallest and the shortest of 4."""

    name: ClassVar[str] = "bar_chart"

    def draw(self, rng: random.Random, level: int, split: Split) -> Scene[ChartFacts]:
        bars, kind = LEVELS[level]
        values = tuple(rng.randint(0, HIGHEST) for _ in range(bars))
        canvas = blank()
        for column, value in enumerate(values):
            left = column * CELL + (CELL - BAR) // 2 + rng.randint(-1, 1)
            canvas[SIDE - UNIT * value :, left : left + BAR] = noisy(rng.choice(PALETTE), rng)
        # The grid lies over the bars and cuts them into units, so that a person can count them.
        canvas[::UNIT, : bars * CELL] = GRID
        canvas[-1, : bars * CELL] = AXIS
        return Scene(picture(canvas), ChartFacts(values, kind))

    def ask(self, scene: Scene[ChartFacts]) -> str:
        return QUESTIONS[scene.facts.kind]

    def solve(self, scene: Scene[ChartFacts]) -> str:
        return str(_running(scene.facts)[-1])

    def explain(self, scene: Scene[ChartFacts]) -> Sequence[Step]:
        return [Step(*step) for step in zip(COLUMNS, scene.facts.values, _running(scene.facts), strict=False)]

    def identity(self, scene: Scene[ChartFacts]) -> bytes:
        return repr(scene.facts.values).encode()  # colours and jitter do not make another chart


def _running(facts: ChartFacts) -> list[int]:
    tallest = list(accumulate(facts.values, max))
    if facts.kind == "tallest":
        return tallest
    if facts.kind == "sum":
        return list(accumulate(facts.values))
    return [high - low for high, low in zip(tallest, accumulate(facts.values, min), strict=True)]
