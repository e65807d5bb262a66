"""What anybody may write, to every visual reward: no exception, a value in [0, 1], no credit for hacks, and in time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Reward, Sample, load_reward
from rlvlm_rewards.check import Finding, Known, findings

from tests.rewards.visual.scoring import Picture


@dataclass(frozen=True)
class Case:
    """A reward with a reference and an answer that is right."""

    name: str
    reference: str
    right: str
    options: Mapping[str, Any]

    def load(self) -> Reward:
        return load_reward(self.name, **self.options)


PIXELS, THOUSANDTHS = {"coordinates": "pixels"}, {"coordinates": "thousandths"}
CASES = [
    Case("exact", "the grey cat", "The grey  cat", {}),
    Case("choice", "C", "(C)", {}),
    Case("number", "12", "12.0", {"relative": 0.01}),
    Case("count", "12", "12", {"partial": True}),
    Case("grounding", "[[10, 20, 30, 40]]", '[{"bbox_2d": [10, 20, 30, 40]}]', PIXELS),
    Case(
        "grounding",
        '[{"bbox": [10, 20, 30, 40], "label": "x"}]',
        '[{"bbox": [10, 20, 30, 40], "label": "X"}]',
        THOUSANDTHS,
    ),
    Case("points", "[[10, 20], [30, 40]]", "[[30, 40], [10, 20]]", PIXELS),
    Case("polygon", "[[10, 20], [30, 40], [30, 20]]", "[10, 20, 30, 20, 30, 40]", THOUSANDTHS),
    Case("ocr", "No parking at any time", "No parking at any time", {}),
    Case("ordering", "B, A, D, C", "B > A > D > C", {}),
    Case("permutation", "[1, 0, 3, 2]", "1, 0, 3, 2", {}),
    Case("grid_path", '{"grid": ["..", ".#"], "start": [1, 0], "goal": [0, 1]}', "up, right", {}),
    Case(
        "chart_table", "year,sales\n2010,10\n2011,20", "| year | sales |\n|---|---|\n| 2010 | 10 |\n| 2011 | 20 |", {}
    ),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{CASES.index(case)}")


def sample(case: Case, completion: str, answer: str | None = None) -> Sample:
    pictures: list[Any] = [Picture((640, 480))]
    return Sample(completion, case.reference if answer is None else answer, "row-7", load_images=lambda: pictures)


@EACH
def test_the_contract_of_a_reward(case: Case) -> None:
    async def check() -> list[Finding]:
        known = [Known(sample(case, f"so it is</think>{case.right}"), 1.0)]
        return [found async for found in findings(case.load(), known, lambda doing: None)]

    failed = [found for found in asyncio.run(check()) if found.passed is not True]
    assert failed == []


NUMBERS = st.integers() | st.floats() | st.integers(-5, 1005) | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["R", "up", "#", ".."]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(NUMBERS, min_size=2, max_size=6)
        | st.dictionaries(
            st.sampled_from(["bbox_2d", "point", "label", "polygon", "grid", "start", "goal", "a"]), inner
        )
    ),
    max_leaves=12,
).map(json.dumps)
PIECES = st.lists(
    st.sampled_from(
        [*"[]{}|,;>\"'\\/-+.%# \n\t0123456789ABCRUDL$€→²½", "```", "1e999", "NaN", "\\boxed{", "</think>", "|-|", "\0"]
    ),
    max_size=30,
).map("".join)
ANYTHING = JSON | PIECES | st.text(max_size=40) | JSON.map(lambda text: f"so</think>```json\n{text}\n```")


@EACH
@settings(max_examples=60, deadline=None)
@given(text=ANYTHING, other=ANYTHING)
def test_any_text_is_an_answer_or_a_reference(case: Case, text: str, other: str) -> None:
    reward = case.load()
    score = reward.now(sample(case, text))
    assert score.failure is None and score.value is not None and 0.0 <= score.value <= 1.0, score
    for completion in (other, text):
        score = reward.now(sample(case, completion, text))
        assert score.failure in (None, Failure.UNPARSABLE_REFERENCE), score
        assert score.value is None or 0.0 <= score.value <= 1.0


MEGABYTE = 1 << 20
PIECES_OF_MUCH = [
    *(
        "[",
        "[[1,2],",
        "[[1,2,3,4],",
        "{",
        '{"a":',
        '{"bbox_2d":[1,2,3,4]},',
        '"',
        "```",
        "```\n[]\n",
        "\\|",
        "\\boxed{",
    ),
    *("9", "1/", "-", "a,", "a > ", "->", "|a|b|\n", "a,b\n", "\n", " ", "R", "R ", "(A)", "\u0301", "é", "\ud800"),
]


@EACH
def test_a_megabyte_takes_no_time(case: Case) -> None:
    reward = case.load()
    wholes = ["[" + ",".join(["[1,2,3,4]"] * 100_000) + "]", "[" + "1," * 500_000 + "1]", "[" * 500_000 + "]" * 500_000]
    for text in (*(piece * (MEGABYTE // len(piece)) for piece in PIECES_OF_MUCH), *wholes):
        start = time.thread_time()
        score = reward.now(sample(case, f"so it is</think>{text}"))
        assert score.value == 0.0, (text[:20], score)
        assert time.thread_time() - start < 1.2, text[:20]  # a quarter of it for finding where the answer stands


@EACH
def test_nothing_is_right_in_a_thought(case: Case) -> None:
    assert case.load().now(sample(case, f"<think>{case.right}")).value == 0.0
    assert case.load().now(sample(case, f"<think>no</think>{case.right}")).value == pytest.approx(1.0)
