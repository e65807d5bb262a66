"""Ranks as Ray actors: what they give, and that a rank which ends takes the others with it and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlvlm.cluster import ray as cluster
from rlvlm.cluster.ray import RankDied, RankRaised, RayRanks
from rlvlm.recipe.errors import RecipeError, RunError


class Rank:
    """Meets the others over gloo, as a learner's rank does."""

    def __init__(self) -> None:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        self.rank = torch.distributed.get_rank()

    def total(self, value: float) -> float:
        import torch

        shared = torch.tensor(value)
        torch.distributed.all_reduce(shared)
        return float(shared)

    def pids(self) -> tuple[int, int]:
        return os.getpid(), int(os.environ["RANK"])

    def on_one(self, how: str) -> float:
        """Rank 1 comes to grief while rank 0 waits for it in a collective."""
        if self.rank == 1:
            _come_to_grief(how)
        return self.total(1.0)


def _come_to_grief(how: str) -> None:
    if how == "named":
        raise RecipeError("tasks.train[0].dataset", "x.parquet", "row 3 is no picture", "mend the row")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        os.abort()
    time.sleep(100)


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _ends_all(how: str, error: type[Exception], address: str, limit_s: float = 600.0) -> Any:
    ranks = RayRanks(Rank, 2, limit_s=600.0, address=address)
    assert ranks.call("total", [1.0, 2.5]) == [3.5, 3.5]  # each rank has its own value
    pids = ranks.call("pids")
    assert [rank for _, rank in pids] == [0, 1]
    ranks.limit_s, started = limit_s, time.monotonic()
    with pytest.raises(error) as caught:
        ranks.call("on_one", [how, how])
    assert time.monotonic() - started < 45
    assert all(_is_gone(pid) for pid, _ in pids)
    with pytest.raises(RunError, match="the ranks have ended"):
        ranks.call("pids")
    ranks.close()  # again: nothing is left to close
    return caught.value, pids[1][0]


@pytest.mark.engine
def test_a_rank_that_is_killed_is_named_as_the_cause(ray_cluster):
    """Not the other one, which lost its connection and said so first."""
    error, pid = _ends_all("killed", RankDied, ray_cluster)
    assert f"rank 1 of 2 (process {pid} " in error.problem and "was killed (SIGKILL)" in error.problem
    assert "in `on_one`" in error.problem and "--resume" in error.mend


@pytest.mark.engine
def test_a_crash_says_its_signal_and_where(ray_cluster):
    error, _ = _ends_all("crash", RankDied, ray_cluster)
    assert "crashed (SIGABRT)" in error.problem
    assert "_come_to_grief" in error.mend  # the stack


@pytest.mark.engine
def test_what_a_rank_raises_arrives_whole(ray_cluster):
    error, _ = _ends_all("named", RecipeError, ray_cluster)
    assert (error.key, error.value, error.problem) == ("tasks.train[0].dataset", "x.parquet", "row 3 is no picture")


@pytest.mark.engine
def test_a_bug_comes_with_the_ranks_traceback(ray_cluster):
    error, _ = _ends_all("bug", RankRaised, ray_cluster)
    assert "rank 1 of 2" in str(error) and "ZeroDivisionError: a bug" in str(error)
    assert "in _come_to_grief" in str(error)


@pytest.mark.engine
def test_ranks_that_do_not_answer_are_ended(ray_cluster):
    error, _ = _ends_all("hang", RankDied, ray_cluster, limit_s=5.0)
    assert "ranks 0, 1 of 2 did not answer within 5 s, in `on_one`" in error.problem


_DRIVER = """
import os, signal, sys
from cluster.test_ray import Rank
from rlvlm.cluster.ray import RayRanks

ranks = RayRanks(Rank, 2, limit_s=600.0)
print(*(pid for pid, _ in ranks.call("pids")), flush=True)
ranks.call("on_one", ["hang", "hang"])
"""


def _driver(folder: str) -> subprocess.Popen:
    path = {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": folder}
    command = [sys.executable, "-c", _DRIVER]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, **path}
    )


@pytest.mark.engine
def test_ranks_do_not_outlive_the_process_that_started_them():
    """SIGINT goes to the whole process group, as a terminal sends it."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        endings = {signal.SIGINT: _driver(folder), signal.SIGKILL: _driver(folder)}
        ranks = [int(pid) for driver in endings.values() for pid in driver.stdout.readline().split()]
        assert len(ranks) == 4
        interrupted, killed = (psutil.Process(one.pid).children(recursive=True) for one in endings.values())
        time.sleep(1)
        os.killpg(endings[signal.SIGINT].pid, signal.SIGINT)
        endings[signal.SIGKILL].kill()
        for ending, driver in endings.items():
            driver.communicate(timeout=45)
            assert driver.returncode == -ending
        deadline, pids = time.monotonic() + 30, [*ranks, *(child.pid for child in interrupted)]
        while not all(map(_is_gone, pids)) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = [pid for pid in pids if not _is_gone(pid)]
        for agent in killed:  # two of Ray's own outlive a killed driver
            if agent.is_running():
                agent.kill()
        assert left == []


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"learner\.ranks = 2: .*install rlvlm\[ray\]"):
        RayRanks(Rank, 2, limit_s=1.0)


def test_rays_sockets_fit_below_its_folder(monkeypatch, tmp_path):
    """A socket's path may have 107 characters; Ray puts them 65 below the folder."""
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(long))
    folder = cluster._short_folder()
    try:
        assert folder.is_dir() and len(str(folder)) + 65 <= 107
    finally:
        folder.rmdir()
