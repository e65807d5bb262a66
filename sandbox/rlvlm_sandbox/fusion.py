"""The request and the answer of SandboxFusion's `POST /run_code`, so that its clients can use our server as it is.

https://github.com/bytedance/SandboxFusion, sandbox/server/sandbox_api.py
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any

from rlvlm_sandbox.bubblewrap import DOES_NOT_COMPILE
from rlvlm_sandbox.messages import NUMBER, TEXT_OR_NONE, BadMessage, Kinds, checked, data
from rlvlm_sandbox.records import PROFILES, Limits, Outcome, Run

_KINDS: Kinds = {
    "code": str, "language": str, "stdin": TEXT_OR_NONE, "compile_timeout": NUMBER, "run_timeout": NUMBER,
    "memory_limit_MB": int, "files": dict, "fetch_files": list, "args": list,
}  # fmt: skip
_LANGUAGES = {"python": "python", "cpp": "cpp", "nodejs": "javascript", "bash": "bash"}
_RUN_TIMEOUT_S = 10.0
# Before and after a program that has files: writes them, and at its end says on stdout what became of those that are
# wanted. A program can say something else there; it would be its own files' content too.
_WITH_FILES = """
def before(files, wanted, mark):
    import atexit, base64, json, os, sys
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(content))
    def after():
        found = {}
        for path in wanted:
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = base64.b64encode(file.read()).decode()
        sys.stdout.flush()
        with open(1, "wb", closefd=False) as stdout:
            stdout.write(mark.encode() + json.dumps(found).encode())
    atexit.register(after)
"""


@dataclass(frozen=True, slots=True)
class Order:
    """A request, read. mark: what stands on stdout between the program's own and its files, if it has any."""

    code: str
    language: str
    stdin: bytes
    limits: Limits
    mark: str = ""


def read_order(message: object) -> Order:
    """Raises BadMessage."""
    order = checked(message, _KINDS, frozenset({"code", "language"}))
    language = _LANGUAGES.get(order["language"])
    if language is None:
        raise BadMessage(f"language is {order['language'][:100]!r}; give one of {', '.join(_LANGUAGES)}")
    if order.get("args"):
        raise BadMessage(f"args is {order['args']!r}; give none, they are for languages that are not supported")
    files, wanted = _files(order.get("files", {})), order.get("fetch_files", [])
    if not all(isinstance(path, str) for path in wanted):
        raise BadMessage("fetch_files holds something else than text; give paths")
    limits = _limits(order.get("run_timeout", _RUN_TIMEOUT_S), order.get("memory_limit_MB", -1), wanted)
    stdin = (order.get("stdin") or "").encode("utf-8", "surrogatepass")
    if not files and not wanted:
        return Order(order["code"], language, stdin, limits)
    if language != "python":
        raise BadMessage(f"files and fetch_files work for python only; language is {order['language']!r}")
    mark = secrets.token_hex(16)
    call = f"before(**{ {'files': files, 'wanted': wanted, 'mark': mark}!r})\ndel before\n"
    program = f"exec(compile({order['code']!r}, '/tmp/main.py', 'exec', dont_inherit=True))\n"
    return Order(_WITH_FILES + call + program, language, stdin, limits, mark)


def answer(order: Order, run: Run) -> dict[str, Any]:
    stdout, mark, found = run.stdout.partition(order.mark.encode()) if order.mark else (run.stdout, b"", b"")
    result = {
        "status": {Outcome.TIME: "TimeLimitExceeded", Outcome.SANDBOX_ERROR: "Error"}.get(run.outcome, "Finished"),
        "execution_time": run.wall_s,
        "return_code": _return_code(run),
        "stdout": stdout.decode(errors="replace"),
        "stderr": run.detail if run.outcome is Outcome.SANDBOX_ERROR else run.stderr.decode(errors="replace"),
    }
    did_not_compile = run.detail == DOES_NOT_COMPILE
    compiled = {"status": "Finished", "execution_time": None, "return_code": 0, "stdout": "", "stderr": ""}
    status = {Outcome.OK: "Success", Outcome.SANDBOX_ERROR: "SandboxError"}.get(run.outcome, "Failed")
    return {
        "status": status,
        "message": run.detail if run.outcome is Outcome.SANDBOX_ERROR else "",
        "compile_result": result if did_not_compile else compiled if order.language == "cpp" else None,
        "run_result": None if did_not_compile else result,
        "executor_pod_name": None,
        "files": _found(found) if mark else {},
    }


def _return_code(run: Run) -> int | None:
    """None where time was up or the sandbox failed; -9 where the program was killed for another limit."""
    if run.outcome in (Outcome.TIME, Outcome.SANDBOX_ERROR):
        return None
    return -9 if run.exit_code is None else run.exit_code


def _limits(wall_s: float, memory_mib: int, wanted: list[str]) -> Limits:
    """memory_mib: -1 for the profile's."""
    if memory_mib != -1 and memory_mib < 1:
        raise BadMessage(f"memory_limit_MB is {memory_mib}; give at least 1, or -1 for the default")
    memory = None if memory_mib == -1 else memory_mib << 20
    tool = PROFILES["tool"]
    room = 2 * (tool.tmp_bytes or 0) if wanted else 0  # for the files in base64
    try:
        cpu_s = math.ceil(wall_s) if wall_s < 1 << 31 else None
        return Limits(wall_s=wall_s, cpu_s=cpu_s, memory_bytes=memory, output_bytes=(tool.output_bytes or 0) + room)
    except ValueError as error:
        raise BadMessage(f"run_timeout is {wall_s}; give more than 0") from error


def _files(files: dict[str, Any]) -> dict[str, str]:
    """By path, in base64. Null stands for an empty file."""
    for path, content in files.items():
        if content is not None and not isinstance(content, str):
            raise BadMessage(f"files: {path[:100]!r} is {content!r:.100}; give base64")
        data("files", content or "")
    return {path: content or "" for path, content in files.items()}


def _found(text: bytes) -> dict[str, str]:
    """The files that came after the mark; none of what is not as our own code writes it."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict) or not all(isinstance(content, str) for content in found.values()):
        return {}
    return found
