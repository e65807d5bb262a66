"""Candidate and tests in one process, for trust="weak": the candidate can forge all of it."""

from __future__ import annotations

import json
import os
import sys
import types


def main(payload: bytes) -> None:
    order = json.loads(payload)
    verdict = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nowhere, fd)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    for name in ("prelude", "code"):
        exec(compile(order[name], name, "exec", dont_inherit=True), module.__dict__)
    module.__name__ = "__main__"
    sys.modules["__main__"] = module
    try:
        exec(compile(order["source"], "tests", "exec", dont_inherit=True), module.__dict__)
        if order["checks"]:
            module.__dict__["check"](module.__dict__[order["entry_point"]])
    except SystemExit as error:
        if error.code:
            raise
    os.write(verdict, order["token"].encode())
    os._exit(0)
