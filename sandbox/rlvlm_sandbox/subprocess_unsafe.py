"""Backend `unsafe-subprocess`: no walls at all. For code that you would run yourself; never chosen unless named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile

from rlvlm_sandbox.collect import Boot, Command, Processes
from rlvlm_sandbox.images import Image
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import Program, Run


class UnsafeSubprocess:
    """A process of this user for each run, in a directory of its own. It reads and writes what this user may, has the
    network, and what it starts in a session of its own outlives it. Limits of time, memory, output and files hold."""

    name = "unsafe-subprocess"

    def __init__(self, image: Image | None = None, workers: int = 1) -> None:
        self._processes = Processes(self.name)
        self._python = image.python if image else os.path.realpath(sys.executable)
        self._packages = image.packages if image else ()
        self._env = image.environment(inside=False) if image else {"PATH": os.defpath, "LANG": "C.UTF-8"}

    async def start(self) -> None:
        """There is nothing to make ready, and nothing that could hold."""

    async def run(self, program: Program) -> Run:
        if program.language != "python":
            error = f"{self.name} runs Python only, not {program.language!r}; use bubblewrap"
            return run_of({"error": error}, b"", b"", False, program.limits, self.name)
        try:
            directory = tempfile.mkdtemp(prefix="rlvlm-sandbox-")
        except OSError as error:  # a full disk
            return run_of({"error": f"no directory for the run: {error}"}, b"", b"", False, program.limits, self.name)
        try:
            return await self._processes.run(self._command(program, directory), program)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def stop(self) -> None:
        await self._processes.stop()

    def _command(self, program: Program, directory: str) -> Command:
        boot = Boot(file=f"{directory}/main.py", packages=self._packages)
        return Command(
            argv=lambda fds: [self._python, *boot.arguments(program, fds)],
            kill=_kill_group,
            is_init=False,
            env={**self._env, "HOME": directory, "TMPDIR": directory},
            cwd=directory,
            memory_bytes=program.limits.memory_bytes if program.profile == "tool" else None,
        )


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(pid, signal.SIGKILL)
