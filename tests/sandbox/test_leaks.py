"""What is left on the host: after thousands of runs, after a kill of the supervisor, after a kill of a fork server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rlvlm_sandbox import Limits, Outcome, Sandbox, SandboxUnavailable, probe

BACKENDS = ("namespaces", "landlock", "bubblewrap")
FORK_SERVERS = BACKENDS[:2]
# Of every way in which a run can end.
PROGRAMS = (
    ("print(1)", Outcome.OK),
    ("1 / 0", Outcome.RUNTIME_ERROR),
    ("import os; os.abort()", Outcome.SIGNAL),
    ("print('x' * 3000)", Outcome.OUTPUT),
    ("import time; time.sleep(9)", Outcome.TIME),
)


OTHERS: set[int] = set()  # what earlier tests of this process have left running, or unreaped


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(children(os.getpid()))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return holding(request.param)


@pytest.fixture(params=FORK_SERVERS)
def fork_server(request: pytest.FixtureRequest) -> str:
    return holding(request.param)


def holding(backend: str) -> str:
    if reason := asyncio.run(probe(backend)):
        pytest.skip(f"{backend}: {reason}")
    return backend


def children(pid: int) -> Iterator[int]:
    """All live descendants."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                yield child
                yield from children(child)


def seen() -> dict[str, Any]:
    """What could be left behind, but for what other processes of this machine do. Sockets and pipes count as one."""
    mine = {place: [name for name in os.listdir(place) if "rlvlm" in name] for place in ("/tmp", "/dev/shm", "/run")}
    return mine | {
        "processes": sorted(set(children(os.getpid())) - OTHERS),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "threads": len(os.listdir("/proc/self/task")),
    }


def until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def inside(pid: int) -> tuple[int, str]:
    """Of a fork server: how many descriptors it has, and its mounts."""
    return len(os.listdir(f"/proc/{pid}/fd")), Path(f"/proc/{pid}/mountinfo").read_text()


async def run_many(backend: str, runs: int) -> None:
    """`runs` of them, four at a time; one in forty is cancelled, one in forty takes its time."""
    async with Sandbox(backend, workers=2) as sandbox:
        await asyncio.gather(*(sandbox.run("import time; time.sleep(0.1)") for _ in range(4)))
        await asyncio.sleep(0.3)
        before = seen()
        servers = {pid: inside(pid) for pid in before["processes"]} if os.geteuid() == 0 else {}
        queue = iter(range(runs))
        await asyncio.gather(*(work(sandbox, queue) for _ in range(4)))
        await asyncio.sleep(0.3)
        after = seen()
        lasting = set(before.pop("processes")), set(after.pop("processes"))
        # a fork server may keep a child ready, another one after each run
        assert len(lasting[0]) == len(lasting[1])
        assert after == before
        for pid in set.intersection(*lasting) & servers.keys():
            assert inside(pid) == servers[pid]


async def work(sandbox: Sandbox, queue: Iterator[int]) -> None:
    for number in queue:
        if number % 40 == 1:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(sandbox.run("import time; time.sleep(9)"), 0.01)
            continue
        program, outcome = PROGRAMS[number % 4 if number % 40 else 4]
        run = await sandbox.run(program, limits=Limits(wall_s=5 if number % 40 else 0.2, output_bytes=2000))
        assert run.outcome is outcome, (program, run)


@pytest.mark.parametrize(
    "runs", [pytest.param(2_000, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.engine)]
)
def test_runs_leave_nothing(backend: str, runs: int) -> None:
    asyncio.run(asyncio.to_thread(int))  # what asyncio itself keeps is there from now on
    before = seen()
    asyncio.run(run_many(backend, runs // 10 if backend == "bubblewrap" else runs))
    assert until(lambda: seen() == before, 2), (before, seen())


_SUPERVISOR = """
import asyncio, sys
from rlvlm_sandbox import Sandbox
async def main():
    async with Sandbox(sys.argv[1], workers=2) as sandbox:
        runs = [asyncio.create_task(sandbox.run("import time; time.sleep(60)")) for _ in range(2)]
        await asyncio.sleep(0.5)
        print("running", flush=True)
        await asyncio.gather(*runs)
asyncio.run(main())
"""


def test_a_killed_supervisor_leaves_nothing(backend: str) -> None:
    mounts, directories = Path("/proc/self/mountinfo").read_text(), set(os.listdir("/tmp"))
    supervisor = subprocess.Popen([sys.executable, "-c", _SUPERVISOR, backend], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None and supervisor.stdout.readline() == b"running\n"
    started = {pid: start_of(pid) for pid in children(supervisor.pid)}
    assert len(started) >= 2
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    assert until(lambda: not any(start_of(pid) == start for pid, start in started.items()), 1), started
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not [name for name in set(os.listdir("/tmp")) - directories if "rlvlm" in name]


def start_of(pid: int) -> str | None:
    """When a process was started, which together with its id is nobody else's; None where it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def own_children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(child) for child in text.split()} - OTHERS


def test_a_killed_fork_server_takes_its_own_runs_only(fork_server: str) -> None:
    async def main() -> None:
        async with Sandbox(fork_server, workers=2) as sandbox:
            mark = uuid.uuid4().hex
            slow = f"import time; time.sleep(1.5); print('{mark}')"
            first, second = (asyncio.create_task(sandbox.run(slow)) for _ in range(2))
            await asyncio.sleep(0.3)
            os.kill(innermost_server(min(own_children())), signal.SIGKILL)
            ended, went_on = sorted(await asyncio.gather(first, second), key=lambda run: run.outcome is Outcome.OK)
            assert (ended.outcome, ended.exit_code, bool(ended.detail)) == (Outcome.SANDBOX_ERROR, None, True)
            assert (went_on.outcome, went_on.stdout) == (Outcome.OK, f"{mark}\n".encode())
            again = await asyncio.gather(*(sandbox.run("print(2)") for _ in range(4)))
            assert [run.stdout for run in again] == [b"2\n"] * 4

    asyncio.run(main())


def innermost_server(pid: int) -> int:
    """`namespaces` has a process outside that only waits for the fork server."""
    inside = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return int(inside[0]) if b"\0root\0" in command else pid


def test_a_killed_outer_half_is_a_failure_of_the_sandbox(fork_server: str) -> None:
    async def main() -> None:
        async with Sandbox(fork_server, workers=1) as sandbox:
            run = asyncio.create_task(sandbox.run("import time; time.sleep(9)"))
            await asyncio.sleep(0.3)
            (child,) = own_children()
            below = {pid: start_of(pid) for pid in children(child)}
            os.kill(child, signal.SIGKILL)
            assert (await asyncio.wait_for(run, 3)).outcome is Outcome.SANDBOX_ERROR
            assert (await sandbox.run("print(2)")).stdout == b"2\n"
            assert until(lambda: not any(start_of(pid) == start for pid, start in below.items()), 1)

    asyncio.run(main())


def test_a_fork_server_that_does_not_start_leaves_nothing(fork_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen()
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        with pytest.raises(SandboxUnavailable):
            await Sandbox(fork_server).__aenter__()

    asyncio.run(main())
    assert until(lambda: seen() == before, 2), (before, seen())


def test_leaving_in_the_middle_ends_what_runs(backend: str) -> None:
    async def main() -> None:
        async with Sandbox(backend, workers=2) as sandbox:
            runs = [asyncio.create_task(sandbox.run("import time; time.sleep(60)")) for _ in range(2)]
            await asyncio.sleep(0.3)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    before = seen()
    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 10
    assert until(lambda: seen() == before, 2), (before, seen())
