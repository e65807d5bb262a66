"""Chart tables by hand."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, InvalidReward, load_reward

from tests.rewards.visual.scoring import judge, value

REFERENCE = "Year,Sales,Costs\n2010,100,20\n2011,200,40\n2012,400,80"
MARKDOWN = "| Year | Sales | Costs |\n|:--|--:|---|\n| 2010 | 100 | 20 |\n| 2011 | 200 | 40 |\n| 2012 | 400 | 80 |"


@pytest.mark.parametrize(
    "answer",
    [
        REFERENCE,
        MARKDOWN,
        f"so it is</think>```markdown\n{MARKDOWN}\n```",
        "Year | Sales | Costs\n--- | --- | ---\n2010 | 100 | 20\n2011 | 200 | 40\n2012 | 400 | 80",
        REFERENCE.replace(",", "\t"),
        REFERENCE.replace(",", ", "),
        REFERENCE.replace("\n", "\n\n"),
        "year,SALES,costs\n2012,400,80\n2010,100,20\n2011,200,40",  # another order of rows
        "Year,Costs,Sales\n2010,20,100\n2011,40,200\n2012,80,400",  # and of columns
        "x,2010,2011,2012\nSales,100,200,400\nCosts,20,40,80",  # on its side
        "Year,Sales,Costs\n2010,$100.00,20%\n2011,200,40\n2012,400,80",
        json.dumps([["", "Sales", "Costs"], [2010, 100, 20], [2011, 200, 40.0], ["2012", "400", 80]]),
        json.dumps({y: {"Sales": 100 * 2**i, "Costs": 20 * 2**i} for i, y in enumerate(("2010", "2011", "2012"))}),
        json.dumps([{"Year": 2010 + i, "Sales": 100 * 2**i, "Costs": 20 * 2**i} for i in range(3)]),
        json.dumps({"Sales": {"2010": 100, "2011": 200, "2012": 400}, "Costs": {"2012": 80, "2011": 40, "2010": 20}}),
    ],
)
def test_forms_of_a_table(answer: str) -> None:
    assert value("chart_table", answer, REFERENCE) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Year,Sales,Costs\n2010,105,21\n2011,190,38\n2012,400,80", 1.0),  # each within 5 %
        ("Year,Sales,Costs\n2010,105.1,21\n2011,200,40\n2012,400,80", 5 / 6),
        ("Year,Sales,Costs\n2010,-100,20\n2011,200,40\n2012,400,80", 5 / 6),
        ("Year,Sales\n2010,100\n2011,200\n2012,400", 2 * 3 / 9),  # a column is missing: 3 right of 3, of 6
        ("Year,Sales,Costs,More\n2010,100,20,1\n2011,200,40,1\n2012,400,80,1", 2 * 6 / 15),
        ("Year,Sales,Costs\n2010,100,20", 2 * 2 / 8),
        ("Year,Sales,Costs\n2010,100,\n2011,200,\n2012,400", 2 * 3 / 9),  # empty cells are none
        ("Year,Sales,Costs\n2010,100,20,9\n2011,200,40\n2012,400,80", 0.0),  # a cell that is in no column: no table
        ("Year,Sales,Costs\n2010,20,100\n2011,40,200\n2012,80,400", 0.0),  # under the wrong headers
        ("Year,Sale,Costs\n2010,100,20\n2011,200,40\n2012,400,80", (3 + 3 * 0.8) / 6),  # 1 of 5 letters is missing
        ("Year,Imports,Debt\n2010,100,20\n2011,200,40\n2012,400,80", 0.0),
        ("Year,Sales,Costs\n2010,many,few\n2011,200,40\n2012,400,80", 4 / 6),
    ],
)
def test_tables_by_hand(answer: str, worth: float) -> None:
    assert value("chart_table", answer, REFERENCE) == pytest.approx(worth, abs=1e-12)


def test_parts_are_precision_and_recall() -> None:
    score = judge("chart_table", "Year,Sales\n2010,100\n2011,9", REFERENCE)
    assert score.parts == {"precision": pytest.approx(1 / 2), "recall": pytest.approx(1 / 6)}
    assert score.value == pytest.approx(1 / 4)


def test_texts_and_zeros() -> None:
    reference = "Town,Mayor,Debt\nUlm,Ann Lee,0"
    assert value("chart_table", "Town,Mayor,Debt\nUlm,ann  lee,0.0", reference) == 1.0
    assert value("chart_table", "Town,Mayor,Debt\nUlm,ann le,0.001", reference) == 0.0


def test_a_tolerance_of_ones_own() -> None:
    answer = "a,b\nc,101"
    assert value("chart_table", answer, "a,b\nc,100", tolerance=0.01) == 1.0
    assert value("chart_table", answer, "a,b\nc,100", tolerance=0) == 0.0


def test_equal_headers_are_told_apart_by_their_order() -> None:
    table = "a,b,b\nc,1,2\nc,3,4\nc,5,6"
    assert value("chart_table", table, table) == pytest.approx(1.0)


def test_quotes_and_escapes() -> None:
    assert value("chart_table", 'a,"b, c"\n"x, y","1,000"', "| a | b, c |\n|---|---|\n| x, y | 1000 |") == 1.0
    assert value("chart_table", "| a | b\\|c |\n|---|---|\n| x | 1 |", '[{"a": "x", "b|c": 1}]') == 1.0


def test_guessing_earns_little_or_nothing() -> None:
    guesses = "\n".join(["Year,Sales,Costs", *(f"{year},{n},{n}" for year in range(2010, 2013) for n in range(60))])
    assert value("chart_table", guesses, REFERENCE) == 0.0  # more than ten times the cells
    few = "\n".join(["Year,Sales", *(f"2010,{n}" for n in (90, 95, 100, 105))])
    assert value("chart_table", few, REFERENCE) == 0.0  # the first stands for 2010, and the others for nothing
    for answer in ("", "Year,Sales,Costs", "100 20 200 40 400 80", f"It is\n{MARKDOWN}"):
        assert value("chart_table", answer, REFERENCE) == 0.0


def test_a_header_with_other_digits_is_another_header() -> None:
    assert value("chart_table", "Year,Sales\n2013,100", "Year,Sales\n2012,100") == 0.0
    assert value("chart_table", "Year,Q1\nUlm,100", "Year,Q2\nUlm,100") == 0.0
    assert value("chart_table", "Year,Sales\n2 012,100", "Year,Sales\n2012,100") == pytest.approx(0.8)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "{}",
        "[1, 2]",
        '[{"a": [1]}]',
        '{"a": 1}',
        '[["a", "b"], ["c", {"d": 1}]]',
        '[["a", "b"], ["c", 1e999]]',
        "|",
        "| a |\n|---|\n| 1 |",
        "|---|---|\n|---|---|",
        "a,b",
        "a,b\nc,",
        "a\nb",
        "[" * 5000,
        '{"a":' * 5000,
        '"' * 1001 + "\n,",
        json.dumps([{str(row * 300 + key): 1 for key in range(300)} for row in range(300)]),
    ],
)
def test_what_is_no_table_earns_nothing(answer: str) -> None:
    assert value("chart_table", answer, REFERENCE) == 0.0


@pytest.mark.parametrize(
    "reference", ["", "no table", "a,b\nc,", "[]", '{"a": 1}', '[{"a": [1], "b": 2}]', "[[1, 2], [3, 4]"]
)
def test_an_unreadable_reference_is_a_failure_that_names_the_row(reference: str) -> None:
    score = judge("chart_table", REFERENCE, reference)
    assert score.failure is Failure.UNPARSABLE_REFERENCE and "row-7" in score.detail and "; " in score.detail


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_bad_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(InvalidReward, match=r"tolerance is .*; give a share from 0 to below 1"):
        load_reward("chart_table", tolerance=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=8), st.integers(-(10**6), 10**6), min_size=1, max_size=8)
)
def test_a_table_equals_itself_in_another_form(values: dict[str, int]) -> None:
    as_csv = "\n".join(["name,value", *(f"{name},{number}" for name, number in values.items())])
    as_json = json.dumps([{"name": name, "value": f"{number:,}"} for name, number in reversed(values.items())])
    assert value("chart_table", as_csv, as_json) == pytest.approx(1.0)


def test_the_largest_tables_take_no_time() -> None:
    table = "\n".join(",".join(f"{y}{x}" for x in range(30)) for y in range(500))
    start = time.process_time()
    assert value("chart_table", table, table) == pytest.approx(1.0)
    assert time.process_time() - start < 2.0
