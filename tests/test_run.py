"""The run folder: never overwritten, one writer at a time, and a resumed run is the run that was started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import load_recipe, recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.run import RunFolder, whole_write

# Takes the lock; with "child", leaves a child behind that outlives it (as an engine may outlive a killed run).
_HOLDER = """
import os, sys, time
from pathlib import Path
from rlvlm.recipe.load import load_recipe
from rlvlm.run import RunFolder
root = Path(sys.argv[1])
run = RunFolder(root)
run.resume(load_recipe(root / "recipe.yaml"))
if sys.argv[2] == "child":
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
else:
    print("ready", flush=True)
time.sleep(30)
"""


def _recipe(tmp_path: Path, **keys: object) -> Recipe:
    data = {"name": "demo", "output": str(tmp_path), "tasks": {"train": [{"generator": "digits_sum"}]}}
    return recipe_from({**data, **keys})


@pytest.fixture
def started(tmp_path: Path) -> RunFolder:
    recipe = _recipe(tmp_path)
    with RunFolder.of(recipe) as run:
        run.create(recipe)
    return run


@pytest.fixture
def holder(started: RunFolder, request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    command = [sys.executable, "-c", _HOLDER, str(started.root), getattr(request, "param", "alone")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
        process.kill()


def test_a_new_run(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    with RunFolder.of(recipe) as run:
        run.create(recipe)
        assert run.root == tmp_path / "demo"
        assert load_recipe(tmp_path / "demo" / "recipe.yaml") == recipe
        assert (run.root / ".lock").read_text() == f"{os.getpid()}\n"
    assert {entry.name for entry in run.root.iterdir()} == {
        "recipe.yaml", "trajectories", "checkpoints", "images", ".lock",
    }  # fmt: skip
    assert [path.name for path in (run.metrics, run.summary, run.report)] == [
        "metrics.jsonl", "summary.json", "report.html",
    ]  # fmt: skip


def test_another_run_is_never_overwritten(started: RunFolder, tmp_path: Path) -> None:
    before = started.recipe.read_bytes()
    (tmp_path / "demo-2").mkdir()
    with pytest.raises(RecipeError) as raised:
        RunFolder(started.root).create(_recipe(tmp_path, seed=7))
    assert (raised.value.key, raised.value.value) == ("name", "demo")
    assert raised.value.problem == f"{started.root} already holds a run"
    assert raised.value.mend == "go on with it: --resume, or choose another name, like name=demo-3"
    assert started.recipe.read_bytes() == before


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="holds other files"):
        RunFolder(tmp_path / "demo").create(_recipe(tmp_path))
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == ["thesis.tex"]


def test_a_folder_whose_run_never_began_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".lock").write_text("1\n")
    (tmp_path / "demo" / ".recipe.yaml.tmp").write_text("name: de")
    with RunFolder(tmp_path / "demo") as run:
        run.create(_recipe(tmp_path))
        assert load_recipe(run.recipe).name == "demo"


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"name = demo: .*/demo holds no run to resume; leave out --resume to start it"
    ):
        RunFolder.of(_recipe(tmp_path)).resume(_recipe(tmp_path))
    assert not (tmp_path / "demo").exists()


def test_resume_with_the_same_recipe(started: RunFolder, tmp_path: Path) -> None:
    (started.checkpoints / "step-5").mkdir()
    with RunFolder(started.root) as run:
        run.resume(_recipe(tmp_path))
    assert (started.checkpoints / "step-5").is_dir()


def test_resume_names_every_key_that_differs_with_both_values(started: RunFolder, tmp_path: Path) -> None:
    other = _recipe(
        tmp_path,
        seed=3,
        rl={"objective": {"tau": 0.2}, "length": {"gate": None}},
        tasks={"train": [{"generator": "digits_sum", "levels": [1]}]},
        checkpoint={"keep": 9},
    )
    with pytest.raises(RecipeError) as raised:
        RunFolder(started.root).resume(other)
    lines = str(raised.value).splitlines()
    new = "or start a new run under another name"
    assert lines[0] == f"seed = 3: the run was started with 0; give seed=0, {new}"
    assert f"rl.objective.tau = 0.2: the run was started with 0.1; give rl.objective.tau=0.1, {new}" in lines
    assert f"rl.length.gate = null: the run was started with 0.5; give rl.length.gate=0.5, {new}" in lines
    assert any(line.startswith("tasks.train = [{generator: digits_sum,") for line in lines)
    assert len(lines) == 4 and not any("checkpoint" in line for line in lines)
    assert load_recipe(started.recipe) == _recipe(tmp_path)


def test_what_may_differ_is_kept(started: RunFolder, tmp_path: Path) -> None:
    more = _recipe(
        tmp_path,
        rl={"iterations": 21},
        checkpoint={"every": 1, "keep": 7},
        report={"trajectories": 3},
        learner={"port": 4321},
        output=f"{tmp_path}/.",
    )
    with RunFolder(started.root) as run:
        run.resume(more)
    assert load_recipe(started.recipe) == more


def test_fewer_iterations_are_refused(started: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        RunFolder(started.root).resume(_recipe(tmp_path, rl={"iterations": 19}))
    assert str(raised.value) == "rl.iterations = 19: the run was started with 20; give at least 20"


def test_a_recipe_of_another_version(started: RunFolder, tmp_path: Path) -> None:
    started.recipe.write_text(started.recipe.read_text() + "magic: 1\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml cannot be read: magic = 1: no such key.*version of rlvlm"):
        RunFolder(started.root).resume(_recipe(tmp_path))


def test_two_processes_never_write_one_run(started: RunFolder, holder: tuple[int, str], tmp_path: Path) -> None:
    pid, _ = holder
    expected = re.escape(f"process {pid} is writing {started.root}; wait for it or stop it, or choose name=demo-2")
    for take in (RunFolder(started.root).create, RunFolder(started.root).resume):
        with pytest.raises(RecipeError, match=expected):
            take(_recipe(tmp_path))


@pytest.mark.parametrize("holder", ["child"], indirect=True)
def test_a_killed_run_can_be_resumed_though_its_children_linger(
    started: RunFolder, holder: tuple[int, str], tmp_path: Path
) -> None:
    pid, child = holder
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(int(child), 0)  # it is there
        with RunFolder(started.root) as run:
            run.resume(_recipe(tmp_path))
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_ctrl_c_waits_for_the_write_at_hand() -> None:
    handler = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), whole_write():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the write")
    assert done and signal.getsignal(signal.SIGINT) is handler
    with whole_write():
        done.append("nothing pending")
    assert len(done) == 2
