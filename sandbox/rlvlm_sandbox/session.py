"""A Python that keeps its state between runs, in a sandbox: what a model uses as a tool."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Self

from rlvlm_sandbox.grading.grade import RunProgram
from rlvlm_sandbox.grading.programs import driver
from rlvlm_sandbox.records import Limits, Outcome, Run

_LIFE_S = 24 * 3600.0  # of a session; time is kept for each run, by us
_GRACE_S = 1.0  # for an interrupted run to come back
_MAX_BYTES = 16 << 20  # of one message
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class SessionRun:
    """What came of one run in a session.

    outcome: OK; RUNTIME_ERROR for an exception (the traceback is on stderr); TIME when it was interrupted; and what
    ended the process, if it ended. stdout, stderr: up to `output_bytes` each; truncated: whether more was written.
    result: `repr` of the last line if that is an expression, and not None. files: new or changed in /tmp, by path.
    pictures: PNG files of matplotlib's open figures, and of an image of PIL that is the result. left_out: files and
    pictures beyond 8 MiB. restarted: whether the state of earlier runs was lost before this one.
    wall_s: seconds. detail: what went wrong, for SANDBOX_ERROR.
    """

    outcome: Outcome
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    result: str | None = None
    files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    pictures: tuple[bytes, ...] = ()
    left_out: tuple[str, ...] = ()
    restarted: bool = False
    wall_s: float = 0.0
    detail: str = ""


class Session:
    """`async with Session(run, limits) as python: await python.run("x = 1")`. One run at a time; more wait.

    run: a backend's. limits: all given; `wall_s` is for each run, the others for the whole session.
    """

    def __init__(self, run: RunProgram, limits: Limits) -> None:
        self._run, self._limits = run, limits
        self._turn = asyncio.Lock()
        self._process: _Process | None = None
        self._lost = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            await self._process.end()
            self._process = None

    async def run(self, code: str, wall_s: float | None = None) -> SessionRun:
        """Runs `code` in the state that the runs before have left. wall_s: in place of the session's limit.

        When time is up the code is interrupted as by Ctrl-C, and the state stays; what does not stop then is ended, and
        the next run starts anew (`restarted`).
        """
        limit = self._limits.wall_s or 0 if wall_s is None else wall_s
        async with self._turn:
            process, restarted = await self._ready()
            started = time.monotonic()
            try:
                done = await process.ask({"do": "run", "code": code}, limit)
            except BaseException:  # cancelled: nobody waits for the rest of it
                await self._drop()
                raise
            if done is None:
                done = SessionRun(await self._ending(process))
                if done.outcome is Outcome.SANDBOX_ERROR:
                    done = replace(done, detail=process.detail)
            return replace(done, restarted=restarted, wall_s=time.monotonic() - started)

    async def put(self, name: str, data: bytes) -> None:
        """Writes a file into /tmp. Raises ValueError for a name that leads out of it, OSError where it does not fit or
        the session ends."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise ValueError(f"put: name is {name!r}; give a relative path without '..'")
        if len(data) > _MAX_BYTES // 2:
            raise ValueError(f"put: {name!r} has {len(data)} bytes; {_MAX_BYTES // 2} is the most")
        async with self._turn:
            process, restarted = await self._ready()
            self._lost = restarted  # the next run is the one that has to say so
            text = binascii.b2a_base64(data, newline=False).decode()
            answer = await process.tell({"do": "put", "name": name, "data": text}, self._limits.wall_s or 0)
            if answer is None:
                raise OSError(f"put: the session ended: {await self._ending(process)} {process.detail}".rstrip())
            if "error" in answer:
                raise OSError(f"put: {answer['error']}")

    async def _ready(self) -> tuple[_Process, bool]:
        """The process, and whether it has lost the state of earlier runs."""
        if self._process is None or self._process.ended:
            if self._process is not None:
                await self._drop()
            self._process = await _Process.start(self._run, self._limits)
        lost, self._lost = self._lost, False
        return self._process, lost

    async def _ending(self, process: _Process) -> Outcome:
        outcome = await process.end()
        self._process, self._lost = None, True
        return outcome

    async def _drop(self) -> None:
        if self._process is not None:
            await self._ending(self._process)


class _Process:
    """The program of a session, and the channel to it."""

    def __init__(self, task: asyncio.Task[Run], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._task, self._reader, self._writer = task, reader, writer
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._listening = asyncio.ensure_future(self._listen())
        self._last_id = 0
        self._timed_out = False
        self.detail = ""

    @classmethod
    async def start(cls, run: RunProgram, limits: Limits) -> Self:
        ours, theirs = socket.socketpair()
        whole = replace(limits, wall_s=_LIFE_S, cpu_s=_LIFE_S)
        task = asyncio.ensure_future(run(driver("session", b"", whole, "tool", theirs.fileno())))
        task.add_done_callback(lambda _: theirs.close())
        reader, writer = await asyncio.open_connection(sock=ours)
        process = cls(task, reader, writer)
        await process._send({"output_bytes": limits.output_bytes})
        return process

    @property
    def ended(self) -> bool:
        return self._task.done() or self._listening.done()

    async def ask(self, message: dict[str, Any], wall_s: float) -> SessionRun | None:
        """None when the process has ended, or has to be."""
        answer = await self.tell(message, wall_s)
        if answer is None:
            return None
        try:
            return _session_run(answer)
        except (KeyError, TypeError, ValueError, AttributeError):  # forged by the code that runs there
            self.detail = "it wrote into the channel to us"
            return None

    async def tell(self, message: dict[str, Any], wall_s: float) -> dict[str, Any] | None:
        self._last_id += 1
        await self._send({"id": self._last_id, **message})
        try:
            async with asyncio.timeout(wall_s):
                return await self._answer()
        except TimeoutError:
            self._timed_out = True
        await self._send({"do": "interrupt"})
        try:
            async with asyncio.timeout(_GRACE_S):
                answer = await self._answer()
        except TimeoutError:
            return None
        self._timed_out = answer is None
        return answer if answer is None else answer | {"outcome": "time"}

    async def _answer(self) -> dict[str, Any] | None:
        while True:
            answer = await self._answers.get()
            if answer is None or answer.get("id") == self._last_id:
                return answer

    async def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self._writer.write(_LENGTH.pack(len(data)) + data)
        with contextlib.suppress(ConnectionError):  # it has ended, as its answer will say
            await self._writer.drain()

    async def _listen(self) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > _MAX_BYTES:
                    break
                answer = json.loads(await self._reader.readexactly(length))
                if isinstance(answer, dict):
                    self._answers.put_nowait(answer)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, RecursionError):
            pass  # it has ended, or what it sends is none of our making
        finally:
            self._answers.put_nowait(None)

    async def end(self) -> Outcome:
        """Ends it if need be, and says what of."""
        if not self._listening.done():  # it lives: our doing
            self._task.cancel()
        self._listening.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=_GRACE_S)
        self._task.cancel()
        await asyncio.gather(self._task, self._listening, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        if self._timed_out or not done or self._task.cancelled():
            return Outcome.TIME if self._timed_out else Outcome.RUNTIME_ERROR
        ended = self._task.result()
        self.detail = self.detail or ended.detail
        return Outcome.RUNTIME_ERROR if ended.outcome is Outcome.OK else ended.outcome


def _session_run(answer: Mapping[str, Any]) -> SessionRun:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is no answer of our driver's."""
    return SessionRun(
        outcome=Outcome(answer["outcome"]),
        stdout=_bytes(answer["stdout"]),
        stderr=_bytes(answer["stderr"]),
        truncated=bool(answer["truncated"]),
        result=None if answer["result"] is None else str(answer["result"]),
        files=MappingProxyType({str(name): _bytes(data) for name, data in answer["files"].items()}),
        pictures=tuple(_bytes(data) for data in answer["pictures"]),
        left_out=tuple(str(name) for name in answer["left_out"]),
    )


def _bytes(text: str) -> bytes:
    return binascii.a2b_base64(text)
