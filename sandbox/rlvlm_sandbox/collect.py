"""One process per run: starts it, collects what it writes, keeps its time and memory, and ends all of it.

What the backends `bubblewrap` and `unsafe-subprocess` have in common.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlvlm_sandbox.descriptors import Output, sealed
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import Limits, Program, Run
from rlvlm_sandbox.server import resident_bytes

_TICK_S = 0.02  # how often memory is looked at
_ACCOUNT_S = 0.2  # for init to reap the program that was killed
_GRACE_S = 10.0  # for what was killed to be gone
_STACK_BYTES = 64 << 20  # 50,000 honest frames of recursion through C
_SIGNS_BYTES = 16  # of what `Descriptors.ready` takes
# Compiled once, and not by every run: for an interpreter of our own version, as all images have.
_BOOT_FILE = Path(__file__).with_name("boot.py")
_BOOT = marshal.dumps(compile(_BOOT_FILE.read_text(), "boot", "exec", dont_inherit=True, optimize=2))


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What a process finds under these numbers. code: the program. boot: what the interpreter executes first. ready:
    it writes a dot there when the program is about to begin (what ends before is the sandbox's failure) and then, where
    it is init, the program's exit status."""

    code: int
    boot: int
    ready: int


@dataclass(frozen=True, slots=True)
class Walls:
    """What is left to build for pid 1 of a pid namespace. filter: a descriptor of the program's seccomp filter. uid:
    the program's user, where init keeps another."""

    filter: int
    uid: int | None


@dataclass(frozen=True, slots=True)
class Boot:
    """What the interpreter does before the program. file: what the code is, to itself. packages: for sys.path.
    argv: executed in its place, where the language is another. processes: RLIMIT_NPROC, None where it would count what
    else the user runs. mapped: whether memory is limited by what a process maps.
    """

    file: str = "/tmp/main.py"
    packages: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    processes: int | None = None
    mapped: bool = True
    walls: Walls | None = None

    def arguments(self, program: Program, fds: Descriptors) -> list[str]:
        """The interpreter's own."""
        limits = program.limits
        walls = None if self.walls is None else asdict(self.walls) | {"inodes": limits.inodes}
        order = {
            "code": fds.code, "ready": fds.ready, "channel": program.channel, "walls": walls,
            "limits": self._rlimits(limits), "argv": [*self.argv], "file": self.file, "packages": [*self.packages],
        }  # fmt: skip
        load = f"import marshal, posix; exec(marshal.loads(posix.pread({fds.boot}, {len(_BOOT)}, 0)))"
        text = f"{load}; boot(**{order!r})"
        return ["-I", "-S", "-B", "-c", text]

    def _rlimits(self, limits: Limits) -> list[tuple[str, int, int]]:
        """(name, soft, hard) as for setrlimit(2)."""
        cpu_s = math.ceil(limits.cpu_s or 1)
        equal = {
            "RLIMIT_AS": limits.memory_bytes if self.mapped else None, "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NPROC": self.processes, "RLIMIT_NOFILE": limits.open_files, "RLIMIT_STACK": _STACK_BYTES,
            "RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0,
        }  # fmt: skip
        given = [(name, limit, limit) for name, limit in equal.items() if limit is not None]
        return [("RLIMIT_CPU", cpu_s, cpu_s + 1), *given]  # SIGXCPU, and a second later SIGKILL


@dataclass(frozen=True, slots=True)
class Command:
    """A process to be started. argv: made from the descriptors that it finds.

    kill: ends all that the process of this pid has started. memory_bytes: what the tree of the process may have
    resident, looked at while it runs; None where the kernel keeps it. nobody: whether the process leaves root.
    """

    argv: Callable[[Descriptors], Sequence[str]]
    kill: Callable[[int], None]
    env: Mapping[str, str]
    is_init: bool
    cwd: str = "/"
    memory_bytes: int | None = None
    nobody: bool = False
    fds: tuple[int, ...] = ()


class Processes:
    """Those of a backend's runs."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._live: set[_Live] = set()
        self._stopped = False

    async def run(self, command: Command, program: Program) -> Run:
        """Runs it to its end; nothing of it is left then. Cancelling ends it too."""
        if self._stopped:
            return run_of({"error": "the sandbox is closed"}, b"", b"", False, program.limits, self._backend)
        live = _Live(command)
        self._live.add(live)
        try:
            return await _run(live, command, program, self._backend)
        except OSError as error:  # no interpreter, or no memory, process or descriptor left
            return run_of({"error": f"it does not start: {error}"}, b"", b"", False, program.limits, self._backend)
        finally:
            self._live.discard(live)

    async def stop(self) -> None:
        """Ends all that is running; nothing starts any more."""
        self._stopped = True
        for live in self._live:
            live.end("stop")
        while self._live:
            await asyncio.sleep(_TICK_S)


async def _run(live: _Live, command: Command, program: Program, backend: str) -> Run:
    loop, limits = asyncio.get_running_loop(), program.limits
    with contextlib.ExitStack() as stack:
        stdin, code, boot = (stack.enter_context(sealed(data)) for data in (program.stdin, program.code, _BOOT))
        outputs = []
        for limit in (limits.output_bytes or 0, limits.output_bytes or 0, _SIGNS_BYTES):
            outputs.append(Output(loop, limit, lambda: live.end("output")))
            stack.callback(outputs[-1].close)
        stdout, stderr, ready = outputs
        fds = Descriptors(code, boot, ready.theirs)
        passed = (code, boot, ready.theirs, *command.fds, *([] if program.channel is None else [program.channel]))
        started = time.monotonic()
        live.start(command.argv(fds), (stdin, stdout.theirs, stderr.theirs), passed)
        for output in outputs:
            output.close_theirs()
        report = await live.wait(limits.wall_s or 0) | {"wall_s": time.monotonic() - started}
        said, complaint, signs = (output.rest() for output in outputs)
    if not signs.startswith(b".") and report["cause"] is None:
        report = {"error": complaint.decode(errors="replace").strip() or "it ended before the program began"}
    elif report["cause"] is not None:
        report["exit_code"] = None
    elif command.is_init:
        report["exit_code"] = int(signs[1:]) if len(signs) > 1 else None
    return run_of(report, said, complaint, stdout.truncated or stderr.truncated, limits, backend)


class _Live:
    """The process of a run. cause: why it was ended, if we did."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._cause: str | None = None

    def start(self, argv: Sequence[str], streams: tuple[int, int, int], fds: tuple[int, ...]) -> None:
        """Raises OSError, with nothing started."""
        nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": ()} if self._command.nobody else {}
        self._process = subprocess.Popen(
            argv, stdin=streams[0], stdout=streams[1], stderr=streams[2], pass_fds=fds, cwd=self._command.cwd,
            env=dict(self._command.env), start_new_session=True, **nobody,
        )  # fmt: skip
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._reap(self._process.pid)
            raise

    def end(self, cause: str) -> None:
        if self._process is not None and self._process.returncode is None:
            self._cause = self._cause or cause
            if self._command.is_init:
                # The program first, so that init can reap it and its time is counted.
                kill_generation(self._process.pid, 2)
                asyncio.get_running_loop().call_later(_ACCOUNT_S, self._kill)
            else:
                self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._command.kill(self._process.pid)

    async def wait(self, wall_s: float) -> dict[str, Any]:
        """Until its end, which comes by itself or by ours. The report is as `run_of` takes it, but for `wall_s`."""
        assert self._process is not None  # start() has been
        loop, pid = asyncio.get_running_loop(), self._process.pid
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        timer = loop.call_later(wall_s, self.end, "wall")
        watch = loop.create_task(self._watch(pid))
        try:
            await ended.wait()
        finally:
            timer.cancel()
            watch.cancel()
            if not ended.is_set():  # cancelled
                self.end("stop")
                await asyncio.wait({loop.create_task(ended.wait())}, timeout=_GRACE_S)
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            report = self._reap(pid)
        return report

    def _reap(self, pid: int) -> dict[str, Any]:
        assert self._process is not None
        self._command.kill(pid)  # what it left behind; the pid is still its own
        _, status, usage = os.wait4(pid, 0)
        self._process.returncode = code = os.waitstatus_to_exitcode(status)
        return {
            "cause": self._cause, "exit_code": code, "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }  # fmt: skip

    async def _watch(self, pid: int) -> None:
        memory = self._command.memory_bytes
        while memory is not None:
            await asyncio.sleep(_TICK_S)
            if await asyncio.to_thread(resident_bytes, pid) > memory:
                self.end("memory")


def kill_generation(pid: int, generation: int) -> None:
    """Kills the children (1) or grandchildren (2) of our child `pid`."""
    parents = [pid] if generation == 1 else children(pid)
    family = [(parent, child) for parent in parents for child in children(parent)]
    for parent, child in family:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            pidfd = os.pidfd_open(child)
            try:
                if child in children(parent):  # its number has not gone to somebody else
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += (int(child) for child in file.read().split())
    return found
