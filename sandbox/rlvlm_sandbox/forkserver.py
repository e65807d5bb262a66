"""Backends `namespaces` and `landlock`: the client's side of the fork server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlvlm_sandbox.descriptors import Output, sealed
from rlvlm_sandbox.images import Image
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import Limits, Program, Run, SandboxUnavailable

_START_S = 60.0  # an image's packages are imported from a cold disk in this time
_GRACE_S = 10.0  # beyond a run's own limit, for the server to kill and report
# Runs a module of ours in a fresh interpreter, without what the package imports: a stand-in knows only where it is.
_BOOT = (
    "import sys, types; package = types.ModuleType('rlvlm_sandbox'); package.__path__ = [sys.argv[2]]; "
    "sys.modules['rlvlm_sandbox'] = package; "
    "module = __import__('rlvlm_sandbox.' + sys.argv[1], fromlist=['main']); text = sys.argv[3]; "
    "sys.argv = ['']; module.main(text)"
)
_LIMITS = tuple(field.name for field in fields(Limits))
_PACKAGE, _PACKAGE_INSIDE = str(Path(__file__).parent), "/python/rlvlm_sandbox"


class ServerGone(RuntimeError):
    """The fork server ended before the run did."""


class ForkServer:
    """One fork server process, and the runs on it. `start` first; `close` ends all of it."""

    def __init__(self, image: Image, namespaces: bool) -> None:
        self._image, self._namespaces = image, namespaces
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0

    @property
    def alive(self) -> bool:
        return self._process is not None

    @property
    def busy(self) -> int:
        return len(self._answers)

    async def start(self) -> None:
        """Raises SandboxUnavailable with what the server said when it could not."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = subprocess.Popen(
                    self._command(theirs.fileno()), pass_fds=[theirs.fileno()], env=self._environment(), cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise SandboxUnavailable(f"the interpreter does not start: {error}") from error
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_START_S):
                ready = await loop.sock_recv(ours, 64)
        except TimeoutError:
            ready = b""
        except BaseException:
            ours.close()
            await _end(process)
            raise
        if ready != b"ready":
            ours.close()
            said = await _end(process)
            raise SandboxUnavailable(said.strip().rpartition("\n")[2] or "the fork server ended without a word")
        self._process, self._control = process, ours
        loop.add_reader(ours, self._hear)

    def _environment(self) -> dict[str, str]:
        """In namespaces the server gets its own from root.py."""
        return {} if self._namespaces else self._image.environment(inside=False)

    def _command(self, control: int) -> list[str]:
        image = self._image
        config: dict[str, Any] = {"control": control, "warm": image.warm, "namespaces": self._namespaces}
        boot = ["-I", "-S", "-B", "-c", _BOOT]
        if not self._namespaces:
            config |= {"packages": image.packages, "readable": _readable(image), "leave_root": _nobody_reads(image)}
            return [image.python, *boot, "server", _PACKAGE, json.dumps(config | {"proc": "/proc"})]
        binds = image.binds()
        config |= {"packages": image.packages_inside, "leave_root": False}
        server = [image.python_inside, *boot, "server", _PACKAGE_INSIDE]
        root = {
            "control": control,
            "argv": server,
            "server": config,
            "env": image.environment(),
            "links": image.links(),
        }
        root["binds"] = [*binds, (_PACKAGE, _PACKAGE_INSIDE)]
        return [image.python, *boot, "root", _PACKAGE, json.dumps(root)]

    async def run(self, program: Program, backend: str) -> Run:
        """Raises ServerGone when the server ends first. Cancelling ends the program, and waits until it has ended."""
        loop = asyncio.get_running_loop()
        self._last_id += 1
        run_id, limits = self._last_id, program.limits
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()
        with contextlib.ExitStack() as stack:
            code, stdin = stack.enter_context(sealed(program.code)), stack.enter_context(sealed(program.stdin))
            outputs = [Output(loop, limits.output_bytes or 0, lambda: self._stop(run_id)) for _ in range(2)]
            for output in outputs:
                stack.callback(output.close)
            order = {
                "id": run_id,
                "profile": program.profile,
                "limits": {name: getattr(limits, name) for name in _LIMITS},
            }
            fds = [code, stdin, *(output.theirs for output in outputs)]
            fds += [] if program.channel is None else [program.channel]
            self._answers[run_id] = answer
            try:
                await self._send(json.dumps(order).encode(), fds)
                for output in outputs:
                    output.close_theirs()
                result = await self._result(run_id, answer, (limits.wall_s or 0) + _GRACE_S)
            finally:
                del self._answers[run_id]
            stdout, stderr = (output.rest() for output in outputs)
            truncated = any(output.truncated for output in outputs)
        return run_of(result, stdout, stderr, truncated, limits, backend)

    async def _result(self, run_id: int, answer: asyncio.Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
        try:
            done, _ = await asyncio.wait({answer}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._stop(run_id)
            await asyncio.wait({answer}, timeout=_GRACE_S)
            answer.cancel()
            raise
        if not done:  # it does not answer: no run on it can be trusted to end
            await self.close()
            raise ServerGone("the fork server did not answer")
        return answer.result()

    def _stop(self, run_id: int) -> None:
        with contextlib.suppress(OSError):  # it is gone, and the run with it
            self._control.send(json.dumps({"stop": run_id}).encode())

    async def _send(self, message: bytes, fds: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._control, [message], fds)
                return
            except BlockingIOError:  # more orders than the socket holds: the server catches up
                await asyncio.sleep(0.001)
            except OSError as error:
                raise ServerGone(f"the fork server is gone: {error}") from error

    def _hear(self) -> None:
        try:
            while message := self._control.recv(1 << 16):
                result = json.loads(message)
                answer = self._answers.get(result.pop("id"))
                if answer is not None and not answer.done():
                    answer.set_result(result)
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        self._lost()

    def _lost(self) -> None:
        if self._process is None:
            return
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        process, self._process = self._process, None
        process.kill()  # its outer half may still wait; both end with it
        process.wait()
        if process.stderr:
            process.stderr.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ServerGone("the fork server was killed or has crashed"))

    async def close(self) -> None:
        if self._process is not None:
            self._control.shutdown(socket.SHUT_RDWR)  # the server ends, and all runs on it with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 2.0)
            self._lost()


class ForkServerBackend:
    """`workers` fork servers. One that dies takes its own runs with it (SANDBOX_ERROR), and is started anew."""

    def __init__(self, name: str, image: Image, workers: int) -> None:
        self.name = name
        self._servers = [ForkServer(image, namespaces=name == "namespaces") for _ in range(workers)]
        self._starting = asyncio.Lock()
        self._stopped = False

    async def start(self) -> None:
        try:
            for server in self._servers:
                await server.start()
        except BaseException:
            await self.stop()
            raise

    async def run(self, program: Program) -> Run:
        server = min(self._servers, key=lambda server: server.busy)
        try:
            async with self._starting:
                if self._stopped:
                    raise ServerGone("the sandbox is closed")
                if not server.alive:
                    await server.start()
            return await server.run(program, self.name)
        except (ServerGone, SandboxUnavailable, OSError) as error:
            return run_of({"error": f"{error}"}, b"", b"", False, program.limits, self.name)

    async def stop(self) -> None:
        async with self._starting:
            self._stopped = True
            for server in self._servers:
                await server.close()


def _readable(image: Image) -> list[str]:
    libraries = [path for path in image.links() if "bin" not in path]
    libraries += [source for source, _ in image.binds() if "/bin" not in source]
    return [*libraries, image.python]


def _nobody_reads(image: Image) -> bool:
    """Whether the interpreter's files stay readable to a user without rights, which root can become only then."""
    paths = [*image.libraries, *image.packages]
    return all(_world_reads(Path(path)) for path in paths)


def _world_reads(path: Path) -> bool:
    return all(os.stat(place).st_mode & 0o005 == 0o005 for place in (path, *path.parents))


async def _end(process: subprocess.Popen[bytes]) -> str:
    """Kills it, and returns what it said on stderr."""
    process.kill()
    _, said = await asyncio.to_thread(process.communicate)
    return said.decode(errors="replace")
