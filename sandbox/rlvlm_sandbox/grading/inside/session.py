"""A Python that keeps its state: runs what the client sends, piece by piece, and answers with what came of it.

It lives with the code that it runs, which can bend it and can forge its answers: that harms that session only.
"""

from __future__ import annotations

import ast
import binascii
import io
import linecache
import os
import queue
import select
import signal
import sys
import threading
import traceback
import types
from typing import Any

from rlvlm_sandbox.grading.inside.peer import Channel, Gone

_CHANNEL = 3
_FILES_BYTES = 8 << 20  # of files and pictures, in one answer
_RESULT_CHARACTERS = 20_000


class _Captured:
    """What is written to a descriptor, up to `limit` bytes between two calls of `take`; the rest is dropped."""

    def __init__(self, fd: int, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._truncated = False
        self._lock = threading.Lock()
        self._pipe, write_end = os.pipe()
        os.set_blocking(self._pipe, False)
        os.dup2(write_end, fd)
        os.close(write_end)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while True:
            select.select([self._pipe], [], [])
            with self._lock:
                self._read()

    def _read(self) -> bool:
        try:
            chunk = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return False
        room = self._limit - len(self._kept)
        self._truncated = self._truncated or len(chunk) > room
        self._kept += chunk[:room]
        return bool(chunk)

    def take(self) -> tuple[bytes, bool]:
        with self._lock:
            while self._read():
                pass
            taken, truncated = bytes(self._kept), self._truncated
            self._kept, self._truncated = bytearray(), False
        return taken, truncated


class _Files:
    """Which files in a directory are new or changed since they were last looked at."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writable = directory != "/" and os.access(directory, os.W_OK)
        self._seen = self._look()

    def _look(self) -> dict[str, tuple[int, int, int]]:
        seen: dict[str, tuple[int, int, int]] = {}
        for folder, _, names in os.walk(self._directory) if self._writable else ():
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except OSError:  # gone meanwhile
                    continue
                if os.path.isfile(path) and not os.path.islink(path):
                    relative = os.path.relpath(path, self._directory)
                    seen[relative] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return seen

    def changed(self) -> list[str]:
        before, self._seen = self._seen, self._look()
        return sorted(name for name, mark in self._seen.items() if before.get(name) != mark)

    def read(self, name: str, most: int) -> bytes | None:
        """None where it is larger, or cannot be read."""
        try:
            with open(os.path.join(self._directory, name), "rb") as file:
                data = file.read(most + 1)
        except OSError:
            return None
        return data if len(data) <= most else None

    def put(self, name: str, data: bytes) -> None:
        path = os.path.join(self._directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        self._seen = self._look()


class _Python:
    """The state, and how a piece of code is run in it."""

    def __init__(self, output_bytes: int) -> None:
        self._module = types.ModuleType("__main__")
        self._drivers_main, sys.modules["__main__"] = sys.modules["__main__"], self._module
        self._files = _Files(os.getcwd())
        self._captured = [_Captured(fd, output_bytes) for fd in (1, 2)]
        self._pieces = 0
        self._running = self._interrupted = False
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, *_: object) -> None:
        if self._running:
            self._interrupted = True
            raise KeyboardInterrupt

    def run(self, code: str) -> dict[str, Any]:
        self._interrupted = False
        try:
            outcome, result = self._run(code)
        except KeyboardInterrupt:  # it came while the code was ending
            outcome, result = "time", None
        if self._interrupted:
            outcome = "time"
        pictures = [*_figures(), *_picture(result)]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # noqa: BLE001 (whatever the code has put there)
                continue
        (stdout, cut_out), (stderr, cut_err) = (captured.take() for captured in self._captured)
        answer: dict[str, Any] = {"outcome": outcome, "truncated": cut_out or cut_err, "result": _shown(result)}
        answer |= {"stdout": _text(stdout), "stderr": _text(stderr)}
        return answer | self._carried(pictures)

    def _run(self, code: str) -> tuple[str, Any]:
        self._pieces += 1
        name = f"<piece {self._pieces}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            self._running = True
            tree = ast.parse(code, name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec", dont_inherit=True), self._module.__dict__)
            if isinstance(last, ast.Expr):
                expression = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
                return "ok", eval(expression, self._module.__dict__)
        except SystemExit as error:
            if error.code:
                return self._failed(error, "runtime_error")
        except MemoryError as error:
            return self._failed(error, "memory")
        except BaseException as error:  # noqa: BLE001 (the code's own)
            return self._failed(error, "runtime_error")
        finally:
            self._running = False
        return "ok", None

    def _failed(self, error: BaseException, outcome: str) -> tuple[str, None]:
        """Tells it on stderr, without our own frame."""
        self._running = False
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        try:
            text = "".join(traceback.format_exception(type(error), error, frames))
        except Exception:  # noqa: BLE001 (the code's own __str__)
            text = f"{type(error).__name__}\n"
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(2, data) :]
        return outcome, None

    def _carried(self, pictures: list[bytes]) -> dict[str, Any]:
        """Files and pictures, as far as they fit."""
        room = _FILES_BYTES
        files: dict[str, str] = {}
        left_out: list[str] = []
        for name in self._files.changed():
            data = self._files.read(name, room)
            if data is None or not name.isprintable():
                left_out.append(ascii(name))
            else:
                files[name] = _text(data)
                room -= len(data)
        shown = []
        for picture in pictures:
            if len(picture) <= room:
                shown.append(_text(picture))
                room -= len(picture)
            else:
                left_out.append("a picture")
        return {"files": files, "pictures": shown, "left_out": left_out}

    def put(self, name: str, data: str) -> dict[str, Any]:
        try:
            self._files.put(name, binascii.a2b_base64(data))
        except OSError as error:
            return {"error": f"{name}: {error.strerror}"}
        return {}


def _figures() -> list[bytes]:
    """The open figures of matplotlib, which are closed."""
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    pictures = []
    try:
        for number in pyplot.get_fignums():
            buffer = io.BytesIO()
            pyplot.figure(number).savefig(buffer, format="png")
            pictures.append(buffer.getvalue())
        pyplot.close("all")
    except Exception as error:  # noqa: BLE001 (a figure that cannot be drawn: matplotlib raises anything)
        print(f"a figure cannot be drawn: {error}", file=sys.stderr)
    return pictures


def _picture(result: Any) -> list[bytes]:
    """A result that is an image of PIL."""
    pil: Any = sys.modules.get("PIL.Image")
    if pil is None or not isinstance(result, pil.Image):
        return []
    buffer = io.BytesIO()
    try:
        result.save(buffer, format="PNG")
    except Exception as error:  # noqa: BLE001 (a mode that PNG does not have, a subclass of the code's own)
        print(f"the image cannot be saved: {error}", file=sys.stderr)
        return []
    return [buffer.getvalue()]


def _shown(result: Any) -> str | None:
    if result is None:
        return None
    try:
        return repr(result)[:_RESULT_CHARACTERS]
    except BaseException as error:  # noqa: BLE001 (the code's own __repr__)
        return f"<{type(result).__name__} whose repr raises {type(error).__name__}>"


def _text(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _listen(channel: Channel, orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """A thread of its own: an interrupt has to arrive while the main thread is busy."""
    while True:
        try:
            order = channel.receive()
        except Gone:
            os._exit(0)
        if order["do"] == "interrupt":
            # To the process: the kernel gives it to the main thread. By its number that cannot be reached, as libc does
            # not know it any more after the fork server's own way to fork.
            os.kill(os.getpid(), signal.SIGINT)
        else:
            orders.put(order)


def main(_: bytes) -> None:
    os.set_inheritable(_CHANNEL, False)
    channel = Channel(_CHANNEL)
    first = channel.receive()
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    python = _Python(first["output_bytes"])
    threading.Thread(target=_listen, args=(channel, orders), daemon=True).start()
    process = os.getpid()
    while True:
        order = orders.get()
        answer = python.run(order["code"]) if order["do"] == "run" else python.put(order["name"], order["data"])
        if os.getpid() != process:  # the code has forked, and this is the child
            os._exit(0)
        channel.send({"id": order["id"], **answer})
