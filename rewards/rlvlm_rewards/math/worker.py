"""The process that reads answers: `python -m rlvlm_rewards.math.worker PARENT TIMEOUT_S`.

The started process imports Math-Verify once and never looks at an answer. It forks readers, one after another; a reader
serves requests until one of them kills it, and its successor stands ready in milliseconds. The kernel does the killing:
a timer of processor time with the default action, which neither C code that keeps the interpreter's lock nor a load of
other processes disturbs.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import resource
import signal
import struct
import sys
from typing import Any

from rlvlm_rewards.math.frames import BrokenFrame, Stage, receive, send

_MEMORY_BYTES = 1 << 30
_SERVES = 2000  # requests; then a successor takes over, without what sympy's caches have gathered
_ALONE = 0.25  # of the time limit: what needs more than this beside a plain number is itself the reason for a timeout
_PR_SET_PDEATHSIG = 1
_CLOSED, _RETIRED, _BROKEN = 0, 10, 11  # a reader's exit codes


class Progress:
    """The request and stage that the reader is at, in memory that outlives it."""

    _LAYOUT = struct.Struct("<QB")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def set(self, request: int, stage: Stage) -> None:
        self._LAYOUT.pack_into(self._memory, 0, request, stage)

    def get(self) -> tuple[int, Stage]:
        request, stage = self._LAYOUT.unpack_from(self._memory, 0)
        return request, Stage(stage)


class Reader:
    """Serves requests of descriptor 0 on `channel`. The reference may take `timeout_s` seconds of processor time, and
    so may answer and comparison together."""

    def __init__(self, channel: int, progress: Progress, timeout_s: float) -> None:
        self._channel = channel
        self._progress = progress
        self._timeout_s = timeout_s

    def serve(self) -> int:
        """Returns the exit code."""
        for _ in range(_SERVES):
            try:
                request = receive(0)
            except BrokenFrame:
                return _BROKEN
            if request is None:
                return _CLOSED
            try:
                outcome = self._outcome(request)
            except Exception:  # noqa: BLE001 (sympy raises anything over what it cannot do, MemoryError included)
                outcome = "no reference" if self._progress.get()[1] is Stage.REFERENCE else "wrong"
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._progress.set(0, Stage.IDLE)
            send(self._channel, {"id": request["id"], "outcome": outcome})
        return _RETIRED

    def _outcome(self, request: dict[str, Any]) -> str:
        from rlvlm_rewards.math import reading

        self._enter(request["id"], Stage.REFERENCE)
        reference = reading.read_reference(request["reference"])
        if reference is None:
            return "no reference"
        self._enter(request["id"], Stage.ANSWER, _ALONE if request["alone"] else 1.0)
        answer = reading.read_answer(request["answer"], request["boxed"])
        if answer is None:
            return "wrong"
        self._progress.set(request["id"], Stage.COMPARISON)
        if request["alone"]:
            reading.compare_with_numbers(answer)
            return "wrong"
        if request["in_prompt"] and reading.is_restated(reference, answer, request["answer"]):
            return "wrong"
        return "right" if reading.same(reference, answer) else "wrong"

    def _enter(self, request: int, stage: Stage, share: float = 1.0) -> None:
        self._progress.set(request, stage)
        signal.setitimer(signal.ITIMER_PROF, self._timeout_s * share)


def main(parent: int, timeout_s: float) -> int:
    _die_with(parent)
    channel = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no frame
    _warm_up()
    progress = Progress()
    send(channel, {"ready": os.getpid()})
    while True:
        code = _run_reader(Reader(channel, progress, timeout_s))
        if code in (_CLOSED, _BROKEN):
            return code
        request, stage = progress.get()
        if request:  # it died at work
            progress.set(0, Stage.IDLE)
            send(channel, {"id": request, "died": code, "stage": stage})
        elif code > 0 and code != _RETIRED:
            return code


def _run_reader(reader: Reader) -> int:
    """Forks a reader and waits for its end; returns its exit code, or minus the signal that killed it."""
    own = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            _die_with(own)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)  # the worker's standard error is a pipe that nobody empties
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
            os._exit(reader.serve())
        finally:  # whatever was raised: the reader's stack is not the worker's
            os._exit(_BROKEN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends. Elsewhere than on Linux the closing of descriptor 0 and the
    timer have to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(_CLOSED)


def _warm_up() -> None:
    """Imports, and fills the caches of expressions and grammars, once for all readers."""
    from rlvlm_rewards.math import reading

    logging.disable()  # verify warns that it has no time limit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for reference, answer in (
        (r"\frac{1}{2}+\sqrt{x}", r"$\sqrt{x} + 0.5$"),
        ("{1,2}", "the answer is 1"),
        ("(0,1]", "x<2"),
    ):
        reading.same(reading.read_reference(reference), reading.read_answer(answer, boxed=False))
    reading.read_reference.cache_clear()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
