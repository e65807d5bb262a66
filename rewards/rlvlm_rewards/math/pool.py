"""A few processes that read answers, behind futures that any thread or event loop may wait for."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from rlvlm_rewards.math.frames import BrokenFrame, Stage, receive, send

_START_S = 60.0
_PATIENCE = 10  # wall clock over processor time, where the machine is busy with other things
_REMEMBERED = 65_536
_PACKAGES = Path(__file__).parents[2]


class Outcome(Enum):
    """What became of a comparison."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_REFERENCE = "no reference"  # it cannot be read, or takes too long, or kills its reader
    TIMEOUT = "timeout"  # reference and answer are each handled in time, but not compared in time
    CRASH = "crash"  # the same, but the comparison killed its reader
    BUSY = "busy"  # the machine gave the reader no time


_SAYS = {Outcome.RIGHT.value, Outcome.WRONG.value, Outcome.NO_REFERENCE.value}


class PoolBroken(Exception):
    """No process that reads answers can be started, or two in a row were lost."""


@dataclass(frozen=True, slots=True)
class Question:
    """Is this answer right? boxed: the answer is the content of a box. in_prompt: it stands in the prompt word for
    word. alone: compare the answer with plain numbers rather than the reference, for what it costs."""

    reference: str
    answer: str
    boxed: bool
    in_prompt: bool
    alone: bool = False


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, timeout_s: float) -> None:
        self._wall_s = 2 * timeout_s * _PATIENCE
        self._asked = 0
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlvlm_rewards.math.worker", str(os.getpid()), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # an interrupt from the terminal is for the parent
            env=_environment(),
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._to, self._from, self._errors = self._process.stdin, self._process.stdout, self._process.stderr

    def ask(self, question: Question) -> dict[str, Any] | None:
        """What the worker says to this question; None if it takes too long by the clock. Raises BrokenFrame, with the
        worker's last words, or OSError."""
        if not self._ready and self._receive(time.monotonic() + _START_S) is None:
            raise BrokenFrame(f"it was not ready within {_START_S:g} s")
        self._ready = True
        self._asked += 1
        send(self._to.fileno(), {"id": self._asked, **asdict(question)})
        deadline = time.monotonic() + self._wall_s
        while (message := self._receive(deadline)) and message.get("id") != self._asked:
            continue
        return message and _checked(message)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from, self._errors):
            pipe.close()

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        message = receive(self._from.fileno())
        if message is None:
            code = self._process.wait()
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise BrokenFrame(f"it ended with {code}: {said[-1] if said else 'no message'}")
        return message


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    """A reader is not trusted further than this. Raises BrokenFrame."""
    if message.get("outcome") in _SAYS or {type(message.get("died")), type(message.get("stage"))} == {int}:
        return message
    raise BrokenFrame(f"it said {message!r:.200}")


class Pool:
    """`workers` threads, each with a worker process that starts at once. `timeout_s`: see `Math`."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._questions: queue.SimpleQueue[tuple[Question, Future[Outcome]] | None] = queue.SimpleQueue()
        self._known: dict[Question, Outcome] = {}
        self._unreadable: set[str] = set()  # each would kill a reader for every answer
        self._threads = [threading.Thread(target=self._work, name="rlvlm-math", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def ask(self, question: Question) -> Future[Outcome]:
        """The future raises PoolBroken. One that is cancelled before its turn costs nothing."""
        future: Future[Outcome] = Future()
        known = self._recall(question)
        if known is None:
            self._questions.put((question, future))
        else:
            future.set_result(known)
        return future

    def close(self) -> None:
        """Ends the processes and threads once all that was asked is answered; waits for it."""
        for _ in self._threads:
            self._questions.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        seat = _Seat(self._timeout_s)
        while (item := self._questions.get()) is not None:
            question, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._recall(question) or self._learn(seat, question))
            except PoolBroken as error:
                future.set_exception(error)
        seat.clear()

    def _recall(self, question: Question) -> Outcome | None:
        return Outcome.NO_REFERENCE if question.reference in self._unreadable else self._known.get(question)

    def _learn(self, seat: _Seat, question: Question) -> Outcome:
        outcome = seat.outcome(question)
        if outcome is Outcome.NO_REFERENCE:
            self._unreadable.add(question.reference)
        elif outcome is not Outcome.BUSY:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[question] = outcome
        return outcome


class _Seat:
    """Where a worker sits; a lost one is replaced. Used by one thread: the kernel ends a worker with the thread that
    started it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._worker: _Worker | None = None
        with contextlib.suppress(OSError):  # the first question will say it
            self._worker = _Worker(timeout_s)

    def outcome(self, question: Question) -> Outcome:
        """Raises PoolBroken."""
        message = self._ask(question)
        if message is None:
            return Outcome.BUSY
        if "outcome" in message:
            return Outcome(message["outcome"])
        if message["stage"] == Stage.REFERENCE:
            return Outcome.NO_REFERENCE
        if message["stage"] == Stage.ANSWER or self._is_bomb(question):
            return Outcome.WRONG
        return Outcome.TIMEOUT if message["died"] == -signal.SIGPROF else Outcome.CRASH

    def clear(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None

    def _is_bomb(self, question: Question) -> bool:
        """Whether the answer kills its reader in the company of plain numbers, too."""
        message = self._ask(replace(question, alone=True))
        return message is not None and message.get("stage") in (Stage.ANSWER, Stage.COMPARISON)

    def _ask(self, question: Question) -> dict[str, Any] | None:
        try:
            return self._ask_once(question)
        except (BrokenFrame, OSError):  # something outside killed it: a question cannot
            self.clear()
        try:
            return self._ask_once(question)
        except (BrokenFrame, OSError) as error:
            self.clear()
            raise PoolBroken(f"two processes that read answers were lost in a row; {error}") from error

    def _ask_once(self, question: Question) -> dict[str, Any] | None:
        self._worker = self._worker or _Worker(self._timeout_s)
        message = self._worker.ask(question)
        if message is None:  # it is still at it
            self.clear()
        return message


_pools: dict[tuple[int, float], Pool] = {}
_lock = threading.Lock()


def ask(workers: int, timeout_s: float, question: Question) -> Future[Outcome]:
    """Asks this process's pool of these options; it opens on first use."""
    with _lock:
        if (workers, timeout_s) not in _pools:
            _pools[workers, timeout_s] = Pool(workers, timeout_s)
        return _pools[workers, timeout_s].ask(question)


def close(workers: int, timeout_s: float) -> None:
    """Closes this process's pool of these options, if it is open; who asks later opens another."""
    with _lock:
        pool = _pools.pop((workers, timeout_s), None)
    if pool is not None:
        pool.close()


def _forget() -> None:
    """In a forked process: the threads are not there, and the workers are the parent's."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget)


def _environment() -> dict[str, str]:
    """Hashes are fixed, so that sympy orders the same way in every worker; the package is found wherever it was found
    here."""
    path = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
