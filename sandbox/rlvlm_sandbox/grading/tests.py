"""Tests as their author gives them: of a program's output, of a function's results, or as assert statements."""

from __future__ import annotations

import ast
import datetime
import decimal
import fractions
import keyword
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlvlm_sandbox.grading.inside.wire import NoLinks, WireError, encode

StdioCase = tuple[str | bytes, str | bytes]
Call = tuple[Sequence[Any], Any] | tuple[Sequence[Any], Mapping[str, Any], Any]


_WRITTEN = (
    bool,
    float,
    complex,
    bytes,
    bytearray,
    range,
    decimal.Decimal,
    fractions.Fraction,
    datetime.date,
    type(None),
)


class InvalidTests(ValueError):
    """The tests cannot be run: the author's error, with the line where there is one. It says nothing of a candidate."""


@dataclass(frozen=True)
class StdioTests:
    """Programs that read stdin and write stdout: one run for each case (stdin, expected stdout).

    Blanks at the ends of lines and empty lines at the end are ignored. float_tolerance: words that are finite numbers
    on both sides may differ by so much, absolutely or relative to the expected one. checker: Python source of
    `check(stdin, stdout, expected)`, which gets texts and returns a bool, or a number from 0 to 1; then nothing else is
    compared. It runs in a sandbox of its own. Raises InvalidTests.
    """

    cases: Sequence[StdioCase]
    float_tolerance: float | None = None
    checker: str | None = None

    def __post_init__(self) -> None:
        _check_cases(self.cases)
        for number, case in enumerate(self.cases, 1):
            if len(case) != 2 or not all(isinstance(text, (str, bytes)) for text in case):
                raise InvalidTests(f"case {number} is {brief(case)}; give (stdin, expected stdout), texts or bytes")
            _check_texts(number, case)
        _check_tolerance(self.float_tolerance)
        if self.checker is not None:
            tree = parse(self.checker, "checker")
            if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
                raise InvalidTests("checker: it does not define check(stdin, stdout, expected)")


@dataclass(frozen=True)
class CallTests:
    """Results of a function: cases are (args, expected) or (args, kwargs, expected), of plain data.

    A result is right if it equals the expected value as Python's `==` says for plain data; an iterator is taken for a
    list. float_tolerance: numbers may differ by so much, absolutely or relative to the expected one. All calls are
    made in one process. Raises InvalidTests.
    """

    entry_point: str
    cases: Sequence[Call]
    float_tolerance: float | None = None
    calls: tuple[tuple[Any, list[Any]], ...] = field(init=False, repr=False, compare=False)
    expected: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.entry_point)
        _check_cases(self.cases)
        _check_tolerance(self.float_tolerance)
        calls = tuple(_encoded(number, case) for number, case in enumerate(self.cases, 1))
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "expected", tuple(case[-1] for case in self.cases))


@dataclass(frozen=True)
class AssertTests:
    """A Python program that calls `entry_point` and asserts: it passes if it runs to its end.

    Where `source` defines `check(candidate)` and does not call it, it is called with the function. sys.exit(0), as by
    unittest.main, passes too. prelude: the author's own source that the tests need (helpers, classes); the candidate
    finds it too. split: each statement outside functions that holds an assert is a case of its own; of `check`, each
    statement inside.

    The function runs in another process than the tests. Arguments and results go over as plain data, instances of the
    author's classes included; functions, iterators and other objects stay where they are and are called there. What the
    function changes in its arguments is seen after the statement that calls it (at once if it returns None). Not seen
    are what it prints, the files it writes and the random numbers it draws; nor do its objects compare themselves with
    the tests' values. Raises InvalidTests.
    """

    source: str
    entry_point: str
    prelude: str = ""
    split: bool = False
    checks: str | None = field(init=False, repr=False, compare=False)  # the argument's name of the check to be called

    def __post_init__(self) -> None:
        check_name(self.entry_point)
        tree = parse(self.source, "tests")
        parse(self.prelude, "prelude")
        object.__setattr__(self, "checks", _uncalled_check(tree))


Tests = StdioTests | CallTests | AssertTests


def parse(source: str, name: str) -> ast.Module:
    """Compiles the author's source. Raises InvalidTests with the line."""
    if not isinstance(source, str):
        raise InvalidTests(f"{name}: it is {brief(source)}; give source text")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, name, "exec", dont_inherit=True)
            return ast.parse(source, name)
    except SyntaxError as error:
        place = f"{name}, line {error.lineno}" if error.lineno else name  # null bytes have no line
        raise InvalidTests(f"{place}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # lone surrogates, nested too deep
        raise InvalidTests(f"{name}: it does not compile: {error}") from error


def check_name(entry_point: str) -> None:
    if not isinstance(entry_point, str) or not entry_point.isidentifier() or keyword.iskeyword(entry_point):
        raise InvalidTests(f"entry_point is {brief(entry_point)}; give the name of a function")


class _Brief(reprlib.Repr):
    """Bounded in depth as in width: what is shared inside a value may be 2**40 values when it is written out."""

    def repr_instance(self, x: Any, level: int) -> str:
        return super().repr_instance(x, level) if isinstance(x, _WRITTEN) else f"<{type(x).__name__}>"


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """A value in a message, shortened."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # an int with more digits than Python writes
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 200 else text[:197] + "..."


def _check_cases(cases: Sequence[Any]) -> None:
    if not isinstance(cases, (list, tuple)) or not cases:
        raise InvalidTests(f"cases is {brief(cases)}; give a list of at least one")
    for number, case in enumerate(cases, 1):
        if not isinstance(case, (list, tuple)):
            raise InvalidTests(f"case {number} is {brief(case)}; give a tuple")


def _check_texts(number: int, case: StdioCase) -> None:
    try:
        for text in case:
            as_bytes(text)
    except UnicodeEncodeError as error:
        raise InvalidTests(f"case {number}: {error}") from error


def as_bytes(text: str | bytes) -> bytes:
    """As a program reads and writes it."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InvalidTests(f"float_tolerance is {tolerance!r}; give a number from 0, or None")


def _encoded(number: int, case: Sequence[Any]) -> tuple[Any, list[Any]]:
    if len(case) not in (2, 3) or not isinstance(case[0], (list, tuple)):
        raise InvalidTests(f"case {number} is {brief(case)}; give (args, expected) or (args, kwargs, expected)")
    kwargs = case[1] if len(case) == 3 else {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise InvalidTests(f"case {number}: kwargs is {brief(kwargs)}; give a dict by names")
    try:
        encode(case[-1], NoLinks())
        value, entries, _ = encode((tuple(case[0]), tuple(kwargs.items())), NoLinks())
    except WireError as error:
        raise InvalidTests(f"case {number}: {error}; give plain data") from error
    return value, entries


def _uncalled_check(tree: ast.Module) -> str | None:
    """The name of the argument of `check`, if the source defines it and leaves the call to whoever runs it."""
    argument = None
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if isinstance(statement, ast.FunctionDef) and statement.name == "check" and statement.args.args:
                argument = statement.args.args[0].arg
        elif any(isinstance(node, ast.Name) and node.id == "check" for node in ast.walk(statement)):
            return None
    return argument
