"""Seconds by part and memory of the whole tree of processes."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from rlvlm.report import clock as module
from rlvlm.report.clock import Clock, MemoryWatch


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is moved: `now[0] += seconds`."""
    time_s = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: time_s[0])
    return time_s


def test_seconds_of_parts_add_up(now):
    clock = Clock()
    with clock.part("rollout"):
        now[0] += 2.0
    now[0] += 0.25
    for _ in range(2):
        with clock.part("learner"):
            now[0] += 1.5
    now[0] += 0.75
    assert clock.total == 6.0
    assert clock.seconds("rollout", "learner", "reward") == {
        "rollout": 2.0,
        "learner": 3.0,
        "reward": 0.0,
        "other": 1.0,
    }


def test_parts_that_are_not_asked_for_are_not_other(now):
    clock = Clock()
    with clock.part("rollout"):
        now[0] += 2.0
    with clock.part("learner"):
        now[0] += 3.0
    assert clock.seconds("rollout") == {"rollout": 2.0, "other": 0.0}


def test_a_part_that_fails_counts_its_time(now):
    clock = Clock()
    with pytest.raises(RuntimeError), clock.part("rollout"):
        now[0] += 2.0
        raise RuntimeError
    assert clock.seconds("rollout") == {"rollout": 2.0, "other": 0.0}


# Grows a little later than it starts, has a child that takes more, and frees both before it ends.
_HUNGRY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "b = bytearray(b'x') * (80 << 20); print(len(b), flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
b = bytearray(b"x") * (40 << 20)
print("grown", flush=True)
input()
child.communicate("done")
"""


def test_memory_counts_children_and_their_children_and_keeps_the_peak():
    own = psutil.Process().memory_info().rss
    with MemoryWatch(every_s=0.02) as memory:
        with subprocess.Popen(
            [sys.executable, "-c", _HUNGRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as p:
            assert p.stdout is not None
            assert p.stdout.readline() == "grown\n"
            time.sleep(0.5)
            p.communicate("done")
        time.sleep(0.1)
    grown = memory.peak_bytes - own
    assert 120 << 20 < grown < 250 << 20


def test_a_child_between_fork_and_exec_does_not_double_its_parent():
    memory_of_the_parent = bytearray(b"x") * (100 << 20)
    own = psutil.Process().memory_info().rss
    with MemoryWatch(every_s=0.005) as memory:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                time.sleep(0.05)
                os._exit(0)
            os.waitpid(child, 0)
    assert len(memory_of_the_parent) == 100 << 20
    assert memory.peak_bytes - own < 50 << 20


def test_a_watch_that_hardly_lived_has_looked_once():
    with MemoryWatch(every_s=1000.0) as memory:
        pass
    assert memory.peak_bytes > 10 << 20
