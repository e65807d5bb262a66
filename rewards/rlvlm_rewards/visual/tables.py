"""A reward for the table behind a chart."""

from __future__ import annotations

import csv
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.visual.answers import parse_number
from rlvlm_rewards.visual.reading import (
    MOST,
    Unreadable,
    answer_of,
    is_number,
    normalise,
    read_json,
    unfenced,
    unparsable,
)

Value: TypeAlias = Fraction | str
Row: TypeAlias = list[Any]  # cells as read: text, number, or None for an empty one
_MOST_CHARACTERS = 100_000
_MOST_HEADERS = 500  # rows or columns: they are compared pair by pair
_UNIT = re.compile(r"[$€£¥%]|\\[$%]")
_NO_DIGITS = re.compile(r"[^0-9]+")
_RULE = re.compile(r":?-+:?")
_LIKE = 0.5  # headers less alike than this are of different things; tau of RMS
_ORDER = 1e-6  # of equally good assignments of equal headers, the one that keeps the order
_FORMS = "give a markdown table, CSV, or JSON"


@dataclass(frozen=True, slots=True)
class Table:
    """What a table says. rows, columns: the headers. values: (row, column) -> value, for the cells that have one."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], Value]

    def transposed(self) -> Table:
        return Table(self.columns, self.rows, {(column, row): value for (row, column), value in self.values.items()})


@dataclass(frozen=True)
class ChartTable:
    """F1 of the cells of a table, after RMS-F1 (relative mapping similarity, Liu et al. 2023, DePlot).

    Row headers of answer and reference are assigned one to one so that the sum of their similarities is largest; so are
    column headers. The similarity is 1 - normalised Levenshtein distance, but 0 where below 0.5, and where digits
    differ: 2010 is not 2011. A cell under matching headers counts the product of the two similarities if its value is
    right, and 0 if not. With S the sum of these, n cells in the answer and m in the reference, F1 = 2 S / (n + m).
    Parts: precision, recall. A table that is turned on its side counts as well as it would upright.

    A table is markdown, CSV (commas or tabs), or JSON: {row: {column: value}}, a list of objects whose first key is
    that of the row header, or a list of lists. Otherwise its first line has the column headers and its first column the
    row headers; no line is longer than the first. Nothing but the table stands in the answer. Empty cells are none;
    signs of currency and per cent in a cell do not count. An answer with more than ten times the reference's cells is
    worth 0.

    tolerance: a number is right within this share of the reference; a text is right if equal after normalisation.
    """

    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance!r}; give a share from 0 to below 1")

    def __call__(self, sample: Sample) -> Score:
        try:
            wanted = read_table(sample.answer)
        except Unreadable as error:
            return unparsable(sample, error)
        try:
            found = read_table(answer_of(sample), MOST * len(wanted.values))
        except Unreadable:
            return Score(value=0.0)
        return max((self.f1(one, wanted) for one in (found, found.transposed())), key=lambda score: score.value or 0.0)

    def f1(self, found: Table, wanted: Table) -> Score:
        """F1 of a table against another, as they stand."""
        rows, columns = matching(found.rows, wanted.rows), matching(found.columns, wanted.columns)
        total = 0.0
        for (row, column), value in found.values.items():
            (to_row, row_likeness), (to_column, column_likeness) = rows[row], columns[column]
            reference = wanted.values.get((to_row, to_column))
            if reference is not None and self._is_right(value, reference):
                total += row_likeness * column_likeness
        precision, recall = total / len(found.values), total / len(wanted.values)
        f1 = min(2 * total / (len(found.values) + len(wanted.values)), 1.0)
        return Score(value=f1, parts={"precision": min(precision, 1.0), "recall": min(recall, 1.0)})

    def _is_right(self, value: Value, reference: Value) -> bool:
        if isinstance(value, str) or isinstance(reference, str):
            return value == reference
        return abs(value - reference) <= Fraction(str(self.tolerance)) * abs(reference)


def matching(found: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, float]]:
    """For each header found: the index of the header wanted that it stands for (-1 for none), and their similarity."""
    likeness = np.asarray(cdist(found, wanted, scorer=Levenshtein.normalized_similarity, dtype=np.float64))
    digits, others = (
        np.array([_NO_DIGITS.sub("", header) for header in headers], object) for headers in (found, wanted)
    )
    likeness[(likeness < _LIKE) | (digits[:, None] != others[None])] = 0.0
    apart = np.abs(np.arange(len(found))[:, None] - np.arange(len(wanted))[None])
    matched = [(-1, 0.0)] * len(found)
    for one, other in zip(*linear_sum_assignment(likeness - _ORDER * apart, maximize=True), strict=True):
        if likeness[one, other]:
            matched[one] = (int(other), float(likeness[one, other]))
    return matched


def read_table(text: str, most: int = _MOST_HEADERS**2) -> Table:
    """See ChartTable. Raises Unreadable, also for a table without a value or with more than `most` cells."""
    if len(text) > _MOST_CHARACTERS:
        raise Unreadable(f"it has {len(text)} characters; give at most {_MOST_CHARACTERS}")
    text = unfenced(text)
    grid = _json_rows(read_json(text)) if text.startswith(("[", "{")) else _text_rows(text)
    width = len(grid[0]) if grid else 0
    if any(len(row) > width for row in grid):
        raise Unreadable("a line of it has more cells than the first, which has the headers")
    if not 1 < len(grid) <= _MOST_HEADERS or not 1 < width <= _MOST_HEADERS:
        raise Unreadable(f"it has {len(grid)} lines and {width} columns; give 2 to {_MOST_HEADERS} of both")
    cells = {(y, x): cell for y, row in enumerate(grid[1:]) for x, cell in enumerate(row[1:]) if cell not in (None, "")}
    if len(cells) > most:
        raise Unreadable(f"it has {len(cells)} cells; give at most {most}")
    values = {place: value for place, cell in cells.items() if (value := _value(cell)) is not None}
    if not values:
        raise Unreadable(f"it has no value in any cell; {_FORMS} with values")
    return Table(
        [_header(row[0] if row else None) for row in grid[1:]], [_header(cell) for cell in grid[0][1:]], values
    )


def _header(cell: Any) -> str:
    return normalise(str(cell)) or "" if cell is not None else ""


def _value(cell: Any) -> Value | None:
    if is_number(cell):
        return Fraction(str(cell))
    number = parse_number(_UNIT.sub("", str(cell)))
    return number if number is not None else normalise(str(cell))


def _json_rows(value: Any) -> list[Row]:
    """Lines, the first with the headers, of the JSON forms of a table. Raises Unreadable."""
    named = isinstance(value, dict)
    lines = list(value.values()) if named else value
    if lines and all(isinstance(line, dict) for line in lines):
        columns = list(dict.fromkeys(key for line in lines for key in line))
        if max(len(lines), len(columns)) > _MOST_HEADERS:
            raise Unreadable(f"it has {len(lines)} rows and {len(columns)} columns; give at most {_MOST_HEADERS}")
        rows = [columns, *([line.get(key) for key in columns] for line in lines)]
        if named:
            rows = [[name, *row] for name, row in zip(["", *value], rows, strict=True)]
    elif not named and all(isinstance(line, list) for line in lines):
        rows = lines
    else:
        raise Unreadable(f"{reprlib.repr(value)} is no table; give a list of objects or lists, or an object of objects")
    if any(isinstance(cell, list | dict) for row in rows for cell in row):
        raise Unreadable("a cell of it is a list or an object; give a text or a number")
    return rows


def _text_rows(text: str) -> list[Row]:
    """Lines of a markdown table or of CSV. Raises Unreadable."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all("|" in line for line in lines):
        rows = [_markdown_cells(line) for line in lines]
        return [row for row in rows if not all(_RULE.fullmatch(cell) for cell in row)]
    try:
        return [*csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",", skipinitialspace=True)] if lines else []
    except csv.Error as error:
        raise Unreadable(f"it is no CSV ({error}); {_FORMS}") from error


def _markdown_cells(line: str) -> Row:
    cells = line.replace(r"\|", "\0").removeprefix("|").removesuffix("|").split("|")
    return [cell.replace("\0", "|").strip() for cell in cells]
