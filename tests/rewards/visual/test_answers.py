"""Short answers. Numbers are checked against fractions.Fraction, worked out from parts that hypothesis draws."""

from __future__ import annotations

import asyncio
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards import Failure, InvalidReward, Sample, Score, final_answer, load_reward, score_all
from rlvlm_rewards.visual.answers import parse_choice, parse_count, parse_number

from tests.rewards.visual.scoring import judge

SIGNS = st.sampled_from(["", "+", "-", "\N{MINUS SIGN}"])


def value_of(sign: str, magnitude: Fraction) -> Fraction:
    return -magnitude if sign in ("-", "\N{MINUS SIGN}") else magnitude


@given(sign=SIGNS, units=st.integers(0, 10**30), places=st.integers(0, 12), percent=st.booleans(), commas=st.booleans())
def test_decimals_equal_their_fraction(sign: str, units: int, places: int, percent: bool, commas: bool) -> None:
    whole, rest = divmod(units, 10**places)
    text = sign + (f"{whole:,}" if commas else str(whole))
    text += f".{rest:0{places}d}" if places else ""
    text += "%" if percent else ""
    assert parse_number(text) == value_of(sign, Fraction(units, 10**places * (100 if percent else 1)))


@given(sign=SIGNS, over=st.integers(0, 10**20), under=st.integers(1, 10**20), blank=st.sampled_from(["", " "]))
def test_fractions_equal_their_fraction(sign: str, over: int, under: int, blank: str) -> None:
    assert parse_number(f" {sign}{over}{blank}/{blank}{under} ") == value_of(sign, Fraction(over, under))


@given(st.text(max_size=40))
def test_whatever_is_read_as_a_number_has_only_the_characters_of_one(text: str) -> None:
    if parse_number(text) is not None:
        assert set("".join(text.split())) <= set("0123456789.,/%+-\N{MINUS SIGN}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("1,234.50", Fraction(2469, 2)),
        ("12.5 %", Fraction(1, 8)),
        ("-0", Fraction(0)),
        ("007", Fraction(7)),
        ("3/4%", Fraction(3, 400)),
    ],
)
def test_numbers(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "-",
        "%",
        "1/0",
        "1,23",
        "12,3456",
        "1,2345",
        ",123",
        "1 2",
        "--1",
        "1/2/3",
        "1e3",
        "inf",
        "nan",
        "½",
        "1½",
        "٣",
        "５",
        "12 apples",
        "9" * 5000,
        "1/-2",
        "0x10",
        "1_000",
    ],
)
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize("text", ["B", "b", "(B)", "B.", "B)", "B:", " (b). "])
def test_choices(text: str) -> None:
    assert parse_choice(text) == "B"


@pytest.mark.parametrize("text", ["", "AB", "(B", "1", "()", "B or C", "Ä", "\u212a", "B.."])
def test_what_is_no_choice(text: str) -> None:
    assert parse_choice(text) is None


@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        ("so</think> 12\n", True, "12"),
        ("a</think>b</think>c", True, "c"),
        ("no end, 12", True, None),
        ("no end, 12", False, "no end, 12"),
        ("<think>no end, 12", False, None),
        ("<think>a</think>12", False, "12"),
        ("a</think>12<think>again", True, None),
        ("a</think>  ", True, None),
        ("a</think>It is \\boxed{\\frac{1}{2}}.", True, "\\frac{1}{2}"),
        ("a</think>\\boxed{1} no, \\boxed{2}", True, "2"),
        ("a</think>\\boxed{1} no, \\boxed{2", True, "1"),
        ("a</think>\\boxed{\\boxed{3}}", True, "3"),
        ("a</think>\\boxed{x \\} y}", True, "x \\} y"),
        ("\\boxed{1}</think>", True, None),
        ("\\boxed{1} and on", True, None),
        ("a</think>\\boxed{}", True, None),
    ],
)
def test_final_answer(completion: str, thinking: bool, answer: str | None) -> None:
    assert final_answer(completion, thinking) == answer


def test_final_answer_takes_linear_time() -> None:
    start = time.perf_counter()
    assert final_answer("</think>" + "\\boxed{" * 50_000, True) is not None
    assert time.perf_counter() - start < 1.0  # a rescan per box would take minutes


@pytest.mark.parametrize(
    ("name", "completion", "answer", "value"),
    [
        ("exact", "t</think>  The  CAT\n", "the cat", 1.0),
        ("exact", "t</think>ｆｕｌｌ Straße", "FULL STRASSE", 1.0),
        ("exact", "t</think>the cats", "the cat", 0.0),
        ("exact", "the cat", "the cat", 1.0),
        ("choice", "t</think>(b)", "B", 1.0),
        ("choice", "t</think>C", "B", 0.0),
        ("choice", "t</think>maybe B", "B", 0.0),
        ("choice", "A B C D", "B", 0.0),
        ("choice", "\\boxed{B}", "(B)", 1.0),
        ("number", "t</think>\\boxed{1/2}", "50%", 1.0),
        ("number", "t</think>1,000", "1000.0", 1.0),
        ("number", "t</think>0.3333", "1/3", 0.0),
        ("number", "12</think>13", "12", 0.0),
        ("number", "t</think>twelve", "12", 0.0),
        ("number", "12", "12", 1.0),
        ("count", "t</think>3.0", "3", 1.0),
        ("count", "t</think>4", "3", 0.0),
        ("count", "t</think>-3", "3", 0.0),
        ("count", "t</think>2.5", "3", 0.0),
    ],
)
def test_short_answers(name: str, completion: str, answer: str, value: float) -> None:
    assert judge(name, completion, answer) == Score(value=value)


@pytest.mark.parametrize(("name", "answer"), [("exact", "the cat"), ("choice", "B"), ("number", "12"), ("count", "12")])
def test_a_thought_that_never_ended_gave_no_answer(name: str, answer: str) -> None:
    assert judge(name, answer, answer, thinking=True) == Score(value=0.0)
    assert judge(name, f"so it is</think>{answer}", answer, thinking=True) == Score(value=1.0)


@pytest.mark.parametrize(
    ("options", "completion", "answer", "value"),
    [
        ({"absolute": 0.1}, "1.1", "1", 1.0),  # with floats, 1.1 - 1 is more than 0.1
        ({"absolute": 0.1}, "1.1000001", "1", 0.0),
        ({"absolute": 2}, "-2", "0", 1.0),
        ({"relative": 0.05}, "105", "100", 1.0),
        ({"relative": 0.05}, "95", "100", 1.0),
        ({"relative": 0.05}, "-105", "-100", 1.0),
        ({"relative": 0.05}, "105.01", "100", 0.0),
        ({"relative": 0.05}, "0.0001", "0", 0.0),
        ({"absolute": 1, "relative": 0.05}, "106", "100", 0.0),
        ({"absolute": 6, "relative": 0.05}, "106", "100", 1.0),
        ({"absolute": 1e300}, "5", "1", 1.0),
    ],
)
def test_number_with_tolerance(options: dict[str, float], completion: str, answer: str, value: float) -> None:
    assert judge("number", completion, answer, **options) == Score(value=value)


@given(answer=st.integers(0, 50), reference=st.integers(0, 50))
def test_partial_count(answer: int, reference: int) -> None:
    expected = max(0.0, 1 - abs(answer - reference) / max(reference, 1))
    assert judge("count", str(answer), str(reference), partial=True).value == pytest.approx(expected, abs=1e-12)


def test_partial_count_of_what_is_no_count() -> None:
    assert judge("count", "2.5", "3", partial=True) == Score(value=0.0)
    assert judge("count", "none", "0", partial=True) == Score(value=0.0)


@pytest.mark.parametrize(("text", "count"), [("3", 3), ("1,000", 1000), ("4/2", 2), ("0", 0), ("-0", 0), ("+5.", 5)])
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("option", ["absolute", "relative"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_bad_tolerance_is_refused(option: str, value: float) -> None:
    with pytest.raises(InvalidReward, match=f"{option} is {value}; give a finite number that is not negative"):
        load_reward("number", **{option: value})


@pytest.mark.parametrize(
    ("name", "answer"), [("exact", "  "), ("choice", "12"), ("number", "twelve"), ("count", "1/2")]
)
def test_an_unreadable_reference_is_a_failure_that_names_the_row(name: str, answer: str) -> None:
    result = judge(name, "t</think>12", answer)
    assert result.failure is Failure.UNPARSABLE_REFERENCE and result.value is None
    assert "row-7" in result.detail and repr(answer) in result.detail


def test_accents_without_end_are_no_text() -> None:
    accents = "\u0301" * 30_000 + "\u0316" * 30_000  # sorting these takes half a minute
    assert judge("exact", "a" + accents, "á") == Score(value=0.0)
    assert judge("exact", "a" + "\u0316" * 29 + "\u0301", "á" + "\u0316" * 29) == Score(value=1.0)
    assert judge("exact", "a", "a" + accents[:40]).failure is Failure.UNPARSABLE_REFERENCE


def test_ten_thousand_built_in_scores_take_less_than_half_a_second() -> None:
    number = load_reward("number")
    pairs = [
        (number, Sample(completion=f"long thought</think>\\boxed{{{i}}}", answer=str(i // 2 * 2)))
        for i in range(10_000)
    ]
    start = time.process_time()
    scores = asyncio.run(score_all(pairs))
    assert time.process_time() - start < 0.5
    assert [s.value for s in scores] == [1.0, 0.0] * 5_000
