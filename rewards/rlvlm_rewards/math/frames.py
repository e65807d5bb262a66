"""What travels between the pool and its readers: JSON behind its length in four bytes (no pickle: a reader that was
taken over can say something wrong, but make nothing run)."""

from __future__ import annotations

import json
import os
from enum import IntEnum
from typing import Any

LIMIT = 1 << 20


class Stage(IntEnum):
    """How far a question came, and so what the end of its reader is charged to."""

    IDLE = 0
    REFERENCE = 1
    ANSWER = 2
    COMPARISON = 3


class BrokenFrame(Exception):
    """The other side is gone or says something that is no frame."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Lone surrogates, which a model's text may hold, travel as \\uXXXX."""
    payload = json.dumps(message).encode()
    view = memoryview(len(payload).to_bytes(4, "big") + payload)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> dict[str, Any] | None:
    """The next message; None when the other side closed between two. Raises BrokenFrame."""
    head = _read(descriptor, 4)
    if not head:
        return None
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > LIMIT:
        raise BrokenFrame(f"a frame starts with {head!r}")
    payload = _read(descriptor, length)
    try:
        message = json.loads(payload)
    except ValueError as error:
        raise BrokenFrame(f"a frame holds {payload[:60]!r}") from error
    if not isinstance(message, dict):
        raise BrokenFrame(f"a frame holds {payload[:60]!r}")
    return message


def _read(descriptor: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length and (part := os.read(descriptor, length - len(parts))):
        parts += part
    return bytes(parts)
