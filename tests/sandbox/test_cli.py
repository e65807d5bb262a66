"""`python -m rlvlm_sandbox` as a user meets it: exit status, what is printed, no traceback whatever is typed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import rlvlm_sandbox
from rlvlm_sandbox import probe
from rlvlm_sandbox.sandbox import BACKENDS

HOLDING = [b for b in BACKENDS if sys.platform == "linux" and asyncio.run(probe(b)) is None]
needs_sandbox = pytest.mark.skipif(not HOLDING, reason="no sandbox holds here")


def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "rlvlm_sandbox", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_probe_says_which_hold_and_why_the_others_do_not() -> None:
    status, said, _ = call("probe")
    lines = said.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(BACKENDS)
    for line in lines:
        name, _, rest = line.partition(": ")
        assert rest == "holds" if name in HOLDING else rest.startswith("does not hold: ") and len(rest) > 20
    assert status == (0 if HOLDING else 1)


def test_probe_where_nothing_holds() -> None:
    """Without /proc none can be built."""
    if "bubblewrap" not in HOLDING:
        pytest.skip("bubblewrap does not hold here")
    package = Path(rlvlm_sandbox.__file__).parent
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); sys.argv = ['', 'probe']\n"
    code += "import runpy; runpy.run_module('rlvlm_sandbox', run_name='__main__')"
    command = ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/proc", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    assert [line.split(": ")[:2] for line in done.stdout.splitlines()] == [[b, "does not hold"] for b in BACKENDS]


@needs_sandbox
def test_run_passes_everything_through(tmp_path: Path) -> None:
    program = tmp_path / "x.py"
    program.write_text("import sys\nprint(input())\nprint('e', file=sys.stderr)")
    status, out, err = call("run", str(program), stdin=b"hi\n")
    assert (status, out) == (0, "hi\n")
    first, last = err.splitlines()
    assert first == "e" and last.startswith("ok, exit code 0: ") and last.endswith(f"MiB, {HOLDING[0]}")


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "options", "said"),
    [
        ("raise SystemExit(3)", (), "runtime_error, exit code 3"),
        ("import time; time.sleep(9)", ("--wall", "0.3"), "time, exit code None"),
        ("import os; os.fork()", (), "runtime_error, exit code 1"),
        ("1/0", ("--backend", "unsafe-subprocess"), "runtime_error, exit code 1"),
    ],
)
def test_run_tells_the_outcome(tmp_path: Path, code: str, options: tuple[str, ...], said: str) -> None:
    program = tmp_path / "x.py"
    program.write_text(code)
    status, _, err = call("run", str(program), *options)
    assert status == 1 and err.splitlines()[-1].startswith(said)


def test_run_in_the_tool_profile(tmp_path: Path) -> None:
    if not {"namespaces", "bubblewrap"} & set(HOLDING):
        pytest.skip("no backend with the tool profile holds here")
    program = tmp_path / "x.py"
    program.write_text("import subprocess; print(subprocess.run(['echo', 'x'], capture_output=True).stdout)")
    assert call("run", str(program), "--profile", "tool")[:2] == (0, "b'x\\n'\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "/nowhere/x.py"), "rlvlm_sandbox run: [Errno 2] No such file or directory: '/nowhere/x.py'"),
        (("run", "/"), "rlvlm_sandbox run: [Errno 21] Is a directory: '/'"),
        (("run", __file__, "--wall", "-1"), "rlvlm_sandbox run: Limits.wall_s is -1.0; "),
        (("run", __file__, "--wall", "nan"), "rlvlm_sandbox run: Limits.wall_s is nan; "),
        (("run", __file__, "--wall", "soon"), "invalid float value: 'soon'"),
        (("run", __file__, "--language", "cobol"), "invalid choice: 'cobol'"),
        (("run", __file__, "--backend", "docker"), "invalid choice: 'docker'"),
        (("run",), "the following arguments are required: file"),
        ((), "the following arguments are required: command"),
        (("serve", "--workers", "0"), "0 is less than 1"),
        (("serve", "--port", "99999"), "port"),
        (("serve", "--host", "0.0.0.0"), "host is '0.0.0.0', which others can reach: a token is needed"),
        (("serve", "--token-env", "H6_UNSET"), "--token-env is 'H6_UNSET', which is not set in the environment"),
    ],
)
def test_bad_input_is_told_and_ends_with_2(arguments: tuple[str, ...], said: str) -> None:
    status, _, err = call(*arguments)
    assert status == 2 and said in err and "Traceback" not in err
