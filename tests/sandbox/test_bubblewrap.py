"""bubblewrap: its walls and limits, other languages, root with and without a readable interpreter, what is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rlvlm_sandbox
from rlvlm_sandbox import Limits, Outcome, Run, Sandbox, probe
from rlvlm_sandbox.bubblewrap import DOES_NOT_COMPILE, Bubblewrap
from rlvlm_sandbox.images import find_image
from rlvlm_sandbox.records import PROFILES, Profile, Program

MIB = 1 << 20
WHY_NOT = asyncio.run(probe("bubblewrap")) if sys.platform == "linux" else "not Linux"
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"bubblewrap does not hold here: {WHY_NOT}")


def run(
    code: str | bytes,
    stdin: bytes = b"",
    profile: Profile = "judge",
    language: str = "python",
    channel: int | None = None,
    **limits: float,
) -> Run:
    async def once() -> Run:
        backend = Bubblewrap(find_image("py"))
        await backend.start()
        try:
            source = code.encode() if isinstance(code, str) else code
            whole = Limits(**limits).over(PROFILES[profile])  # type: ignore[arg-type]
            return await backend.run(Program(source, whole, stdin, profile, language, channel))
        finally:
            await backend.stop()

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("code", "outcome", "exit_code"),
    [
        ("print(1)", Outcome.OK, 0),
        ("raise SystemExit(7)", Outcome.RUNTIME_ERROR, 7),
        ("exit(139)", Outcome.RUNTIME_ERROR, 139),  # what a shell would take for a segmentation fault
        ("import os; os._exit(5)", Outcome.RUNTIME_ERROR, 5),
        ("1/0", Outcome.RUNTIME_ERROR, 1),
        ("import os; os.kill(os.getpid(), 11)", Outcome.SIGNAL, -11),
        ("import os; os.kill(os.getpid(), 9)", Outcome.SIGNAL, -9),
        ("import os; os.abort()", Outcome.SIGNAL, -6),
        ("import os\nfor s in (2, 9, 15):\n  try: os.kill(1, s)\n  except OSError: pass", Outcome.OK, 0),
        ("import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))", Outcome.RUNTIME_ERROR, 1),  # of init
        ("x = 'a' * (2 << 30)", Outcome.MEMORY, 1),
        (b"x = '\xff'", Outcome.RUNTIME_ERROR, 1),
        (b"x = '\0'", Outcome.RUNTIME_ERROR, 1),
    ],
)
def test_how_a_program_ends(code: str | bytes, outcome: Outcome, exit_code: int) -> None:
    ended = run(code)
    assert (ended.outcome, ended.exit_code, ended.backend) == (outcome, exit_code, "bubblewrap"), ended


def test_a_program_runs_as_a_file_of_its_own() -> None:
    ended = run(
        "import sys\nprint(sys.argv, __name__, __file__, sys.path[0], sorted(globals()), sys.stdin.read())\n"
        "def f():\n  raise ValueError('x')\nf()",
        b"in",
    )
    names = ["__annotations__", "__builtins__", "__doc__", "__file__", "__loader__", "__name__", "__package__"]
    assert ended.stdout.decode() == f"['/tmp/main.py'] __main__ /tmp/main.py /tmp {[*names, '__spec__', 'sys']} in\n"
    assert ended.stderr.decode() == (
        'Traceback (most recent call last):\n  File "/tmp/main.py", line 5, in <module>\n    f()\n'
        "  File \"/tmp/main.py\", line 4, in f\n    raise ValueError('x')\nValueError: x\n"
    )


ENDS = [
    "import sys; sys.exit()", "raise SystemExit(True)", "raise SystemExit(257)", "raise SystemExit(-1)",
    "raise SystemExit('why')", "raise SystemExit(1.5)", "import sys; sys.exit((1, 2))",
    "class E(BaseException): pass\nraise E",
    "import atexit; atexit.register(print, 'bye'); print('a')", "import atexit; atexit.register(lambda: 1 / 0)",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()",
    "import sys; sys.stdout.close()", "import sys; sys.stdout = None; print('x')",
    "import sys; sys.excepthook = lambda *a: print('hook', a[0].__name__); 1 / 0",
    "import sys; sys.stdout.write('no newline')", "quit()", "print(type(exit).__name__)",
]  # fmt: skip


@pytest.mark.parametrize("code", ENDS)
def test_it_ends_as_the_interpreter_does(code: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(code)
    plain = subprocess.run([sys.executable, "-B", str(tmp_path / "main.py")], capture_output=True)
    ended = run(code)
    assert (ended.exit_code, ended.stdout) == (plain.returncode, plain.stdout)
    last = [stderr.splitlines()[-1:] for stderr in (ended.stderr, plain.stderr)]
    assert last[0] == last[1]


def test_time_is_kept_and_counted() -> None:
    slept = run("import time; time.sleep(60)", wall_s=0.5)
    spun = run("while True: pass", wall_s=0.6)
    used_up = run("while True: pass", cpu_s=1, wall_s=20)
    assert {slept.outcome, spun.outcome, used_up.outcome} == {Outcome.TIME}
    assert 0.5 <= slept.wall_s < 5 and slept.cpu_s < 0.4
    assert slept.exit_code is None
    assert spun.cpu_s > 0.1  # init has reaped it
    assert used_up.exit_code == -24 and 0.9 < used_up.cpu_s < 2.5


def test_output_is_cut_where_the_limit_is() -> None:
    flood = run("import os\nwhile True: os.write(1, b'x' * 1000)", output_bytes=10_000)
    assert (flood.outcome, flood.stdout, flood.truncated) == (Outcome.OUTPUT, b"x" * 10_000, True)
    exact = run("import os; os.write(2, b'x' * 10_000)", output_bytes=10_000)
    assert (exact.outcome, exact.stderr, exact.truncated) == (Outcome.OK, b"x" * 10_000, False)


def test_files_are_limited_in_size_and_number() -> None:
    one = run("open('x', 'w').write('a' * 2_000_000)", file_bytes=MIB)
    full = run("for i in range(9): open(str(i), 'w').write('a' * 1_000_000)", tmp_bytes=4 * MIB)
    many = run("import os\nfor i in range(99): open(str(i), 'w')", inodes=50)
    assert b"OSError: [Errno 27]" in one.stderr and b"OSError: [Errno 28]" in full.stderr
    assert b"OSError: [Errno 28] No space left on device: '48'" in many.stderr  # beside /tmp itself and main.py


def test_threads_are_limited() -> None:
    program = (
        "import threading, time\nstarted = []\n"
        "for i in range(40):\n    threading.Thread(target=time.sleep, args=(.3,)).start()\n    print(i, flush=True)"
    )
    ended = run(program, processes=8)
    assert ended.outcome in (Outcome.RUNTIME_ERROR, Outcome.SIGNAL), ended  # as root they are counted by looking
    if ended.outcome is Outcome.RUNTIME_ERROR:
        assert len(ended.stdout.split()) == 7 and b"can't start new thread" in ended.stderr
    assert run(program.replace("40", "7"), processes=8).outcome is Outcome.OK


def test_the_tool_profile_may_start_processes_and_none_is_left() -> None:
    name = f"h{os.getpid()}"
    program = (
        f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)\n"
        "print(os.wait()[1])"
    )
    assert run(program).outcome is Outcome.RUNTIME_ERROR
    ended = run(program, profile="tool")
    assert (ended.outcome, ended.stdout) == (Outcome.OK, b"0\n")
    assert name not in {comm(path).strip() for path in Path("/proc").glob("[0-9]*/comm")}


def test_a_fork_bomb_is_over_at_once() -> None:
    started = time.monotonic()
    bomb = run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", profile="tool", wall_s=3)
    assert bomb.outcome in (Outcome.SIGNAL, Outcome.TIME)
    assert time.monotonic() - started < 10


def test_memory_of_all_processes_together_counts() -> None:
    program = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * (40 << 20)\n        time.sleep(30)\ntime.sleep(30)"
    )
    assert run(program, profile="tool", memory_bytes=100 * MIB).outcome is Outcome.MEMORY


def test_the_channel_is_descriptor_3_and_nothing_else_is_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"ab")
        program = "import os, socket\ns = socket.socket(fileno=3)\ns.sendall(s.recv(2) * 2)\n"
        ended = run(program + "print(sorted(os.listdir('/proc/self/fd'), key=int))", channel=theirs.fileno())
        assert ours.recv(9) == b"abab"
    assert ended.stdout == b"['0', '1', '2', '3', '4']\n"  # 4 is the one it lists them with


def test_nothing_of_the_host_is_in_sight() -> None:
    program = (
        "import os\nprint(sorted(os.listdir('/')), os.getuid(), os.getppid())\n"
        "for path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/proc/sys/kernel/hostname', '/proc/self/comm'):\n"
        "    try: open(path, 'w'); print(path)\n    except OSError: pass\n"
        "for path in ('/root', '/home', '/proc/1/root/tmp'):\n"
        "    try: os.listdir(path); print(path)\n    except OSError: pass\n"
        "for path in ('/proc/1/environ', '/proc/1/mem', *(f'/proc/1/fd/{i}' for i in range(64))):\n"
        "    try: open(path, 'ab' if 'fd' in path else 'rb'); print(path)\n    except OSError: pass\n"
        "print(dict(os.environ))"
    )
    os.environ["H6_SECRET"] = "s3cret"
    seen = run(program).stdout.decode().splitlines()
    del os.environ["H6_SECRET"]
    system = ["bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "python", "tmp", "usr"]
    root, uid, parent = seen[0].rsplit(" ", 2)
    assert set(eval(root)) <= set(system) and (uid, parent) == ("1000", "1")
    assert len(seen) == 2, seen
    assert "s3cret" not in seen[1] and str(Path.home()) not in seen[1]


def test_cancelling_ends_the_run() -> None:
    async def cancelled() -> float:
        async with Sandbox("bubblewrap", workers=1) as sandbox:
            task = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
            await asyncio.sleep(0.3)
            task.cancel()
            started = time.monotonic()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            return time.monotonic() - started

    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    assert asyncio.run(cancelled()) < 3
    assert children.read_text() == before


def test_many_runs_leave_no_descriptor_and_no_process() -> None:
    async def many() -> tuple[int, int]:
        async with Sandbox("bubblewrap", workers=2) as sandbox:
            await asyncio.gather(sandbox.run(""), sandbox.run(""))
            before = len(os.listdir("/proc/self/fd"))
            await asyncio.gather(*(sandbox.run(f"print({i})") for i in range(20)))
            return before, len(os.listdir("/proc/self/fd"))

    before, after = asyncio.run(many())
    assert before == after


def test_a_supervisor_that_is_killed_leaves_nothing() -> None:
    name = f"d{os.getpid()}"
    program = (
        f"import ctypes, os, sys, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
        "if not os.fork(): os.setsid()\ntime.sleep(60)"
    )
    supervisor = (
        "import asyncio, rlvlm_sandbox\nasync def main():\n"
        "    async with rlvlm_sandbox.Sandbox('bubblewrap') as sandbox:\n"
        f"        await sandbox.run({program!r}, profile='tool')\nasyncio.run(main())"
    )

    def living() -> int:
        return sum(name in text for text in map(comm, Path("/proc").glob("[0-9]*/comm")))

    process = subprocess.Popen([sys.executable, "-c", supervisor])
    deadline = time.monotonic() + 20
    while living() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    while living():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def comm(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


# ---- other languages

CPP = b"#include <iostream>\nint main() { long x; std::cin >> x; std::cout << x * 3; return x == 14 ? 0 : 4; }"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program, path="/usr/bin:/bin") is None, reason=f"{program} is missing")


@needs("g++")
def test_cpp() -> None:
    ended = run(CPP, b"14\n", language="cpp")
    assert (ended.outcome, ended.stdout) == (Outcome.OK, b"42"), ended
    assert run(CPP, b"15\n", language="cpp").exit_code == 4
    crashed = run("int main() { volatile int *p = nullptr; *p = 1; }", language="cpp")
    assert (crashed.outcome, crashed.exit_code) == (Outcome.SIGNAL, -11)
    deep = "int f(int n) { volatile char room[900]; room[0] = n; return n ? f(n - 1) + room[0] - room[0] + 1 : 0; }"
    assert run(deep + "int main() { return f(50000) == 50000 ? 0 : 1; }", language="cpp").outcome is Outcome.OK
    wrong = run("int main() { return x; }", language="cpp")
    assert (wrong.outcome, wrong.detail) == (Outcome.RUNTIME_ERROR, DOES_NOT_COMPILE)
    assert b"'x' was not declared" in wrong.stderr.replace("‘".encode(), b"'").replace("’".encode(), b"'")
    forks = run("#include <unistd.h>\nint main() { return fork() == -1 ? 0 : 1; }", language="cpp")
    assert forks.outcome is Outcome.OK


@needs("node")
def test_javascript() -> None:
    ended = run("console.log(require('fs').readFileSync(0, 'utf8') * 3)", b"14\n", language="javascript")
    assert (ended.outcome, ended.stdout) == (Outcome.OK, b"42\n"), ended
    assert run("throw new Error('x')", language="javascript").outcome is Outcome.RUNTIME_ERROR
    eats = "const a = []; while (true) a.push(Buffer.alloc(1e7, 1))"
    assert run(eats, language="javascript", memory_bytes=200 * MIB).outcome is Outcome.MEMORY


@needs("bash")
def test_bash() -> None:
    ended = run("read x; echo $((x * 3)); exit 4", b"14\n", language="bash")
    assert (ended.outcome, ended.exit_code, ended.stdout) == (Outcome.RUNTIME_ERROR, 4, b"42\n"), ended
    assert run("ls / | wc -l > n; cat n", language="bash", profile="tool").outcome is Outcome.OK
    assert run("ls / | wc -l", language="bash").outcome is Outcome.RUNTIME_ERROR  # the judge starts no process


def test_a_language_that_is_not_there_is_said_to_be() -> None:
    ended = run("", language="cobol")
    assert ended.outcome is Outcome.SANDBOX_ERROR
    assert ended.detail == "language is 'cobol'; give python, cpp, javascript, bash"


def test_a_missing_interpreter_is_the_sandbox_s_failure() -> None:
    async def once() -> Run:
        image = find_image("py")
        object.__setattr__(image, "python", "/nowhere/python3")
        backend = Bubblewrap(image)
        await backend.start()
        try:
            return await backend.run(Program(b"print(1)", PROFILES["judge"]))
        finally:
            await backend.stop()

    ended = asyncio.run(once())
    assert ended.outcome is Outcome.SANDBOX_ERROR and "/nowhere/python3" in ended.detail


# ---- as whom

AS_OTHERS = """
import asyncio, sys, types
sys.path.insert(0, sys.argv[1])
from rlvlm_sandbox.canaries import canary
from rlvlm_sandbox.bubblewrap import Bubblewrap
from rlvlm_sandbox.images import find_image
from rlvlm_sandbox.records import PROFILES, Program
async def main():
    backend = Bubblewrap(find_image("py"))
    await backend.start()
    for code in (canary("bubblewrap"), b"import os\\nprint(os.getuid())"):
        run = await backend.run(Program(code, PROFILES["judge"]))
        print(run.outcome, run.stdout.decode().strip(), run.detail, run.stderr.decode())
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not os.access("/usr/bin/python3", os.X_OK), reason="there is no /usr/bin/python3")
@pytest.mark.parametrize("user", [0, 65534])
def test_it_holds_as_root_and_as_nobody(user: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the system's interpreter, which others can read: as root the programs become nobody."""
    version = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"], stdout=-1)
    if version.stdout != b"True\n":
        pytest.skip("/usr/bin/python3 is older than 3.11")
    place = tmp_path_factory.mktemp("others")
    for directory in (place, *place.parents[:2]):
        directory.chmod(0o755)
    shutil.copytree(Path(rlvlm_sandbox.__file__).parent, place / "rlvlm_sandbox")
    command = ["/usr/bin/python3", "-I", "-B", "-c", AS_OTHERS, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, user=user, group=user, extra_groups=(), cwd="/")
    assert done.stdout == "ok holds  \nok 1000  \n", done.stderr
