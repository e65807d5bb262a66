"""HTTP/1.1 messages on asyncio's streams: as much of it as our server and our client need."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

HEAD_BYTES = 16 << 10
BODY_BYTES = 128 << 20  # 50 MB of code in base64, and room


class FramingError(ValueError):
    """What came is no message that we read. status: the answer that it gets."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """The first line's three words, and the headers by name in lower case."""

    words: tuple[str, str, str]
    headers: Mapping[str, str]

    @property
    def keeps_alive(self) -> bool:
        http_1_0 = "HTTP/1.0" in self.words
        connection = self.headers.get("connection", "close" if http_1_0 else "keep-alive")
        return connection.lower() != "close"


async def read_head(reader: asyncio.StreamReader, begun: bytes = b"") -> Head:
    """begun: what has been read of it. Raises FramingError, EOFError when the other side has closed before it began."""
    try:
        text = (begun + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        if not begun + error.partial:
            raise EOFError from error
        raise FramingError(400, "the connection ended within a header") from error
    except asyncio.LimitOverrunError as error:
        raise FramingError(431, f"the header is longer than {HEAD_BYTES} bytes") from error
    first, *lines = text[:-4].split("\r\n")
    words = first.split(" ", 2)
    pairs = [line.partition(":") for line in lines]
    if len(words) != 3 or not all(colon and name and name == name.strip() for name, colon, _ in pairs):
        raise FramingError(400, f"the header is malformed: {first[:100]!r}")
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if len(headers) != len(pairs) and len({v.strip() for n, _, v in pairs if n.lower() == "content-length"}) > 1:
        raise FramingError(400, "there are two content-lengths")
    return Head((words[0], words[1], words[2]), headers)


def body_bytes(head: Head) -> int:
    """The length of the body that follows. Raises FramingError."""
    if "transfer-encoding" in head.headers:
        raise FramingError(411, "transfer-encoding is not supported; give content-length")
    text = head.headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()):
        raise FramingError(400, f"content-length is {text[:100]!r}; give a number of bytes")
    if len(text) > 12 or int(text) > BODY_BYTES:
        raise FramingError(413, f"content-length is {text[:100]}; at most {BODY_BYTES} are taken")
    return int(text)


def message(first: str, headers: Mapping[str, object], body: bytes) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
