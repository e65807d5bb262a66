"""One open sandbox for each event loop and set of options, whoever asks for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from rlvlm_sandbox import Sandbox

Loop = asyncio.AbstractEventLoop


@dataclass(frozen=True, slots=True)
class Options:
    """What `Sandbox` is made with."""

    backend: str
    image: str
    workers: int | None
    url: str | None
    token_env: str | None

    def sandbox(self) -> Sandbox:
        token = None if self.token_env is None else os.environ.get(self.token_env)
        return Sandbox(self.backend, self.image, self.workers, url=self.url, token=token)


class _Shared:
    """The sandbox of one loop, open as long as it has users, or as its loop."""

    def __init__(self, loop: Loop, options: Options) -> None:
        self.key = (loop, options)
        self.users: set[int] = set()
        self._keeper = self._keep()
        self.opening = loop.create_task(self._open())

    async def close(self) -> None:
        await asyncio.wait({self.opening})
        await self._keeper.aclose()

    async def _open(self) -> Sandbox:
        return await anext(self._keeper)

    async def _keep(self) -> AsyncGenerator[Sandbox, None]:
        """`asyncio.run` closes a loop's asynchronous generators when it ends, and so this one: a sandbox that nobody
        released goes with its loop."""
        try:
            async with self.key[1].sandbox() as sandbox:
                yield sandbox
        finally:
            self.forget()

    def forget(self) -> None:
        """The next one who asks opens another."""
        with _lock:
            if _shared.get(self.key) is self:
                del _shared[self.key]


_shared: dict[tuple[Loop, Options], _Shared] = {}
_lock = threading.RLock()  # loops of several threads share the table; nothing is awaited under it


async def borrow(options: Options, user: int) -> Sandbox:
    """The running loop's sandbox with these options, opened if it is not. user: whoever will `release` it.

    Raises SandboxUnavailable where no backend holds; the next call tries again.
    """
    loop = asyncio.get_running_loop()
    with _lock:
        for closed in [shared for shared in _shared.values() if shared.key[0].is_closed()]:
            closed.forget()
        if (loop, options) not in _shared:
            _shared[loop, options] = _Shared(loop, options)
        shared = _shared[loop, options]
        shared.users.add(user)
    return await asyncio.shield(shared.opening)  # one caller that gives up must not end it for the others


async def release(options: Options, user: int) -> None:
    """`user` needs the running loop's sandbox no more; it is closed when nobody else does."""
    with _lock:
        shared = _shared.get((asyncio.get_running_loop(), options))
        if shared is None or user not in shared.users:
            return
        shared.users.remove(user)
        if shared.users:
            return
        shared.forget()
    await shared.close()
