"""OCR against a Levenshtein distance of our own, and its options by hand."""

from __future__ import annotations

import json
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, InvalidReward, Score, load_reward

from tests.rewards.visual.scoring import judge, value

LETTERS = st.text("abcdé", min_size=1, max_size=12)


def distance(one: str, other: str) -> int:
    """Levenshtein's, by the recurrence of Wagner and Fischer."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@settings(deadline=None)
@given(one=LETTERS, other=LETTERS)
@example("kitten", "sitting")
def test_ocr_is_one_less_the_normalised_distance(one: str, other: str) -> None:
    expected = 1 - distance(one, other) / max(len(one), len(other)) if len(one) <= 10 * len(other) else 0.0
    assert value("ocr", one, other, threshold=0) == pytest.approx(expected, abs=1e-12)
    assert value("ocr", one, other) == pytest.approx(expected if expected >= 0.5 else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "options", "worth"),
    [
        ("so</think>\\boxed{hallo}", "hello", {}, 0.8),
        ("Hello", "hello", {}, 0.8),
        ("HELLO", "hello", {"ignore_case": True}, 1.0),
        ("STRASSE", "Straße", {"ignore_case": True}, 1.0),
        ("a  b\n\tc", "a b c", {}, 1.0),
        ("a  b", "a b", {"whitespace": "keep"}, 0.75),
        ("a\n", "a", {"whitespace": "keep"}, 1.0),
        ("a b c", "abc", {"whitespace": "ignore"}, 1.0),
        ("a b c", "abc", {}, 0.6),
        ("abcd", "abxy", {}, 0.5),
        ("abcde", "abxyz", {}, 0.0),
        ("abcde", "abxyz", {"threshold": 0.4}, 0.4),
        ("abcd", "abcx", {"threshold": 1.0}, 0.0),
    ],
)
def test_ocr_by_hand(answer: str, reference: str, options: dict[str, object], worth: float) -> None:
    assert value("ocr", answer, reference, **options) == pytest.approx(worth)


def test_accents_may_be_composed_or_not() -> None:
    assert value("ocr", unicodedata.normalize("NFD", "Größe 5 é"), "Größe 5 é") == 1.0


def test_hacks_earn_nothing() -> None:
    sign = "No parking at any time. Tow away zone."
    question = "Read the text on the sign in the picture, word by word, and give nothing but the text."
    for answer in ("", " ", question, f"{question} {sign} {question}", sign * 11, "the " * 10_000, "e" * len(sign)):
        assert value("ocr", answer, sign) == 0.0


def test_no_text_takes_long() -> None:
    page = json.dumps(list(range(3_500)))[:19_000]
    start = time.process_time()
    assert 0.0 <= value("ocr", "1, 2, " * 31_000, page, threshold=0) < 0.2  # just below ten times the reference
    assert value("ocr", "x" * 1_000_000, page) == 0.0
    assert value("ocr", "a" + "\u0301" * 50_000 + "\u0316" * 50_000, page) == 0.0  # minutes to normalise
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("reference", ["", " \n", "x" * 20_001, "a" + "\u0301" * 50])
def test_an_unreadable_reference_is_a_failure(reference: str) -> None:
    score = judge("ocr", "x", reference)
    assert score.failure is Failure.UNPARSABLE_REFERENCE and "row-7" in score.detail


@pytest.mark.parametrize(
    ("option", "given", "mend"),
    [
        ("threshold", 1.5, "threshold is 1.5; give a similarity from 0 to 1"),
        ("threshold", float("nan"), "threshold is nan; give a similarity from 0 to 1"),
        ("whitespace", "drop", "whitespace is 'drop'; give 'fold'"),
        ("ignore_case", "yes", "ignore_case is 'yes'; give true or false"),
    ],
)
def test_a_bad_option_is_refused(option: str, given: object, mend: str) -> None:
    with pytest.raises(InvalidReward, match=mend):
        load_reward("ocr", **{option: given})


def test_lone_surrogates_are_characters() -> None:
    assert judge("ocr", "\ud800abc", "\ud800abd") == Score(value=0.75)
