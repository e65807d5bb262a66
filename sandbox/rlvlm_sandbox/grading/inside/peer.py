"""Calls between two programs over a socket. Each holds numbers for what stays with the other: functions, iterators,
objects of classes that the other does not have. One of the two speaks at a time; a call may call back.
"""

from __future__ import annotations

import json
import operator
import os
import struct
import time
from _thread import RLock  # `threading` takes long to import
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlvlm_sandbox.grading.inside.wire import MAX_BYTES, Entry, WireError, decode, encode, exception_class

_LENGTH = struct.Struct(">I")
_dumps = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_ONE_BY_ONE = 16  # an item may take long to make: only who takes so many gets more than asked for
_CHUNK, _CHUNK_S = 64, 0.002
_LONGEST_STREAM = 1 << 20


class Gone(BaseException):
    """The other side has ended."""


class Channel:
    """Messages, which are JSON, over a descriptor. Raises Gone when the other end is closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()

    def send(self, message: Any) -> None:
        data = _dumps(message).encode()
        if len(data) > MAX_BYTES:
            raise WireError(f"it takes {len(data)} bytes; {MAX_BYTES} is the most that is sent")
        view = memoryview(_LENGTH.pack(len(data)) + data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise Gone from error

    def receive(self) -> Any:
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > MAX_BYTES:
            raise WireError(f"a message of {length} bytes is announced; {MAX_BYTES} is the most")
        try:
            return json.loads(self._take(length))
        except (ValueError, RecursionError) as error:
            raise WireError(f"a message is malformed: {error}") from error

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                chunk = os.read(self._fd, 1 << 18)
            except OSError as error:
                raise Gone from error
            if not chunk:
                raise Gone
            self._buffer += chunk
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def _asks(operation: str) -> Callable[..., Any]:
    return lambda self, *args: self._peer.operate(self, operation, args)


def _asks_both(operation: str) -> Callable[..., Any]:
    """Only between two objects of a class that the tests name: who tests a class has to trust its operators, but no
    result of a function may say itself that it equals the expected value, or is close to it."""

    def operator_of_both(self: Remote, other: object) -> Any:
        named = isinstance(other, Remote) and {self.__name__, other.__name__} <= self._peer.named
        return self._peer.operate(self, operation, (other,)) if named else NotImplemented

    return operator_of_both


class Remote:
    """Stands for an object of the other side: its attributes by name, its length, items and text."""

    def __init__(self, peer: Peer, number: int, name: str) -> None:
        self.__dict__.update(_peer=peer, _number=number, __name__=name, __qualname__=name, __doc__=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask(["get", self._number, name])

    def __repr__(self) -> str:
        return f"<{self.__name__} of the other side>"

    __hash__ = object.__hash__
    __len__, __str__, __bool__, __iter__ = _asks("len"), _asks("str"), _asks("bool"), _asks("iter")
    __getitem__, __setitem__, __delitem__ = _asks("getitem"), _asks("setitem"), _asks("delitem")
    __eq__, __add__, __sub__, __mul__ = _asks_both("eq"), _asks_both("add"), _asks_both("sub"), _asks_both("mul")


class RemoteCallable(Remote):
    def __bool__(self) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.call(self._number, args, kwargs)


_OPERATIONS: dict[str, Callable[..., Any]] = {"len": len, "str": str, "bool": bool, "iter": iter}
for _name in ("getitem", "setitem", "delitem", "eq", "add", "sub", "mul"):
    _OPERATIONS[_name] = getattr(operator, _name)


class RemoteIterator(Remote):
    """ahead: whether more items may be fetched than are asked for."""

    def __init__(self, peer: Peer, number: int, ahead: bool) -> None:
        super().__init__(peer, number, "iterator")
        self._ahead = ahead
        self._waiting: list[Any] = []  # last first
        self._taken = 0
        self._ended = False

    def __iter__(self) -> RemoteIterator:
        return self

    def __next__(self) -> Any:
        if not self._waiting and not self._ended:
            wanted = _CHUNK if self._ahead and self._taken >= _ONE_BY_ONE else 1
            self._ended, items = self._peer.ask(["next", self._number, wanted])
            self._waiting = list(items)[::-1]
        if not self._waiting:
            self._ended = True
            raise StopIteration
        self._taken += 1
        if self._taken > _LONGEST_STREAM:
            raise WireError(f"an iterator has more than {_LONGEST_STREAM} items")
        return self._waiting.pop()


class Stream:
    """Our end of a RemoteIterator."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items
        self._failure: BaseException | None = None

    def take(self, count: int) -> tuple[bool, tuple[Any, ...]]:
        """(whether these are the last, up to `count` items). What fails after some items is raised the next time."""
        if self._failure is not None:
            raise self._failure
        taken: list[Any] = []
        until = time.monotonic() + _CHUNK_S
        while len(taken) < count and (not taken or time.monotonic() < until):
            try:
                taken.append(next(self.items))
            except StopIteration:
                return True, tuple(taken)
            except BaseException as error:
                if not taken:
                    raise
                self._failure = error
                break
        return False, tuple(taken)


class Peer:
    """One of the two programs. A subclass says what the other may have and what becomes of exceptions."""

    caught: type[BaseException] = Exception  # what passes to the other side when a call of its raises it

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._given: list[object] = []
        self._numbers: dict[int, int] = {}  # id -> number; what is given stays alive, and so its id its own
        self._remotes: dict[int, Remote] = {}
        self._turn = RLock()
        self.named: set[str] = set()  # classes of the other side whose operators are asked

    # What a subclass decides.

    def find_class(self, name: str) -> type | None:
        raise NotImplementedError

    def class_name(self, kind: type) -> str | None:
        raise NotImplementedError

    def may_get(self, value: object, name: str) -> bool:
        """Whether the other side may have this attribute of an object of ours."""
        raise NotImplementedError

    def raised(self, names: Sequence[str], args: tuple[Any, ...], said: str) -> BaseException:
        """The exception to raise here for one of the other side, given the names of its classes."""
        raise NotImplementedError

    def returned(self, value: Any, entries: Mapping[int, Entry], own: dict[int, Any]) -> Any:
        """The result of a call: `own` are the objects that were sent, `entries` what of them has changed."""
        return decode(value, entries, self, own, fill=True)[0]

    # Numbers of what stays on its side (wire.Links).

    def give(self, value: object) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._given)
            self._given.append(value)
        return number

    def given(self, number: int) -> object:
        value = self._given[number]
        return value.items if isinstance(value, Stream) else value

    def remote(self, number: int, name: str, called: bool) -> object:
        if number not in self._remotes:
            self._remotes[number] = (RemoteCallable if called else Remote)(self, number, name)
        return self._remotes[number]

    def remote_number(self, value: object) -> int | None:
        return int(value._number) if isinstance(value, Remote) else None

    def stream(self, number: int, ahead: bool) -> Iterator[Any]:
        return RemoteIterator(self, number, ahead)

    async def coroutine(self, number: int) -> Any:
        """Runs to its end where it is, in one step of ours."""
        return self.ask(["await", number])

    # Asking

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, entries, objects = encode((args, tuple(kwargs.items())), self)
        return self.ask(["call", number, value, entries], dict(enumerate(objects)))

    def operate(self, remote: Remote, operation: str, args: tuple[Any, ...]) -> Any:
        value, entries, _ = encode(args, self)
        return self.ask(["operate", remote._number, operation, value, list(enumerate(entries))])

    def ask(self, message: list[Any], own: dict[int, Any] | None = None) -> Any:
        with self._turn:
            self._channel.send(message)
            while True:
                answer = self._channel.receive()
                if type(answer) is not list or not answer:
                    raise WireError("a message is malformed: it is no list")
                if answer[0] == "done":
                    return self.returned(answer[1], _numbered(answer[2]), own or {})
                if answer[0] == "raise":
                    raise self._failure(answer)
                self.answer(answer)

    def _failure(self, answer: list[Any]) -> BaseException:
        try:
            args = decode(answer[2], _numbered(answer[3]), self)[0]
        except WireError:
            args = ()
        names = [str(name) for name in answer[1]]
        return self.raised(names, args if type(args) is tuple else (), str(answer[4]))

    # Answering

    def answer(self, message: list[Any]) -> None:
        try:
            reply = self._perform(message)
        except self.caught as error:
            reply = self.failure(error)
        try:
            self._channel.send(reply)
        except WireError as error:
            self._channel.send(self.failure(error))

    def _perform(self, message: list[Any]) -> list[Any]:
        kind, number, *rest = message
        if kind == "get":
            target, name = self.given(number), str(rest[0])
            if not self.may_get(target, name):
                raise AttributeError(name)
            return self._done(getattr(target, name))
        if kind == "next":
            return self._done(self._stream_of(number).take(rest[0]))
        if kind == "operate":
            args = decode(rest[1], _numbered(rest[2]), self)[0]
            return self._done(_OPERATIONS[rest[0]](self.given(number), *args))
        if kind == "await":
            import asyncio  # takes long, and is seldom needed

            return self._done(asyncio.run(self.given(number)))  # type: ignore[arg-type]
        if kind != "call":
            raise WireError(f"a message is malformed: {kind!r}")
        (args, kwargs), objects = decode(rest[0], _numbered(list(enumerate(rest[1]))), self)
        known = [objects[index] for index in range(len(objects))]
        before = encode(None, self, known)[1] if known else []
        called: Any = self.given(number)
        result = called(*args, **dict(kwargs))
        del args, kwargs
        return self._done(result, known, before)

    def _done(self, result: Any, known: Sequence[Any] = (), before: list[Entry] | None = None) -> list[Any]:
        value, entries, _ = encode(result, self, known)
        # All or none of what came: what has not changed may hold what has.
        before = before or []
        first = len(before) if entries[: len(before)] == before else 0
        return ["done", value, [[number, entries[number]] for number in range(first, len(entries))]]

    def _stream_of(self, number: int) -> Stream:
        value = self._given[number]
        if not isinstance(value, Stream):
            value = self._given[number] = Stream(iter(value))  # type: ignore[call-overload]
        return value

    def failure(self, error: BaseException) -> list[Any]:
        """The message that says what was raised."""
        # What cannot be sent is no exception that a test may expect.
        names = [] if isinstance(error, WireError) else [kind.__name__ for kind in type(error).__mro__]
        said = _said(error)
        try:
            value, entries, _ = encode(tuple(error.args), self)
        except WireError:
            value, entries = ["t", said], []
        return ["raise", names, value, list(enumerate(entries)), said]


def _numbered(pairs: Any) -> dict[int, Entry]:
    try:
        numbered = {number: entry for number, entry in pairs}
    except (TypeError, ValueError) as error:
        raise WireError(f"a message is malformed: {error}") from error
    if not all(type(number) is int and type(entry) is list for number, entry in numbered.items()):
        raise WireError("a message is malformed: its entries are no entries")
    return numbered


def _said(error: BaseException) -> str:
    """One line on it: class, text, line of the module that raised it."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (the other side's own __str__)
        text = "(no text)"
    return f"{type(error).__name__}: {text}"[:500]


def builtin_exception(names: Sequence[str]) -> type[BaseException]:
    """The nearest built-in class of an exception, given the names of its classes."""
    return next((kind for name in names if (kind := exception_class(name)) is not None), BaseException)
