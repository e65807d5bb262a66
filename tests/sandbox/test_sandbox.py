"""The fork server's backends: what programs get, what limits do, what is left when something dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import rlvlm_sandbox
from rlvlm_sandbox import Limits, Outcome, Run, Sandbox
from rlvlm_sandbox.records import Profile

PACKAGE = Path(rlvlm_sandbox.__file__).parent
MIB = 1 << 20
# The first line of a program that shall be found from outside: its process calls itself so.
NAME = "import ctypes; ctypes.CDLL(None).prctl(15, b'{}', 0, 0, 0)\n"
RUNNER = asyncio.Runner()
OPEN: dict[str, Sandbox] = {}


@pytest.fixture(scope="module", autouse=True)
def _close() -> Iterator[None]:
    yield
    for sandbox in OPEN.values():
        RUNNER.run(sandbox.__aexit__())
    RUNNER.close()


def run(
    code: str | bytes, stdin: bytes = b"", profile: Profile = "judge", backend: str = "namespaces", **limits: float
) -> Run:
    """On a sandbox that stays open for all tests of this module."""

    async def main() -> Run:
        if backend not in OPEN:
            OPEN[backend] = await Sandbox(backend, workers=2).__aenter__()
        return await OPEN[backend].run(code, stdin, profile, Limits(**limits))  # type: ignore[arg-type]

    return RUNNER.run(main())


def run_on(backend: str, code: str | bytes, stdin: bytes = b"", **limits: float) -> Run:
    return run(code, stdin, backend=backend, **limits)


fork_servers = pytest.mark.parametrize("backend", ["namespaces", "landlock"])


def attempts(*lines: str) -> str:
    """A program that tries each line and prints `name of the error` or `done`, one a line."""
    return (
        "import ctypes, os, socket\n"
        "def syscall(*arguments):\n"
        "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
        f"for line in {lines!r}:\n"
        "    try: exec(line)\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "    else: print('done')\n"
    )


def named(marker: str) -> set[str]:
    """The ids of all processes on this machine that call themselves `marker`."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == marker:
                found.add(pid)
    return found


@pytest.fixture
def marker() -> str:
    return "sbx" + uuid.uuid4().hex[:10]


def until(condition: bool | object, seconds: float = 5.0) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- programs that mean no harm


@fork_servers
def test_a_program_that_ends_well(backend: str) -> None:
    result = run_on(backend, "import sys\nprint('to stdout')\nprint('to stderr', file=sys.stderr)")
    assert (result.outcome, result.exit_code, result.backend) == (Outcome.OK, 0, backend)
    assert (result.stdout, result.stderr, result.truncated) == (b"to stdout\n", b"to stderr\n", False)
    assert 0 < result.wall_s < 10 and 0 < result.cpu_s < 10


@fork_servers
def test_bytes_go_in_and_come_out_unchanged(backend: str) -> None:
    data = bytes(range(256)) * 2000
    code = (
        "import sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data[::-1]); sys.stderr.buffer.write(data)"
    )
    result = run_on(backend, code, data)
    assert result.stdout == data[::-1] and result.stderr == data


def test_standard_streams_can_be_opened_by_name() -> None:
    assert run("open('/dev/stdout', 'w').write(open('/dev/stdin').read())", b"by name").stdout == b"by name"


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("1 / 0", 1, b"ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(7)", 7, b""),
        ("import os; os._exit(255)", 255, b""),
        ("exit(3)", 3, b""),
        ("quit('said')", 1, b"said"),
        ("def f(:", 1, b"SyntaxError"),
        ("x = '\ud800'", 1, b"SyntaxError"),
        ("def f(): f()\nf()", 1, b"RecursionError"),
    ],
)
def test_runtime_errors(code: str, exit_code: int, said: bytes) -> None:
    result = run(code)
    assert (result.outcome, result.exit_code) == (Outcome.RUNTIME_ERROR, exit_code)
    assert said in result.stderr


@fork_servers
def test_honest_deep_recursion_passes(backend: str) -> None:
    code = "import sys\nsys.setrecursionlimit(60000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(50000))"
    assert run_on(backend, code).stdout == b"50000\n"


@fork_servers
def test_work_with_much_memory_below_the_limit_passes_and_is_measured(backend: str) -> None:
    result = run_on(backend, f"x = bytearray({200 * MIB})\nfor i in range(0, len(x), 4096): x[i] = 1")
    assert result.outcome is Outcome.OK
    assert 200 * MIB < result.peak_rss_bytes < 300 * MIB


def test_threads_and_shared_memory_pools_work() -> None:
    code = "from concurrent.futures import *\nprint(list({}(4).map(abs, [-1, -2])))"
    assert run(code.format("ThreadPoolExecutor")).stdout == b"[1, 2]\n"
    assert run(code.format("ProcessPoolExecutor"), profile="tool").stdout == b"[1, 2]\n"


@fork_servers
def test_another_thread_can_signal_the_main_one(backend: str) -> None:
    code = """
import signal, threading
main = threading.get_ident()
signal.signal(signal.SIGUSR1, lambda *_: print("got it"))
thread = threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGUSR1))
thread.start()
thread.join()
"""
    assert run_on(backend, code).stdout == b"got it\n"


# ---- limits


@fork_servers
def test_an_endless_loop_uses_up_its_cpu_time(backend: str) -> None:
    result = run_on(backend, "while True: pass", cpu_s=1, wall_s=8)
    assert (result.outcome, result.exit_code) == (Outcome.TIME, -signal.SIGXCPU)
    assert 0.9 < result.cpu_s < 2.5 and result.wall_s < 7


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(60)",
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    ],
)
def test_sleeping_ends_at_the_wall_clock(code: str) -> None:
    result = run("print('before', flush=True)\n" + code, wall_s=0.7)
    assert (result.outcome, result.exit_code, result.stdout) == (Outcome.TIME, None, b"before\n")
    assert 0.7 <= result.wall_s < 3


@fork_servers
def test_cpu_time_ends_even_who_ignores_its_signal(backend: str) -> None:
    result = run_on(
        backend, "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", cpu_s=1, wall_s=8
    )
    assert (result.outcome, result.exit_code) == (Outcome.TIME, -signal.SIGKILL)


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(600 << 20)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import mmap; mmap.mmap(-1, 600 << 20)",
    ],
)
def test_memory_bombs(code: str) -> None:
    result = run(code, memory_bytes=256 * MIB)
    # mmap reports the same lack as an OSError: refused just as well, but the program's own error
    assert result.outcome is (Outcome.RUNTIME_ERROR if "mmap" in code else Outcome.MEMORY)
    assert result.peak_rss_bytes < 280 * MIB


def test_memory_of_many_children_counts_together() -> None:
    code = "import os, time\nfor _ in range(5):\n    if os.fork() == 0: break\nx = b'x' * (90 << 20)\ntime.sleep(5)"
    result = run(code, memory_bytes=256 * MIB, profile="tool")
    assert (result.outcome, result.exit_code) == (Outcome.MEMORY, None)
    assert result.wall_s < 4


def test_memory_shared_after_a_fork_counts_once() -> None:
    code = "import os, time\nx = b'x' * (90 << 20)\nfor _ in range(5):\n    if os.fork() == 0: break\ntime.sleep(0.3)"
    assert run(code, memory_bytes=256 * MIB, profile="tool").outcome is Outcome.OK


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(stream: str) -> None:
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", output_bytes=10_000)
    assert (result.outcome, result.truncated) == (Outcome.OUTPUT, True)
    assert getattr(result, stream) == b"x" * 10_000 and result.wall_s < 5


@fork_servers
def test_the_output_limit_is_exact(backend: str) -> None:
    assert run_on(backend, "print('x' * 999)", output_bytes=1000).outcome is Outcome.OK
    over = run_on(backend, "print('x' * 1000)", output_bytes=1000)
    assert (over.outcome, over.truncated, over.stdout) == (Outcome.OUTPUT, True, b"x" * 1000)


@pytest.mark.parametrize(
    ("code", "number"),
    [("import ctypes; ctypes.string_at(0)", signal.SIGSEGV), ("import os; os.abort()", signal.SIGABRT),
     ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL)],
)  # fmt: skip
def test_deaths_by_signal(code: str, number: int) -> None:
    result = run(code)
    assert (result.outcome, result.exit_code) == (Outcome.SIGNAL, -number)


def test_the_disk_is_limited_in_size_files_and_file_size() -> None:
    code = """
import errno, os
def fails(make):
    try: make()
    except OSError as error: print(errno.errorcode[error.errno])
def fill():
    for i in range(10): open(f"/tmp/{i}", "wb").write(bytes(1 << 20))
def many():
    for i in range(200): open(f"/tmp/many{i}", "w").close()
fails(lambda: open("/tmp/big", "wb").write(bytes(3 << 20)))
os.remove("/tmp/big")
fails(fill)
fails(many)
"""
    result = run(code, tmp_bytes=6 * MIB, file_bytes=2 * MIB, inodes=100)
    assert result.stdout.split() == [b"EFBIG", b"ENOSPC", b"ENOSPC"]


def test_processes_and_threads_are_limited_and_forks_need_leave() -> None:
    threads = "import threading, time\nn = 1\ntry:\n    while n < 99: "
    threads += "threading.Thread(target=time.sleep, args=(1,), daemon=True).start(); n += 1\n"
    assert run(threads + "except RuntimeError: print(n)", processes=6).stdout == b"6\n"
    forks = "import os, time\nn = 1\ntry:\n    while n < 99:\n        if os.fork() == 0: time.sleep(5)\n"
    forks += "        n += 1\nexcept {}: print(n)"
    assert run(forks.format("BlockingIOError"), processes=6, profile="tool").stdout == b"6\n"
    assert run(forks.format("PermissionError")).stdout == b"1\n"


# ---- programs that mean harm


def test_host_files_are_invisible(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the expected answers")
    secret.chmod(0o644)
    places = [
        str(secret),
        str(PACKAGE),
        "/root",
        "/home",
        "/work",
        "/var",
        "/etc/shadow",
        "/.host",
        "/proc/1/root",
        "/proc/1/fd",
    ]
    reads = [f"os.listdir({place!r}) if os.path.isdir({place!r}) else open({place!r}).read()" for place in places]
    reads += [
        f"open('/proc/self/root/../..{secret}').read()",
        "os.symlink('/root', '/tmp/way'); os.listdir('/tmp/way')",
    ]
    result = run(attempts(*reads))
    refused = {b"FileNotFoundError", b"PermissionError"}
    assert len(result.stdout.split()) == len(reads) and set(result.stdout.split()) <= refused
    assert run(attempts("os.listdir('/usr')")).stdout == b"done\n"  # and not because nothing can be read


def test_the_system_cannot_be_written() -> None:
    places = [
        "/x",
        "/usr/x",
        "/usr/lib/x",
        "/python/lib/x",
        "/etc/passwd",
        "/dev/x",
        "/proc/sys/kernel/hostname",
        "/main.py",
    ]
    result = run(attempts(*(f"open({place!r}, 'w').write('x')" for place in places)))
    assert len(result.stdout.split()) == len(places) and set(result.stdout.split()) <= {b"OSError", b"PermissionError"}


def test_the_kernel_s_dangerous_calls_are_refused() -> None:
    calls = """
        165, b'none', b'/tmp', b'tmpfs', 0, 0 | 166, b'/tmp', 2 | 272, 0x10000000 | 272, 0x20000 | 101, 0, 0, 0, 0
        321, 0, 0, 0 | 425, 1, 0 | 323, 0 | 250, 0, 0, 0 | 298, 0, 0, 0, 0, 0 | 319, b'x', 0 | 29, 0, 4096, 0o1600
        56, 0x10000011, 0, 0, 0, 0 | 161, b'/tmp' | 133, b'/tmp/d', 0o20666, 0x103 | 303, -100, b'/', 0, 0, 0
    """.strip().replace(
        "\n", "|"
    )  # mount umount2 unshare ptrace bpf io_uring userfaultfd keyctl perf memfd shmget clone ...
    lines = [f"syscall({call.strip()})" for call in calls.split("|")]
    assert run(attempts(*lines), profile="tool").stdout.split() == [b"PermissionError"] * 16
    x32 = run(attempts("syscall(0x40000000 + 39)"))
    assert (x32.outcome, x32.exit_code) == (Outcome.SIGNAL, -signal.SIGSYS)


@pytest.fixture
def listeners() -> Iterator[tuple[int, str]]:
    """A TCP port and an abstract unix address on which the host listens."""
    name = f"rlvlm-{uuid.uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        yield tcp.getsockname()[1], name


def test_there_is_no_network(listeners: tuple[int, str]) -> None:
    port, name = listeners
    tries = [f"socket.create_connection(('127.0.0.1', {port}), 2)", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
             "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket.socket(40, socket.SOCK_STREAM)",
             f"socket.socket(socket.AF_UNIX).connect('\\0{name}')"]  # fmt: skip
    assert run(attempts(*tries)).stdout.split() == [b"PermissionError"] * 5
    with_unix_sockets = run(attempts(*tries), profile="tool")
    assert with_unix_sockets.stdout.split() == [b"PermissionError"] * 4 + [b"ConnectionRefusedError"]
    with socket.create_connection(("127.0.0.1", port), 2), socket.socket(socket.AF_UNIX) as unix:
        unix.connect("\0" + name)  # which on the host works


def test_secrets_of_the_environment_are_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2")
    code = "import os\nprint(dict(os.environ))\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n"
    code += "    for name in ('environ', 'cmdline'):\n"
    code += (
        "        try: print(pid, open(f'/proc/{pid}/{name}').read())\n        except PermissionError: print('refused')"
    )
    result = run(code)
    assert result.outcome is Outcome.OK and b"OMP_NUM_THREADS" in result.stdout
    assert b"hunter2" not in result.stdout and b"API_TOKEN" not in result.stdout


def test_init_cannot_be_killed_from_inside() -> None:
    code = (
        "import os, signal\nfor s in signal.Signals:\n    try: os.kill(1, s)\n    except OSError: pass\nprint('after')"
    )
    assert run(code).stdout == b"after\n"


def test_a_daemon_dies_with_the_run(marker: str) -> None:
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import ctypes; ctypes.CDLL(None).prctl(15, b"{marker}", 0, 0, 0)
        print("daemon", flush=True)
        time.sleep(60)
    os._exit(0)
time.sleep({{}})
"""

    async def main() -> Run:
        async with Sandbox() as sandbox:
            going = asyncio.create_task(sandbox.run(code.format(1.5), profile="tool"))
            assert await asyncio.to_thread(until, lambda: len(named(marker)) == 1)  # it can be seen from outside
            return await going

    result = asyncio.run(main())
    assert (result.outcome, result.stdout) == (Outcome.OK, b"daemon\n") and result.wall_s < 5
    assert named(marker) == set()


# ---- what is left


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: print('x' * 1000)"])
def test_a_cancelled_run_has_ended_when_the_call_returns(code: str, marker: str) -> None:
    async def main() -> None:
        async with Sandbox() as sandbox:
            limits = Limits(wall_s=60, cpu_s=60, output_bytes=1 << 40)
            going = asyncio.create_task(sandbox.run(NAME.format(marker) + code, limits=limits))
            assert await asyncio.to_thread(until, lambda: len(named(marker)) == 1)
            start = time.monotonic()
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
            assert time.monotonic() - start < 5 and named(marker) == set()

    asyncio.run(main())


def test_a_run_ends_when_whoever_asked_for_it_is_killed(marker: str) -> None:
    code = NAME.format(marker) + "import time; time.sleep(60)"
    script = (
        "import asyncio\nfrom rlvlm_sandbox import Limits, Sandbox\nasync def main():\n"
        "    async with Sandbox() as sandbox:\n"
        f"        await sandbox.run({code!r}, limits=Limits(wall_s=60))\nasyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    ) as asker:
        assert until(lambda: len(named(marker)) == 1, 10)
        asker.kill()
    assert until(lambda: named(marker) == set())


def test_fifty_runs_four_at_a_time_leave_nothing_and_keep_apart(marker: str) -> None:
    def traces() -> tuple[str, set[str], set[str]]:
        children = "".join(
            Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task")
        )
        return (
            Path("/proc/self/mountinfo").read_text(),
            set(children.split()),
            {os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds()},
        )

    def open_fds() -> list[str]:
        return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]

    async def main() -> list[Run]:
        gate = asyncio.Semaphore(4)

        async def one(sandbox: Sandbox, number: int) -> Run:
            code = NAME.format(marker) + "import os; print(os.listdir('/tmp'), input()); open('/tmp/left', 'w')"
            async with gate:
                return await sandbox.run(code, f"{number}\n".encode())

        async with Sandbox() as sandbox:
            return await asyncio.gather(*(one(sandbox, number) for number in range(50)))

    before = traces()
    results = asyncio.run(main())
    assert [result.stdout for result in results] == [f"['main.py'] {number}\n".encode() for number in range(50)]
    assert {result.outcome for result in results} == {Outcome.OK}
    assert traces() == before and named(marker) == set() and not Path("/tmp/.host").exists()


def test_four_runs_go_on_at_the_same_time() -> None:
    async def main() -> float:
        async with Sandbox() as sandbox:
            start = time.monotonic()
            await asyncio.gather(*(sandbox.run("import time; time.sleep(1)") for _ in range(4)))
            return time.monotonic() - start

    assert asyncio.run(main()) < 3


# ---- when the sandbox itself fails


def test_where_namespaces_are_refused_it_says_so_and_auto_takes_landlock() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs util-linux's unshare to make a place without user namespaces")
    script = (
        "import asyncio\nfrom rlvlm_sandbox import Sandbox, SandboxUnavailable\nasync def main():\n"
        "    async with Sandbox() as sandbox: print(sandbox.backend, (await sandbox.run('print(6 * 7)')).stdout)\n"
        "    try:\n        async with Sandbox('namespaces'): print('entered')\n"
        "    except SandboxUnavailable as error: print(error)\nasyncio.run(main())"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "-Ur", "sh", "-c", shell, sys.executable, script]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "landlock b'42\\n'"
    assert said[1].startswith("no sandbox holds here; allow unprivileged user namespaces")
    assert "The reasons: namespaces: " in said[1] and "unshare: No space left on device" in said[1]


def test_it_works_for_an_ordinary_user_too() -> None:
    if os.geteuid() != 0:
        pytest.skip("all other tests have just run as an ordinary user")
    python = "/usr/bin/python3"
    version = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not Path(python).exists() or subprocess.run(version, check=False).returncode:
        pytest.skip(f"needs a {python} of 3.11 or later that every user may start")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(PACKAGE, f"{folder}/rlvlm_sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        probing = subprocess.run(
            [python, "-B", "-m", "rlvlm_sandbox", "probe"],
            cwd=folder, user=65534, group=65534, extra_groups=[], env={}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert {"namespaces: holds", "landlock: holds"} <= set(probing.stdout.splitlines()), probing.stderr
    assert probing.returncode == 0


def test_running_outside_of_the_context_and_unknown_backends_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not open; write `async with Sandbox"):
        asyncio.run(Sandbox().run("print(1)"))
    with pytest.raises(ValueError, match="'dockr'"):
        Sandbox("dockr")
    with pytest.raises(ValueError, match=r"Limits\.wall_s is 0"):
        Limits(wall_s=0)
