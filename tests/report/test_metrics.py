from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlvlm.report.metrics import CorruptMetricsError, MetricsLog, without_times


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"stage": "sft", "step": 10, "loss": 1.5})
    for i in range(1, 5):
        log.write({"stage": "rl", "iteration": i, "reward": i / 4})
    return log


def test_one_json_line_a_record(log: MetricsLog) -> None:
    lines = log.path.read_text().splitlines()
    assert lines[0] == '{"stage": "sft", "step": 10, "loss": 1.5}'
    assert [json.loads(line)["iteration"] for line in lines[1:]] == [1, 2, 3, 4]
    assert log.read()[4] == {"stage": "rl", "iteration": 4, "reward": 1.0}


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert MetricsLog(tmp_path / "metrics.jsonl").read() == []


def test_truncating_keeps_sft_and_iterations_up_to_n(log: MetricsLog) -> None:
    log.write({"stage": "evaluation", "iteration": 2, "accuracy": 0.25})
    log.write({"stage": "evaluation", "iteration": 3, "accuracy": 0.5})
    log.truncate_after(2)
    assert log.read() == [
        {"stage": "sft", "step": 10, "loss": 1.5},
        {"stage": "rl", "iteration": 1, "reward": 0.25},
        {"stage": "rl", "iteration": 2, "reward": 0.5},
        {"stage": "evaluation", "iteration": 2, "accuracy": 0.25},
    ]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_line_is_dropped_by_all(log: MetricsLog) -> None:
    with open(log.path, "ab") as file:
        file.write(b'{"stage": "rl", "iteration": 5, "rew')
    assert [r.get("iteration") for r in log.read()] == [None, 1, 2, 3, 4]
    log.write({"stage": "rl", "iteration": 5, "reward": 0.9})
    assert log.read()[-1] == {"stage": "rl", "iteration": 5, "reward": 0.9}
    with open(log.path, "ab") as file:
        file.write(b'{"sta')
    log.truncate_after(4)
    assert log.path.read_bytes().endswith(b'"iteration": 4, "reward": 1.0}\n')


def test_a_half_written_first_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"stage"')
    assert log.read() == []
    log.write({"a": 1})
    assert log.path.read_bytes() == b'{"a": 1}\n'


def test_numbers_that_json_lacks_become_null(log: MetricsLog) -> None:
    log.write({"grad_norm": math.nan, "loss": -math.inf, "nested": {"x": [1.0, math.inf]}})
    assert log.path.read_text().splitlines()[-1] == '{"grad_norm": null, "loss": null, "nested": {"x": [1.0, null]}}'


def test_a_broken_line_in_the_middle_is_named(log: MetricsLog) -> None:
    log.path.write_bytes(b'{"a": 1}\noops\n{"a": 2}\n')
    with pytest.raises(CorruptMetricsError, match="line 2"):
        log.read()


def test_without_times_leaves_what_a_resumed_run_must_repeat() -> None:
    record = {
        "stage": "rl",
        "iteration": 3,
        "reward": 0.5,
        "tokens": 900,
        "tokens_per_s": 120.0,
        "seconds/rollout": 1.0,
        "seconds/iteration": 2.0,
        "wall": 17.0,
    }
    assert without_times(record) == {"stage": "rl", "iteration": 3, "reward": 0.5, "tokens": 900}
    assert without_times({"stage": "sft", "step": 1, "seconds": 0.6}) == {"stage": "sft", "step": 1}


def test_kill_9_leaves_every_finished_line(tmp_path: Path) -> None:
    """The writer says which line it has finished; after the kill all of these are there, whole and in order."""
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys, itertools, pathlib\n"
        "from rlvlm.report.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for i in itertools.count(1):\n"
        "    log.write({'stage': 'rl', 'iteration': i, 'filler': 'x' * 5000})\n"
        "    print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.1)
    writer.send_signal(signal.SIGKILL)
    finished = [1, *(int(line) for line in writer.stdout.read().splitlines())]
    writer.wait()
    kept = [r["iteration"] for r in MetricsLog(path).read()]
    assert kept[: len(finished)] == finished
    assert kept == list(range(1, len(kept) + 1))
