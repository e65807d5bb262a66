"""The backend `http` against real servers in this process, and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_sandbox import AssertTests, CallTests, Limits, Outcome, Run, Sandbox, SandboxUnavailable, StdioTests
from rlvlm_sandbox import http as client
from rlvlm_sandbox.grading import Case, InvalidTests, Verdict
from rlvlm_sandbox.http import HTTP
from rlvlm_sandbox.messages import (
    grade_order,
    read_grade_order,
    read_run_answer,
    read_verdict_answer,
    run_answer,
    verdict_answer,
)
from rlvlm_sandbox.records import PROFILES, Program
from rlvlm_sandbox.serve import Server

JUDGE = PROFILES["judge"]


@asynccontextmanager
async def serving(workers: int = 2, queue: int = 8, token: str | None = None, port: int = 0) -> AsyncIterator[Server]:
    """A server whose programs run without walls: what is tested here is the way to it."""
    async with Sandbox("unsafe-subprocess", workers=workers) as sandbox:
        server = Server(sandbox, "127.0.0.1", port, workers=workers, queue=queue, token=token)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says these things, one for each request, then closes. Yields its url and what it was asked."""
    asked: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        asked.append(head + await reader.readexactly(length))
        writer.write(answers[min(len(asked), len(answers)) - 1])
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


def with_sandbox(work: Callable[[Sandbox], Awaitable[Any]], token: str | None = None) -> Any:
    async def once() -> Any:
        async with serving(token=token) as server, Sandbox("http", url=url(server), token=token) as sandbox:
            return await work(sandbox)

    return asyncio.run(once())


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE_S", 0.01)


# ---- the same as on this machine


def test_a_run_comes_back_whole() -> None:
    code = "import os, sys\ndata = sys.stdin.buffer.read()\nos.write(1, data)\nos.write(2, b'\\xfe')\nsys.exit(3)"
    ended = with_sandbox(lambda sandbox: sandbox.run(code, b"\0\xff"))
    assert dataclasses.replace(ended, wall_s=0, cpu_s=0, peak_rss_bytes=0) == Run(
        Outcome.RUNTIME_ERROR, 3, b"\0\xff", b"\xfe", False, 0, 0, 0, "unsafe-subprocess"
    )
    assert ended.wall_s > 0 and ended.cpu_s > 0 and ended.peak_rss_bytes > 1 << 20


def test_limits_go_along() -> None:
    slept = with_sandbox(lambda sandbox: sandbox.run("import time; time.sleep(9)", limits=Limits(wall_s=0.3)))
    flood = with_sandbox(lambda sandbox: sandbox.run("print('x' * 99)", limits=Limits(output_bytes=10)))
    assert slept.outcome is Outcome.TIME and slept.wall_s < 5
    assert (flood.outcome, flood.stdout, flood.truncated) == (Outcome.OUTPUT, b"x" * 10, True)


@pytest.mark.parametrize("code", [b"\xff\xfe", b"\0", "\ud800", b""])
def test_code_of_any_kind(code: str | bytes) -> None:
    assert with_sandbox(lambda sandbox: sandbox.run(code)).outcome in (Outcome.OK, Outcome.RUNTIME_ERROR)


def test_50_mb_of_code_go_over() -> None:
    assert with_sandbox(lambda sandbox: sandbox.run("#" * 50_000_000)).outcome is Outcome.OK
    huge = with_sandbox(lambda sandbox: sandbox.run(bytes(100 << 20)))
    assert huge.outcome is Outcome.SANDBOX_ERROR and "at most 134217728" in huge.detail


def test_gradings() -> None:
    code = "def f(x, n=2):\n    return x * n\nif __name__ == '__main__':\n    print(int(input()) * 2)"
    stdio = StdioTests([("4", "8"), (b"5", b"10"), ("6", "13")])
    calls = CallTests("f", [((2,), 4), ((2,), {"n": 3}, 6), (([1],), [1, 1]), (((1, 2),), (1, 2, 1)), ((1,), 3)])
    asserts = AssertTests("assert f(2) == 4\nassert f(1) == 3", "f", split=True)
    for tests, passed, total in ((stdio, 2, 3), (calls, 3, 5), (asserts, 1, 2)):
        verdict = with_sandbox(lambda sandbox, tests=tests: sandbox.grade(code, tests))
        assert (verdict.passed, verdict.total, verdict.outcome) == (passed, total, Outcome.OK), verdict
        assert [case.passed for case in verdict.cases].count(True) == passed


def test_the_author_s_error_is_the_author_s() -> None:
    tests = AssertTests("assert f(1) == 1", "f", prelude="import nothing_of_this_name")
    with pytest.raises(InvalidTests, match="nothing_of_this_name"):
        with_sandbox(lambda sandbox: sandbox.grade("def f(x): return x", tests))


def test_the_token() -> None:
    assert with_sandbox(lambda sandbox: sandbox.run("print(1)"), token="geheim").stdout == b"1\n"

    async def wrong() -> Run:
        async with serving(token="geheim") as server:
            return await HTTP(url(server), "falsch").run(Program(b"", JUDGE))

    ended = asyncio.run(wrong())
    assert ended.outcome is Outcome.SANDBOX_ERROR and "token is missing or wrong" in ended.detail


def test_sessions_say_that_they_cannot() -> None:
    ended = asyncio.run(HTTP("http://127.0.0.1:9").run(Program(b"", JUDGE, channel=0)))
    assert ended.outcome is Outcome.SANDBOX_ERROR and "session" in ended.detail


# ---- a pool that fails


def test_a_connection_is_used_again_and_one_that_has_died_is_replaced() -> None:
    async def twice() -> list[int]:
        async with serving() as server:
            pool = HTTP(url(server))
            port = server.port
            await asyncio.gather(*(pool.run(Program(b"", JUDGE)) for _ in range(2)))
            kept = [len(pool._servers[0]._free)]
            await pool.run(Program(b"", JUDGE))
            kept.append(len(pool._servers[0]._free))
        async with serving(port=port):  # a new server under the old address
            assert (await pool.run(Program(b"print(2)", JUDGE))).stdout == b"2\n"
            await pool.stop()
        return kept

    assert asyncio.run(twice()) == [2, 2]


def test_a_full_server_is_asked_again_until_it_has_room() -> None:
    async def crowd() -> Counter[Outcome]:
        async with serving(workers=1, queue=1) as server:
            pool = HTTP(url(server))
            runs = await asyncio.gather(*(pool.run(Program(b"pass", JUDGE)) for _ in range(10)))
            await pool.stop()
            return Counter(run.outcome for run in runs)

    assert asyncio.run(crowd()) == {Outcome.OK: 10}


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PATIENCE_S", 0.1)

    async def once() -> Run:
        async with answering(b"HTTP/1.1 429 Too Many Requests\r\n\r\n") as (address, _):
            return await HTTP(address).run(Program(b"", JUDGE))

    ended = asyncio.run(once())
    assert ended.outcome is Outcome.SANDBOX_ERROR and "its queue is full" in ended.detail


def test_a_dead_server_s_work_goes_to_the_others_by_turns() -> None:
    async def once() -> tuple[int, int, int]:
        ok = json.dumps(run_answer(Run(Outcome.OK, 0, b"", b"", False, 0, 0, 0, "x"))).encode()
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(ok) + ok
        async with answering(answer) as (first, one), answering(answer) as (second, two):
            pool = HTTP([first, "http://127.0.0.1:9", second])
            await pool.start.__func__(HTTP([second]))  # type: ignore[attr-defined]
            del two[:]
            runs = [await pool.run(Program(b"", JUDGE)) for _ in range(6)]
            return sum(run.outcome is Outcome.OK for run in runs), len(one), len(two)

    assert asyncio.run(once()) == (6, 2, 4)


def test_a_pool_that_is_gone_is_the_sandbox_s_failure() -> None:
    async def gone() -> tuple[Run, Verdict]:
        pool = HTTP(["http://127.0.0.1:9", "http://127.0.0.1:19"])
        return await pool.run(Program(b"", JUDGE)), await pool.grade("", StdioTests([("", "")] * 3), JUDGE)

    run, verdict = asyncio.run(gone())
    assert (
        run.outcome is Outcome.SANDBOX_ERROR and "the pool gives no answer; the last: http://127.0.0.1:" in run.detail
    )
    assert (verdict.outcome, verdict.passed, verdict.total) == (Outcome.SANDBOX_ERROR, 0, 3)
    with pytest.raises(SandboxUnavailable, match=r"no server of the pool answers: http://127\.0\.0\.1:9: "):
        asyncio.run(Sandbox("http", url="http://127.0.0.1:9").__aenter__())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 16\r\n\r\n" + b'{"detail": "no"}',
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
)
def test_what_a_broken_server_says_is_the_sandbox_s_failure(answer: bytes) -> None:
    async def once() -> tuple[Run, int]:
        async with answering(answer) as (address, asked):
            run = await HTTP(address).run(Program(b"", JUDGE))
            return run, len(asked)

    run, asked = asyncio.run(once())
    assert run.outcome is Outcome.SANDBOX_ERROR and run.detail
    assert asked in (1, 5)  # asked once if it has said something that will not change


def test_a_loss_is_made_good() -> None:
    async def once() -> tuple[Run, int]:
        ok = json.dumps(run_answer(Run(Outcome.OK, 0, b"x", b"", False, 0, 0, 0, "y"))).encode()
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(ok) + ok
        async with answering(b"", b"HTTP/1.1 502 Bad Gateway\r\n\r\n", answer) as (address, asked):
            return await HTTP(address).run(Program(b"", JUDGE)), len(asked)

    run, asked = asyncio.run(once())
    assert (run.stdout, asked) == (b"x", 3)


@pytest.mark.parametrize("wrong", ["127.0.0.1:80", "ftp://x", "http://", "http://x/?y", []])
def test_a_wrong_url(wrong: Any) -> None:
    with pytest.raises(ValueError, match="url is "):
        HTTP(wrong)


# ---- messages


@given(
    st.builds(
        Run,
        st.sampled_from(Outcome), st.none() | st.integers(-64, 255), st.binary(), st.binary(), st.booleans(),
        st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 1 << 50), st.text(), st.text(),
    )
)  # fmt: skip
def test_a_run_survives_the_way(run: Run) -> None:
    assert read_run_answer(json.loads(json.dumps(run_answer(run)))) == run


@given(
    st.builds(
        Verdict, st.integers(0, 9), st.integers(0, 9), st.sampled_from(Outcome),
        st.lists(st.builds(Case, st.booleans(), st.sampled_from(Outcome), st.text(), st.floats(0, 1))).map(tuple),
        st.text(), st.text(),
    )
)  # fmt: skip
def test_a_verdict_survives_the_way(verdict: Verdict) -> None:
    assert read_verdict_answer(json.loads(json.dumps(verdict_answer(verdict)))) == verdict


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.lists(PLAIN, max_size=2).map(tuple), PLAIN), min_size=1, max_size=3))
def test_calls_survive_the_way(cases: list[Any]) -> None:
    sent = grade_order(b"", CallTests("f", cases), JUDGE)
    read = read_grade_order(json.loads(json.dumps(sent)))["tests"]
    assert read == CallTests("f", cases)
    assert repr(read.cases) == repr(cases)  # True is not 1


def test_special_values_survive_the_way() -> None:
    values = [{1, 2}, frozenset("a"), Counter("aab"), Decimal("1.50"), 1 << 200, math.inf, b"\xff", range(3), 1j]
    tests = CallTests("f", [((value,), value) for value in values])
    read = read_grade_order(json.loads(json.dumps(grade_order(b"", tests, JUDGE))))["tests"]
    assert [case[1] for case in read.cases] == values
    assert [type(case[1]) for case in read.cases] == [type(value) for value in values]
