"""`Sandbox`: finds a backend that holds here, and runs, grades and keeps sessions on it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

from rlvlm_sandbox.bubblewrap import Bubblewrap
from rlvlm_sandbox.canaries import canary
from rlvlm_sandbox.forkserver import ForkServerBackend
from rlvlm_sandbox.grading import AssertTests, Tests, Verdict, grade
from rlvlm_sandbox.http import HTTP
from rlvlm_sandbox.images import Image, find_image
from rlvlm_sandbox.records import PROFILES, Backend, Limits, Outcome, Profile, Program, Run, SandboxUnavailable
from rlvlm_sandbox.session import Session
from rlvlm_sandbox.subprocess_unsafe import UnsafeSubprocess

# What `auto` tries, the strongest first.
BACKENDS = ("namespaces", "bubblewrap", "landlock")
UNSAFE = "unsafe-subprocess"
_LOCAL: dict[str, Callable[[Image, int], Backend]] = {
    "namespaces": lambda image, workers: ForkServerBackend("namespaces", image, workers),
    "landlock": lambda image, workers: ForkServerBackend("landlock", image, workers),
    "bubblewrap": Bubblewrap,
    UNSAFE: UnsafeSubprocess,
}
_MEND = (
    "allow unprivileged user namespaces (in a container: a seccomp profile that permits clone with new namespaces, "
    "and an unmasked /proc), or use a kernel with landlock (5.13 and later), or name a remote pool: backend='http'"
)


class Sandbox:
    """`async with Sandbox() as sandbox: run = await sandbox.run(code)`.

    backend: `auto` takes the first of BACKENDS that holds on this machine, found out by running its canary;
    `http` a remote pool (`url`, `token`); `unsafe-subprocess` has no walls and is never chosen unless named. Entering
    raises SandboxUnavailable, with the reason for each, where nothing holds: nothing weaker is used instead.
    image: `py` (the standard library) or `py-sci` (numpy and sympy too, imported beforehand).
    workers: how many runs may go on at a time; more wait for their turn (default: one for each core).
    """

    def __init__(
        self,
        backend: str = "auto",
        image: str = "py",
        workers: int | None = None,
        *,
        url: str | list[str] | None = None,
        token: str | None = None,
    ) -> None:
        if backend not in ("auto", "http", *_LOCAL):
            raise ValueError(f"backend is {backend!r}; give 'auto', 'http' or one of {sorted(_LOCAL)}")
        if (backend == "http") != (url is not None):
            raise ValueError(f"backend is {backend!r} and url is {url!r}; 'http' needs a url, no other takes one")
        workers = (os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1")
        self._wanted, self._image, self._workers = backend, image, workers
        self._url, self._token = url, token
        self._backend: Backend | None = None
        self._other_languages: Bubblewrap | None = None

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self._entered().name

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(self._workers)
        if self._wanted == "http":
            assert self._url is not None  # checked when made
            self._backend = HTTP(self._url, self._token)
            await self._backend.start()
        else:
            self._backend = await _first_that_holds(self._wanted, self._image, self._workers)
        return self

    async def __aexit__(self, *_: object) -> None:
        backend, self._backend = self._entered(), None
        await backend.stop()
        if self._other_languages is not None:
            await self._other_languages.stop()

    async def run(
        self,
        code: str | bytes,
        stdin: bytes = b"",
        profile: Profile = "judge",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Run:
        """Runs `code` in an empty, writable /tmp (`landlock`: with no writable directory).

        Nothing of the run survives it, however it ends; cancelling the call ends the run. Other languages (`cpp`,
        `javascript`, `bash`) go through bubblewrap.
        """
        if profile not in PROFILES:
            raise ValueError(f"profile is {profile!r}; give one of {get_args(Profile)}")
        backend = self._for_profile(await self._backend_for(language), profile)
        program = Program(_encoded(code), (limits or Limits()).over(PROFILES[profile]), stdin, profile, language)
        async with self._slots:
            return await backend.run(program)

    async def grade(
        self,
        code: str | bytes,
        tests: Tests,
        limits: Limits | None = None,
        *,
        fail_fast: bool = False,
        trust: Literal["split", "weak"] = "split",
        language: str = "python",
    ) -> Verdict:
        """Whether the candidate `code` passes its author's `tests`; see `rlvlm_sandbox.grading.grade` for the rest.

        limits: of each run of the candidate. fail_fast: stop at the first case that fails. trust: `weak` runs
        candidate and AssertTests in one process, which lets a candidate cheat. Raises InvalidTests for an error of the
        tests' author.
        """
        whole = (limits or Limits()).over(PROFILES["judge"])
        backend = await self._backend_for(language)
        if isinstance(backend, HTTP):
            return await backend.grade(code, tests, whole, fail_fast=fail_fast, trust=trust, language=language)

        async def in_a_slot(program: Program) -> Run:
            async with self._slots:
                return await backend.run(program)

        options: dict[str, Any] = {"fail_fast": fail_fast, "trust": trust, "language": language}
        if not isinstance(tests, AssertTests):
            return await grade(in_a_slot, code, tests, whole, **options)
        async with self._slots:  # one for both sides: each waits for the other
            return await grade(backend.run, code, tests, whole, **options)

    def session(self, limits: Limits | None = None) -> Session:
        """A Python that keeps its state between runs, for tools: `async with sandbox.session() as python`."""
        return Session(self._for_profile(self._entered(), "tool").run, (limits or Limits()).over(PROFILES["tool"]))

    def _entered(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("the sandbox is not open; write `async with Sandbox() as sandbox:` around its use")
        return self._backend

    def _for_profile(self, backend: Backend, profile: Profile) -> Backend:
        if profile == "tool" and backend.name == "landlock":
            raise SandboxUnavailable(f"profile 'tool' needs walls that landlock lacks; {_MEND}")
        return backend

    async def _backend_for(self, language: str) -> Backend:
        """Languages other than Python go through bubblewrap, unless the backend is one that takes all."""
        backend = self._entered()
        if language == "python" or isinstance(backend, (HTTP, Bubblewrap)):
            return backend
        if self._other_languages is None:
            other = Bubblewrap(find_image(self._image), self._workers)
            await other.start()
            self._other_languages = other
        return self._other_languages


async def probe(backend: str, image: str = "py") -> str | None:
    """Starts the backend and runs its canary. None where all that it promises holds, else the reason why not."""
    try:
        started = await _started(backend, find_image(image), workers=1)
    except SandboxUnavailable as error:
        return str(error)
    await started.stop()
    return None


async def _first_that_holds(wanted: str, image: str, workers: int) -> Backend:
    found = find_image(image)
    reasons = []
    for name in BACKENDS if wanted == "auto" else (wanted,):
        try:
            return await _started(name, found, workers)
        except SandboxUnavailable as error:
            reasons.append(f"{name}: {error}")
    raise SandboxUnavailable(f"no sandbox holds here; {_MEND}. The reasons: " + "; ".join(reasons))


async def _started(name: str, image: Image, workers: int) -> Backend:
    """Raises SandboxUnavailable, with nothing left behind, where it does not start or its canary is not content."""
    if sys.platform != "linux":
        raise SandboxUnavailable(f"it needs Linux, this is {sys.platform}")
    backend = _LOCAL[name](image, workers)
    await backend.start()
    if name == UNSAFE:
        return backend
    try:
        run = await backend.run(Program(canary(name), PROFILES["judge"]))
        if run.outcome is not Outcome.OK or run.stdout != b"holds\n":
            said = run.detail or (run.stdout + run.stderr).decode(errors="replace").strip()
            raise SandboxUnavailable(f"its canary ended with {run.outcome}: {said or 'no word'}")
    except BaseException:
        await backend.stop()
        raise
    return backend


def _encoded(code: str | bytes) -> bytes:
    """What UTF-8 cannot hold is the program's own error: Python will refuse to read it."""
    return code.encode("utf-8", "surrogatepass") if isinstance(code, str) else code
