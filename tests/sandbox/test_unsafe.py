"""The backend without walls: explicit only, stamped on every result, and its limits hold."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
from rlvlm_sandbox import Limits, Outcome, Run, Sandbox
from rlvlm_sandbox.records import PROFILES, Profile, Program
from rlvlm_sandbox.sandbox import BACKENDS
from rlvlm_sandbox.subprocess_unsafe import UnsafeSubprocess


def run(
    code: str | bytes, stdin: bytes = b"", profile: Profile = "judge", channel: int | None = None, **limits: float
) -> Run:
    source = code.encode() if isinstance(code, str) else code
    whole = Limits(**limits).over(PROFILES[profile])  # type: ignore[arg-type]
    return asyncio.run(UnsafeSubprocess().run(Program(source, whole, stdin, profile, channel=channel)))


def test_auto_never_takes_it() -> None:
    assert "unsafe-subprocess" not in BACKENDS

    async def named() -> Run:
        async with Sandbox("unsafe-subprocess") as sandbox:
            return await sandbox.run("print(input())", b"x")

    ended = asyncio.run(named())
    assert (ended.outcome, ended.stdout, ended.backend) == (Outcome.OK, b"x\n", "unsafe-subprocess")


@pytest.mark.parametrize(
    ("code", "outcome", "exit_code"),
    [
        (b"exit(3)", Outcome.RUNTIME_ERROR, 3),
        (b"import os; os.kill(os.getpid(), 11)", Outcome.SIGNAL, -11),
        (b"x = 'a' * (2 << 30)", Outcome.MEMORY, 1),
        (b"open('x', 'w').write('a' * (20 << 20))", Outcome.RUNTIME_ERROR, 1),
        (b"import sys\ndef f(n): return n and 1 + f(n - 1)\nsys.setrecursionlimit(10**6)\nf(50000)", Outcome.OK, 0),
        (b"\xff", Outcome.RUNTIME_ERROR, 1),
        (b"\0", Outcome.RUNTIME_ERROR, 1),
        (b"#" * 50_000_000, Outcome.OK, 0),
    ],
)
def test_how_a_program_ends(code: bytes, outcome: Outcome, exit_code: int) -> None:
    ended = run(code)
    assert (ended.outcome, ended.exit_code) == (outcome, exit_code), ended


def test_limits_of_time_and_output() -> None:
    slept = run("import time; time.sleep(60)", wall_s=0.3)
    assert (slept.outcome, slept.exit_code) == (Outcome.TIME, None) and 0.3 <= slept.wall_s < 5
    flood = run("while True: print('x' * 999)", output_bytes=5000)
    assert (flood.outcome, flood.truncated) == (Outcome.OUTPUT, True)
    assert flood.stdout == (b"x" * 999 + b"\n") * 5


def test_what_it_started_ends_with_it_and_its_directory_is_gone() -> None:
    started = time.monotonic()
    ended = run("import os, time\nprint(os.getcwd(), flush=True)\nchild = os.fork()\nprint(child or time.sleep(60))")
    directory, child = ended.stdout.decode().split()
    assert not Path(directory).exists()
    while Path(f"/proc/{child}/fd/0").exists():  # killed, and not yet gone
        assert time.monotonic() - started < 10


def test_the_channel_is_descriptor_3() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"ab")
        ended = run("import socket\ns = socket.socket(fileno=3)\ns.sendall(s.recv(2) * 2)", channel=theirs.fileno())
        assert ended.outcome is Outcome.OK and ours.recv(9) == b"abab"


def test_it_has_none_of_our_environment() -> None:
    os.environ["H6_SECRET"] = "s3cret"
    ended = run("import os; print(dict(os.environ))")
    del os.environ["H6_SECRET"]
    assert ended.outcome is Outcome.OK and b"s3cret" not in ended.stdout


def test_other_languages_are_refused() -> None:
    ended = asyncio.run(UnsafeSubprocess().run(Program(b"", PROFILES["judge"], language="cpp")))
    assert ended.outcome is Outcome.SANDBOX_ERROR and "'cpp'" in ended.detail


def test_no_interpreter_no_disk() -> None:
    backend = UnsafeSubprocess()
    backend._python = "/nowhere/python3"
    ended = asyncio.run(backend.run(Program(b"", PROFILES["judge"])))
    assert ended.outcome is Outcome.SANDBOX_ERROR and "/nowhere/python3" in ended.detail
    tempfile.tempdir = "/nowhere"
    try:
        ended = run("")
    finally:
        tempfile.tempdir = None
    assert ended.outcome is Outcome.SANDBOX_ERROR and "/nowhere" in ended.detail
