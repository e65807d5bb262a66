"""The candidate's side of CallTests: makes the calls that stdin names, and writes what each returned as a line of JSON.

The lines may be forged by the candidate: they hold answers only, and what is right is not known here.
"""

from __future__ import annotations

import json
import os
from typing import Any

from rlvlm_sandbox.grading.inside.solution import load, read_order
from rlvlm_sandbox.grading.inside.wire import NoLinks, WireError, decode, encode

_LONGEST_STREAM = 1 << 17


def main(payload: bytes) -> None:
    answers = os.dup(1)
    order, code = read_order(payload)
    try:
        module = load(code, "", order["entry_point"])
    except BaseException as error:  # noqa: BLE001 (the candidate's code: whatever it raises is told)
        _write(answers, {"unloaded": _said(error), "memory": isinstance(error, MemoryError)})
        os._exit(0)
    target = module.__dict__[order["entry_point"]]
    for index, call in enumerate(order["calls"]):
        _write(answers, {"call": index, **_answer(target, call)})
    os._exit(0)


def _answer(target: Any, call: list[Any]) -> dict[str, Any]:
    try:
        (args, kwargs), _ = decode(call[0], dict(enumerate(call[1])), NoLinks())
        result = target(*args, **dict(kwargs))
        value, entries, _ = encode(_whole(result), NoLinks())
    except BaseException as error:  # noqa: BLE001 (the candidate's code)
        return {"raised": _said(error), "memory": isinstance(error, MemoryError)}
    return {"value": value, "entries": entries}


def _whole(result: Any) -> Any:
    """An iterator as a list: nobody is there to ask for more."""
    if not (hasattr(type(result), "__next__") and hasattr(type(result), "__iter__")):
        return result
    items = []
    for item in result:
        items.append(item)
        if len(items) > _LONGEST_STREAM:
            raise WireError(f"an iterator has more than {_LONGEST_STREAM} items")
    return items


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:  # noqa: BLE001 (the candidate's own __str__)
        return type(error).__name__


def _write(fd: int, line: dict[str, Any]) -> None:
    view = memoryview(json.dumps(line, check_circular=False).encode() + b"\n")
    while view:
        view = view[os.write(fd, view) :]
