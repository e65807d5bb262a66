"""Reads one answer as mathematics and compares two, on Math-Verify. Runs in the reader processes only: it may hang."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

Parsed = Any  # a sympy object, or a text where nothing mathematical was found

# Priority 0: a phrase such as "final answer is" inside the box does not take over.
_BOX = [LatexExtractionConfig(boxed_match_priority=0)]
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{4,}")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'.,-]+[^\W\d_]+)*\.?")
_PROSE = re.compile(r"(?<![\\\w])[A-Za-z]{2,}[\s,:]+(?:[A-Za-z]{2,}\b|[$\\(-]?\S)|\$|\\\(|\\\[")
_SHORT = 100
_TOLERANCE = 1e-5
_UNEVALUATED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?(?:/\d+)?|\\[dt]?frac\{?\d+\}?\{?\d+\}?)")
# What people write and Math-Verify misreads: 2 1/2 as 3/2, 1.5e3 with Euler's number, pi as p*i, 3 \quad 4 as their
# sum, 3 4 as their product.
_SPELLINGS = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\s*,?\s*\\q?quad\s*"), ", "),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)\b"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\w./])(\d+) +(\d+)/(\d+)(?![\w./])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d ])"), lambda match: match[0].replace(" ", "")),
    (re.compile(r"(?<=\d) +(?=\d)"), ", "),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|oo|inf)(?![A-Za-z])|∞"), r"\\infty "),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
)


@lru_cache(maxsize=4096)
def read_reference(text: str) -> Parsed | None:
    """The reference; None if it cannot be read, or cannot be compared even with itself (0/0).

    It is also compared with 0: a reference that hangs beside anything is not blamed on the answer.
    """
    reference = read_box(text)
    if reference is None or not verify(reference, reference, timeout_seconds=None):
        return None
    verify(sympy.Integer(0), reference, timeout_seconds=None)
    return reference


def compare_with_numbers(answer: Parsed) -> None:
    """Compares with numbers of two kinds, which Math-Verify handles differently: does this answer hang beside
    anything?"""
    for number in (sympy.Integer(0), sympy.sqrt(2)):
        verify(number, answer, timeout_seconds=None)


def read_answer(text: str, boxed: bool) -> Parsed | None:
    """One candidate, or None. boxed: the text is the content of a box; otherwise it may be a sentence, whose last
    expression counts. A short text without an expression is taken whole: no solution."""
    if boxed or _words(text) is not None or not _PROSE.search(text):
        return read_box(text)
    last = _first(parse(text, parsing_timeout=None))
    return read_box(text) if last is None and len(text) <= _SHORT else last


def read_box(text: str) -> Parsed | None:
    """What stands in a box or a data set's answer column: an expression, a relation, a set, a matrix, a word."""
    words = _words(text)
    if words is not None:
        return words
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return _first(parse(f"\\boxed{{{text.strip(' ,')}}}", _BOX, parsing_timeout=None))


def same(reference: Parsed, answer: Parsed) -> bool:
    """Whether the answer means what the reference means.

    An integral, sum, product, limit or derivative left standing is the question, not its answer, unless the reference
    has one. Numbers must agree to 1e-5 of their size: Math-Verify alone takes 0 for 1e-7.
    """
    if isinstance(reference, str) or isinstance(answer, str):
        return isinstance(reference, str) and isinstance(answer, str) and reference.strip() == answer.strip()
    if _has_unevaluated(answer) and not _has_unevaluated(reference):
        return False
    return bool(verify(reference, answer, timeout_seconds=None)) and not _far_apart(reference, answer)


def is_restated(reference: Parsed, answer: Parsed, text: str) -> bool:
    """Whether an answer that stands in the prompt word for word is the question itself: 3+4 for 7. It is, if it takes
    more operations than the reference does; a number or a fraction never is."""
    if isinstance(reference, str) or isinstance(answer, str) or _PLAIN_NUMBER.fullmatch(re.sub(r"\s", "", text)):
        return False
    return bool(sympy.count_ops(answer) > sympy.count_ops(reference))


def _words(text: str) -> str | None:
    """A text that is words (one of them of four letters: shorter ones may be a product of symbols), case folded. As
    mathematics East would be E*a*s*t and equal Seat."""
    bare = " ".join(_TEXT.sub(r"\1", text).strip(" $").split()).casefold()
    if _WORD.search(bare) and _WORDS.fullmatch(bare) and "infinity" not in bare:
        return bare.rstrip(".")
    return None


def _first(candidates: list[Parsed]) -> Parsed | None:
    """Math-Verify gives the parsed object and, as a second chance, the text; an answer has one chance."""
    return candidates[0] if candidates else None


def _has_unevaluated(parsed: Parsed) -> bool:
    return bool(parsed.has(*_UNEVALUATED))


def _far_apart(reference: Parsed, answer: Parsed) -> bool:
    """Two numbers that differ by more than the tolerance, in any unit of percent: 50% is 50 and 0.5."""
    left, right = _number(reference), _number(answer)
    if left is None or right is None:
        return False
    percent = any(sympy.UnevaluatedExpr(sympy.Rational(1, 100)) in one.args for one in (reference, answer))
    scales = (1, 100, sympy.Rational(1, 100)) if percent else (1,)
    return not any(abs(left * scale - right) <= _TOLERANCE * abs(left * scale) for scale in scales)


def _number(parsed: Parsed) -> Any | None:
    """As a finite complex number, or None for what is none."""
    if isinstance(parsed, sympy.Eq):
        parsed = parsed.rhs
    if not isinstance(parsed, sympy.Expr) or not parsed.is_number:
        return None
    value = parsed.doit().evalf(15)
    return value if value.is_finite and value.is_number else None
