"""Every attack and every ordinary program, on every backend that holds here, as root and as nobody.

One driver process for each backend and user runs them one after another, and looks after the host after each.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rlvlm_sandbox

from .attacks import ATTACKS
from .cases import ALL, Case
from .driver import TABLES
from .honest import HONEST

_NOBODY = {"user": 65534, "group": 65534, "extra_groups": ()}
_SYSTEM_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")
# own: this process's user and interpreter. nobody: one without any rights. system: this user, but an interpreter that
# everybody can read, which root leaves its rights for.
USERS = ("own", "nobody", "system")


def _users(backend: str) -> Sequence[str]:
    return USERS if backend != "namespaces" else USERS[:2]  # there root's rights are left in any case


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
def folder() -> Any:
    """What a driver needs, where anybody can read it."""
    with tempfile.TemporaryDirectory() as name:
        for package, to in ((Path(rlvlm_sandbox.__file__).parent, "rlvlm_sandbox"), (Path(__file__).parent, "attacks")):
            shutil.copytree(package, f"{name}/{to}", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield name


_answers: dict[tuple[Any, ...], Any] = {}


def drive(folder: str, backend: str, user: str, table: str, names: Sequence[str], image: str = "py") -> list[Any]:
    """How each of the named cases ended. Skips with the reason where the backend does not hold."""
    key = (backend, user, table, tuple(names), image)
    if key not in _answers:
        job = {"backend": backend, "image": image, "table": table, "names": list(names)}
        done = subprocess.run(
            [_interpreter(user), "-B", "-m", "attacks.driver", json.dumps(job)], cwd=folder, env={}, text=True,
            capture_output=True, timeout=300, **(_NOBODY if user == "nobody" else {}),
        )  # fmt: skip
        _answers[key] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr}
    assert "failed" not in _answers[key], _answers[key]["failed"]
    if "unavailable" in _answers[key]:
        pytest.skip(_answers[key]["unavailable"])
    return list(_answers[key]["runs"])


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


def _parameters(cases: Sequence[Case], image: str) -> list[Any]:
    return [
        pytest.param(backend, user, case, id=f"{backend}-{user}-{case.name}")
        for backend in ALL
        for user in _users(backend)
        for case in cases
        if backend in case.backends and case.image == image
    ]


@pytest.mark.parametrize(("backend", "user", "case"), _parameters(ATTACKS, "py"))
def test_attack(backend: str, user: str, case: Case, folder: str) -> None:
    names = all_of("attacks", backend)
    check(case, drive(folder, backend, user, "attacks", names)[names.index(case.name)], backend)


@pytest.mark.parametrize(("backend", "user", "case"), _parameters(HONEST, "py"))
def test_honest_program(backend: str, user: str, case: Case, folder: str) -> None:
    names = all_of("honest", backend)
    check(case, drive(folder, backend, user, "honest", names)[names.index(case.name)], backend)


@pytest.mark.parametrize(
    ("backend", "user", "case"), [p for p in _parameters(HONEST, "py-sci") if p.values[1] == "own"]
)
def test_honest_science(backend: str, user: str, case: Case, folder: str) -> None:
    pytest.importorskip("sympy")
    names = all_of("honest", backend, "py-sci")
    check(case, drive(folder, backend, user, "honest", names, "py-sci")[names.index(case.name)], backend)


@pytest.mark.parametrize(("backend", "user"), [(backend, user) for backend in ALL for user in _users(backend)])
class TestTheNextRun:
    """On one worker, so that a fork server is the same for all."""

    names = ("look", "soil", "look", "chance", "chance", "hold a secret")

    def runs(self, folder: str, backend: str, user: str) -> list[Any]:
        runs = drive(folder, backend, user, "state", self.names)
        assert [(run["outcome"], run["harm"]) for run in runs] == [("ok", [])] * len(runs), runs
        return runs

    def test_finds_everything_as_it_was(self, folder: str, backend: str, user: str) -> None:
        before, _, after, *_ = self.runs(folder, backend, user)
        assert json.loads(before["stdout"]) == json.loads(after["stdout"])
        assert "left" not in after["stdout"]

    def test_has_chances_of_its_own(self, folder: str, backend: str, user: str) -> None:
        once, again = (run["stdout"].split(" ") for run in self.runs(folder, backend, user)[3:5])
        assert len(once) >= 6 and not set(once) & set(again)

    def test_finds_no_secret_in_its_memory(self, folder: str, backend: str, user: str) -> None:
        if backend == "landlock":
            pytest.skip("it cannot look")
        _, look = drive(folder, backend, user, "state", ("hold a secret", "look for a secret"))
        assert (look["outcome"], look["stdout"]) == ("ok", "set()\n"), look


@pytest.mark.parametrize("backend", ALL)
def test_numpy_has_chances_of_its_own(backend: str, folder: str) -> None:
    pytest.importorskip("sympy")
    once, again = drive(folder, backend, "own", "state", ("numpy's chance",) * 2, "py-sci")
    assert not set(once["stdout"].split()) & set(again["stdout"].split())


@pytest.mark.parametrize("case", [case for case in ATTACKS if case.harms_unwalled], ids=lambda case: case.name)
def test_harm_is_seen_where_nothing_is_walled(case: Case, folder: str) -> None:
    """The same programs as nobody, without a sandbox: what the tests above look at does see it."""
    (run,) = drive(folder, "unsafe-subprocess", "nobody", "attacks", (case.name,))
    assert run["harm"], run
