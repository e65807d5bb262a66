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
# To compile them takes longer than a whole run: they go as byte code, which is the same interpreter's.
_BOOT = """
import marshal, sys, types
if sys.hexversion != {version}:
    raise SystemExit("the sandbox's Python is %x, ours is {version:x}" % sys.hexversion)
for name, code in marshal.loads({code!r}):
    module = sys.modules[name] = types.ModuleType(name)
    exec(code, module.__dict__)
module.main()
"""


@functools.cache
def program(name: str) -> bytes:
    """The program that runs `main` of the module inside/`name`.py."""
    codes = []
    for part in _PARTS[name]:
        source = (_INSIDE / f"{part}.py").read_bytes()
        codes.append((f"{_PACKAGE}.{part}", compile(source, f"<{part}>", "exec", dont_inherit=True, optimize=0)))
    return _BOOT.format(version=sys.hexversion, code=marshal.dumps(codes)).encode()


def order(header: Mapping[str, Any], code: bytes) -> bytes:
    """The stdin of `solution` and `calls`: a header and the candidate's code as it came."""
    head = dumps(header).encode()
    return struct.pack(">I", len(head)) + head + code
