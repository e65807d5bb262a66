"""Backend `bubblewrap`: a process of `bwrap` for each run, in fresh namespaces and a root of its own.

Slower than the fork server, and independent of how that one builds its walls. Other languages run through it too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlvlm_sandbox.collect import Boot, Command, Descriptors, Processes, Walls, children, kill_generation
from rlvlm_sandbox.images import Image
from rlvlm_sandbox.kernel import NEW_USER
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import PROFILES, Outcome, Program, Run, SandboxUnavailable
from rlvlm_sandbox.seccomp import filter_program

DOES_NOT_COMPILE = "the program does not compile"
_UID, _NOBODY = "1000", 65534
_NAMESPACES = (
    "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox",
    "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
    # For the boot's own last steps: it limits the inodes of /tmp, may change the user, and gives all up.
    "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP",
)  # fmt: skip
_OWN_USER = ("--unshare-user", "--uid", _UID, "--gid", _UID)
_USERS = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--userns")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_TOOLCHAIN = ("/usr/include", "/usr/local/include", "/usr/libexec")
_PATH = "/usr/bin:/bin"  # what an image has of the system


@dataclass(frozen=True, slots=True)
class Language:
    """needs: what has to be installed. argv: how the file /main is run, empty for itself. mapped: whether a limit on
    what a process maps leaves it alive. compiles: the command that makes /tmp/main of the source /main.
    """

    needs: str
    argv: tuple[str, ...]
    mapped: bool = True
    compiles: str = ""


LANGUAGES = {
    "cpp": Language("g++", ("/main",), compiles="g++ -std=c++20 -O2 -pipe -x c++ /main -o /tmp/main"),
    "javascript": Language("node", ("/usr/bin/env", "node", "/main"), mapped=False),  # V8 maps gigabytes beforehand
    "bash": Language("bash", ("/usr/bin/env", "bash", "/main")),
}


class Bubblewrap:
    """Programs of root's run as nobody. Where only root reads the interpreter's files, bwrap stays root until it has
    bound them, in a user namespace that knows both users."""

    name = "bubblewrap"

    def __init__(self, image: Image, workers: int = 1) -> None:
        self._image = image
        self._processes = Processes(self.name)
        self._walls: list[str] = []
        self._filters: dict[tuple[str, bool], int] = {}
        is_root = os.geteuid() == 0
        self._both = is_root and not all(_world_reads(source) for source, _ in image.binds())
        self._nobody = is_root and not self._both
        self._free: list[int] = []  # user namespaces that no run is in

    async def start(self) -> None:
        """Raises SandboxUnavailable where bwrap is missing."""
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxUnavailable("bwrap is not installed; install bubblewrap with the system's packages")
        self._walls = [found, *_walls(self._image)]
        self._filters = {
            (profile, execs): _filter_file(filter_program(profile, execs=execs))
            for profile in PROFILES
            for execs in (False, True)
        }

    async def run(self, program: Program) -> Run:
        if program.language == "python":
            packages = self._image.packages_inside
            return await self._run(program, Boot(packages=packages))
        language = LANGUAGES.get(program.language)
        if language is None:
            return self._failure(program, f"language is {program.language!r}; give python, {', '.join(LANGUAGES)}")
        if shutil.which(language.needs, path=_PATH) is None:
            return self._failure(program, f"{program.language} needs {language.needs} in {_PATH}; install it")
        if language.compiles:
            compiled, binary = await self._compile(program, language.compiles)
            if compiled.outcome is not Outcome.OK:
                return replace(compiled, detail=compiled.detail or DOES_NOT_COMPILE)
            program = replace(program, code=binary)
        boot = Boot(argv=language.argv, mapped=language.mapped)
        return await self._run(program, boot)

    async def stop(self) -> None:
        await self._processes.stop()
        for fd in (*self._filters.values(), *self._free):
            os.close(fd)
        self._filters, self._free = {}, []

    async def _compile(self, program: Program, compiles: str) -> tuple[Run, bytes]:
        """In a run of its own, with the tool's limits. The binary comes back through the channel."""
        limits = PROFILES["tool"]
        with open(os.memfd_create("rlvlm-sandbox", os.MFD_CLOEXEC), "rb") as binary:
            source = replace(program, limits=limits, profile="tool", stdin=b"", channel=binary.fileno())
            boot = Boot(argv=("/bin/sh", "-c", f"{compiles} && cat /tmp/main >&3"))
            run = await self._run(source, boot, _toolchain())
            binary.seek(0)
            return run, binary.read()

    async def _run(self, program: Program, boot: Boot, binds: Sequence[str] = ()) -> Run:
        if not self._both:
            return await self._processes.run(self._command(program, boot, binds, None), program)
        try:
            users = self._free.pop() if self._free else _root_and_nobody(self._image.python)
        except OSError as error:
            return self._failure(program, f"there is no user namespace: {error}")
        try:
            return await self._processes.run(self._command(program, boot, binds, users), program)
        finally:
            self._free.append(users)

    def _command(self, program: Program, boot: Boot, binds: Sequence[str], users: int | None) -> Command:
        """users: a user namespace for bwrap to enter, None for it to make one."""
        limits, python = program.limits, self._image.python_inside
        execs = bool(boot.argv)
        seccomp = self._filters[program.profile, execs]
        # Where it is the same user's, init counts as one too.
        processes = (limits.processes or 1) + (users is None)
        boot = replace(boot, processes=processes, walls=Walls(seccomp, None if users is None else int(_UID)))
        user = _OWN_USER if users is None else (*_USERS, str(users))

        def argv(fds: Descriptors) -> list[str]:
            file = ["--perms", "0755", "--ro-bind-data", str(fds.code), "/main"] if execs else []
            tmp = ["--perms", "0777", "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
            end = ["--remount-ro", "/proc", "--remount-ro", "/", "--"]
            return [*self._walls, *user, *binds, *file, *tmp, *end, python, *boot.arguments(program, fds)]

        watched = program.profile == "tool" or not boot.mapped
        return Command(
            argv=argv,
            kill=_kill_inside,
            env={},
            is_init=True,
            memory_bytes=limits.memory_bytes if watched else None,
            nobody=self._nobody,
            fds=(seccomp,) if users is None else (seccomp, users),
        )

    def _failure(self, program: Program, error: str) -> Run:
        return run_of({"error": error}, b"", b"", False, program.limits, self.name)


def _walls(image: Image) -> list[str]:
    """bwrap's options that are the same for all runs."""
    links = {"/dev/fd": "/proc/self/fd", "/dev/shm": "/tmp"} | image.links()
    links |= {f"/dev/{name}": f"/proc/self/fd/{fd}" for fd, name in enumerate(("stdin", "stdout", "stderr"))}
    options = [["--perms", "0755", "--dir", "/dev"]]
    options += [["--dev-bind", f"/dev/{device}", f"/dev/{device}"] for device in _DEVICES]
    options += [["--symlink", target, link] for link, target in links.items()]
    options += [["--setenv", name, value] for name, value in image.environment().items()]
    words = [word for option in options for word in option]
    return [*_NAMESPACES, *_readable(image.binds()), *words, "--proc", "/proc"]


def _readable(binds: Sequence[tuple[str, str]]) -> list[str]:
    """bwrap would make the directories above for their owner alone."""
    parents = sorted({str(parent) for _, target in binds for parent in Path(target).parents if parent.name})
    directories = [word for parent in parents for word in ("--perms", "0755", "--dir", parent)]
    return [*directories, *(word for source, target in binds for word in ("--ro-bind", source, target))]


def _kill_inside(pid: int) -> None:
    """bwrap's child is init: with it everything inside dies, and bwrap after it."""
    if children(pid):
        kill_generation(pid, 1)
    else:
        os.kill(pid, signal.SIGKILL)


def _root_and_nobody(python: str) -> int:
    """A user namespace in which 0 is root and 1000 is nobody. Raises OSError."""
    make = f"import ctypes, sys; print(ctypes.CDLL(None).unshare({NEW_USER}), flush=True); sys.stdin.read()"
    command = [python, "-I", "-S", "-B", "-c", make]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}) as process:
        assert process.stdout is not None  # it is a pipe
        if process.stdout.readline() != b"0\n":
            raise OSError("unshare failed")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 0 1\n{_UID} {_NOBODY} 1\n")
        return os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _toolchain() -> list[str]:
    return _readable([(path, path) for path in _TOOLCHAIN if os.path.isdir(path)])


def _filter_file(program: bytes) -> int:
    """Read by every run at its own pace, so that nobody may write to it."""
    fd = os.memfd_create("rlvlm-sandbox-filter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, program)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _world_reads(source: str) -> bool:
    path = Path(source)
    return all(os.stat(place).st_mode & 0o005 == 0o005 for place in (path, *path.parents) if place.is_dir())
