"""Time limits, retries, order, and that a failure stays a failure."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rlvlm_rewards import Failure, Limits, Reward, Sample, Score, inline, load_reward, score, score_all
from rlvlm_rewards.compose import Part, compose
from rlvlm_rewards.reward import keeps_time, wrap
from rlvlm_rewards.scoring import _wait_s

SAMPLE = Sample(completion="12", answer="12", task="row-7")


class Flaky:
    """Fails `failures` times, then gives 0.5."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self, sample: Sample) -> float:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("down")
        return 0.5


@pytest.mark.parametrize("mark", [lambda function: function, inline])
@pytest.mark.parametrize(
    ("failures", "retries", "calls", "value"), [(0, 3, 1, 0.5), (2, 2, 3, 0.5), (2, 1, 2, None), (1, 0, 1, None)]
)
def test_failures_are_retried_and_then_stay_failures(
    mark: Callable[[Flaky], Flaky], failures: int, retries: int, calls: int, value: float | None
) -> None:
    flaky = mark(Flaky(failures))
    result = asyncio.run(score(wrap("flaky", flaky), SAMPLE, timeout_s=5, retries=retries))
    assert flaky.calls == calls and result.value == value
    assert result.failure is (Failure.INFRASTRUCTURE if value is None else None)


def test_waits_double_up_to_a_limit_and_vary() -> None:
    waits = [[_wait_s(tried) for _ in range(200)] for tried in range(12)]
    for tried, those in enumerate(waits):
        most = min(10.0, 0.1 * 2**tried)
        assert most / 2 <= min(those) < max(those) <= most
        assert max(those) - min(those) > most / 4  # those who failed together do not come back together


def test_a_retry_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("rlvlm_rewards.scoring.asyncio.sleep", sleep)
    result = asyncio.run(score(wrap("flaky", Flaky(3)), SAMPLE, timeout_s=5, retries=3))
    assert result.value == 0.5 and len(waits) == 3
    assert all(0.05 * 2**tried <= wait <= 0.1 * 2**tried for tried, wait in enumerate(waits))


def test_a_user_s_random_numbers_stay_as_they_were() -> None:
    random.seed(5)
    state = random.getstate()
    asyncio.run(score(wrap("flaky", Flaky(1)), SAMPLE, timeout_s=5, retries=1))
    assert random.getstate() == state


@keeps_time
class Patient:
    """Ends on its own, later than a limit of 0.05 s."""

    async def __call__(self, sample: Sample) -> float:
        await asyncio.sleep(0.2)
        return 1.0


def test_a_reward_that_keeps_time_itself_has_no_limit_but_its_own() -> None:
    patient = wrap("patient", Patient())
    mix = compose("mix", [Part(patient), Part(load_reward("format"))])
    for reward, value in ((patient, 1.0), (mix, 0.5)):
        assert asyncio.run(score(reward, SAMPLE, timeout_s=0.05, retries=0)).value == value
    limits = Limits(timeout_s=0.05, retries=0)
    (limited,) = asyncio.run(score_all([(patient, SAMPLE)], limits_of=lambda reward: limits))
    assert limited.failure is Failure.TIMEOUT  # unless it is said for this very reward


def test_each_reward_has_its_own_limits() -> None:
    most = {"narrow": 0, "wide": 0}
    running = {"narrow": 0, "wide": 0}

    def reward(name: str) -> Reward:
        async def function(sample: Sample) -> float:
            running[name] += 1
            most[name] = max(most[name], running[name])
            await asyncio.sleep(0.01)
            running[name] -= 1
            return 1.0

        return wrap(name, function)

    limits = {"narrow": Limits(concurrency=2), "wide": Limits(concurrency=9)}
    rewards = [reward("narrow"), reward("wide")]
    asyncio.run(score_all([(one, SAMPLE) for one in rewards * 20], limits_of=lambda one: limits[one.name]))
    assert most == {"narrow": 2, "wide": 9}


def test_an_unparsable_reference_is_not_retried() -> None:
    calls: list[Sample] = []

    def reward(sample: Sample) -> Score:
        calls.append(sample)
        return Score(failure=Failure.UNPARSABLE_REFERENCE, detail="row-7")

    result = asyncio.run(score(wrap("reference", reward), SAMPLE, timeout_s=5, retries=4))
    assert result.failure is Failure.UNPARSABLE_REFERENCE and len(calls) == 1


def test_a_wrong_answer_is_not_retried() -> None:
    calls: list[Sample] = []

    def reward(sample: Sample) -> float:
        calls.append(sample)
        return 0.0

    assert asyncio.run(score(wrap("wrong", reward), SAMPLE, timeout_s=5, retries=4)) == Score(value=0.0)
    assert len(calls) == 1


def test_a_slow_synchronous_reward_times_out_and_leaves_the_loop_free() -> None:
    release = threading.Event()
    reward = wrap("slow", lambda sample: release.wait(30) * 1.0)

    async def main() -> tuple[Score, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        result = await score(reward, SAMPLE, timeout_s=0.3, retries=0)
        ticking.cancel()
        return result, ticks

    start = time.perf_counter()
    result, ticks = asyncio.run(main())
    assert time.perf_counter() - start < 5  # neither the score nor the end of the loop waits for the thread
    release.set()
    assert (
        result.failure is Failure.TIMEOUT
        and result.value is None
        and "'slow'" in result.detail
        and "0.3 s" in result.detail
    )
    assert ticks >= 5


def test_an_async_reward_times_out_even_if_it_refuses_to_be_cancelled() -> None:
    async def stubborn(sample: Sample) -> float:
        for _ in range(100):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        return 1.0

    async def main() -> tuple[Score, float]:
        start = time.perf_counter()
        result = await score(wrap("stubborn", stubborn), SAMPLE, timeout_s=0.1, retries=1)
        return result, time.perf_counter() - start

    result, took_s = asyncio.run(main())
    assert result.failure is Failure.TIMEOUT and took_s < 2  # twice 0.1 s


def test_a_reward_s_own_timeout_error_is_not_ours() -> None:
    async def reward(sample: Sample) -> float:
        raise TimeoutError("the server")

    result = asyncio.run(score(wrap("server", reward), SAMPLE, timeout_s=5, retries=0))
    assert result.failure is Failure.INFRASTRUCTURE and "TimeoutError: the server" in result.detail


def test_many_scores_keep_the_order_and_the_failures_and_the_bound() -> None:
    running, most = 0, 0

    async def uneven(sample: Sample) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        number = int(sample.completion)
        await asyncio.sleep(0.001 * (7 - number % 8))
        running -= 1
        if number % 10 == 3:
            raise ValueError(number)
        return number / 100

    def threaded(sample: Sample) -> float:
        return int(sample.completion) / 100

    rewards = [wrap("uneven", uneven), wrap("threaded", threaded), load_reward("number")]
    pairs = [(rewards[i % 3], Sample(completion=str(i), answer=str(i - i % 2))) for i in range(90)]
    scores = asyncio.run(score_all(pairs, timeout_s=5, retries=0, concurrency=4))
    for i, result in enumerate(scores):
        if i % 3 == 0 and i % 10 == 3:
            assert result.failure is Failure.INFRASTRUCTURE and f"ValueError: {i} " in result.detail
        else:
            assert result == Score(value=float(i % 2 == 0) if i % 3 == 2 else i / 100)
    assert [i for i, result in enumerate(scores) if result.failure] == [3, 33, 63]
    assert 2 <= most <= 4


def test_nothing_to_score() -> None:
    assert asyncio.run(score_all([])) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asyncio.run(score_all([(load_reward("exact"), SAMPLE)], **arguments))


def test_built_ins_run_inline_and_plugins_do_not(tmp_path: Path) -> None:
    path = tmp_path / "where.py"
    path.write_text(
        "import threading\nfrom rlvlm_rewards import inline\n"
        "def threaded(sample): return float(threading.current_thread() is threading.main_thread())\n"
        "inlined = inline(lambda sample: float(threading.current_thread() is threading.main_thread()))\n"
    )

    def value(reward: Reward) -> float | None:
        return asyncio.run(reward(SAMPLE)).value

    assert value(load_reward(f"{path}:threaded")) == 0.0
    assert value(load_reward(f"{path}:inlined")) == 1.0
