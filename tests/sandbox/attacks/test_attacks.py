"""Every attack and every ordinary program, on every backend that holds here, as root and as nobody.

One driver process for each backend and user runs them one after another, and looks after the host after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import rlvlm_sandbox
from rlvlm_sandbox import Sandbox, SandboxUnavailable, probe

from .attacks import ATTACKS
from .cases import ALL, Case
from .driver import TABLES

_NOBODY = {"user": 65534, "group": 65534, "extra_groups": ()}
_SYSTEM_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")
# own: this process's user and interpreter. nobody: one without any rights. system: this user, but an interpreter that
# everybody can read, for which root becomes nobody where it otherwise only gives up its capabilities.
USERS = ("own", "nobody", "system")


def _users(backend: str) -> Sequence[str]:
    return USERS if backend == "landlock" else USERS[:2]


@functools.cache
def _interpreter(user: str) -> str:
    """Skips where there is none."""
    if user == "own":
        return sys.executable
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for python in (os.path.realpath(sys.executable), *_SYSTEM_PYTHONS):
        try:
            done = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], **_NOBODY)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip("there is no interpreter from 3.11 on that nobody can execute")


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """What a driver needs, where anybody can read it."""
    with tempfile.TemporaryDirectory() as name:
        for package, to in ((Path(rlvlm_sandbox.__file__).parent, "rlvlm_sandbox"), (Path(__file__).parent, "attacks")):
            shutil.copytree(package, f"{name}/{to}", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield name


_DEFECT = re.compile(r"(Name|Type|Attribute|Key|Index|Import|Syntax|Overflow)Error")  # ours, and no reason to skip
Key = tuple[str, str, str, tuple[str, ...], str]  # backend, user, table, names, image


class Drivers:
    """The answers of driver processes, four of which run at a time: they spend much of theirs waiting."""

    def __init__(self, folder: str) -> None:
        self._folder, self._pool = folder, ThreadPoolExecutor(4)
        self._jobs: dict[Key, Future[dict[str, Any]]] = {}

    def start(self, key: Key) -> Future[dict[str, Any]]:
        if key not in self._jobs:
            backend, user, table, names, image = key
            job = {"backend": backend, "image": image, "table": table, "names": names}
            self._jobs[key] = self._pool.submit(self._drive, _interpreter(user), user, json.dumps(job))
        return self._jobs[key]

    def runs(self, key: Key) -> list[dict[str, Any]]:
        """How each of the named cases ended. Skips with the reason where the backend does not hold."""
        answer = self.start(key).result()
        if "unavailable" in answer:
            assert not _DEFECT.search(answer["unavailable"]), answer["unavailable"]
            pytest.skip(answer["unavailable"])
        return answer["runs"]

    def _drive(self, python: str, user: str, job: str) -> dict[str, Any]:
        done = subprocess.run(
            [python, "-B", "-m", "attacks.driver", job], cwd=self._folder, env={}, text=True, capture_output=True,
            timeout=300, **(_NOBODY if user == "nobody" else {}),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def drivers(folder: str, request: pytest.FixtureRequest) -> Drivers:
    """With all that the chosen tests will ask for already on its way."""
    drivers = Drivers(folder)
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module is request.module and "table" in parameters:
            with contextlib.suppress(pytest.skip.Exception):
                drivers.start(_key(*(parameters[name] for name in ("backend", "user", "table", "image"))))
    return drivers


def _key(backend: str, user: str, table: str, image: str) -> Key:
    return backend, user, table, tuple(all_of(table, backend, image)), image


def all_of(table: str, backend: str, image: str = "py") -> list[str]:
    return [case.name for case in TABLES[table] if backend in case.backends and case.image == image]


def check(case: Case, run: dict[str, Any], backend: str) -> None:
    said = f"{run.get('outcome')}\n{run.get('stdout')}\n{run.get('stderr')}\n{run.get('detail')}"[-6000:]
    assert run["harm"] == []
    assert run["outcome"] in case.expected(backend), said
    assert [line for line in run["stdout"].splitlines() if line.startswith("GOT THROUGH")] == []
    assert run["took_s"] < case.within_s, said
    stdout = run["stdout"].encode("latin-1")
    if case.says is not None:
        assert stdout == case.says, said
    if case.exit_code is not None:
        assert run["exit_code"] == case.exit_code, said
    assert re.search(case.complains, run["stderr"]), said
    assert len(stdout) <= case.limits.get("output_bytes", 1 << 20)
    assert run["backend"] == backend


def _parameters() -> Iterator[Any]:
    for backend in ALL:
        for user in _users(backend):
            for table in ("attacks", "honest") if user != "system" else ("attacks",):
                for case in TABLES[table]:
                    if backend in case.backends and (case.image == "py" or user == "own"):
                        name = f"{table}-{backend}-{user}-{case.name}"
                        yield pytest.param(backend, user, table, case.image, case, id=name)


@pytest.mark.parametrize(("backend", "user", "table", "image", "case"), _parameters())
def test_ends_as_it_must(backend: str, user: str, table: str, image: str, case: Case, drivers: Drivers) -> None:
    if image == "py-sci":
        pytest.importorskip("sympy")
    key = _key(backend, user, table, image)
    check(case, drivers.runs(key)[key[3].index(case.name)], backend)


@pytest.mark.parametrize(("backend", "user"), [(backend, user) for backend in ALL for user in _users(backend)])
class TestTheNextRun:
    """On one worker, so that a fork server is the same for all."""

    names = ("look", "soil", "look", "chance", "chance", "hold a secret")

    def runs(self, drivers: Drivers, backend: str, user: str) -> list[Any]:
        runs = drivers.runs((backend, user, "state", self.names, "py"))
        assert [(run["outcome"], run["harm"]) for run in runs] == [("ok", [])] * len(runs), runs
        return runs

    def test_finds_everything_as_it_was(self, drivers: Drivers, backend: str, user: str) -> None:
        before, _, after, *_ = self.runs(drivers, backend, user)
        assert json.loads(before["stdout"]) == json.loads(after["stdout"])
        assert "left" not in after["stdout"]

    def test_has_chances_of_its_own(self, drivers: Drivers, backend: str, user: str) -> None:
        once, again = (run["stdout"].strip().split(",") for run in self.runs(drivers, backend, user)[3:5])
        assert len(once) == 6 and not set(once) & set(again)

    def test_finds_no_secret_in_its_memory(self, drivers: Drivers, backend: str, user: str) -> None:
        if backend == "landlock":
            pytest.skip("it cannot look")
        _, look = drivers.runs((backend, user, "state", ("hold a secret", "look for a secret"), "py"))
        assert (look["outcome"], look["stdout"]) == ("ok", "set()\n"), look


@pytest.mark.parametrize("backend", ALL)
def test_numpy_has_chances_of_its_own(backend: str, drivers: Drivers) -> None:
    pytest.importorskip("sympy")
    once, again = drivers.runs((backend, "own", "state", ("numpy's chance",) * 2, "py-sci"))
    assert not set(once["stdout"].strip().split(",")) & set(again["stdout"].strip().split(","))


@pytest.mark.parametrize("case", [case for case in ATTACKS if case.harms_unwalled], ids=lambda case: case.name)
def test_harm_is_seen_where_nothing_is_walled(case: Case, drivers: Drivers) -> None:
    """The same programs as nobody, without a sandbox: what the tests above look at does see it."""
    (run,) = drivers.runs(("unsafe-subprocess", "nobody", "attacks", (case.name,), "py"))
    assert run["harm"], run


def test_landlock_alone_cannot_hold_a_tool() -> None:
    async def run() -> None:
        async with Sandbox("landlock", workers=1) as sandbox:
            with pytest.raises(SandboxUnavailable, match="tool"):
                await sandbox.run("print(1)", profile="tool")

    if reason := asyncio.run(probe("landlock")):
        pytest.skip(reason)
    asyncio.run(run())
