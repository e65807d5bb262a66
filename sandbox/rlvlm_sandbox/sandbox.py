"""`Sandbox`: starts runs, collects their output, names their outcome."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from signal import SIGXCPU
from typing import Any, Self

from rlvlm_sandbox.records import Limits, Outcome, Run, SandboxUnavailable
from rlvlm_sandbox.seccomp import filter_program

BACKENDS = ("namespaces",)
_LAUNCHER = Path(__file__).with_name("launch.py")
_GRACE_S = 10.0  # beyond the run's own limit, for the launcher to start, kill and report
_ENVIRONMENT = {
    "PATH": "/python/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": "/python/lib",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip

# Says `holds` where every promise of the backend is kept, else which ones are not.
_CANARY = """
import os, socket
def succeeds(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
status = dict(line.rstrip("\\n").partition(":\\t")[::2] for line in open("/proc/self/status"))
files = set("dev etc lib lib32 lib64 main.py proc python tmp usr".split())
broken = {
    "the user is not 1000": os.getuid() != 1000 or os.getgid() != 1000,
    "it has capabilities": any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
    "it may gain privileges": status["NoNewPrivs"] != "1",
    "system calls are not filtered": status["Seccomp"] != "2",
    "it sees other processes": {name for name in os.listdir("/proc") if name.isdigit()} != {"1", "2"},
    "it sees other files": not set(os.listdir("/")) <= files,
    "it sees network interfaces": any("lo:" not in line for line in open("/proc/net/dev").readlines()[2:]),
    "it may open a network socket": succeeds(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "it may write to the root": succeeds(lambda: open("/x", "w")),
    "it may write to the libraries": succeeds(lambda: open("/python/lib/x", "w")),
    "it may not write to /tmp": not succeeds(lambda: open("/tmp/x", "w")),
    "it may start processes": succeeds(os.fork),
}
print(*[what for what, is_so in broken.items() if is_so] or ["holds"], sep="; ")
"""


async def probe(backend: str = "namespaces") -> str | None:
    """Runs the backend's canary. Returns None where all it promises holds, else the reason why it does not."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    run = await _run(backend, _CANARY.encode(), b"", Limits())
    if run.outcome is Outcome.OK and run.stdout == b"holds\n":
        return None
    said = run.detail or (run.stdout + run.stderr).decode(errors="replace").strip()
    return f"its canary ended with {run.outcome}: {said or 'no word'}"


class Sandbox:
    """`async with Sandbox() as sandbox: run = await sandbox.run(code)`. Any number of runs may go on at a time.

    backend: `auto` takes the first that holds; `namespaces` (the only one today) gives every run a fresh process in
    fresh user, pid, mount, network, ipc, uts and cgroup namespaces. Entering raises SandboxUnavailable, with the
    reason, where it does not hold on this machine; nothing weaker is used instead.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"Sandbox backend is {backend!r}; give 'auto' or one of {BACKENDS}")
        self.backend = BACKENDS[0] if backend == "auto" else backend
        self._entered = False

    async def __aenter__(self) -> Self:
        reason = await probe(self.backend)
        if reason is not None:
            raise SandboxUnavailable(
                f"sandbox backend {self.backend!r} does not hold here: {reason}. Allow unprivileged user namespaces "
                "(container: a seccomp profile that permits clone with new namespaces, and an unmasked /proc)"
            )
        self._entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._entered = False

    async def run(self, code: str | bytes, stdin: bytes = b"", limits: Limits | None = None) -> Run:
        """Runs `code` as `/main.py` with the standard library of this interpreter, in an empty writable /tmp.

        Nothing of the run survives it, however it ends; cancelling the call ends the run.
        """
        if not self._entered:
            raise RuntimeError("Sandbox.run outside of `async with Sandbox() as sandbox:`; enter it first")
        # What UTF-8 cannot hold is the program's own error: Python will refuse to read it.
        source = code.encode("utf-8", "surrogatepass") if isinstance(code, str) else code
        return await _run(self.backend, source, stdin, limits or Limits())


async def _run(backend: str, code: bytes, stdin: bytes, limits: Limits) -> Run:
    with _sealed(code) as code_fd, _sealed(stdin) as stdin_fd, _pipe() as (result_in, result_out):
        fds = {"code_fd": code_fd, "stdin_fd": stdin_fd, "result_fd": result_out}
        interpreter = os.path.realpath(sys.executable)
        process = await asyncio.create_subprocess_exec(
            interpreter, "-I", "-S", "-B", str(_LAUNCHER), json.dumps(_config(interpreter, limits) | fds),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            pass_fds=tuple(fds.values()), env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None  # they are pipes
        try:
            async with asyncio.timeout(limits.wall_s + _GRACE_S):
                (stdout, more_out), (stderr, more_err), status = await asyncio.gather(
                    _collect(process.stdout, limits.output_bytes, process.terminate),
                    _collect(process.stderr, limits.output_bytes, process.terminate),
                    process.wait(),
                )
            report = json.loads(os.read(result_in, 1 << 16)) if status == 0 else {}
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                process.terminate()
            raise
        except TimeoutError:
            process.kill()  # and its death ends the run
            stdout = stderr = b""
            more_out = more_err = False
            report = {"error": f"the launcher did not end within {_GRACE_S:g} s of the run's time"}
        finally:
            # Nothing is left when this returns. Reading on matters: a full pipe that nobody reads is never seen to end.
            ends = (_collect(stream, 0, lambda: None) for stream in (process.stdout, process.stderr))
            await asyncio.gather(*ends, process.wait())
    truncated = more_out or more_err
    outcome, detail = _outcome(report, truncated, stderr, limits)
    return Run(
        outcome=outcome,
        exit_code=None if outcome is Outcome.SANDBOX_ERROR else report.get("exit_code"),
        stdout=stdout,
        stderr=stderr,
        truncated=truncated,
        wall_s=report.get("wall_s", 0.0),
        cpu_s=report.get("cpu_s", 0.0),
        peak_rss_bytes=report.get("peak_rss_bytes", 0),
        backend=backend,
        detail=detail,
    )


def _outcome(report: Mapping[str, Any], truncated: bool, stderr: bytes, limits: Limits) -> tuple[Outcome, str]:
    """The outcome, and the detail if it is SANDBOX_ERROR. What the sandbox saw goes before what the program says."""
    exit_code, cause = report.get("exit_code"), report.get("cause")
    if "error" in report:
        return Outcome.SANDBOX_ERROR, report["error"]
    if truncated:
        return Outcome.OUTPUT, ""
    if cause in ("wall", "memory"):
        return (Outcome.TIME if cause == "wall" else Outcome.MEMORY), ""
    if exit_code is None:
        said = stderr.decode(errors="replace").strip()
        return Outcome.SANDBOX_ERROR, f"the launcher gave no exit status: {said or 'no word'}"
    if exit_code == -SIGXCPU or (exit_code < 0 and report["cpu_s"] >= limits.cpu_s):
        return Outcome.TIME, ""
    if exit_code < 0:
        return Outcome.SIGNAL, ""
    if exit_code == 1 and _last_exception(stderr).endswith(b"MemoryError"):
        return Outcome.MEMORY, ""
    return (Outcome.OK if exit_code == 0 else Outcome.RUNTIME_ERROR), ""


def _last_exception(stderr: bytes) -> bytes:
    """The name of the exception on the last line of a traceback. A program can only forge its own failure with it."""
    return stderr.rstrip().rpartition(b"\n")[2].partition(b":")[0]


def _config(interpreter: str, limits: Limits) -> dict[str, Any]:
    """The launcher's orders. The interpreter moves to /python: its own path may tell about the host."""
    inside = f"/python/bin/{os.path.basename(interpreter)}"
    binds = [(interpreter, inside)]
    links: dict[str, str] = {}
    for name in ("lib", "lib64"):
        if os.path.isdir(f"{sys.base_prefix}/{name}"):
            binds.append((os.path.realpath(f"{sys.base_prefix}/{name}"), f"/python/{name}"))
    for path in (
        "/usr/lib",
        "/usr/lib32",
        "/usr/lib64",
        "/usr/local/lib",
        "/lib",
        "/lib32",
        "/lib64",
        "/etc/ld.so.cache",
    ):
        if os.path.islink(path):
            links[path] = os.path.realpath(path)
        elif os.path.exists(path):
            binds.append((path, path))
    orders = {"parent": os.getpid(), "argv": [inside, "-I", "-B", "/main.py"], "env": _ENVIRONMENT}
    return orders | asdict(limits) | {"binds": binds, "links": links, "filter": filter_program(limits.fork).hex()}


async def _collect(stream: asyncio.StreamReader, limit: int, stop: Callable[[], None]) -> tuple[bytes, bool]:
    """Reads to the end, keeps the first `limit` bytes, calls `stop` when there are more: (kept, whether there were)."""
    kept = bytearray()
    more = False
    while chunk := await stream.read(1 << 16):
        if len(kept) + len(chunk) > limit and not more:
            more = True
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                stop()
        kept += chunk[: limit - len(kept)]
    return bytes(kept), more


@contextlib.contextmanager
def _sealed(data: bytes) -> Iterator[int]:
    """A file in memory that nobody can change, as a descriptor at its start."""
    fd = os.memfd_create("rlvlm-sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        )
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)
