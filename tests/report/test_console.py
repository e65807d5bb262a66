from __future__ import annotations

import io
import json
import os
import pty
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvlm.report.console import Console, Example, TimeLeft, duration
from rlvlm.report.metrics import MetricsLog

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BEFORE = Example("What is the sum?", "14", "<think> 7 ; 12 ;</think> 12", 8, 0.0)
AFTER = Example("What is the sum?", "14", "<think> 7 : 7 [b] 7 : 14</think> 14", 10, 1.0)


class Ticks:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def printed(act: Callable[[Console], None], clock: Callable[[], float] = time.monotonic) -> str:
    stream = io.StringIO()
    with Console(stream, clock) as console:
        act(console)
    return stream.getvalue()


def iteration(i: int, seconds: float = 6.0, **more: Any) -> dict[str, Any]:
    return {
        "iteration": i,
        "reward": 0.5,
        "accuracy": 0.625,
        "completions/mean_length": 18.25,
        "tokens_per_s": 1234.5,
        "seconds/iteration": seconds,
        **more,
    }


def test_one_plain_line_an_iteration() -> None:
    def act(console: Console) -> None:
        console.stage("rl", "20 iterations")
        console.iteration(iteration(1), 20)
        console.iteration(iteration(2, failures=3), 20)

    assert printed(act).splitlines() == [
        "rl         20 iterations",
        "  iteration  1/20  reward 0.500  accuracy 62.5%  length 18.2  1,234 tok/s  1 min 54 s left",
        "  iteration  2/20  reward 0.500  accuracy 62.5%  length 18.2  1,234 tok/s  3 unscored  1 min 48 s left",
    ]


def test_numbers_that_were_not_measured_are_dashes() -> None:
    line = printed(lambda console: console.iteration(iteration(20, reward=None, accuracy=None), 20))
    assert line == "  iteration 20/20  reward -  accuracy -  length 18.2  1,234 tok/s\n"


def test_sft_prints_about_ten_lines_and_counts_the_time_left() -> None:
    clock = Ticks()

    def act(console: Console) -> None:
        for step in range(1, 401):
            clock.now += 60 if step == 1 else 0.5  # the first step warms up
            console.sft_step(step, 400, 1.0, 0.5, 9000)

    lines = printed(act, clock).splitlines()
    assert len(lines) == 11
    assert lines[0] == "  step   1/400  loss 1.000  accuracy 50.0%  9,000 tok/s"
    assert lines[5] == "  step 200/400  loss 1.000  accuracy 50.0%  9,000 tok/s  1 min 40 s left"
    assert lines[-1] == "  step 400/400  loss 1.000  accuracy 50.0%  9,000 tok/s"


def test_time_left_is_not_moved_by_one_slow_iteration_but_follows_a_change() -> None:
    left = TimeLeft()
    assert left.seconds(10) is None
    for seconds in (6.0, 6.0, 90.0, 6.0, 6.0):
        left.add(seconds)
    assert left.seconds(10) == 60.0
    for _ in range(9):
        left.add(4.0)
    assert left.seconds(10) == 40.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_final_compares_before_and_after(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    text = printed(lambda console: console.final(summary, BEFORE, AFTER, Path("runs/tiny_demo/report.html")))
    first, second = (summary["evaluation"][stage] for stage in ("sft", "rl"))
    row = next(line for line in text.splitlines() if line.startswith("accuracy, T=1"))
    assert f"{first['accuracy']:.1%} ({100 * first['ci95'][0]:.1f}-{100 * first['ci95'][1]:.1f})" in row
    assert row.split()[-1] == f"{100 * (second['accuracy'] - first['accuracy']):+.1f}"
    for name in ("digit_sum", "largest_digit", "level 5", "style verbose"):
        assert name in text
    share = first["by_style"]["short"]
    assert f"{share['share']:.0%}, {share['accuracy']:.0%} right" in text
    assert "95% interval" in text
    assert "come from choosing other chain styles" in text
    assert "before RL: wrong, 8 tokens\n  <think> 7 ; 12 ;</think> 12\n" in text
    assert "after RL: right, 10 tokens\n  <think> 7 : 7 [b] 7 : 14</think> 14\n" in text  # [b] is no markup
    assert text.endswith("report  runs/tiny_demo/report.html\n")
    assert not CONTROL.search(text)


def test_final_of_a_run_with_sft_only(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    del summary["evaluation"]["rl"], summary["accuracy_gain"], summary["length_change"]
    text = printed(lambda console: console.final(summary, BEFORE, None, Path("report.html")))
    row = next(line for line in text.splitlines() if line.startswith("accuracy, T=1"))
    assert row.split()[-1] == "-"
    assert "after RL:" not in text


def test_colour_wishes_of_the_environment_do_not_reach_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert not CONTROL.search(printed(lambda console: console.stage("rl", "x")))


def test_characters_that_the_stream_cannot_show_do_not_end_the_run() -> None:
    raw = io.BytesIO()
    with Console(io.TextIOWrapper(raw, encoding="ascii")) as console:
        console.note("7 → 9")
        assert raw.getvalue() == b"  7 ? 9\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.TextIOWrapper, Callable[[], str]]]:
    """A real pseudo-terminal: what is written to it, and what has arrived so far."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    controller, terminal = pty.openpty()
    arrived: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                block = os.read(controller, 65536)
            except OSError:  # the other end was closed
                return
            arrived.append(block)

    reader = threading.Thread(target=drain)
    reader.start()
    stream = os.fdopen(terminal, "w", encoding="utf-8")

    def text() -> str:
        stream.close()
        reader.join(timeout=10)
        return b"".join(arrived).decode()

    yield stream, text
    os.close(controller)


def test_a_terminal_shows_a_live_bar_under_the_lines(
    terminal: tuple[io.TextIOWrapper, Callable[[], str]], run_folder: Path
) -> None:
    stream, text = terminal
    threads = threading.active_count()
    with Console(stream) as console:
        console.stage("sft", "400 steps")
        for step in range(1, 401):
            console.sft_step(step, 400, 0.5, 0.9, 9000)
        console.stage("rl", "")
        for record in MetricsLog(run_folder / "metrics.jsonl").read():
            if record["stage"] == "rl":
                console.iteration(record, 20)
        assert threading.active_count() == threads
    seen = text()
    assert "\x1b[?25l" in seen and seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor comes back
    lines = [CONTROL.sub("", line).strip() for line in seen.replace("\r", "\n").split("\n")]
    assert sum(line.startswith("iteration") for line in lines) == 20
    bars = [line for line in lines if line.endswith("left")]
    assert bars
    assert max(len(line) for line in lines) <= 80
