"""`python -m rlvlm_sandbox serve`: runs and gradings over HTTP, for the backend `http` and for SandboxFusion's clients.

POST /run_code  SandboxFusion's request and answer (fusion.py)
POST /run       a run, as Sandbox.run        (messages.py)
POST /grade     a grading, as Sandbox.grade  (messages.py)
GET  /health    how many requests are in hand
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from rlvlm_sandbox import fusion
from rlvlm_sandbox.framing import HEAD_BYTES, FramingError, Head, body_bytes, message, read_head
from rlvlm_sandbox.grading import InvalidTests
from rlvlm_sandbox.messages import read_grade_order, read_run_order, run_answer, verdict_answer
from rlvlm_sandbox.records import Profile, SandboxUnavailable
from rlvlm_sandbox.sandbox import Sandbox

_IDLE_S = 75.0  # of a connection between two requests
_HEAD_S, _BODY_S = 10.0, 60.0
_FINISH_S = 30.0  # for what is running when the server is asked to stop
_LOOK_S = 0.5  # how often a client that waits is looked for
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 411: "Length Required", 413: "Content Too Large", 422: "Unprocessable Content",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 503: "Service Unavailable",
}  # fmt: skip

Answer = tuple[int, dict[str, Any]]
Handler = Callable[[Any], Awaitable[dict[str, Any]]]


class Server:
    """Answers for an open sandbox. workers: of the sandbox; queue: how many requests may wait beyond these before the
    next gets 429. token: what clients have to send (`Authorization: Bearer`); None lets everybody in.

    Raises ValueError where host is not this machine alone and there is no token.
    """

    def __init__(
        self, sandbox: Sandbox, host: str, port: int, *, workers: int, queue: int, token: str | None = None
    ) -> None:
        if not token and not _is_loopback(host):
            raise ValueError(f"host is {host!r}, which others can reach: a token is needed; give --token-env NAME")
        self._sandbox, self._host, self._port, self._token = sandbox, host, port, token
        self._most, self._in_hand, self._workers = workers + queue, 0, workers
        self._connections: dict[asyncio.Task[Any], bool] = {}  # whether it has a request in hand
        self._stopping = False
        self._routes: dict[str, tuple[str, Handler]] = {
            "/run_code": ("POST", self._run_code), "/run": ("POST", self._run), "/grade": ("POST", self._grade),
            "/health": ("GET", self._health),
        }  # fmt: skip

    @property
    def port(self) -> int:
        """The one that it listens on, also where 0 was asked for."""
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Raises OSError where it cannot listen."""
        self._server = await asyncio.start_server(self._connected, self._host, self._port, limit=HEAD_BYTES)

    async def stop(self) -> None:
        """Takes no more, lets what is running finish for a while, and ends the rest."""
        self._stopping = True
        self._server.close()
        for task, busy in self._connections.items():
            if not busy:
                task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_FINISH_S)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # ---- connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # it is one
        self._connections[task] = False
        try:
            while await self._exchange(reader, writer, task):
                pass
        except (EOFError, OSError):
            pass  # the client has gone, or stays too long without a word
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            del self._connections[task]
            writer.close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[Any]
    ) -> bool:
        """One request and its answer. Returns whether more may come."""
        head: Head | None = None
        try:
            head = await self._next_head(reader)
            self._connections[task] = True
            status, said = await self._answer(head, reader, writer)
        except FramingError as error:
            head, status, said = None, error.status, {"detail": str(error)}
        goes_on = head is not None and head.keeps_alive and status != 401 and not self._stopping
        headers: dict[str, object] = {"Content-Type": "application/json"}
        headers |= {} if goes_on else {"Connection": "close"}
        headers |= {"Retry-After": 1} if status == 429 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        writer.write(message(f"HTTP/1.1 {status} {_REASONS[status]}", headers, json.dumps(said).encode()))
        async with asyncio.timeout(_BODY_S):
            await writer.drain()
        self._connections[task] = False
        return goes_on

    async def _next_head(self, reader: asyncio.StreamReader) -> Head:
        async with asyncio.timeout(_IDLE_S):
            first = await reader.readexactly(1)
        try:
            async with asyncio.timeout(_HEAD_S):
                return await read_head(reader, first)
        except TimeoutError as error:
            raise FramingError(408, f"the header did not come within {_HEAD_S:g} s") from error

    async def _answer(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
        method, path, _ = head.words
        path = path.partition("?")[0]
        if path != "/health" and not self._may(head):
            return 401, {"detail": "the token is missing or wrong; send Authorization: Bearer TOKEN"}
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(_BODY_S):
                body = await reader.readexactly(body_bytes(head))
        except TimeoutError as error:
            raise FramingError(408, f"the body did not come within {_BODY_S:g} s") from error
        if path not in self._routes:
            return 404, {"detail": f"{path[:100]!r} is not served; there are {', '.join(self._routes)}"}
        wanted, handler = self._routes[path]
        if method != wanted:
            return 405, {"detail": f"the method is {method[:20]!r}; {path} takes {wanted}"}
        return await self._handled(handler, body, reader)

    def _may(self, head: Head) -> bool:
        if not self._token:
            return True
        scheme, _, token = head.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self._token.encode())

    async def _handled(self, handler: Handler, body: bytes, reader: asyncio.StreamReader) -> Answer:
        if handler == self._health:
            return 200, await self._health(None)
        if self._in_hand >= self._most:
            return 429, {"detail": f"{self._in_hand} requests are in hand; come again in a second"}
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            return 400, {"detail": f"the body is no JSON: {error}"}
        self._in_hand += 1
        try:
            return 200, await _while_wanted(handler(request), reader)
        except InvalidTests as error:
            return 422, {"detail": str(error), "kind": "invalid_tests"}
        except ValueError as error:  # BadMessage, and what Sandbox finds wrong in its arguments
            return 422, {"detail": str(error)}
        except SandboxUnavailable as error:
            return 503, {"detail": str(error)}
        finally:
            self._in_hand -= 1

    # ---- what is asked for

    async def _run_code(self, request: Any) -> dict[str, Any]:
        order = fusion.read_order(request)
        profile: Profile = "judge" if self._sandbox.backend == "landlock" else "tool"  # it has no walls for more
        run = await self._sandbox.run(order.code, order.stdin, profile, order.limits, order.language)
        return fusion.answer(order, run)

    async def _run(self, request: Any) -> dict[str, Any]:
        return run_answer(await self._sandbox.run(**read_run_order(request)))

    async def _grade(self, request: Any) -> dict[str, Any]:
        return verdict_answer(await self._sandbox.grade(**read_grade_order(request)))

    async def _health(self, _: Any) -> dict[str, Any]:
        running = min(self._in_hand, self._workers)
        return {
            "status": "ok", "backend": self._sandbox.backend, "running": running, "waiting": self._in_hand - running,
        }  # fmt: skip


async def serve(server: Server) -> None:
    """Until SIGTERM or SIGINT. Raises OSError where it cannot listen."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    print(f"listening on port {server.port}", file=sys.stderr, flush=True)
    try:
        await stop.wait()
    finally:
        await server.stop()


async def _while_wanted(work: Awaitable[dict[str, Any]], reader: asyncio.StreamReader) -> dict[str, Any]:
    """Ends the work when the client is gone. Raises EOFError then."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            if reader.at_eof():
                raise EOFError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
