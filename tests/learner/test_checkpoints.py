"""A checkpoint is there whole or not at all."""

import signal
import subprocess
import sys

import pytest

from rlvlm.learner.checkpoints import CheckpointRefused, Checkpoints

# Writes step 1 whole; dies in the middle of step 2, with hf/ written and state/ begun.
_KILLED = """
import os, signal, sys
from pathlib import Path
from rlvlm.learner.checkpoints import Checkpoints

def fill(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "weights").write_text("whole")
    (folder / "state").mkdir()

def die(folder):
    fill(folder)
    (folder / "state" / "trainer.json").write_text('{"iteration": 2}')
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
checkpoints.write(1, fill, {"iteration": 1})
checkpoints.write(2, die, {"iteration": 2})
"""


def _fill(content):
    def fill(folder):
        for part in ("hf", "state"):
            (folder / part).mkdir()
            (folder / part / "weights").write_text(content)

    return fill


def test_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 9, 10, 100):  # as numbers: 9 comes before 10
        checkpoints.write(step, _fill(str(step)), {"iteration": step})
    assert checkpoints.steps() == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert (checkpoints.path(10) / "hf" / "weights").read_text() == "10"
    assert checkpoints.state(100) == {"iteration": 100}


def test_other_folders_are_no_checkpoints_and_stay(tmp_path):
    for name in ("sft", "initial", "unfinished-7", "step-x", "step-3.old", "xstep-4"):
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.steps() == []
    checkpoints.write(2, _fill("a"), {})
    assert checkpoints.steps() == [2]
    assert len(list(tmp_path.iterdir())) == 7


def test_killed_in_the_middle_the_previous_one_is_the_latest(tmp_path):
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [1]
    assert checkpoints.state(1) == {"iteration": 1}
    assert (tmp_path / "unfinished-2").is_dir()
    checkpoints.write(2, _fill("again"), {"iteration": 2})  # the resumed run; leftovers do not get in its way
    assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert (checkpoints.path(2) / "hf" / "weights").read_text() == "again"


def test_an_error_while_filling_leaves_what_was_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(1, _fill("a"), {})

    def full_disk(folder):
        (folder / "hf").mkdir()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(2, full_disk, {})
    assert checkpoints.steps() == [1]


def test_the_same_step_is_replaced_as_a_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.write(4, _fill("old"), {"iteration": 4, "extra": 1})
    (checkpoints.path(4) / "hf" / "leftover").write_text("x")
    checkpoints.write(4, _fill("new"), {"iteration": 4})
    assert checkpoints.state(4) == {"iteration": 4}
    assert (checkpoints.path(4) / "hf" / "weights").read_text() == "new"
    assert not (checkpoints.path(4) / "hf" / "leftover").exists()


def test_state_comes_back_with_every_bit(tmp_path):
    state = {
        "iteration": 3,
        "sampler": {"tasks": {"a/ü": [0.1 + 0.2, 1e-300]}, "buckets": {"s/1": [1 / 3, 2.0**60 + 1]}},
    }
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(3, _fill(""), state)
    assert checkpoints.state(3) == state


def test_a_file_that_is_cut_short_or_missing_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.write(step, _fill("x" * 1234), {"iteration": step})
    weights = checkpoints.path(2) / "state" / "weights"
    weights.write_text("x" * 1000)
    with pytest.raises(CheckpointRefused) as caught:
        checkpoints.state(2)
    assert caught.value.problem == f"{tmp_path / 'step-2'} is damaged: state/weights has 1,000 bytes of 1,234"
    assert caught.value.mend == "remove it, and `--resume` again: step-1 is the one before it"
    weights.unlink()
    with pytest.raises(CheckpointRefused, match="is damaged: state/weights is missing"):
        checkpoints.state(2)
    (checkpoints.path(1) / "hf" / "weights").unlink()
    with pytest.raises(CheckpointRefused, match=r"hf/weights is missing; .*there is none before it"):
        checkpoints.state(1)


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(3, _fill(""), {"iteration": 3})
    (checkpoints.path(3) / "state" / "manifest.json").unlink()
    with pytest.raises(CheckpointRefused, match="form that this version of rlvlm does not read"):
        checkpoints.state(3)
