"""Backend `http`: a pool of servers (`python -m rlvlm_sandbox serve`), by turns, each standing in for the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from typing import Any
from urllib.parse import urlsplit

from rlvlm_sandbox.framing import BODY_BYTES, HEAD_BYTES, FramingError, body_bytes, message, read_head
from rlvlm_sandbox.grading import InvalidTests, Tests, Verdict
from rlvlm_sandbox.grading.verdict import failed, verdict_of
from rlvlm_sandbox.messages import (
    BadMessage,
    grade_order,
    read_run_answer,
    read_verdict_answer,
    run_order,
)
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import Limits, Outcome, Program, Run, SandboxUnavailable

_CONNECT_S = 10.0
_ANSWER_S = 300.0  # beyond the run's own time: for the server's queue
_ROUNDS = 5  # over all servers, when connections are lost
_PATIENCE_S = 300.0  # with servers that are full
_PAUSE_S = 0.1  # after the first round; doubled after each, up to
_LONGEST_PAUSE_S = 5.0
_LOST = (OSError, EOFError)  # TimeoutError and IncompleteReadError are of these


class PoolGone(RuntimeError):
    """No server gave an answer; the message says what the last one said or did."""


class Refused(RuntimeError):
    """A server has understood, and says no. kind: `invalid_tests` for an error of the tests' author."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


class _Full(RuntimeError):
    """The server's queue is full."""


class HTTP:
    """urls: one, or several: they take turns. token: what the servers were started with; sent to all of them."""

    name = "http"

    def __init__(self, urls: str | list[str], token: str | None = None) -> None:
        self._servers = [_Server(url, token) for url in ([urls] if isinstance(urls, str) else urls)]
        if not self._servers:
            raise ValueError("url is []; give the address of at least one server")
        self._turn = 0

    async def start(self) -> None:
        """Raises SandboxUnavailable where no server says that it is well."""
        reasons = []
        for server in self._servers:
            try:
                await server.ask("GET", "/health", b"", _CONNECT_S)
                return
            except (Refused, _Full, BadMessage, FramingError, *_LOST) as error:
                reasons.append(f"{server.url}: {_said(error)}")
        raise SandboxUnavailable("no server of the pool answers: " + "; ".join(reasons))

    async def run(self, program: Program) -> Run:
        if program.channel is not None:
            return self._failure(program.limits, "sessions need a sandbox on this machine; give another backend")
        try:
            answer = await self._ask("/run", run_order(program), program.limits.wall_s or 0)
            return read_run_answer(answer)
        except (PoolGone, Refused, BadMessage) as error:
            return self._failure(program.limits, str(error))

    async def grade(
        self,
        code: str | bytes,
        tests: Tests,
        limits: Limits,
        *,
        fail_fast: bool = False,
        trust: str = "split",
        language: str = "python",
    ) -> Verdict:
        """As Sandbox.grade. limits: all given. Raises InvalidTests."""
        encoded = code.encode("utf-8", "surrogatepass") if isinstance(code, str) else code
        runs = len(getattr(tests, "cases", "x"))
        try:
            order = grade_order(encoded, tests, limits, fail_fast=fail_fast, trust=trust, language=language)
            return read_verdict_answer(await self._ask("/grade", order, runs * (limits.wall_s or 0)))
        except (PoolGone, Refused, BadMessage) as error:
            if isinstance(error, Refused) and error.kind == "invalid_tests":
                raise InvalidTests(str(error)) from error
            return verdict_of([failed(str(error), Outcome.SANDBOX_ERROR)] * runs, self.name)

    async def stop(self) -> None:
        for server in self._servers:
            server.close()

    async def _ask(self, path: str, order: dict[str, Any], run_s: float) -> Any:
        """Asks one server after the other until one answers. Raises PoolGone, Refused, BadMessage."""
        body = json.dumps(order).encode()
        if len(body) > BODY_BYTES:
            raise Refused(f"the request has {len(body)} bytes; a server takes at most {BODY_BYTES}")
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _PATIENCE_S
        rounds, pause, reason = 0, _PAUSE_S, ""
        while rounds < _ROUNDS and loop.time() < give_up:
            self._turn += 1
            full = False
            for index in range(len(self._servers)):
                server = self._servers[(self._turn + index) % len(self._servers)]
                try:
                    return await server.ask("POST", path, body, run_s + _ANSWER_S)
                except _Full as error:
                    full, reason = True, f"{server.url}: {error}"
                except (FramingError, *_LOST) as error:
                    reason = f"{server.url}: {_said(error)}"
            rounds += not full
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise PoolGone(f"the pool gives no answer; the last: {reason}")

    def _failure(self, limits: Limits, error: str) -> Run:
        return run_of({"error": error}, b"", b"", False, limits, self.name)


class _Server:
    """One server, and connections to it that are free. Raises ValueError for a url that is none."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url is {url!r}; give http://host:port or https://host:port")
        self.url = url
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, method: str, path: str, body: bytes, timeout_s: float) -> Any:
        """The answer's JSON. Raises _Full, Refused, BadMessage, FramingError, or what _LOST names."""
        request = message(f"{method} {self._path}{path} HTTP/1.1", self._headers, body)
        async with asyncio.timeout(timeout_s):
            while self._free:  # one that has been free may have been closed in the meantime
                with contextlib.suppress(OSError, EOFError):
                    return await self._exchange(self._free.pop(), request)
            async with asyncio.timeout(_CONNECT_S):
                connection = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=HEAD_BYTES)
            return await self._exchange(connection, request)

    async def _exchange(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> Any:
        reader, writer = connection
        try:
            writer.write(request)
            await writer.drain()
            head = await read_head(reader)
            body = await reader.readexactly(body_bytes(head))
        except BaseException:
            writer.close()
            raise
        if head.keeps_alive:
            self._free.append(connection)
        else:
            writer.close()
        return _read(head.words[1], body)

    def close(self) -> None:
        while self._free:
            self._free.pop()[1].close()


def _read(status: str, body: bytes) -> Any:
    if status == "429":
        raise _Full("its queue is full")
    try:
        answer = json.loads(body)
    except ValueError as error:
        answer = error
    if status in ("500", "502", "503", "504"):
        raise FramingError(int(status), f"it answered {status}: {answer}"[:1000])
    if status == "200" and not isinstance(answer, ValueError):
        return answer
    if isinstance(answer, dict) and isinstance(answer.get("detail"), str):
        raise Refused(answer["detail"], str(answer.get("kind", "")))
    raise Refused(f"it answered {status}: {body[:200]!r}")


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
