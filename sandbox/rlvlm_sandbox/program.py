"""What the fork server's child does: goes behind its walls, then runs the code as `python main.py` would.

The program builds its own walls before any other code runs in it. A tool is two processes: init, pid 1 of the run,
which reaps and whose death kills everything inside; and the program. A judged one cannot start a process, and is alone.
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import fcntl
import functools
import json
import linecache
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from rlvlm_sandbox import kernel
from rlvlm_sandbox.kernel import MS_NODEV, MS_NOEXEC, MS_NOSUID
from rlvlm_sandbox.seccomp import for_process

_UID = 1000
NOBODY = 65534
_STACK_BYTES = 64 << 20  # 50,000 honest frames of recursion through C
_CHANNEL = 3  # the program's descriptor for whoever works with it
_TASKS_OF_A_USER = 4096  # without namespaces the kernel counts all that a user runs anywhere
_FILE = "/tmp/main.py"
_LONGEST_FILE = 1 << 20
MOST_DESCRIPTORS = 5  # of an order

Order = Callable[[], tuple[dict[str, Any], list[int]]]


@dataclass(frozen=True, slots=True)
class Walls:
    """What the runs of a fork server have in common.

    namespaces: whether a run has its own, and its own root. leave_root: whether the program of a server that is root
    becomes nobody. ruleset: of landlock, where one does for all runs. landlock: whether the kernel has it.
    filters: the seccomp program by profile, for OWN_PID. mapped_bytes: what a program maps at its start.
    """

    namespaces: bool
    leave_root: bool
    landlock: bool
    ruleset: int | None
    filters: Mapping[str, bytes]
    mapped_bytes: int


def become(walls: Walls, profile: str, order: Order, report: int) -> NoReturn:
    """order: gives the order and its descriptors (the code, stdin, stdout, stderr and perhaps the channel), and may
    wait for them. report: a pipe to the server."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if walls.namespaces:
            _enter(own_pids=profile == "tool")
        what, fds = order()
        if walls.namespaces:
            _mount_tmp(what["limits"])
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, 16)  # out of the way of 0 to 3
        code = _take_descriptors(fds, [report] if walls.ruleset is None else [report, walls.ruleset])
        _lock_up(walls, what)
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not pass for an exit status of the program)
        os.write(report, json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode() + b"\n")
        os._exit(1)
    os.close(report)
    own_root = walls.namespaces
    del order, what, fds, report  # the program can walk up to this frame
    _run(code, own_root)


def order_from(ordering: socket.socket, report: int) -> tuple[dict[str, Any], list[int]]:
    """Waits for an order, as a child that was forked before there was one; keeps nothing else of the server's open."""
    close_all_but([0, 1, 2, report, ordering.fileno()])
    message, fds, _, _ = socket.recv_fds(ordering, 1 << 16, MOST_DESCRIPTORS)
    if not message:
        os._exit(1)  # the server is gone
    ordering.close()
    return json.loads(message), fds


def close_all_but(keep: list[int]) -> None:
    start = 0
    for fd in sorted(keep):
        if start < fd:  # closerange(0, 0) closes everything
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 16)


# ---- init


def be_init(report: int) -> None:
    """Pid 1 of a run: forks the program, which returns; reaps until it ends, says how, and takes the rest with it."""
    child = kernel.fork_between()
    if child == 0:
        return
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # a program of the same user cannot look into init
    kernel.give_up_capabilities()
    close_all_but([report])
    while True:
        pid, status = os.wait()
        if pid == child:
            os.write(report, b'{"exit_code": %d}\n' % os.waitstatus_to_exitcode(status))
            os._exit(0)


def _enter(own_pids: bool) -> None:
    """Finishes the namespaces that this process was born into, with all capabilities in them."""
    for name, line in {"setgroups": "deny", "uid_map": f"{_UID} {_UID} 1", "gid_map": f"{_UID} {_UID} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    if own_pids:
        kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _mount_tmp(limits: dict[str, Any]) -> None:
    options = f"size={limits['tmp_bytes']},nr_inodes={limits['inodes']},mode=700,uid={_UID},gid={_UID}"
    kernel.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir("/tmp")


# ---- program


def _take_descriptors(fds: list[int], keep: list[int]) -> bytes:
    """Puts 0 to 3 where they belong, closes all others but those to keep, and returns the code."""
    os.setsid()
    code_fd, stdin, stdout, stderr, *channel = fds
    code = b"".join(iter(functools.partial(os.read, code_fd, 1 << 24), b""))
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1 + max(keep)) for fd in channel]  # 3 may be taken until the others are done
    for target, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, target)
    for fd in kept:
        os.dup2(fd, _CHANNEL)
    close_all_but([*range(_CHANNEL + len(channel)), *keep])
    return code


def _lock_up(walls: Walls, order: dict[str, Any]) -> None:
    """From here on the process can do what a program may and nothing else, whatever code runs in it."""
    if not walls.namespaces:
        os.chdir("/")
        if walls.leave_root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    _set_limits(order["limits"], walls, has_init=walls.namespaces and order["profile"] == "tool")
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    if walls.landlock:
        # /tmp is a file system of this run alone, so that its rule can only be made here.
        ruleset = kernel.landlock_ruleset(["/"], ["/tmp", "/dev"]) if walls.ruleset is None else walls.ruleset
        kernel.landlock_restrict(ruleset)
        os.close(ruleset)
    kernel.install_filter(for_process(walls.filters[order["profile"]], os.getpid()))


def _set_limits(limits: dict[str, Any], walls: Walls, has_init: bool) -> None:
    cpu_s = math.ceil(limits["cpu_s"])
    tasks = limits["processes"] + has_init if walls.namespaces else _TASKS_OF_A_USER
    wanted = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # SIGXCPU, and a second later SIGKILL
        resource.RLIMIT_AS: (walls.mapped_bytes + limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NPROC: (tasks,) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_STACK: (_STACK_BYTES,) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for kind, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _run(code: bytes, own_root: bool) -> NoReturn:
    main = _fresh_main(code, own_root)
    status = 0
    try:
        exec(compile(code, _FILE, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        status = _exit_status(error)
    except BaseException as error:  # noqa: BLE001 (as the interpreter itself does at the end of a program)
        status = 1
        _show(error)
    os._exit(_finish(status))


def prepare_interpreter() -> None:
    """In the fork server: what every program finds the same. Descriptors 0 to 2 become the program's own later."""
    for name, fd, mode, errors in (
        ("stdin", 0, "r", "surrogateescape"),
        ("stdout", 1, "w", "surrogateescape"),
        ("stderr", 2, "w", "backslashreplace"),
    ):
        stream = open(fd, mode, encoding="utf-8", errors=errors, newline="\n", closefd=False)  # noqa: SIM115 (it stays)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for name in ("exit", "quit"):  # all of `site`, which is not loaded, that programs use
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    sys.argv = [_FILE]
    for name in [name for name in sys.modules if name.startswith("rlvlm_sandbox")]:
        del sys.modules[name]


def _fresh_main(code: bytes, own_root: bool) -> ModuleType:
    """A `__main__` as a fresh interpreter has it, and its surroundings."""
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=_FILE)
    sys.modules["__main__"] = main
    if own_root:
        sys.path.insert(0, "/tmp")
    if not (own_root and len(code) <= _LONGEST_FILE and _write(code)):  # then for tracebacks and inspect
        source = code.decode(errors="replace")
        linecache.cache[_FILE] = (len(source), None, source.splitlines(keepends=True), _FILE)
    if "numpy.random" in sys.modules:  # Python's own generator is seeded anew by the fork, numpy's is not
        sys.modules["numpy.random"].seed(int(time.time_ns() ^ os.getpid() << 20) % 2**32)
    return main


def _write(code: bytes) -> bool:
    """Makes the file that the program believes to be. False where it has no room."""
    try:
        with open(_FILE, "wb", buffering=0) as file:
            if file.write(code) == len(code):
                return True
        os.unlink(_FILE)
    except OSError:
        pass
    return False


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """By the program's own excepthook, without our frame."""
    inside: TracebackType | None = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        sys.excepthook(type(error), error.with_traceback(inside), inside)
    except BaseException as second:  # noqa: BLE001 (the program's hook, or no memory left for ours)
        os.write(2, f"{type(second).__name__}\n".encode())


def _finish(status: int) -> int:
    """What the interpreter does at its end: waits for threads, calls atexit, flushes."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    except BaseException as error:  # noqa: BLE001 (the program's own threads and functions)
        _show(error)
    try:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
    except BaseException:  # noqa: BLE001 (a full pipe, a closed file, what the program put there)
        return status or 120
    return status
