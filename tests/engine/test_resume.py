"""A run killed with SIGKILL at any point goes on with the numbers of an uninterrupted one; Ctrl-C leaves no process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlvlm.report.metrics import MetricsLog, without_times
from tests.conftest import DEMO, ROOT, rlvlm

pytestmark = pytest.mark.engine

_SMALL = (
    "stages=[rl]", "rl.iterations=5", "rl.pool=40", "rl.prompts=8", "rl.samples=4", "rl.minibatches=2",
    "rl.length.start_iteration=2", "evaluation.tasks=12", "evaluation.samples=1", "evaluation.every=2",
    "checkpoint.every=2", "sft.ranks=1",
)  # fmt: skip


def _arguments(demo: Path, output: Path) -> list[str]:
    model = demo / "checkpoints" / "sft" / "hf"
    return ["train", str(DEMO), f"policy.model={model}", f"output={output}", *_SMALL]


def _lines(run: Path) -> list[dict]:
    return [without_times(line) for line in MetricsLog(run / "metrics.jsonl").read()]


def _engine_processes() -> list[psutil.Process]:
    """Processes that rlvlm's engines live in, wherever they hang in the process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if "RLVLM_ENGINE_PARENT" in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def _gone(before: set[int], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while {process.pid for process in _engine_processes()} - before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def uninterrupted(demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    done = rlvlm(*_arguments(demo, output), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = _lines(output / "tiny_demo")
    assert [line["iteration"] for line in lines if line["stage"] == "rl"] == [1, 2, 3, 4, 5]
    assert [line["iteration"] for line in lines if line["stage"] == "evaluation"] == [0, 2, 4, 5]
    return lines


@pytest.mark.parametrize("point", ["rollout", "learner", "checkpoint"])
def test_killed_and_resumed_equals_uninterrupted(point, demo, uninterrupted, tmp_path):
    before = {process.pid for process in _engine_processes()}
    arguments = _arguments(demo, tmp_path)
    killer = [sys.executable, str(Path(__file__).with_name("kill_at.py")), point, *arguments]
    killed = subprocess.run(killer, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    run = tmp_path / "tiny_demo"
    assert _gone(before), "the engine outlived its trainer"
    assert not (run / "summary.json").exists()
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-2"]

    resumed = rlvlm(*arguments, "--resume", timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumes after iteration 2" in resumed.stdout
    assert _lines(run) == uninterrupted
    assert (run / "summary.json").exists() and (run / "report.html").exists()


def test_ctrl_c_says_how_to_go_on_and_leaves_no_process(demo, tmp_path):
    before = {process.pid for process in _engine_processes()}
    with subprocess.Popen(
        [sys.executable, "-m", "rlvlm", *_arguments(demo, tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if "iteration 2/5" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-3000:]
    assert "--resume" in errors and "Traceback" not in errors
    assert _gone(before)
    _, alive = psutil.wait_procs(children, timeout=10)
    # A zombie holds nothing; in a container nobody may be there to reap it.
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)
    assert MetricsLog(tmp_path / "tiny_demo" / "metrics.jsonl").read()[-1]["iteration"] >= 2
