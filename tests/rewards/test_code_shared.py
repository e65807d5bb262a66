"""The sandbox behind the reward `code`: one for each loop and set of options, and none that is left behind."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import pytest
from rlvlm_rewards import Failure, Sample
from rlvlm_rewards.code import Code
from rlvlm_rewards.code import shared as shared_module
from rlvlm_sandbox import Sandbox, SandboxUnavailable

SAMPLE = Sample("```python\nprint(2 * int(input()))\n```", json.dumps({"stdio": [["1", "2"]]}), task="row-7")


class Counted(Sandbox):
    """A sandbox that says when it is opened and closed. broken: how many openings fail before one holds."""

    opened, closed, broken = 0, 0, 0

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0.05)
        if Counted.broken:
            Counted.broken -= 1
            raise SandboxUnavailable("not now")
        Counted.opened += 1
        return await super().__aenter__()

    async def __aexit__(self, *reason: object) -> None:
        await super().__aexit__(*reason)
        Counted.closed += 1


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "Sandbox", Counted)
    Counted.opened = Counted.closed = Counted.broken = 0


def code(**options: object) -> Code:
    return Code(backend="unsafe-subprocess", **options)


def test_equal_options_share_one_until_the_last_gives_it_back() -> None:
    async def work() -> None:
        one, two, other = code(), code(score="all"), code(workers=1)
        scores = await asyncio.gather(*(reward(SAMPLE) for reward in (one, two, other, one, two)))
        assert [score.value for score in scores] == [1.0] * 5
        assert (Counted.opened, Counted.closed) == (2, 0)
        await one.aclose()
        await one.aclose()
        assert Counted.closed == 0
        await two.aclose()
        assert Counted.closed == 1
        assert (await one(SAMPLE)).value == 1.0
        assert Counted.opened == 3

    asyncio.run(work())
    assert Counted.closed == 3


def test_loops_of_several_threads_have_their_own() -> None:
    values = []

    def work() -> None:
        values.append([asyncio.run(reward(SAMPLE)).value for _ in range(2)])

    reward = code()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [[1.0, 1.0]] * 3
    assert Counted.opened == Counted.closed == 6
    assert not shared_module._shared


def test_where_none_opens_the_next_call_tries_again() -> None:
    async def work() -> None:
        Counted.broken = 1
        first = await asyncio.gather(code()(SAMPLE), code()(SAMPLE))
        assert [score.failure for score in first] == [Failure.INFRASTRUCTURE] * 2
        assert "not now" in first[0].detail
        assert (await code()(SAMPLE)).value == 1.0

    asyncio.run(work())
    assert Counted.opened == Counted.closed == 1


def test_who_gives_up_while_it_opens_takes_it_from_nobody() -> None:
    async def work() -> None:
        reward = code()
        one, two = (asyncio.ensure_future(reward(SAMPLE)) for _ in range(2))
        await asyncio.sleep(0.01)
        one.cancel()
        assert (await two).value == 1.0
        assert one.cancelled()

    asyncio.run(work())
    assert Counted.opened == Counted.closed == 1


# As TRL's rewards do: a loop in a daemon thread, that nobody ends.
FORGETFUL = f"""
import asyncio, pathlib, threading
from rlvlm_rewards import Sample
from rlvlm_rewards.code import Code
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
sample = Sample({SAMPLE.completion!r}, {SAMPLE.answer!r})
score = asyncio.run_coroutine_threadsafe(Code(wall_s=20)(sample), loop).result()
def below(pid):
    tasks = pathlib.Path(f"/proc/{{pid}}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [other for child in children for other in below(child)]
import os
print(score.value, score.failure, *below(os.getpid()))
"""


def test_an_interpreter_that_ends_leaves_no_process() -> None:
    ended = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    score, failure, *pids = ended.stdout.split()
    if failure == Failure.INFRASTRUCTURE:
        pytest.skip("no sandbox holds here")
    assert (score, ended.stderr) == ("1.0", "")
    assert pids
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
