"""The price of walls: a sandboxed program against a bare `python3 -c` of the same interpreter.

    .venv/bin/python benchmarks/sandbox.py [--runs 200]

Everything is interleaved (A B C A B C ...), so that what else the machine does falls on all alike; measure on an idle
one all the same. `bare` is subprocess.run with captured output, of the same interpreter in a virtual environment
without packages. One at a time: p50 and p95 of `print(1)`, and of the same with numpy and sympy, which bare has to
import. Four at a time: programs a second, of four threads with subprocess.run against four calls of Sandbox.run in
flight. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rlvlm_sandbox import Sandbox
from rlvlm_sandbox.images import find_image

PLAIN, SCIENCE = "print(1)", "import numpy, sympy; print(1)"
FORK_SERVERS, BACKENDS = ("namespaces", "landlock"), ("namespaces", "landlock", "bubblewrap")
AT_A_TIME = 4
MS = 1000.0
Line = tuple[str, str, float | None, bool]  # what, measured, ratio to bare, whether its target is met


@functools.cache
def clean_python() -> str:
    """The same interpreter in an environment without packages, whose start-up files could cost more than all else."""
    directory = tempfile.mkdtemp(prefix="benchmark-")
    atexit.register(shutil.rmtree, directory)
    venv.create(directory, symlinks=True)
    return f"{directory}/bin/python"


@functools.cache
def bare_environment(code: str) -> dict[str, str]:
    image = find_image("py-sci" if code == SCIENCE else "py")
    path = {"PYTHONPATH": ":".join(image.packages)} if image.packages else {}
    return image.environment(inside=False) | path


def bare(code: str) -> None:
    done = subprocess.run([clean_python(), "-c", code], capture_output=True, env=bare_environment(code))
    assert done.stdout == b"1\n", done


async def sandboxed(sandbox: Sandbox, code: str) -> None:
    run = await sandbox.run(code)
    assert run.stdout == b"1\n", run


async def one_at_a_time(code: str, sandboxes: Sequence[Sandbox], runs: int) -> list[list[float]]:
    """Milliseconds of each run: of bare, then of each sandbox."""
    bare(code)
    times: list[list[float]] = [[] for _ in range(1 + len(sandboxes))]
    for _ in range(runs):
        for sandbox, sample in zip((None, *sandboxes), times, strict=True):
            started = time.perf_counter()
            if sandbox is None:
                bare(code)
            else:
                await sandboxed(sandbox, code)
            sample.append((time.perf_counter() - started) * MS)
    return times


async def four_at_a_time(sandboxes: Sequence[Sandbox], runs: int, rounds: int = 7) -> list[list[float]]:
    """Programs a second, by round: of bare, then of each sandbox."""

    async def ours(sandbox: Sandbox) -> None:
        queue = iter(range(runs))

        async def work() -> None:
            for _ in queue:
                await sandboxed(sandbox, PLAIN)

        await asyncio.gather(*(work() for _ in range(AT_A_TIME)))

    async def theirs() -> None:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            await asyncio.to_thread(lambda: list(pool.map(bare, [PLAIN] * runs)))

    ways: list[Callable[[], Awaitable[None]]] = [theirs, *(functools.partial(ours, sandbox) for sandbox in sandboxes)]
    rates: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, sample in zip(ways, rates, strict=True):
            started = time.perf_counter()
            await way()
            sample.append(runs / (time.perf_counter() - started))
    return rates


def latency_lines(title: str, names: Sequence[str], times: list[list[float]], targets: Sequence[float]) -> list[Line]:
    p50 = [statistics.median(sample) for sample in times]
    p95 = [statistics.quantiles(sample, n=20)[-1] for sample in times]
    lines: list[Line] = [(f"{title}, bare", f"{p50[0]:.2f} / {p95[0]:.2f} ms", None, True)]
    for name, middle, high, target in zip(names, p50[1:], p95[1:], targets, strict=True):
        ratio = middle / p50[0]
        measured = f"{middle:.2f} / {high:.2f} ms, target <= {target}"
        lines.append((f"{title}, {name}", measured, ratio, ratio <= target))
    return lines


def throughput_lines(names: Sequence[str], rates: list[list[float]], targets: Sequence[float]) -> list[Line]:
    lines: list[Line] = [("four at a time, bare", f"{statistics.median(rates[0]):.0f} a second", None, True)]
    for name, sample, target in zip(names, rates[1:], targets, strict=True):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(sample, rates[0], strict=True))
        measured = f"{statistics.median(sample):.0f} a second, target >= {target}"
        lines.append((f"four at a time, {name}", measured, ratio, ratio >= target))
    return lines


async def measure(runs: int) -> list[Line]:
    async with contextlib.AsyncExitStack() as stack:
        plain = [await stack.enter_async_context(Sandbox(name)) for name in BACKENDS]
        times = await one_at_a_time(PLAIN, plain, runs)
        lines = latency_lines("print(1)", BACKENDS, times, (0.45, 0.45, 1.8))
        lines += throughput_lines(FORK_SERVERS, await four_at_a_time(plain[:2], runs), (2.0, 2.5))
        science = [await stack.enter_async_context(Sandbox(name, "py-sci")) for name in FORK_SERVERS]
        times = await one_at_a_time(SCIENCE, science, max(10, runs // 10))
        return lines + latency_lines("numpy and sympy", FORK_SERVERS, times, (0.03, 0.03))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="of each way (default: %(default)s)")
    lines = asyncio.run(measure(parser.parse_args().runs))
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; p50 / p95, ratio of the p50 to bare's\n")
    for what, measured, ratio, met in lines:
        print(f"{what:28} {'' if ratio is None else f'{ratio:.3f}':>7}  {measured}{'' if met else '   MISSED'}")
    return 0 if all(met for *_, met in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
