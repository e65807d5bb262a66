"""What equals what. One side comes from a candidate: it is only looked at as far as the expected side goes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SEQUENCES = (list, tuple)


def same_output(got: bytes, expected: bytes, float_tolerance: float | None) -> bool:
    """Line by line, without blanks at their ends and empty lines at the end."""
    got_lines, lines = _lines(got), _lines(expected)
    if len(got_lines) != len(lines):
        return False
    pairs = zip(got_lines, lines, strict=True)
    return all(a == b or (float_tolerance is not None and _same_words(a, b, float_tolerance)) for a, b in pairs)


def _lines(text: bytes) -> list[bytes]:
    lines = [line.rstrip() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_words(got: bytes, expected: bytes, tolerance: float) -> bool:
    got_words, words = got.split(), expected.split()
    if len(got_words) != len(words):
        return False
    return all(a == b or _same_number(a, b, tolerance) for a, b in zip(got_words, words, strict=True))


def _same_number(got: bytes, expected: bytes, tolerance: float) -> bool:
    texts = [word.decode("ascii", "replace") for word in (got, expected)]
    if not all(_NUMBER.fullmatch(text) for text in texts):
        return False
    return close(float(texts[0]), float(texts[1]), tolerance)


def close(got: float, expected: float, tolerance: float) -> bool:
    """Both finite, and apart by at most the tolerance, or the tolerance times the expected one."""
    if not (math.isfinite(got) and math.isfinite(expected)):
        return False
    return abs(got - expected) <= tolerance * max(1.0, abs(expected))


def same_value(got: Any, expected: Any, float_tolerance: float | None) -> bool:
    """`got == expected` for plain data; numbers within the tolerance, if there is one."""
    if isinstance(expected, _SEQUENCES) and type(got) in _SEQUENCES:
        return isinstance(expected, list) == (type(got) is list) and _same_items(got, expected, float_tolerance)
    if isinstance(expected, Mapping) and isinstance(got, dict):
        if len(got) != len(expected):
            return False
        return all(key in got and same_value(got[key], item, float_tolerance) for key, item in expected.items())
    if _is_array(got) or _is_array(expected):
        return _same_arrays(got, expected, float_tolerance)
    if float_tolerance is not None and _is_number(got) and _is_number(expected):
        return bool(got == expected) or _close_numbers(got, expected, float_tolerance)
    return bool(got == expected)


def _same_items(got: Any, expected: Any, tolerance: float | None) -> bool:
    if len(got) != len(expected):
        return False
    return all(same_value(a, b, tolerance) for a, b in zip(got, expected, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _close_numbers(got: float, expected: float, tolerance: float) -> bool:
    try:
        return close(float(got), float(expected), tolerance)
    except OverflowError:  # an int beyond every float
        return False


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy"


def _same_arrays(got: Any, expected: Any, tolerance: float | None) -> bool:
    numpy: Any = sys.modules["numpy"]
    if numpy.shape(got) != numpy.shape(expected) or isinstance(got, numpy.ndarray) != isinstance(
        expected, numpy.ndarray
    ):
        return False
    if tolerance is not None and all(numpy.asarray(side).dtype.kind in "iuf" for side in (got, expected)):
        left, right = numpy.asarray(got, float), numpy.asarray(expected, float)
        apart = numpy.abs(left - right) <= tolerance * numpy.maximum(1.0, numpy.abs(right))
        return bool(((left == right) | (numpy.isfinite(left) & numpy.isfinite(right) & apart)).all())
    return bool(numpy.all(numpy.equal(got, expected)))
