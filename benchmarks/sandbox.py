"""How fast the sandbox is, beside what a user would otherwise pick: a bare `python3 -c` for each program.

    .venv/bin/python benchmarks/sandbox.py [--runs 200] [--python /usr/bin/python3]

One run of each in turn, so that whatever else the machine does meets all alike. Prints a table of ratios and targets,
and exits with 1 if one is missed. Every protection is on. `--python` names another interpreter to start bare.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlvlm_sandbox import Outcome, Sandbox, probe

SMALL = "print(1)"
SCIENCE = "import numpy, sympy\nprint(1)"
AT_A_TIME = 4


@dataclass(frozen=True)
class Line:
    """One claim. target: the most (p50) or, for throughput, the least that the ratio to bare may be."""

    what: str
    bare: float
    ours: float
    unit: str
    target: float

    @property
    def ratio(self) -> float:
        return self.ours / self.bare

    @property
    def holds(self) -> bool:
        return self.ratio >= self.target if self.unit == "runs/s" else self.ratio <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.unit == "runs/s" else "<="
        numbers = f"{self.bare:9.1f} {self.ours:9.1f} {self.unit:7} {self.ratio:6.3f}  {sign} {self.target:<5}"
        return f"{self.what:44} {numbers} {'' if self.holds else 'MISSED'}".rstrip()


def bare(python: str, code: str) -> None:
    subprocess.run([python, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, check=True)


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await call()
    return (time.perf_counter() - start) * 1e3


async def in_sandbox(sandbox: Sandbox, code: str) -> None:
    run = await sandbox.run(code)
    if run.outcome is not Outcome.OK or run.stdout != b"1\n":
        raise SystemExit(f"{sandbox.backend}: {run}")


async def one_at_a_time(python: str, sandbox: Sandbox, code: str, runs: int) -> tuple[float, float]:
    """Milliseconds of the median run, bare and ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        times[0].append(await timed(lambda: asyncio.to_thread(bare, python, code)))
        times[1].append(await timed(lambda: in_sandbox(sandbox, code)))
    return statistics.median(times[0]), statistics.median(times[1])


async def four_at_a_time(python: str, sandbox: Sandbox, runs: int, rounds: int = 5) -> tuple[float, float]:
    """Runs a second, bare and ours: the median round."""
    rates: tuple[list[float], list[float]] = ([], [])
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda _: bare(python, SMALL), range(runs)))
            rates[0].append(runs / (time.perf_counter() - start))
            waiting = iter(range(runs))

            async def work(waiting: object = waiting) -> None:
                for _ in waiting:  # type: ignore[attr-defined]
                    await in_sandbox(sandbox, SMALL)

            start = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
            rates[1].append(runs / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


async def measure(python: str, runs: int) -> list[Line]:
    lines = []
    for backend, slowest, least in (("namespaces", 0.45, 2.0), ("landlock", 0.45, 2.5), ("bubblewrap", 1.8, None)):
        if (reason := await probe(backend)) is not None:
            print(f"{backend}: left out, as it does not hold here: {reason}")
            continue
        async with Sandbox(backend, workers=os.cpu_count()) as sandbox:
            lines.append(Line(f"{backend}, p50", *await one_at_a_time(python, sandbox, SMALL, runs), "ms", slowest))
            if least is not None:
                rates = await four_at_a_time(python, sandbox, runs // 4)
                lines.append(Line(f"{backend}, {AT_A_TIME} at a time", *rates, "runs/s", least))
        if least is not None and python == sys.executable:
            async with Sandbox(backend, image="py-sci", workers=os.cpu_count()) as sandbox:
                times = await one_at_a_time(python, sandbox, SCIENCE, max(runs // 10, 5))
                lines.append(Line(f"{backend}, p50 with numpy and sympy", *times, "ms", 0.03))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="of each (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to start bare (default: this one)")
    arguments = parser.parse_args()
    lines = asyncio.run(measure(arguments.python, arguments.runs))
    print(f"{'':44} {'bare':>9} {'ours':>9} {'':7} {'ratio':>6}  target")
    print(*lines, sep="\n")
    return 0 if all(line.holds for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
