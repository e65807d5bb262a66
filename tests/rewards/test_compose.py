"""Weighted composition: the mean, the parts, failures, the bonus that is paid only when the rest is right."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Reward, Sample, Score, inline, load_reward
from rlvlm_rewards.compose import Part, compose
from rlvlm_rewards.reward import Kind, wrap

SAMPLE = Sample("<think>a</think>12", "12", task="row-7")


def _constant(name: str, value: float | Score, kind: Kind = Kind.INLINE) -> Reward:
    def now(sample: Sample) -> float | Score:
        return value

    async def later(sample: Sample) -> float | Score:
        await asyncio.sleep(0)
        return value

    return wrap(name, later if kind is Kind.ASYNC else inline(now) if kind is Kind.INLINE else now)


def _score(*parts: tuple[Reward, float], sample: Sample = SAMPLE) -> Score:
    return asyncio.run(compose("mine", [Part(reward, weight) for reward, weight in parts])(sample))


@pytest.mark.parametrize("kind", list(Kind))
def test_the_weighted_mean_and_the_parts(kind: Kind) -> None:
    result = _score((_constant("grounding", 0.5, kind), 0.8), (_constant("format", 1.0), 0.2))
    assert result.value == pytest.approx(0.6)  # 0.8 x 0.5 + 0.2 x 1
    assert result.parts == {"grounding": 0.5, "format": 1.0}


def test_only_the_ratio_of_the_weights_counts() -> None:
    # (4 x 0.25 + 1 x 1) / 5 = 0.4
    assert _score((_constant("a", 0.25), 4), (_constant("b", 1.0), 1)).value == pytest.approx(0.4)
    assert _score((_constant("a", 0.25), 0.04), (_constant("b", 1.0), 0.01)).value == pytest.approx(0.4)


def test_names_of_parts() -> None:
    detailed = _constant("number", Score(value=0.5, parts={"iou": 0.25}))
    result = _score((detailed, 1), (_constant("my/file.py:Close.call", 1.0), 1), (_constant("number", 0.0), 1))
    assert result.parts == {"number": 0.5, "Close.call": 1.0, "number~2": 0.0, "number/iou": 0.25}


@pytest.mark.parametrize("kind", list(Kind))
def test_a_part_that_fails_makes_the_whole_fail(kind: Kind) -> None:
    failing = _constant("judge", Score(failure=Failure.INFRASTRUCTURE, detail="no connection"), kind)
    result = _score((_constant("a", 1.0), 100), (failing, 0.001))
    assert (result.value, result.failure) == (None, Failure.INFRASTRUCTURE)
    assert result.detail == "part judge: no connection"


def test_what_no_retry_mends_comes_first() -> None:
    down = _constant("judge", Score(failure=Failure.TIMEOUT, detail="slow"))
    unreadable = _constant("number", Score(failure=Failure.UNPARSABLE_REFERENCE, detail="row-7"))
    assert _score((down, 1), (unreadable, 1)).failure is Failure.UNPARSABLE_REFERENCE


@pytest.mark.parametrize(
    ("rest", "whole", "paid"), [(1.0, 1.0, 1.0), (0.75, 0.8, 1.0), (0.5, 0.4, 0.0), (0.0, 0.0, 0.0)]
)
def test_the_tool_bonus_is_paid_only_when_the_rest_is_right(rest: float, whole: float, paid: float) -> None:
    sample = Sample('<tool_call>{"name": "zoom"}</tool_call>', "")
    result = _score((_constant("number", rest), 4), (load_reward("tool_bonus"), 1), sample=sample)
    assert result.value == pytest.approx(whole)  # (4 rest + paid) / 5
    assert result.parts == {"number": rest, "tool_bonus": paid}


def test_no_bonus_without_a_call() -> None:
    assert _score((_constant("number", 1.0), 4), (load_reward("tool_bonus"), 1)).value == pytest.approx(0.8)


def test_a_bonus_alone_and_weights_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no part that judges the answer"):
        compose("mine", [Part(load_reward("tool_bonus"))])
    with pytest.raises(ValueError, match=r"weight is 0 for format; give"):
        compose("mine", [Part(load_reward("format"), 0)])


def test_closing_closes_the_parts() -> None:
    closed = []

    class Pool:
        async def __call__(self, sample: Sample) -> float:
            return 1.0

        async def aclose(self) -> None:
            closed.append(self)

    pool = Pool()
    asyncio.run(compose("mine", [Part(wrap("pool", pool)), Part(load_reward("format"))]).aclose())
    assert closed == [pool]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_the_mean_lies_among_the_values(pairs: list[tuple[float, float]]) -> None:
    result = _score(*((_constant("part", value), weight) for value, weight in pairs))
    values = [value for value, _ in pairs]
    assert result.value is not None and min(values) - 1e-9 <= result.value <= max(values) + 1e-9
