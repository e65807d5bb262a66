"""Reads texts that anybody may have written: nothing here raises but `Unreadable`, and all of it takes linear time."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, NoReturn

from rlvlm_rewards.answers import final_answer
from rlvlm_rewards.records import Failure, Sample, Score

MOST = 10  # times what the reference has; more is spam, whose precision would be below a tenth anyway
_LONGEST_JSON = 200_000  # characters
_LONGEST_TEXT = 10_000
_MARKS = re.compile(rb"[^\0]{31}")  # more combining marks in a row than the Stream-Safe Text Format (UAX 15) knows


class Unreadable(ValueError):
    """A text does not say what it should; the message says why, and after a semicolon what it should say."""


def answer_of(sample: Sample) -> str:
    """The final answer, or an empty text where there is none."""
    return final_answer(sample.completion, sample.thinking) or ""


def unparsable(sample: Sample, why: object) -> Score:
    """The failure that a reference which cannot be read is. why: what is wrong, and after a semicolon the mend."""
    detail = f"task {sample.task!r}: reference answer {sample.answer!r:.300}: {why}"
    return Score(failure=Failure.UNPARSABLE_REFERENCE, detail=detail)


def normalise(text: str) -> str | None:
    """NFKC, case folded, white space folded to single blanks; None if nothing is left, or for more than 10,000
    characters or 30 combining marks in a row (ordering these takes quadratic time)."""
    if len(text) > _LONGEST_TEXT or not stream_safe(text):
        return None
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split()) or None


def stream_safe(text: str) -> bool:
    """Whether no more than 30 combining marks stand in a row, so that normalising takes linear time."""
    return text.isascii() or not _MARKS.search(bytes(map(unicodedata.combining, text)))


def unfenced(text: str) -> str:
    """What stands in the ``` block, where a text has just one; else the text itself."""
    blocks = text.split("```")
    if len(blocks) != 3:
        return text.strip()
    language, newline, rest = blocks[1].partition("\n")
    return (rest if newline and language.strip().isalnum() else blocks[1]).strip()


def read_json(text: str) -> Any:
    """The JSON list or object that a text is, or that its one ``` block is. Numbers are finite.

    One that merely stands somewhere in a text does not count: it could stand among all others.
    Raises Unreadable, for more than 200,000 characters and for nesting beyond Python's recursion limit too.
    """
    if len(text) > _LONGEST_JSON:
        raise Unreadable(f"it has {len(text)} characters; give at most {_LONGEST_JSON}")
    text = unfenced(text)
    if not text.startswith(("[", "{")):
        raise Unreadable("it is no JSON list or object; give one")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # a whole number of more than 4,300 digits is a ValueError
        raise Unreadable(f"it is no JSON ({error}); give a JSON list or object") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is beyond the largest float")
    return number


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
