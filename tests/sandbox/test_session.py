"""A session keeps its state; what ends it costs one run, and the next says so."""

from __future__ import annotations

import asyncio
import io
import struct
import sys
import time
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from rlvlm_sandbox import Limits, Outcome, Sandbox, SandboxUnavailable
from rlvlm_sandbox.session import Session, SessionRun

Play = Callable[[Session], Coroutine[Any, Any, None]]


def played(play: Play, limits: Limits | None = None, backend: str = "auto") -> None:
    async def main() -> None:
        try:
            async with Sandbox(backend=backend, workers=1) as sandbox, sandbox.session(limits) as python:
                await play(python)
        except SandboxUnavailable as error:
            pytest.skip(f"no sandbox holds here: {error}")

    asyncio.run(main())


def test_state_output_and_result() -> None:
    async def play(python: Session) -> None:
        first = await python.run("x = 20\nimport sys\nprint('out')\nprint('err', file=sys.stderr)\nx + 1")
        assert (first.outcome, first.result, first.stdout, first.stderr) == (Outcome.OK, "21", b"out\n", b"err\n")
        assert not first.restarted and not first.truncated and first.pictures == () and dict(first.files) == {}
        second = await python.run("def f(n): return n * x\nf(3)")
        assert (second.result, second.stdout, second.stderr) == ("60", b"", b"")
        assert (await python.run("y = f(1)")).result is None
        assert (await python.run("None")).result is None
        assert (await python.run("")).outcome is Outcome.OK
        assert (await python.run("(x, y)")).result == "(20, 20)"

    played(play)


def test_errors_keep_the_state_and_show_the_line() -> None:
    async def play(python: Session) -> None:
        await python.run("x = 1")
        raised = await python.run("x = 2\n1 / 0\nx = 3")
        assert raised.outcome is Outcome.RUNTIME_ERROR
        lines = raised.stderr.decode().splitlines()
        assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ZeroDivisionError: division by zero"
        assert lines[1].endswith("line 2, in <module>") and lines[2].strip() == "1 / 0"
        assert not any("_run" in line for line in lines)
        assert (await python.run("x")).result == "2"
        assert b"SyntaxError" in (await python.run("x = = 1")).stderr
        assert (await python.run("import sys; sys.exit(2)")).outcome is Outcome.RUNTIME_ERROR
        assert (await python.run("exit = sys.exit; exit()")).outcome is Outcome.OK
        shown = await python.run("class A:\n    def __repr__(self): raise KeyError\nA()")
        assert shown.outcome is Outcome.OK and shown.result == "<A whose repr raises KeyError>"
        assert (await python.run("x")).result == "2"

    played(play)


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "import threading\nthreading.Event().wait()"]
)
def test_time_is_up_and_the_state_stays(code: str) -> None:
    async def play(python: Session) -> None:
        await python.run("x = 7")
        started = time.monotonic()
        stopped = await python.run("print('begun', flush=True)\n" + code, wall_s=0.4)
        assert stopped.outcome is Outcome.TIME and 0.4 <= time.monotonic() - started < 3
        assert stopped.stdout == b"begun\n" and b"KeyboardInterrupt" in stopped.stderr
        after = await python.run("x")
        assert after.result == "7" and not after.restarted

    played(play)


def test_what_cannot_be_interrupted_is_ended() -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"

    async def play(python: Session) -> None:
        await python.run("x = 7")
        assert (await python.run(stubborn, wall_s=0.3)).outcome is Outcome.TIME
        after = await python.run("'x' in globals()")
        assert after.result == "False" and after.restarted
        assert not (await python.run("1")).restarted

    played(play)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import os; os._exit(0)", Outcome.RUNTIME_ERROR),
        ("import os; os._exit(3)", Outcome.RUNTIME_ERROR),
        ("import os; os.abort()", Outcome.SIGNAL),
        ("import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass", Outcome.RUNTIME_ERROR),
        ("import os\nos.write(3, b'\\xff' * 100)", Outcome.RUNTIME_ERROR),
        ("import os, struct\nos.write(3, struct.pack('>I', 8) + b'{\"id\":1}')", Outcome.RUNTIME_ERROR),
    ],
)
def test_the_end_of_the_process_costs_one_run(code: str, outcome: Outcome) -> None:
    async def play(python: Session) -> None:
        ended = await python.run(code, wall_s=3)
        assert ended.outcome is outcome and not ended.restarted
        after = await python.run("40 + 2")
        assert (after.outcome, after.result, after.restarted) == (Outcome.OK, "42", True)

    played(play)


def test_memory() -> None:
    async def play(python: Session) -> None:
        await python.run("x = 1")
        assert (await python.run("y = bytearray(1 << 36)")).outcome is Outcome.MEMORY
        assert (await python.run("x")).result == "1"

    played(play, Limits(memory_bytes=512 << 20))


def test_output_is_cut_and_the_program_goes_on() -> None:
    async def play(python: Session) -> None:
        run = await python.run("print('a' * 5000)\nx = 5")
        assert run.truncated and run.stdout == b"a" * 1000 and run.outcome is Outcome.OK
        after = await python.run("print(x)")
        assert after.stdout == b"5\n" and not after.truncated

    played(play, Limits(output_bytes=1000))


def test_files_go_in_and_come_out() -> None:
    async def play(python: Session) -> None:
        if (await python.run("open('probe', 'w').close()")).outcome is not Outcome.OK:
            pytest.skip("this backend has no writable directory")
        await python.put("data/in.bin", b"\0\xff")
        run = await python.run("data = open('data/in.bin', 'rb').read()\nopen('out.txt', 'w').write('x')\ndata")
        assert run.result == "b'\\x00\\xff'" and dict(run.files) == {"out.txt": b"x"}
        assert dict((await python.run("1")).files) == {}
        changed = await python.run(
            "open('data/in.bin', 'ab').write(b'!')\nimport os; os.symlink('/etc/passwd', 'link')"
        )
        assert dict(changed.files) == {"data/in.bin": b"\0\xff!"}
        large = await python.run("open('large', 'wb').write(bytes(9 << 20))\nopen('small', 'w').write('s')")
        assert dict(large.files) == {"small": b"s"} and large.left_out == ("'large'",)
        for name in ("../x", "/tmp/x", "", "a/../b"):
            with pytest.raises(ValueError, match="put: name is"):
                await python.put(name, b"")
        with pytest.raises(OSError, match="put: out"):
            await python.put("out.txt/x", b"")

    played(play)


def png(width: int, height: int) -> bytes:
    """By the format's specification: a grey picture of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pictures_of_figures_and_images() -> None:
    """With stand-ins that have the parts of matplotlib and PIL that are used: the images do not hold the real ones."""
    libraries = f"""
import sys, types
data = {png(2, 3)!r}
class Figure:
    def savefig(self, file, format): assert format == "png"; file.write(data + bytes([open_figures[0]]))
open_figures = [1, 2]
pyplot = types.ModuleType("matplotlib.pyplot")
pyplot.get_fignums = lambda: list(open_figures)
pyplot.figure = lambda number: Figure()
pyplot.close = lambda which: open_figures.clear()
pil = types.ModuleType("PIL.Image")
class Image:
    def save(self, file, format): assert format == "PNG"; file.write(data)
pil.Image = Image
sys.modules.update({{"matplotlib.pyplot": pyplot, "PIL.Image": pil}})
Image()
"""

    async def play(python: Session) -> None:
        run = await python.run(libraries)
        assert run.outcome is Outcome.OK, run.stderr
        assert run.pictures == (png(2, 3) + b"\1", png(2, 3) + b"\1", png(2, 3))
        assert (await python.run("1")).pictures == ()
        assert len((await python.run("Image()")).pictures) == 1

    played(play)


def test_an_image_of_pil_comes_out_as_png() -> None:
    image = pytest.importorskip("PIL.Image")
    path = sys.path

    async def play(python: Session) -> None:
        ready = await python.run(f"import sys; sys.path += {path!r}\nfrom PIL import Image")
        assert ready.outcome is Outcome.OK, ready.stderr
        run = await python.run("Image.new('RGB', (3, 2), (1, 2, 3))")
        (picture,) = run.pictures
        back = image.open(io.BytesIO(picture))
        assert (back.format, back.size, back.getpixel((2, 1))) == ("PNG", (3, 2), (1, 2, 3))

    played(play, backend="unsafe-subprocess")


def test_runs_wait_for_each_other() -> None:
    async def play(python: Session) -> None:
        await python.run("seen = []")
        runs = [python.run(f"import time; seen.append({n}); time.sleep(0.01); seen.append({n})") for n in range(4)]
        await asyncio.gather(*runs)
        assert (await python.run("seen")).result == "[0, 0, 1, 1, 2, 2, 3, 3]"

    played(play)


def test_a_cancelled_run_ends_the_process() -> None:
    async def play(python: Session) -> None:
        await python.run("x = 1")
        task = asyncio.ensure_future(python.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = await python.run("'x' in globals()")
        assert after.result == "False" and after.restarted

    played(play)


def test_a_sandbox_that_fails_is_no_word_on_the_code() -> None:
    from rlvlm_sandbox.records import PROFILES, Program, Run

    async def broken(program: Program) -> Run:
        return Run(Outcome.SANDBOX_ERROR, None, b"", b"", False, 0.0, 0.0, 0, "none", "no room")

    async def main() -> SessionRun:
        async with Session(broken, PROFILES["tool"]) as python:
            return await python.run("1")

    run = asyncio.run(main())
    assert (run.outcome, run.detail) == (Outcome.SANDBOX_ERROR, "no room")
