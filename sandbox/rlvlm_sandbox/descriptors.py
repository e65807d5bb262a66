"""What a program is given to read and to write, as descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

_PIPE_BYTES = 1 << 20  # so that a program does not stand still where our event loop does


class Output:
    """A pipe that keeps the first `limit` bytes of what the program writes, and calls `full` when there is more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, full: Callable[[], None]) -> None:
        self._loop, self._limit, self._full = loop, limit, full
        self._kept = bytearray()
        self.truncated = False
        self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        os.fchmod(self.theirs, 0o666)  # /dev/stdout can be opened by the program's user too
        with contextlib.suppress(PermissionError):  # more than this user may have in pipes: a shorter one does
            fcntl.fcntl(self.theirs, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        loop.add_reader(self._ours, self._read)

    def close_theirs(self) -> None:
        os.close(self.theirs)
        self.theirs = -1

    def _read(self) -> bool:
        """Takes what there is; False when nothing more can come."""
        try:
            chunk = os.read(self._ours, 1 << 18)
        except BlockingIOError:
            return False
        if not chunk:
            self._loop.remove_reader(self._ours)
            return False
        if len(self._kept) + len(chunk) > self._limit and not self.truncated:
            self.truncated = True
            self._full()
        self._kept += chunk[: self._limit - len(self._kept)]
        return True

    def rest(self) -> bytes:
        """All of it, once the program has ended."""
        while self._read():
            pass
        return bytes(self._kept)

    def close(self) -> None:
        self._loop.remove_reader(self._ours)
        os.close(self._ours)
        if self.theirs >= 0:
            self.close_theirs()


@contextlib.contextmanager
def sealed(data: bytes) -> Iterator[int]:
    """A file in memory that nobody can change, as a descriptor at its start."""
    fd = os.memfd_create("rlvlm-sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)
