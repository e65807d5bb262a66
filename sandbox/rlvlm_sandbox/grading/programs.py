"""Programs made of the modules in inside/: what a sandbox is given as its code."""

from __future__ import annotations

import functools
import marshal
import struct
import sys
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

from rlvlm_sandbox.records import Limits, Profile, Program

_PACKAGE = "rlvlm_sandbox.grading.inside"
_INSIDE = Path(__file__).with_name("inside")
_PARTS = {
    "author": ("wire", "peer", "author"),
    "solution": ("wire", "peer", "solution"),
    "calls": ("wire", "peer", "solution", "calls"),
    "checker": ("checker",),
    "weak": ("weak",),
    "session": ("wire", "peer", "session"),
}
# To compile them takes longer than a whole run: they go as byte code, which is the same interpreter's. And by stdin, as
# even to read a literal of that size takes a while.
_BOOT = f"""
import marshal, sys, types
if sys.hexversion != {sys.hexversion}:
    raise SystemExit("the sandbox has another Python than its client")
with open(0, "rb", closefd=False) as file:
    data = file.read()
end = int.from_bytes(data[:4], "big") + 4
for name, code in marshal.loads(data[4:end]):
    module = sys.modules[name] = types.ModuleType(name)
    exec(code, module.__dict__)
module.main(data[end:])
""".encode()


def driver(
    name: str, payload: bytes, limits: Limits, profile: Profile = "judge", channel: int | None = None
) -> Program:
    """The program that calls `main(payload)` of the module inside/`name`.py."""
    return Program(_BOOT, limits, _modules(name) + payload, profile, channel=channel)


@functools.cache
def _modules(name: str) -> bytes:
    codes = []
    for part in _PARTS[name]:
        source = (_INSIDE / f"{part}.py").read_bytes()
        without_docstrings = 2
        code = compile(source, f"<{part}>", "exec", dont_inherit=True, optimize=without_docstrings)
        codes.append((f"{_PACKAGE}.{part}", code))
    data = marshal.dumps(codes)
    return struct.pack(">I", len(data)) + data


def order(header: Mapping[str, Any], code: bytes) -> bytes:
    """The payload of `solution` and `calls`: a header and the candidate's code as it came."""
    head = dumps(header).encode()
    return struct.pack(">I", len(head)) + head + code
