"""Rewards for short answers: exact text, a choice's letter, a number, a count."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.reward import inline
from rlvlm_rewards.visual.reading import answer_of, normalise, unparsable

_CHOICE = re.compile(r"\(([A-Za-z])\)[.:]?|([A-Za-z])[.):]?")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)"
    r"|(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.(?P<places>[0-9]*))?|\.(?P<bare>[0-9]+))\s*(?P<percent>%?)"
)
_MAX_NUMBER = 200  # characters; a longer "number" is no answer, and Python refuses to read those beyond 4,300 digits


def parse_choice(text: str) -> str | None:
    """The letter, as a capital, of `A`, `(A)`, `A.`, `A)` or `A:` (either case); None for anything else."""
    match = _CHOICE.fullmatch(text.strip())
    return (match[1] or match[2]).upper() if match else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction; sign, thousands commas and percent (50% is 1/2) are optional.
    None for anything else, division by zero included."""
    match = _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-")) if len(text) <= _MAX_NUMBER else None
    if match is None:
        return None
    if match["over"]:
        if int(match["under"]) == 0:
            return None
        value = Fraction(int(match["over"]), int(match["under"]))
    else:
        places = match["places"] or match["bare"] or ""
        value = Fraction(int((match["whole"] or "0").replace(",", "") + places), 10 ** len(places))
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value


def parse_count(text: str) -> int | None:
    """The value of a number that is whole and not negative (`3`, `1,000`, `3.0`); None for anything else."""
    number = parse_number(text)
    return int(number) if number is not None and number.denominator == 1 and number >= 0 else None


@inline
@dataclass(frozen=True)
class Exact:
    """1 if the answer is the reference, up to case, white space and compatible characters (Unicode NFKC)."""

    def __call__(self, sample: Sample) -> Score:
        reference = normalise(sample.answer)
        if reference is None:
            return unparsable(sample, "it is not a text of 1 to 10,000 characters; mend the row or its reward")
        return Score(value=float(normalise(answer_of(sample)) == reference))


@inline
@dataclass(frozen=True)
class Choice:
    """1 if the answer is the letter of the reference, and nothing but that letter."""

    def __call__(self, sample: Sample) -> Score:
        reference = parse_choice(sample.answer)
        if reference is None:
            return unparsable(sample, "it is not a letter; mend the row or its reward")
        return Score(value=float(parse_choice(answer_of(sample)) == reference))


@inline
@dataclass(frozen=True)
class Number:
    """1 if |answer - reference| <= max(absolute, relative * |reference|), in exact arithmetic; by default equality.

    absolute, relative: tolerances, not negative. Decimals are taken as written: 0.1 is a tenth.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def __post_init__(self) -> None:
        for name in ("absolute", "relative"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; give a finite number that is not negative")

    def __call__(self, sample: Sample) -> Score:
        reference = parse_number(sample.answer)
        if reference is None:
            return unparsable(sample, "it is not a number; mend the row or its reward")
        answer = parse_number(answer_of(sample))
        return Score(value=float(answer is not None and abs(answer - reference) <= self._tolerance(reference)))

    def _tolerance(self, reference: Fraction) -> Fraction:
        if not self.absolute and not self.relative:
            return Fraction(0)
        return max(Fraction(str(self.absolute)), Fraction(str(self.relative)) * abs(reference))


@inline
@dataclass(frozen=True)
class Count:
    """1 if the answer n is the reference n*. partial: also max(0, 1 - |n - n*| / max(n*, 1)) for other counts, Kimi
    K2.5's absolute difference. With it, always guessing the usual count pays; leave it off where counts vary little."""

    partial: bool = False

    def __call__(self, sample: Sample) -> Score:
        reference = parse_count(sample.answer)
        if reference is None:
            return unparsable(sample, "it is not a count; give a whole number that is not negative")
        answer = parse_count(answer_of(sample))
        if answer is None or not self.partial:
            return Score(value=float(answer == reference))
        return Score(value=float(max(Fraction(0), 1 - Fraction(abs(answer - reference), max(reference, 1)))))
