"""Scoring within limits of time and number, with retries: one sample or many."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import Kind, Reward

_YIELD_EVERY = 256
_LOOK_AGAIN_S = 1.0  # for a limit that was raised while every place is taken
_BACKSTOP_S = 600.0  # for a reward that keeps time itself, should it fail to
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
_jitter = random.Random()  # of its own: a user's seeded generator stays where it is


@dataclass(frozen=True, slots=True)
class Limits:
    """timeout_s: for each attempt (inline rewards have no limit). concurrency: how many samples this reward scores at a
    time. retries: of a failure other than an unparsable reference, each after twice the wait of the one before.

    `Limits.of` gives a reward that keeps time itself the time it takes.

    Raises ValueError for timeout_s <= 0, concurrency < 1 or retries < 0.
    """

    timeout_s: float = 10.0
    concurrency: int = 64
    retries: int = 1

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; a reward needs time: give more than 0 seconds")
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; give 1 or more samples at a time")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; give 0 (one attempt only) or more")

    def of(self, reward: Reward) -> Limits:
        return replace(self, timeout_s=max(self.timeout_s, _BACKSTOP_S)) if reward.keeps_time else self


LimitsOf = Callable[[Reward], Limits]


async def score(reward: Reward, sample: Sample, timeout_s: float = 10.0, retries: int = 1) -> Score:
    """Scores one response; see `Limits`. The last failure is returned as it is.

    Raises ValueError for limits that make no sense.
    """
    return await _score(reward, sample, Limits(timeout_s, retries=retries).of)


async def score_all(
    pairs: Sequence[tuple[Reward, Sample]],
    timeout_s: float = 10.0,
    retries: int = 1,
    concurrency: int = 64,
    *,
    limits_of: LimitsOf | None = None,
) -> list[Score]:
    """Scores many responses; the scores come in the order of `pairs`.

    limits_of: the limits of each reward, in place of the same for all; asked again before every attempt, so that they
    may change while the scoring goes on. Raises ValueError for limits that make no sense.
    """
    limits_of = limits_of or Limits(timeout_s, concurrency, retries).of
    scores: dict[int, Score] = {}
    waiting: dict[int, tuple[Reward, list[int]]] = {}
    for index, (reward, sample) in enumerate(pairs):
        if reward.kind is Kind.INLINE:
            scores[index] = _score_inline(reward, sample, limits_of(reward).retries)
        else:
            waiting.setdefault(id(reward), (reward, []))[1].append(index)
        if index % _YIELD_EVERY == 0:  # whoever else lives on this loop gets a turn
            await asyncio.sleep(0)
    async with asyncio.TaskGroup() as group:
        for reward, indices in waiting.values():
            group.create_task(_score_those(reward, indices, pairs, scores, limits_of))
    return [scores[index] for index in range(len(pairs))]


async def _score_those(
    reward: Reward,
    indices: Sequence[int],
    pairs: Sequence[tuple[Reward, Sample]],
    scores: dict[int, Score],
    limits_of: LimitsOf,
) -> None:
    """One reward's samples, as many at a time as its limit says at the moment."""
    running, freed = 0, asyncio.Event()

    async def work(index: int) -> None:
        nonlocal running
        scores[index] = await _score(reward, pairs[index][1], limits_of)
        running -= 1
        freed.set()

    async with asyncio.TaskGroup() as group:
        for index in indices:
            while running >= limits_of(reward).concurrency:
                freed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(freed.wait(), _LOOK_AGAIN_S)
            running += 1
            group.create_task(work(index))


async def _score(reward: Reward, sample: Sample, limits_of: LimitsOf) -> Score:
    if reward.kind is Kind.INLINE:
        return _score_inline(reward, sample, limits_of(reward).retries)
    tried = 0
    while True:
        limits = limits_of(reward)
        result = await _attempt(reward, sample, limits.timeout_s)
        if _settled(result) or tried >= limits.retries:
            return result
        await asyncio.sleep(_wait_s(tried))
        tried += 1


def _wait_s(tried: int) -> float:
    """Twice as long each time; half of it by chance, so that those who failed together do not come back together."""
    return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**tried) * _jitter.uniform(0.5, 1.0))


async def _attempt(reward: Reward, sample: Sample, timeout_s: float) -> Score:
    """One attempt. The reward is cancelled at the limit but not waited for: it may refuse to be cancelled."""
    task = asyncio.ensure_future(reward.score(sample))
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()
    if not task.done():
        return reward.failed(f"gave no score within {timeout_s:g} s", Failure.TIMEOUT)
    if task.cancelled():
        return reward.failed("cancelled itself")
    return task.result()


def _score_inline(reward: Reward, sample: Sample, retries: int) -> Score:
    for _ in range(retries + 1):
        result = reward.now(sample)
        if _settled(result):
            break
    return result


def _settled(result: Score) -> bool:
    return result.failure is None or result.failure is Failure.UNPARSABLE_REFERENCE
