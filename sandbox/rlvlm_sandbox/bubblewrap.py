"""Backend `bubblewrap`: a process of `bwrap` for each run, in fresh namespaces and a root of its own.

Slower than the fork server, and independent of how that one builds its walls. Other languages run through it too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlvlm_sandbox.collect import Boot, Command, Descriptors, children, kill_generation, run_process
from rlvlm_sandbox.images import Image
from rlvlm_sandbox.outcomes import run_of
from rlvlm_sandbox.records import PROFILES, Outcome, Program, Run, SandboxUnavailable
from rlvlm_sandbox.seccomp import filter_program

DOES_NOT_COMPILE = "the program does not compile"
_NAMESPACES = (
    "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox",
    "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
    # For the boot's own last steps: it limits the inodes of /tmp, and gives both up.
    "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP",
)  # fmt: skip
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
    """Raises SandboxUnavailable on `start` where bwrap is missing. Where we are root and the interpreter's files are
    root's alone, programs run with root's user id and no capability, and processes are counted by looking."""

    name = "bubblewrap"

    def __init__(self, image: Image, workers: int = 1) -> None:
        self._image = image
        self._walls: list[str] = []
        self._filters: dict[tuple[str, bool], int] = {}
        self._nobody = os.geteuid() == 0 and all(_world_reads(source) for source, _ in image.binds())
        self._counts = os.geteuid() == 0 and not self._nobody

    async def start(self) -> None:
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
            return await run_process(self._command(program, Boot(packages=packages)), program, self.name)
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
        return await run_process(self._command(program, boot), program, self.name)

    async def stop(self) -> None:
        for fd in self._filters.values():
            os.close(fd)
        self._filters = {}

    async def _compile(self, program: Program, compiles: str) -> tuple[Run, bytes]:
        """In a run of its own, with the tool's limits. The binary comes back through the channel."""
        limits = PROFILES["tool"]
        with open(os.memfd_create("rlvlm-sandbox", os.MFD_CLOEXEC), "rb") as binary:
            source = replace(program, limits=limits, profile="tool", stdin=b"", channel=binary.fileno())
            boot = Boot(argv=("/bin/sh", "-c", f"{compiles} && cat /tmp/main >&3"))
            run = await run_process(self._command(source, boot, _toolchain()), source, self.name)
            binary.seek(0)
            return run, binary.read()

    def _command(self, program: Program, boot: Boot, binds: Sequence[str] = ()) -> Command:
        limits, python = program.limits, self._image.python_inside
        execs = bool(boot.argv)
        processes = (limits.processes or 1) + 1  # init is one too
        seccomp = self._filters[program.profile, execs]
        boot = replace(boot, processes=processes, seccomp=seccomp)

        def argv(fds: Descriptors) -> list[str]:
            file = ["--perms", "0755", "--ro-bind-data", str(fds.code), "/main"] if execs else []
            tmp = ["--perms", "0700", "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
            end = ["--remount-ro", "/proc", "--remount-ro", "/", "--"]
            return [*self._walls, *binds, *file, *tmp, *end, python, *boot.arguments(program, fds)]

        watched = program.profile == "tool" or not boot.mapped
        return Command(
            argv=argv,
            kill=_kill_inside,
            env={},
            is_init=True,
            memory_bytes=limits.memory_bytes if watched else None,
            processes=processes + 1 if self._counts else None,  # bwrap's outer half is one too
            nobody=self._nobody,
            fds=(seccomp,),
        )

    def _failure(self, program: Program, error: str) -> Run:
        return run_of({"error": error}, b"", b"", False, program.limits, self.name)


def _walls(image: Image) -> list[str]:
    """bwrap's options that are the same for all runs."""
    links = {"/dev/fd": "/proc/self/fd", "/dev/shm": "/tmp"} | image.links()
    links |= {f"/dev/{name}": f"/proc/self/fd/{fd}" for fd, name in enumerate(("stdin", "stdout", "stderr"))}
    options = [["--ro-bind", source, target] for source, target in image.binds()]
    options += [["--dev-bind", f"/dev/{device}", f"/dev/{device}"] for device in _DEVICES]
    options += [["--symlink", target, link] for link, target in links.items()]
    options += [["--setenv", name, value] for name, value in image.environment().items()]
    return [*_NAMESPACES, *(word for option in options for word in option), "--proc", "/proc"]


def _kill_inside(pid: int) -> None:
    """bwrap's child is init: with it everything inside dies, and bwrap after it."""
    if children(pid):
        kill_generation(pid, 1)
    else:
        os.kill(pid, signal.SIGKILL)


def _toolchain() -> list[str]:
    present = [path for path in _TOOLCHAIN if os.path.isdir(path)]
    return [word for path in present for word in ("--ro-bind", path, path)]


def _filter_file(program: bytes) -> int:
    """Read by every run at its own pace, so that nobody may write to it."""
    fd = os.memfd_create("rlvlm-sandbox-filter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, program)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _world_reads(source: str) -> bool:
    path = Path(source)
    return all(os.stat(place).st_mode & 0o005 == 0o005 for place in (path, *path.parents) if place.is_dir())
