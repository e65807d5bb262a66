"""The candidate's side: loads its code as the module `solution`, then answers calls until the other side ends."""

from __future__ import annotations

import json
import os
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

from rlvlm_sandbox.grading.inside.peer import Channel, Gone, Peer, builtin_exception

_CHANNEL = 3


class Missing(Exception):
    """The code does not define what is tested."""


class SolutionPeer(Peer):
    caught = BaseException  # SystemExit too is an answer

    def __init__(self, channel: Channel, module: types.ModuleType) -> None:
        super().__init__(channel)
        self._module = module

    def find_class(self, name: str) -> type | None:
        kind = self._module.__dict__.get(name)
        return kind if isinstance(kind, type) and kind.__module__ == self._module.__name__ else None

    def class_name(self, kind: type) -> str | None:
        return kind.__name__ if kind.__module__ == self._module.__name__ else None

    def may_get(self, value: object, name: str) -> bool:
        return True  # there is nothing here to hide

    def raised(self, names: Sequence[str], args: tuple[Any, ...], said: str) -> BaseException:
        own = next((kind for name in names if (kind := self.find_class(name)) is not None), None)
        kind = own if own is not None and issubclass(own, BaseException) else builtin_exception(names)
        return _exception(kind, args, said)

    def serve(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if message[0] == "classes":
                    found = ((name, self.find_class(name)) for name in message[1])
                    self._channel.send(self._done(tuple((name, kind) for name, kind in found if kind is not None)))
                else:
                    self.answer(message)
        except Gone:
            os._exit(0)


def _exception(kind: type[BaseException], args: tuple[Any, ...], said: str) -> BaseException:
    try:
        return kind.__new__(kind, *args)
    except Exception:  # noqa: BLE001 (a class of the candidate's, or one that wants other arguments)
        return Exception(said)


def read_order(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """The header (its length, JSON) and the code. From here on stdin is empty, and what is printed goes nowhere."""
    (length,) = struct.unpack_from(">I", payload)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    return json.loads(payload[4 : 4 + length]), payload[4 + length :]


def load(code: bytes, prelude: str, entry_point: str) -> types.ModuleType:
    """Raises whatever the code raises, and Missing."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    if prelude:
        exec(compile(prelude, "prelude", "exec", dont_inherit=True), module.__dict__)
        module.__dict__.pop(entry_point, None)  # the author's stub of it is no solution
    exec(compile(code, "solution", "exec", dont_inherit=True), module.__dict__)
    if entry_point not in module.__dict__:
        raise Missing(f"the code does not define {entry_point!r}")
    return module


def main(payload: bytes) -> None:
    order, code = read_order(payload)
    channel = Channel(_CHANNEL)
    try:
        module = load(code, order["prelude"], order["entry_point"])
    except BaseException as error:  # noqa: BLE001 (the candidate's code: whatever it raises is told)
        channel.send(SolutionPeer(channel, types.ModuleType("solution")).failure(error))
        os._exit(0)
    peer = SolutionPeer(channel, module)
    peer.give(module.__dict__[order["entry_point"]])
    channel.send(["ready"])
    peer.serve()
