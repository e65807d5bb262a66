"""Orders and paths. Paths are checked against a walk and a search written another way."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Score
from rlvlm_rewards.visual.reading import Unreadable
from rlvlm_rewards.visual.sequences import read_sequence

from tests.rewards.visual.scoring import judge, value


@pytest.mark.parametrize(
    "text",
    [
        "a, B,c d",
        "A > b > c  d",
        "a->b->c d",
        "a → b → C D",
        "a\nb\nc d",
        "a; b; c d",
        '["a", "B", "c d"]',
        "```\na,b,c d\n```",
    ],
)
def test_forms_of_a_sequence(text: str) -> None:
    assert read_sequence(text) == ["a", "b", "c d"]


def test_numbers_are_items() -> None:
    assert read_sequence("[2, 0, 1]") == read_sequence("2, 0, 1") == ["2", "0", "1"]


@pytest.mark.parametrize(
    "text", ["", " ", "[]", "[[1], [2]]", "[1, null]", "[true]", "a,,b", "a,", '["a", ""]', "[1", "x," * 2_000]
)
def test_what_is_no_sequence(text: str) -> None:
    with pytest.raises(Unreadable):
        read_sequence(text)


@pytest.mark.parametrize(
    ("answer", "reference", "ordering", "permutation"),
    [
        ("A, B, C, D", "A, B, C, D", 1.0, 1.0),
        ("A, B, D, C", "A, B, C, D", 0.1, 0.5),
        ("B, A, D, C", "A, B, C, D", 0.0, 0.0),
        ("so</think>\\boxed{[2, 0, 1]}", "2 0 1", 0.0, 0.0),
        ("[2, 1, 0]", "[0, 1, 2]", 0.2 / 3, 1 / 3),
        ("A, B, C", "A, B, C, D", 0.0, 0.0),
        ("A, B, C, D, A", "A, B, C, D", 0.0, 0.0),
        ("A, B, C, C", "A, B, C, D", 0.0, 0.0),
        ("A, A, A, A", "A, B, C, D", 0.0, 0.0),
        ("A, B, C, E", "A, B, C, D", 0.0, 0.0),
        ("A, B, C, D; B, A, C, D", "A, B, C, D", 0.0, 0.0),
        ("", "A, B, C, D", 0.0, 0.0),
    ],
)
def test_orders_by_hand(answer: str, reference: str, ordering: float, permutation: float) -> None:
    assert value("ordering", answer, reference) == pytest.approx(ordering)
    assert value("permutation", answer, reference) == pytest.approx(permutation)


@given(st.permutations(range(7)))
def test_orders_count_what_is_in_place(order: list[int]) -> None:
    fixed = sum(position == item for position, item in enumerate(order))
    answer, reference = json.dumps(order), json.dumps(list(range(7)))
    assert value("permutation", answer, reference) == pytest.approx(fixed / 7)
    assert value("ordering", answer, reference) == pytest.approx(1.0 if fixed == 7 else 0.2 * fixed / 7)


def test_an_order_may_hold_equals_but_a_permutation_not() -> None:
    assert judge("ordering", "a, b, a", "a, b, a") == Score(value=1.0)
    assert "an item stands in it twice; give each once" in judge("permutation", "a, b, a", "a, b, a").detail


@pytest.mark.parametrize("name", ["ordering", "permutation", "grid_path"])
def test_an_unreadable_reference_is_a_failure_that_names_the_row(name: str) -> None:
    score = judge(name, "a, b", "[[1], 2")
    assert score.failure is Failure.UNPARSABLE_REFERENCE and "row-7" in score.detail


MAZE = {"grid": ["..#", "#..", "..."], "start": [0, 0], "goal": [2, 2]}


def path(answer: str, maze: object = MAZE, **options: bool) -> float:
    return value("grid_path", answer, json.dumps(maze), **options)


@pytest.mark.parametrize(
    "answer",
    [
        "RDRD",
        "r d r d",
        "R, D, R, D",
        "right, down, right, down",
        "Right Down Right Down",
        "→↓→↓",
        "→ ↓ → ↓",
        '["R", "D", "right", "down"]',
        "[[0, 0], [0, 1], [1, 1], [1, 2], [2, 2]]",
        "so</think>\\boxed{RDDR}",
        "```\nRDRD\n```",
    ],
)
def test_paths(answer: str) -> None:
    assert path(answer) == path(answer, shortest=True) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "RD",  # ends before the goal
        "RDRDD",  # leaves the grid
        "RRDD",  # into a wall
        "RDRDLR",  # over a cell twice
        "RLRDRD",
        "RDRDRDRD",
        "[[0, 1], [1, 1], [1, 2], [2, 2]]",  # does not begin at the start
        "[[0, 0], [2, 2]]",  # jumps
        "[[0, 0], [1, 1], [2, 2]]",  # diagonal
        "[[0, 0], [0, 1], [1, 1], [1, 2], [2, 2], [2, 2]]",
        "[[0, 0], [0, 1], [1, 1], [1, 2], [2, 2.0]]",
        "[[0, 0], 1]",
        '[[0, 0], "R"]',
        '["R", [1, 1]]',
        "[0, 1]",
        "RDRD or RDDR",
        "north",
        "RDRX",
        '{"path": "RDRD"}',
        "U" * 1_000_000,
    ],
)
def test_what_is_no_path(answer: str) -> None:
    assert path(answer) == 0.0


def test_a_detour_is_a_path_but_not_the_shortest() -> None:
    maze = {"grid": [[0, 0, 0], [0, 0, 0]], "start": [0, 0], "goal": [0, 2]}
    assert path("DRRU", maze) == 1.0 and path("DRRU", maze, shortest=True) == 0.0
    assert path("RR", maze, shortest=True) == 1.0


@pytest.mark.parametrize("grid", [["..#"], ["0 1"], [[0, 0, 1]], [[".", ".", "#"]]])
def test_walls(grid: object) -> None:
    assert path("R", {"grid": grid, "start": [0, 0], "goal": [0, 1]}) == 1.0
    assert path("RR", {"grid": grid, "start": [0, 0], "goal": [0, 1]}) == 0.0
    score = judge("grid_path", "RR", json.dumps({"grid": grid, "start": [0, 0], "goal": [0, 2]}))
    assert "goal is [0, 2], which is no free cell of the grid" in score.detail


def test_to_be_there_already() -> None:
    there = {"grid": ["."], "start": [0, 0], "goal": [0, 0]}
    assert path("[]", there) == path("[[0, 0]]", there) == 1.0
    assert path("", there) == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": []}, "its grid is empty"),
        ({"grid": "..."}, "it has no grid"),
        ({"grid": ["." * 101] * 100}, "more than 10000 cells"),
        ({"start": [0]}, "a cell is two whole numbers"),
        ({"start": [True, False]}, "a cell is two whole numbers"),
        ({"goal": [0, 9]}, "goal is [0, 9], which is no free cell"),
        ({"goal": [-1, 0]}, "goal is [-1, 0], which is no free cell"),
        ({"grid": [".##", "###", "..."]}, "no path leads from (0, 0) to (2, 2); mend the grid"),
    ],
)
def test_a_maze_that_cannot_be_is_a_failure(change: dict[str, object], said: str) -> None:
    score = judge("grid_path", "RDRD", json.dumps({**MAZE, **change}))
    assert score.failure is Failure.UNPARSABLE_REFERENCE and said in score.detail and "; " in score.detail


def shortest(free: set[tuple[int, int]], start: tuple[int, int], goal: tuple[int, int]) -> float:
    """By relaxing all cells until nothing changes (Bellman and Ford)."""
    far = {cell: 0.0 if cell == start else math.inf for cell in free}
    for _ in free:
        for y, x in free:
            near = (far.get(cell, math.inf) for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)))
            far[y, x] = min(far[y, x], 1 + min(near))
    return far[goal]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=3),
    moves=st.text("UDLR", max_size=8),
)
def test_any_walk_in_any_maze(rows: list[list[bool]], moves: str) -> None:
    rows[0][0] = rows[2][2] = False
    free = {(y, x) for y in range(3) for x in range(3) if not rows[y][x]}
    walk = [(0, 0)]
    for move in moves:
        y, x = walk[-1]
        walk.append({"U": (y - 1, x), "D": (y + 1, x), "L": (y, x - 1), "R": (y, x + 1)}[move])
    right = walk[-1] == (2, 2) and set(walk) <= free and len(set(walk)) == len(walk)
    maze = json.dumps({"grid": ["".join(".#"[wall] for wall in row) for row in rows], "start": [0, 0], "goal": [2, 2]})
    least = shortest(free, (0, 0), (2, 2))
    for only_shortest in (False, True):
        score = judge("grid_path", moves or "[]", maze, shortest=only_shortest)
        if least == math.inf:
            assert score.failure is Failure.UNPARSABLE_REFERENCE
        else:
            assert score.value == float(right and (not only_shortest or len(moves) == least))
