"""Runs cases on one backend and says, as JSON, how each ended and what it did to the host.

    python -m attacks.driver JOB        where the folder of `attacks` and `rlvlm_sandbox` is the current one

JOB: JSON with `backend`, `image`, `table` (`attacks` or `honest`) and `names` (None: all of the table). The answer is
{"unavailable": reason} or {"runs": {name: {...}}}. Standard library only, for an interpreter that nobody can execute.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlvlm_sandbox import Limits, Run, Sandbox, SandboxUnavailable

from .attacks import ATTACKS
from .cases import Case
from .honest import HONEST, STATE
from .host import SECRET, Host, descendants, secret

TABLES = {"attacks": ATTACKS, "honest": HONEST, "state": STATE}
_NOBODY = 65534
_SETTLE_S = 1.0  # for the kernel to take away what was killed
_PR_SET_CHILD_SUBREAPER = 36


class Driver:
    """Keeps a sandbox open and a host beside it; both are made anew when there was harm."""

    def __init__(self, job: dict[str, Any], directory: Path) -> None:
        self._job, self._directory = job, directory
        self._open = contextlib.AsyncExitStack()

    async def run(self, case: Case) -> dict[str, Any]:
        program = case.program(self._host.facts())
        started = time.monotonic()
        try:
            async with asyncio.timeout(60):
                run = await self._sandbox.run(program, case.stdin, case.profile, Limits(**case.limits))
        except TimeoutError:
            return {"harm": ["the run did not end"]}
        said = _said(run) | {"took_s": time.monotonic() - started, "harm": await self._harm(run)}
        if said["harm"]:
            await self.end()
            await self.begin()
        return said

    async def begin(self) -> None:
        """A host unharmed, and what belongs to the backend itself when nothing runs; a fork server may keep a child
        ready, which is another one after each run."""
        own = os.geteuid()
        self._host = Host(self._directory, (own, _NOBODY) if own == 0 else (own,))
        sandbox = Sandbox(self._job["backend"], self._job["image"], workers=1)
        self._sandbox = await self._open.enter_async_context(sandbox)
        before = await _settled()
        run = await self._sandbox.run("print('begin')")
        assert run.stdout == b"begin\n", run
        after = await _settled()
        self._lasting, self._count = before & after, len(after)

    async def end(self) -> None:
        self._host.close()
        await self._open.aclose()

    async def _harm(self, run: Run) -> list[str]:
        end = time.monotonic() + _SETTLE_S
        while not self._is_quiet(seen := descendants(os.getpid())) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        found = self._host.harm()
        found += [f"process {pid} of the backend is gone" for pid in self._lasting - seen]
        if len(seen) != self._count:
            more = [_name(pid) for pid in seen - self._lasting]
            found.append(f"there were {self._count} processes, {len(seen)} are left, among them {more}")
        return found + [f"it says {word!r}" for word in SECRET.findall(run.stdout + run.stderr)]

    def _is_quiet(self, seen: set[int]) -> bool:
        return len(seen) == self._count and self._lasting <= seen


async def _settled() -> set[int]:
    seen: set[int] = set()
    while seen != (seen := descendants(os.getpid())):
        await asyncio.sleep(0.1)
    return seen


def _said(run: Run) -> dict[str, Any]:
    return {
        "outcome": str(run.outcome), "exit_code": run.exit_code, "stdout": run.stdout.decode("latin-1"),
        "stderr": run.stderr[-4000:].decode("latin-1"), "truncated": run.truncated, "wall_s": run.wall_s,
        "detail": run.detail, "backend": run.backend,
    }  # fmt: skip


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()}"
    return str(pid)


async def drive(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    table = {case.name: case for case in TABLES[job["table"]]}
    driver = Driver(job, directory)
    try:
        await driver.begin()
    except SandboxUnavailable as error:
        return {"unavailable": str(error)}
    try:
        return {"runs": [await driver.run(table[name]) for name in job["names"]]}
    finally:
        await driver.end()


def main() -> None:
    # What a run leaves behind becomes our own child, and is seen.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["TOKEN"] = secret("driver")
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as file:
        os.chmod(directory, 0o755)
        file.write(secret("descriptor").encode())
        file.flush()
        os.set_inheritable(file.fileno(), True)
        print(json.dumps(asyncio.run(drive(json.loads(sys.argv[1]), Path(directory)))))


if __name__ == "__main__":
    main()
