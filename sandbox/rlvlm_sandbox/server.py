"""The fork server: imports what programs need once, then forks a child for every run.

One thread, one loop. It never holds a run's code, input or output: these are descriptors which only the child reads,
since all that the server's memory holds is in every child's memory too. It keeps time and memory, kills, and reports.

Run by forkserver.py (behind root.py, for the backend `namespaces`) in a fresh interpreter, without the rest of the
package. It dies when its control socket closes, and all runs with it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rlvlm_sandbox import kernel, program
from rlvlm_sandbox.seccomp import OWN_PID, filter_program

_TICK_S = 0.02  # how often a run is looked at whose memory or threads no limit of the kernel's bounds
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Of every run. A tool has pids and a network of its own too. A judged program starts no process, reaches none
# (seccomp), sees none (hidepid) and has no sockets: the server's, where nothing is, are as good, and cost nothing.
_NAMESPACES = kernel.NEW_USER | kernel.NEW_MOUNTS | kernel.NEW_IPC | kernel.NEW_UTS


def main(text: str) -> None:
    """text: JSON with `control`, `packages`, `warm`, `proc` (where the server sees its runs), `namespaces` (whether a
    run has its own), and for runs without: `readable` (paths), `leave_root` (whether nobody can read what they need).
    """
    config = json.loads(text)
    sys.path += config["packages"]
    for module in config["warm"]:
        importlib.import_module(module)
    walls = _walls(config)
    control = socket.socket(fileno=config["control"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    program.prepare_interpreter()
    gc.collect()
    gc.freeze()  # or the first collection in every child would copy all pages
    control.send(b"ready")
    become_program = Server(control, walls, config["proc"]).serve()
    become_program()


def _walls(config: dict[str, Any]) -> program.Walls:
    namespaces = config["namespaces"]
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    if not namespaces:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # runs may be of our own user
    return program.Walls(
        namespaces=namespaces,
        leave_root=config["leave_root"] and os.geteuid() == 0 and kernel.is_mapped(program.NOBODY),
        landlock=kernel.landlock_version() >= 1 or not namespaces,
        ruleset=None if namespaces else _out_of_the_way(kernel.landlock_ruleset(config["readable"], _DEVICES)),
        filters={
            "judge": filter_program("judge", alone=False, own_files=namespaces, own_pid=OWN_PID),
            "tool": filter_program("tool", own_pid=OWN_PID),
        },
        mapped_bytes=pages * resource.getpagesize(),
    )


def _out_of_the_way(fd: int) -> int:
    """Of the program's own descriptors, 0 to 3, and of the report's."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 32)


@dataclass(slots=True)
class _Live:
    """A run that goes on. most_bytes, most_threads: what the server has to watch, as no limit of the kernel's does.
    cause: why the server killed it, if it did."""

    id: int
    pid: int
    pidfd: int
    report: int
    started: float
    deadline: float
    most_bytes: int | None
    most_threads: int | None
    has_init: bool
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class _Spare:
    """A child that was forked before there is anything to run, and waits for its order."""

    pid: int
    pidfd: int
    report: int
    ordering: socket.socket


class Server:
    def __init__(self, control: socket.socket, walls: program.Walls, proc: str) -> None:
        self._control, self._walls, self._proc = control, walls, proc
        self._live: dict[int, _Live] = {}  # by pidfd
        self._spare: _Spare | None = None
        self._epoll = select.epoll()
        self._epoll.register(control, select.EPOLLIN)

    def serve(self) -> Callable[[], NoReturn]:
        """Returns in a forked child only, with what the child has to do: nothing of the server is on its stack."""
        while True:
            for fd, _ in self._epoll.poll(self._wait_s()):
                if fd != self._control.fileno():
                    self._reap(fd)
                elif (child := self._listen()) is not None:
                    return child
            self._watch()
            if self._walls.namespaces and self._spare is None and (child := self._fork_spare()) is not None:
                return child

    def _wait_s(self) -> float:
        now = time.monotonic()
        waits = [run.deadline - now for run in self._live.values() if run.cause is None]
        if any(run.most_bytes or run.most_threads for run in self._live.values()):
            waits.append(_TICK_S)
        return max(min(waits), 0) if waits else -1

    def _listen(self) -> Callable[[], NoReturn] | None:
        """Takes all that has been asked for."""
        while True:
            try:
                message, fds = self._receive()
            except BlockingIOError:
                return None
            if not message:
                self._end()
            order = json.loads(message)
            if "stop" in order:
                for run in self._live.values():
                    if run.id == order["stop"]:
                        self._kill(run, "stop")
                continue
            child = self._start(order, fds)
            if child is not None:
                return child
            for fd in fds:
                os.close(fd)

    def _receive(self) -> tuple[bytes, list[int]]:
        """As socket.recv_fds, which drops its flags. Raises BlockingIOError when there is nothing."""
        room = socket.CMSG_SPACE(program.MOST_DESCRIPTORS * array.array("i").itemsize)
        message, ancillary, _, _ = self._control.recvmsg(1 << 16, room, socket.MSG_DONTWAIT)
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        return message, list(fds)

    def _start(self, order: dict[str, Any], fds: list[int]) -> Callable[[], NoReturn] | None:
        spare, started = self._spare, time.monotonic()
        if spare is not None and order["profile"] == "judge":
            self._spare = None
            with spare.ordering, contextlib.suppress(BrokenPipeError):  # it has died: so says its pidfd
                socket.send_fds(spare.ordering, [json.dumps(order).encode()], fds)
            self._follow(order, started, spare.pid, spare.pidfd, spare.report)
            return None
        report_in, report_out = os.pipe()
        try:
            pid, pidfd = self._fork(order["profile"], report_out)
        except OSError as error:
            os.close(report_in)
            os.close(report_out)
            self._answer({"id": order["id"], "error": str(error)})
            return None
        if pid == 0:
            return functools.partial(program.become, self._walls, order["profile"], lambda: (order, fds), report_out)
        os.close(report_out)
        self._epoll.register(pidfd, select.EPOLLIN)
        self._follow(order, started, pid, pidfd, report_in)
        return None

    def _follow(self, order: dict[str, Any], started: float, pid: int, pidfd: int, report: int) -> None:
        limits = order["limits"]
        # Resource limits hold for each process; and threads count for a user, whom only namespaces keep to one run.
        most_bytes = limits["memory_bytes"] if order["profile"] == "tool" else None
        most_threads = None if self._walls.namespaces else limits["processes"]
        deadline = started + limits["wall_s"]
        has_init = order["profile"] == "tool"
        run = _Live(order["id"], pid, pidfd, report, started, deadline, most_bytes, most_threads, has_init)
        self._live[pidfd] = run

    def _fork_spare(self) -> Callable[[], NoReturn] | None:
        """Half of a run's time goes into a child's walls; with this they stand when the order comes."""
        report_in, report_out = os.pipe()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid, pidfd = self._fork("judge", report_out)
            except OSError:  # the next order tries for itself, and reports
                ours.close()
                os.close(report_in)
                os.close(report_out)
                return None
            if pid == 0:
                ordering = theirs.dup()
                order = functools.partial(program.order_from, ordering, report_out)
                return functools.partial(program.become, self._walls, "judge", order, report_out)
        os.close(report_out)
        self._epoll.register(pidfd, select.EPOLLIN)
        self._spare = _Spare(pid, pidfd, report_in, ours)
        return None

    def _fork(self, profile: str, report: int) -> tuple[int, int]:
        if not self._walls.namespaces:
            return kernel.clone(0)
        if profile == "judge":
            return kernel.clone(_NAMESPACES)
        flags = _NAMESPACES | kernel.NEW_PIDS | kernel.NEW_NETWORK
        return kernel.clone(flags, functools.partial(program.be_init, report))

    def _watch(self) -> None:
        now = time.monotonic()
        for run in self._live.values():
            if run.cause is not None:
                continue
            if now >= run.deadline:
                self._kill(run, "wall")
            elif run.most_bytes is not None and resident_bytes(run.pid, self._proc) > run.most_bytes:
                self._kill(run, "memory")
            elif run.most_threads is not None and threads(run.pid, self._proc) > run.most_threads:
                self._kill(run, "threads")

    def _kill(self, run: _Live, cause: str) -> None:
        """This is pid 1 of the run, and all of it dies with it; or the only process that there is."""
        run.cause = run.cause or cause
        signal.pidfd_send_signal(run.pidfd, signal.SIGKILL)

    def _reap(self, pidfd: int) -> None:
        spare = self._spare
        if spare is not None and spare.pidfd == pidfd:
            self._drop(spare)
            return
        run = self._live.get(pidfd)
        if run is None or os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return  # an event of a descriptor that had this number before
        _, status, usage = os.wait4(run.pid, 0)
        del self._live[pidfd]
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        with open(run.report) as stream:
            lines = [json.loads(line) for line in stream]
        said = {key: value for line in lines for key, value in line.items()}
        ended_by_us = run.cause is not None and run.cause != "threads"
        exit_code = None if run.has_init or ended_by_us else os.waitstatus_to_exitcode(status)
        self._answer(
            {
                "id": run.id, "cause": run.cause, "exit_code": exit_code, "wall_s": time.monotonic() - run.started,
                "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024,
            } | said
        )  # fmt: skip

    def _drop(self, spare: _Spare) -> None:
        """It has died before its time, which kernels short of memory let happen."""
        os.waitpid(spare.pid, 0)
        self._spare = None
        spare.ordering.close()
        self._epoll.unregister(spare.pidfd)
        os.close(spare.pidfd)
        os.close(spare.report)

    def _answer(self, result: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(result).encode())
        except (BrokenPipeError, ConnectionResetError):
            self._end()

    def _end(self) -> NoReturn:
        """Nobody listens any more. In namespaces the runs die with us, their pid 1's parent; elsewhere by this."""
        for run in self._live.values():
            self._kill(run, "stop")
        for run in self._live.values():
            os.waitpid(run.pid, 0)
        os._exit(0)


def threads(pid: int, proc: str) -> int:
    try:
        with open(f"{proc}/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[17])
    except ProcessLookupError:  # it ended just now
        return 0


def resident_bytes(pid: int, proc: str = "/proc") -> int:
    """Proportional resident memory of a process and its descendants: pages shared after a fork count once."""
    try:
        total = _proportional_bytes(f"{proc}/{pid}")
        children = []
        for task in os.listdir(f"{proc}/{pid}/task"):
            with open(f"{proc}/{pid}/task/{task}/children") as file:
                children += file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended just now; its children are init's by the next tick
    return total + sum(resident_bytes(int(child), proc) for child in children)


def _proportional_bytes(process: str) -> int:
    try:
        with open(f"{process}/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except PermissionError:  # a process may make itself unreadable to its user, but never its plain resident size
        with open(f"{process}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
