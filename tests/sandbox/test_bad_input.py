"""What is no program, or no place to run one: an outcome, and never an exception for what the program is."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_sandbox import Limits, Outcome, Run, Sandbox, SandboxUnavailable, probe

MIB = 1 << 20
BACKENDS = ("namespaces", "bubblewrap", "landlock")


class Opened:
    """A sandbox that stays open between tests, with the loop it lives on."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._loop = asyncio.new_event_loop()
        self._sandbox = self._loop.run_until_complete(Sandbox(backend, workers=1).__aenter__())

    def run(self, code: str | bytes, stdin: bytes = b"", profile: Any = "judge", **limits: Any) -> Run:
        return self._loop.run_until_complete(self._sandbox.run(code, stdin, profile, Limits(**limits)))

    def close(self) -> None:
        self._loop.run_until_complete(self._sandbox.__aexit__())
        self._loop.close()


@pytest.fixture(scope="module", params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Any:
    if reason := asyncio.run(probe(request.param)):
        pytest.skip(f"{request.param}: {reason}")
    opened = Opened(request.param)
    yield opened
    assert opened.run("print('still here')").stdout == b"still here\n"
    opened.close()


def first_error(run: Run) -> bytes:
    """The name of the exception that a traceback ends with."""
    return run.stderr.strip().rpartition(b"\n")[2].partition(b":")[0]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (random.Random(0).randbytes(2000), b"SyntaxError"),
        (b"\x00", b"SyntaxError"),
        (b"print(1)\x00print(2)", b"SyntaxError"),
        ("print(1)\0", b"SyntaxError"),
        (b"# coding: utf-9\nprint(1)", b"SyntaxError"),
        (b"# coding: ascii\nx = '\xc3\xa9'", b"SyntaxError"),
        (b"x = '\xff'", b"SyntaxError"),
        ("x = '\ud800'", b"SyntaxError"),
        (b"\xff\xfep\x00r\x00i\x00n\x00t\x00", b"SyntaxError"),
        ("(" * 100_000, b"SyntaxError|MemoryError|RecursionError"),
        ("x = " + "-" * 100_000 + "1", b"SyntaxError|MemoryError|RecursionError"),
        ("\tx = 1\n  y = 2", b"IndentationError"),
        (b"\x7fELF" + bytes(100), b"SyntaxError"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_program_is_its_own_error(sandbox: Opened, code: str | bytes, error: bytes) -> None:
    run = sandbox.run(code)
    if run.outcome is Outcome.MEMORY and b"MemoryError" in error:
        return  # so CPython says of code that is nested too deep
    assert (run.outcome, run.exit_code) == (Outcome.RUNTIME_ERROR, 1), run
    assert first_error(run) in error.split(b"|"), run.stderr
    assert run.stdout == b""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (b"", b""),
        ("\n\n", b""),
        (b"# coding: latin-1\nprint(ascii('\xe9'))", b"'\\xe9'\n"),
        (b"# -*- coding: utf-8 -*-\nprint(len('\xc3\xa9'))", b"1\n"),
        (b"\xef\xbb\xbfprint(1)", b"1\n"),
        (b"print(1)\r\nprint(2)\r\n", b"1\n2\n"),
        (b"print(1)\rprint(2)\r", b"1\n2\n"),
        ("print('é', '🙂')", "é 🙂\n".encode()),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_a_program_though_an_odd_one(sandbox: Opened, code: str | bytes, says: bytes) -> None:
    run = sandbox.run(code)
    assert (run.outcome, run.exit_code, run.stdout, run.stderr) == (Outcome.OK, 0, says, b"")


@settings(max_examples=25, deadline=None)
@given(code=st.binary(max_size=300) | st.text(max_size=100))
def test_anything_is_an_outcome(sandbox: Opened, code: str | bytes) -> None:
    run = sandbox.run(code, wall_s=5)
    assert run.outcome in (Outcome.OK, Outcome.RUNTIME_ERROR, Outcome.MEMORY)
    assert run.backend == sandbox.backend


def test_fifty_megabytes_of_code(sandbox: Opened) -> None:
    comment = sandbox.run(b"print('long')\n#" + b"x" * (50 * MIB))
    assert (comment.outcome, comment.stdout) == (Outcome.OK, b"long\n")
    many = sandbox.run(b"x = 1\n" * (50 * MIB // 6), wall_s=2)
    assert many.outcome in (Outcome.TIME, Outcome.MEMORY), many
    noise = sandbox.run(random.Random(1).randbytes(50 * MIB))
    assert noise.outcome is Outcome.RUNTIME_ERROR and first_error(noise) == b"SyntaxError"


def test_fifty_megabytes_of_input(sandbox: Opened) -> None:
    data = bytes(range(256)) * (50 * MIB // 256)
    run = sandbox.run("import sys, zlib; print(zlib.crc32(sys.stdin.buffer.read()))", data)
    assert (run.outcome, run.stdout) == (Outcome.OK, b"%d\n" % zlib.crc32(data))
    assert sandbox.run("print(1)", data).stdout == b"1\n"  # which nobody reads


def test_a_disk_without_room(sandbox: Opened) -> None:
    code = "open('x', 'w').write('y' * 100_000)"
    small = sandbox.run(code, tmp_bytes=4096)
    assert small.outcome is Outcome.RUNTIME_ERROR and first_error(small) in (b"OSError", b"PermissionError"), small
    # without room for the program's own file: it runs, or the sandbox says that it cannot
    for limits in ({"tmp_bytes": 4096, "inodes": 3}, {"tmp_bytes": 1}, {"inodes": 1}, {"file_bytes": 1}):
        run = sandbox.run("print(1)\n" + "#" * 10_000, **limits)
        assert run.outcome in (Outcome.OK, Outcome.SANDBOX_ERROR), (limits, run)
        assert run.stdout == (b"1\n" if run.outcome is Outcome.OK else b"")


@pytest.mark.parametrize(
    "limits",
    [{"wall_s": 1e-9}, {"cpu_s": 1e-9}, {"memory_bytes": 1}, {"processes": 1}, {"output_bytes": 1}, {"open_files": 1}],
    ids=str,
)
def test_hardly_any_room_is_an_outcome(sandbox: Opened, limits: dict[str, Any]) -> None:
    run = sandbox.run("print(1)", **limits)
    assert isinstance(run.outcome, Outcome)
    assert run.stdout in (b"", b"1", b"1\n")


@pytest.mark.parametrize("value", [0, -1, float("nan"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["wall_s", "cpu_s", "memory_bytes", "processes", "output_bytes", "tmp_bytes", "inodes"]
)
def test_limits_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits.{name} is {value}; .*give"):
        Limits(**{name: value})


@pytest.mark.parametrize("value", [float("inf"), 1e30])
@pytest.mark.parametrize("name", ["wall_s", "cpu_s", "memory_bytes"])
def test_limits_without_end(sandbox: Opened, name: str, value: float) -> None:
    """Either they are refused when they are made, or a program runs under them."""
    try:
        assert sandbox.run("print(1)", **{name: value}).stdout == b"1\n"
    except ValueError as error:
        assert name in str(error) and "give" in str(error)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sandbox("docker"), "backend is 'docker'; give"),
        (lambda: Sandbox(workers=0), "workers is 0; give"),
        (lambda: Sandbox("http"), "url"),
        (lambda: Sandbox(url="http://127.0.0.1:1"), "url"),
    ],
)
def test_a_sandbox_that_cannot_be(make: Callable[[], Sandbox], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_an_image_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"image is 'cuda'; give one of \['py', 'py-sci'\]"):
        asyncio.run(Sandbox(image="cuda").__aenter__())


def test_a_profile_that_is_none(sandbox: Opened) -> None:
    with pytest.raises(ValueError, match="profile is 'root'; give"):
        sandbox.run("", profile="root")


def test_a_sandbox_that_is_not_open() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(Sandbox().run("print(1)"))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_without_an_interpreter_there_is_no_sandbox(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(SandboxUnavailable, match="interpreter"):
        asyncio.run(Sandbox(backend).__aenter__())


def test_an_interpreter_that_goes_away_is_a_failure_of_the_sandbox(tmp_path: Path) -> None:
    """It is there when the sandbox opens; then the fork server is killed, and cannot be started anew."""
    copy = tmp_path / "python3"
    shutil.copy(os.path.realpath(sys.executable), copy)
    script = f"""
import asyncio, os, signal, sys
sys.executable = {str(copy)!r}
from rlvlm_sandbox import Sandbox
async def main():
    async with Sandbox("landlock", workers=1) as sandbox:
        print((await sandbox.run("print(1)")).outcome)
        os.unlink(sys.executable)
        (child,) = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
        os.kill(int(child), signal.SIGKILL)
        await asyncio.sleep(0.2)
        run = await sandbox.run("print(1)")
        print(run.outcome, bool(run.detail))
asyncio.run(main())
"""
    if reason := asyncio.run(probe("landlock")):
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["ok", "sandbox_error", "True"], done.stderr
