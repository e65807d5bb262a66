"""Built-in rewards for short answers about pictures: exact text, a choice's letter, a number.

An answer that cannot be read is wrong (0.0); a reference that cannot be read is a failure of the data.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TypeVar

from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import inline

Parsed = TypeVar("Parsed", str, Fraction)
_OPEN, _CLOSE = "<think>", "</think>"
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")  # an escaped brace matches so that it is passed over
_CHOICE = re.compile(r"\(([A-Za-z])\)[.:]?|([A-Za-z])[.):]?")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)"
    r"|(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.(?P<places>[0-9]*))?|\.(?P<bare>[0-9]+))\s*(?P<percent>%?)"
)
_MAX_NUMBER = 200  # characters; a longer "number" is no answer, and Python refuses to read those beyond 4,300 digits


def final_answer(completion: str, thinking: bool = True) -> str | None:
    """What a response answers: the content of the last `\\boxed{}` after the last `</think>`, or else all after it.

    thinking: the prompt ended with `<think>`, so a response without `</think>` never came to an answer. With False such
    a response is taken whole, unless it opens `<think>` itself.
    Returns None where there is no answer: thinking that never ended, or nothing after it.
    """
    _, closed, answer = completion.rpartition(_CLOSE)
    if _OPEN in answer or (thinking and not closed):
        return None
    boxed = _last_box(answer)
    return (answer if boxed is None else boxed).strip() or None


def _last_box(text: str) -> str | None:
    """The content of the `\\boxed{...}` that starts last among those whose braces balance.

    One pass: rescanning for every box would take minutes on a response that is nothing but open boxes.
    """
    opened: list[int | None] = []  # for each open brace: where a box's content starts, None for any other brace
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0].startswith("\\boxed"):
            opened.append(brace.end())
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return text[last[0] : last[1]] if last else None


def normalise(text: str) -> str | None:
    """NFKC, case folded, white space folded to single blanks; None if nothing is left."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split()) or None


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


def _compare(parse: Callable[[str], Parsed | None], kind: str, thinking: bool) -> Callable[[Sample], Score]:
    @inline
    def reward(sample: Sample) -> Score:
        reference = parse(sample.answer)
        if reference is None:
            detail = (
                f"task {sample.task!r}: reference answer {sample.answer!r} is not {kind}; mend the row or its reward"
            )
            return Score(failure=Failure.UNPARSABLE_REFERENCE, detail=detail)
        answer = final_answer(sample.completion, thinking)
        return Score(value=float(answer is not None and parse(answer) == reference))

    return reward


BUILT_IN: Mapping[str, Callable[[Sample], Score]] = {
    "exact": _compare(normalise, "a text", thinking=True),
    "choice": _compare(parse_choice, "a letter", thinking=True),
    "number": _compare(parse_number, "a number", thinking=True),
    "exact_no_think": _compare(normalise, "a text", thinking=False),
    "choice_no_think": _compare(parse_choice, "a letter", thinking=False),
    "number_no_think": _compare(parse_number, "a number", thinking=False),
}
