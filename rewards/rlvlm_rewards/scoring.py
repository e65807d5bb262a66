"""Scoring with a time limit and retries, one sample or many."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import Kind, Reward

_YIELD_EVERY = 256


async def score(reward: Reward, sample: Sample, timeout_s: float = 10.0, retries: int = 1) -> Score:
    """Scores one response. Each attempt may take `timeout_s` seconds (inline rewards have no limit); failures are tried
    `retries` times more, except an unparsable reference, which stays what it is. The last failure is returned as it is.

    Raises ValueError for timeout_s <= 0 or retries < 0.
    """
    _check(timeout_s, retries)
    if reward.kind is Kind.INLINE:
        return _score_inline(reward, sample, retries)
    for _ in range(retries + 1):
        result = await _attempt(reward, sample, timeout_s)
        if _settled(result):
            break
    return result


async def score_all(
    pairs: Sequence[tuple[Reward, Sample]], timeout_s: float = 10.0, retries: int = 1, concurrency: int = 64
) -> list[Score]:
    """Scores many responses, at most `concurrency` at a time; the scores come in the order of `pairs`.

    Raises ValueError for timeout_s <= 0, retries < 0 or concurrency < 1.
    """
    _check(timeout_s, retries)
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; at least one sample must be scored at a time: give 1 or more")
    scores: dict[int, Score] = {}
    waiting: list[int] = []
    for index, (reward, sample) in enumerate(pairs):
        if reward.kind is Kind.INLINE:
            scores[index] = _score_inline(reward, sample, retries)
        else:
            waiting.append(index)
        if index % _YIELD_EVERY == 0:  # whoever else lives on this loop gets a turn
            await asyncio.sleep(0)

    async def work(indices: Iterator[int]) -> None:
        for index in indices:
            scores[index] = await score(*pairs[index], timeout_s, retries)

    shared = iter(waiting)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(waiting))):
            group.create_task(work(shared))
    return [scores[index] for index in range(len(pairs))]


async def _attempt(reward: Reward, sample: Sample, timeout_s: float) -> Score:
    """One attempt. The reward is cancelled at the limit but not waited for: it may refuse to be cancelled."""
    task = asyncio.ensure_future(reward(sample))
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


def _check(timeout_s: float, retries: int) -> None:
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}; a reward needs time: give more than 0 seconds")
    if retries < 0:
        raise ValueError(f"retries is {retries}; give 0 (one attempt only) or more")
