"""Rewards for orders and paths: ordering, permutation (jigsaw), grid path."""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.reward import inline
from rlvlm_rewards.visual.reading import Unreadable, answer_of, is_number, normalise, read_json, unfenced, unparsable

Cell: TypeAlias = tuple[int, int]  # row and column, from 0
_BETWEEN = re.compile(r"->|[→>,;\n]")
_MOST_ITEMS = 1_000
_MOST_CELLS = 10_000
_MOST_CHARACTERS = 100_000
_PARTIAL = 0.2
_WALLS = ("#", "1", 1)
_STEPS = {
    **dict.fromkeys(("u", "up", "↑"), (-1, 0)),
    **dict.fromkeys(("d", "down", "↓"), (1, 0)),
    **dict.fromkeys(("l", "left", "←"), (0, -1)),
    **dict.fromkeys(("r", "right", "→"), (0, 1)),
}
_RUN_OF_MOVES = re.compile(r"[udlr↑↓←→]+")
_GRID = 'give {"grid": ["..#", ...], "start": [row, column], "goal": [row, column]}'


def read_sequence(text: str) -> list[str]:
    """The items, normalised, of a JSON list of texts or numbers, or of a text with `,`, `;`, `>`, `->` or new lines
    between them. Raises Unreadable for none, for an empty one, and for more than 1,000."""
    if len(text) > _MOST_CHARACTERS:
        raise Unreadable(f"it has {len(text)} characters; give at most {_MOST_CHARACTERS}")
    text = unfenced(text)
    parts: Any = read_json(text) if text.startswith("[") else _BETWEEN.split(text)
    if len(parts) > _MOST_ITEMS or not all(isinstance(part, str) or is_number(part) for part in parts):
        raise Unreadable(f"it is no list of at most {_MOST_ITEMS} texts or numbers; give one")
    items = [item for part in parts if (item := normalise(str(part))) is not None]
    if len(items) < max(len(parts), 1):
        raise Unreadable("an item of it is empty; give items with `,` or `>` between them, or a JSON list")
    return items


def _in_place(sample: Sample, reference: Sequence[str]) -> float:
    """The share of items that stand where the reference has them; 0 if the answer is no rearrangement of it."""
    try:
        answer = read_sequence(answer_of(sample))
    except Unreadable:
        return 0.0
    if Counter(answer) != Counter(reference):
        return 0.0
    return sum(one == other for one, other in zip(answer, reference, strict=True)) / len(reference)


@inline
@dataclass(frozen=True)
class Ordering:
    """1 if the items stand in the reference's order, else 0.2 times the share of them that stand in place (Vero).

    An answer that is no rearrangement of the reference's items is worth 0. See read_sequence for the forms of both.
    """

    def __call__(self, sample: Sample) -> Score:
        try:
            reference = read_sequence(sample.answer)
        except Unreadable as error:
            return unparsable(sample, error)
        share = _in_place(sample, reference)
        return Score(value=share if share == 1.0 else _PARTIAL * share)


@inline
@dataclass(frozen=True)
class Permutation:
    """The share of items in place (a jigsaw's tiles); 0 if the answer is no permutation of the reference's items, which
    differ from one another. See read_sequence for the forms of both."""

    def __call__(self, sample: Sample) -> Score:
        try:
            reference = read_sequence(sample.answer)
        except Unreadable as error:
            return unparsable(sample, error)
        if len(set(reference)) < len(reference):
            return unparsable(sample, "an item stands in it twice; give each once")
        return Score(value=_in_place(sample, reference))


@dataclass(frozen=True)
class GridPath:
    """1 if the answer is a path from start to goal, else 0.

    The reference is JSON: {"grid": ["..#", "...", ...], "start": [row, column], "goal": [row, column]}, rows from the
    top and columns from the left, from 0; `#` is a wall, or 1 in a grid of 0 and 1. The answer is moves, as words or
    letters or arrows ("RRD", "right, right, down", ["R", "D"], "→→↓"), or JSON cells from start to goal ([[0, 0],
    [0, 1], ...]). A path steps to neighbours up, down, left or right, never into a wall, off the grid or onto a cell a
    second time, and ends on the goal.

    shortest: only a path of the least length counts.
    """

    shortest: bool = False

    def __call__(self, sample: Sample) -> Score:
        try:
            free, start, goal = read_grid(sample.answer)
            least = distance(free, start, goal)
        except Unreadable as error:
            return unparsable(sample, error)
        try:
            path = read_path(answer_of(sample), start)
        except Unreadable:
            return Score(value=0.0)
        right = is_path(path, free) and path[0] == start and path[-1] == goal
        return Score(value=float(right and (not self.shortest or len(path) == least + 1)))


def read_grid(text: str) -> tuple[frozenset[Cell], Cell, Cell]:
    """The free cells, the start and the goal of a reference. Raises Unreadable."""
    value = read_json(text)
    rows = value.get("grid") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, str | list) and row for row in rows):
        raise Unreadable(f"it has no grid; {_GRID}")
    if not 0 < sum(map(len, rows)) <= _MOST_CELLS:
        raise Unreadable(f"its grid is empty or has more than {_MOST_CELLS} cells; {_GRID}")
    free = frozenset((y, x) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell not in _WALLS)
    start, goal = _cell(value.get("start")), _cell(value.get("goal"))
    for name, cell in (("start", start), ("goal", goal)):
        if cell not in free:
            raise Unreadable(f"{name} is {value.get(name)}, which is no free cell of the grid; {_GRID}")
    return free, start, goal


def _cell(value: Any) -> Cell:
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int for one in value):
        raise Unreadable(f"a cell is two whole numbers; {_GRID}")
    return value[0], value[1]


def distance(free: frozenset[Cell], start: Cell, goal: Cell) -> int:
    """Steps of the shortest path. Raises Unreadable where there is none."""
    steps = {start: 0}
    ahead = deque([start])
    while ahead and goal not in steps:
        y, x = ahead.popleft()
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            cell = (y + dy, x + dx)
            if cell in free and cell not in steps:
                steps[cell] = steps[y, x] + 1
                ahead.append(cell)
    if goal not in steps:
        raise Unreadable(f"no path leads from {start} to {goal}; mend the grid")
    return steps[goal]


def read_path(text: str, start: Cell) -> list[Cell]:
    """The cells of a path given as moves from the start or as cells; see GridPath. Raises Unreadable."""
    if len(text) > _MOST_CHARACTERS:
        raise Unreadable(f"it has {len(text)} characters; give at most {_MOST_CHARACTERS}")
    text = unfenced(text)
    parts: Sequence[Any] = read_json(text) if text.startswith("[") else _split_moves(text)
    if parts and isinstance(parts[0], list):
        return [_cell(part) for part in parts]
    path = [start]
    for part in parts:
        step = _STEPS.get(part.strip().lower()) if isinstance(part, str) else None
        if step is None:
            raise Unreadable("it has a move that is none of up, down, left, right; give moves or cells")
        path.append((path[-1][0] + step[0], path[-1][1] + step[1]))
    return path


def _split_moves(text: str) -> list[str]:
    words = text.lower().replace(",", " ").split()
    if not words:
        raise Unreadable("it has no move; give moves or cells, or [] to stay")
    return [move for word in words for move in (word if _RUN_OF_MOVES.fullmatch(word) else [word])]


def is_path(path: Sequence[Cell], free: frozenset[Cell]) -> bool:
    """Whether the cells are free, differ from one another, and each is a neighbour of the one before."""
    steps = (abs(one[0] - other[0]) + abs(one[1] - other[1]) for one, other in itertools.pairwise(path))
    return len(set(path)) == len(path) and free.issuperset(path) and all(step == 1 for step in steps)
