"""The limits of rewards while a run goes on: the file in the run folder, changes to it, and what is wrong in it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from rlvlm_rewards import Limits, Reward, Sample, score_all
from rlvlm_rewards.reward import keeps_time, wrap

from rlvlm.limits import HotLimits
from rlvlm.recipe.schema import Named, Part, Rewards

_NAMED = Named(parts=(Part(reward="format"),), timeout_s=5.0, concurrency=8)
_RECIPE = Rewards(timeout_s=10.0, concurrency=64, retries=2, named={"mine": _NAMED})


def _reward(name: str) -> Reward:
    return wrap(name, lambda sample: 1.0)


class _Watched:
    """Limits of a file that is written in steps; every write has a time stamp of its own."""

    def __init__(self, folder: Path) -> None:
        self.file, self.told, self.writes = folder / "rewards.yaml", list[str](), 0
        self.limits = HotLimits(_RECIPE, self.file, self.told.append)

    def write(self, text: str) -> None:
        self.writes += 1
        self.file.write_text(text)
        os.utime(self.file, ns=(self.writes, self.writes))

    def of(self, name: str) -> Limits:
        return self.limits(_reward(name))


@pytest.fixture
def watched(tmp_path: Path) -> _Watched:
    return _Watched(tmp_path)


def test_without_a_file_the_recipe_says(watched: _Watched) -> None:
    assert watched.of("mine") == Limits(timeout_s=5.0, concurrency=8, retries=2)
    assert watched.of("math") == Limits(timeout_s=10.0, concurrency=64, retries=2)
    assert watched.told == []


def test_a_reward_that_keeps_time_itself_is_limited_only_by_name(watched: _Watched) -> None:
    @keeps_time
    def function(sample: Sample) -> float:
        return 1.0

    assert watched.limits(wrap("judge", function)).timeout_s == 600.0
    assert watched.limits(wrap("mine", function)).timeout_s == 5.0
    watched.write("judge: {timeout_s: 30}")
    assert watched.limits(wrap("judge", function)).timeout_s == 30


def test_the_file_overrides_as_soon_as_it_changes(watched: _Watched) -> None:
    watched.write("mine: {timeout_s: 60}\nmath: {concurrency: 2}\n")
    assert watched.of("mine") == Limits(timeout_s=60, concurrency=8, retries=2)
    assert watched.of("math") == Limits(timeout_s=10.0, concurrency=2, retries=2)
    watched.write("a_file.py:reward: {timeout_s: 0.5, concurrency: 1}\n")
    assert watched.of("mine").timeout_s == 5.0 and watched.of("math").concurrency == 64
    assert watched.of("a_file.py:reward") == Limits(timeout_s=0.5, concurrency=1, retries=2)
    watched.file.unlink()
    assert watched.of("a_file.py:reward").timeout_s == 10.0
    assert [told.partition(": ")[2] for told in watched.told] == [
        "limits of mine, math are in force",
        "limits of a_file.py:reward are in force",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mine: [", "the limits stay as they were"),
        ("5", "write lines like `judge: {timeout_s: 60, concurrency: 16}`"),
        ("mien: {timeout_s: 1}", "'mien' names no reward of this run; did you mean 'mine'?"),
        ("mine: 5", "mine is 5; give timeout_s, concurrency or both"),
        ("mine: {timeout: 5}", "mine is {timeout: 5}; give timeout_s, concurrency or both"),
        ("mine: {timeout_s: '5'}", "mine.timeout_s is '5'; give a number"),
        ("mine: {concurrency: 1.5}", "mine.concurrency is 1.5; give a number"),
        ("mine: {concurrency: true}", "mine.concurrency is true; give a number"),
        ("mine: {concurrency: 0}", "concurrency is 0; give 1 or more"),
        ("mine: {timeout_s: -1}", "timeout_s is -1"),
        ("mine: {timeout_s: 7}\nmath: {timeout_s: 0}", "timeout_s is 0"),
    ],
)
def test_bad_content_is_told_once_and_the_last_good_one_stays(watched: _Watched, text: str, said: str) -> None:
    watched.write("mine: {timeout_s: 60}")
    assert watched.of("mine").timeout_s == 60
    watched.write(text)
    assert [watched.of("mine").timeout_s for _ in range(3)] == [60, 60, 60]
    assert len(watched.told) == 2 and said in watched.told[1] and "stay as they were" in watched.told[1]
    watched.write("mine: {timeout_s: 61}")
    assert watched.of("mine").timeout_s == 61


def test_a_raised_limit_lets_more_samples_in_while_they_are_scored(watched: _Watched) -> None:
    running, most, seen = 0, 0, list[int]()

    async def reward(sample: Sample) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        seen.append(most)
        if len(seen) == 3:
            watched.write("mine: {concurrency: 4}")
        await asyncio.sleep(0.005)
        running -= 1
        return 1.0

    watched.write("mine: {concurrency: 1}")
    pairs: list[Any] = [(wrap("mine", reward), Sample("a", "a"))] * 12
    asyncio.run(score_all(pairs, limits_of=watched.limits))
    assert seen[:3] == [1, 1, 1] and most == 4
