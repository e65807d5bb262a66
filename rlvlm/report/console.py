"""What a person sees while a run goes on: on a terminal a live bar under the lines, elsewhere plain lines."""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import rich.box
import rich.console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlvlm.records import Group
from rlvlm.report.decomposition import decompose, in_words
from rlvlm.report.trajectories import prompt_text

RECENT = 9  # durations that the estimate of the time left looks back on
PLAIN_WIDTH = 120
INDENT = "  "
SFT_LINES = 10  # lines that SFT prints where there is no live bar


@dataclass(frozen=True, slots=True)
class Example:
    """One sampled response to show. value: None where it was not scored."""

    prompt: str
    answer: str
    text: str
    length: int
    value: float | None

    @classmethod
    def of(cls, group: Group, index: int = 0) -> Example:
        task, trajectory = group.task, group.trajectories[index]
        value = group.scores[index].value if group.scores else None
        return cls(prompt_text(task.messages), task.answer, trajectory.text, trajectory.length, value)


class TimeLeft:
    """Seconds left, from the median of recent durations: one slow step (a checkpoint, a cold cache) hardly moves it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    def seconds(self, remaining: int) -> float | None:
        """For `remaining` more steps; None as long as nothing is known."""
        return statistics.median(self._recent) * remaining if self._recent else None


class Console:
    """Prints to `stream`. clock: monotonic seconds. `close` (or the end of a `with` block) takes the live bar away."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stdout if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):
            # A policy may say anything; a terminal that cannot show a character must not end the run.
            self._stream.reconfigure(errors="replace")
        self.live = self._stream.isatty() and not rich.console.Console(file=self._stream).is_dumb_terminal
        self._rich = rich.console.Console(
            file=self._stream,
            highlight=False,
            emoji=False,
            force_terminal=self.live,
            color_system="auto" if self.live else None,
            width=None if self.live else PLAIN_WIDTH,
        )
        self._clock = clock
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._left = TimeLeft()
        self._sft_seen: tuple[int, float] | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._bar = None

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins: "policy", "sft", "evaluation", "rl" ..."""
        self.close()
        self._left = TimeLeft()
        self._sft_seen = None
        self._print(Text.assemble((f"{name:<11}", "bold cyan"), detail))

    def note(self, text: str) -> None:
        """One line, as it is (no markup)."""
        self._print(Text(INDENT + text, style="dim"))

    def sft_step(self, step: int, total: int, loss: float, accuracy: float, tokens_per_s: float) -> None:
        """After an SFT step, 1 to `total`. accuracy: of the next token, in [0, 1]."""
        now = self._clock()
        if self._sft_seen is not None and step > self._sft_seen[0]:
            self._left.add((now - self._sft_seen[1]) / (step - self._sft_seen[0]))
        previous, self._sft_seen = self._sft_seen, (step, now)
        shown = (
            f"step {step:>{len(str(total))}}/{total}  loss {loss:.3f}  accuracy {accuracy:.1%}"
            f"  {_count(tokens_per_s)} tok/s  {self._time_left(total - step)}".rstrip()
        )
        if self.live:
            self._advance(step, total, shown)
        elif step == total or _crosses(previous[0] if previous else 0, step, total):
            self._print(Text(INDENT + shown))

    def iteration(self, record: Mapping[str, Any], total: int) -> None:
        """After an RL iteration (1 to `total`): one line from what goes into metrics.jsonl."""
        done = int(record["iteration"])
        self._left.add(float(record["seconds/iteration"]))
        shown = (
            f"iteration {done:>{len(str(total))}}/{total}  reward {_number(record['reward'], '.3f')}"
            f"  accuracy {_number(record['accuracy'], '.1%')}"
            f"  length {_number(record['completions/mean_length'], '.1f')}"
            f"  {_count(record['tokens_per_s'])} tok/s"
        )
        failures, left = record.get("failures") or 0, self._time_left(total - done)
        unscored = f"{failures} unscored" if failures else ""
        if self.live:
            self._print(Text(INDENT + shown))
            self._advance(done, total, "  ".join(part for part in (left, unscored) if part))
        else:
            self._print(Text("  ".join(part for part in (INDENT + shown, unscored, left) if part)))

    def final(
        self,
        summary: Mapping[str, Any],
        before_chain: Example | None,
        after_chain: Example | None,
        report_path: Path,
    ) -> None:
        """The table before/after, one sampled chain each, and where the report is. summary: as in summary.json."""
        self.close()
        evaluation = summary.get("evaluation", {})
        before, after = evaluation.get("sft"), evaluation.get("rl")
        self._print(Rule(str(summary["name"]), characters="─", align="left", style="dim"))
        if before or after:
            self._print(Text(""))
            self._print(_table(before, after))
            self._print(Text(""))
        for line in _gain_lines(summary, before, after):
            self._print(Text(line))
        self._examples(before_chain, after_chain)
        self._print(Text.assemble("\nreport  ", (str(report_path), "bold")))

    def _examples(self, before: Example | None, after: Example | None) -> None:
        shown = [(name, example) for name, example in (("before RL", before), ("after RL", after)) if example]
        if not shown:
            return
        self._print(Text(f"\nOne held-out picture: {shown[0][1].prompt}  (reference answer: {shown[0][1].answer})"))
        for name, example in shown:
            verdict = {None: "not scored", 1.0: "right", 0.0: "wrong"}.get(example.value, f"score {example.value}")
            self._print(Text(f"\n{name}: {verdict}, {example.length} tokens", style="bold"))
            self._print(Padding(Text(example.text.strip()), (0, 0, 0, 2), expand=False))

    def _print(self, what: Any) -> None:
        # One line an iteration stays one line in a log file, however long it is.
        self._rich.print(what, soft_wrap=not self.live and isinstance(what, Text))

    def _advance(self, done: int, total: int, shown: str) -> None:
        if self._progress is None:
            # Without the refresh thread: other parts of the run start processes, and threads do not survive a fork.
            self._progress = Progress(
                TextColumn(" "),
                BarColumn(32 if self._rich.width > 100 else 10),
                TextColumn("{task.fields[shown]}", markup=False),
                console=self._rich,
                transient=True,
                auto_refresh=False,
            )
            self._bar = self._progress.add_task("", total=total, shown="")
            self._progress.start()
        assert self._bar is not None
        self._progress.update(self._bar, completed=done, shown=shown, refresh=True)

    def _time_left(self, remaining: int) -> str:
        seconds = self._left.seconds(remaining)
        return "" if seconds is None or remaining == 0 else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """As people say it: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("held out")
    for name in ("before RL", "after RL", "change"):
        table.add_column(name, justify="right")
    both = (before or {}, after or {})
    table.add_row("accuracy, T=1", *(_with_interval(side) for side in both), _points(before, after, "accuracy"))
    greedy = [side.get("greedy_accuracy") for side in both]
    table.add_row("accuracy, greedy", *(_percent(g) for g in greedy), _points(before, after, "greedy_accuracy"))
    lengths = [side.get("mean_length") for side in both]
    table.add_row("mean length, tokens", *(_number(n, ".1f") for n in lengths), _relative(lengths), end_section=True)
    for slices, title in (("by_task", ""), ("by_level", "level ")):
        names = _names(before, after, slices)
        for name in names:
            sides = [side.get(slices, {}).get(name) for side in both]
            cells = [_percent(side["accuracy"] if side else None) for side in sides]
            change = _points(sides[0], sides[1], "accuracy")
            table.add_row(f"{title}{name}", *cells, change, end_section=name == names[-1])
    for name in _names(before, after, "by_style"):
        sides = [side.get("by_style", {}).get(name) for side in both]
        table.add_row(f"style {name}", *(_style(side) for side in sides), "")
    return table


def _gain_lines(
    summary: Mapping[str, Any], before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> Sequence[str]:
    if not (before and after):
        return ()
    lines = []
    if rise := summary.get("accuracy_gain"):
        low, high = rise["ci95"]
        lines.append(f"accuracy {rise['points']:+.1f} points (95% interval {low:+.1f} to {high:+.1f})")
    if parts := decompose(before.get("by_style", {}), after.get("by_style", {})):
        lines.append(in_words(parts))
    return lines


def _names(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, slices: str) -> list[str]:
    return list(dict.fromkeys(name for side in (before, after) if side for name in side.get(slices, {})))


def _with_interval(side: Mapping[str, Any] | None) -> str:
    if not side:
        return "-"
    low, high = side["ci95"]
    return f"{side['accuracy']:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def _style(side: Mapping[str, Any] | None) -> str:
    if not side:
        return "-"
    return f"{side['share']:.0%}" + (f", {side['accuracy']:.0%} right" if side["accuracy"] is not None else "")


def _points(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, key: str) -> str:
    first, second = (side.get(key) if side else None for side in (before, after))
    return "" if first is None or second is None else f"{100 * (second - first):+.1f}"


def _relative(pair: Sequence[float | None]) -> str:
    first, second = pair
    return "" if not first or second is None else f"{second / first - 1:+.0%}"


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _count(value: float | None) -> str:
    return _number(value, ",.0f")


def _crosses(previous: int, step: int, total: int) -> bool:
    return previous == 0 or previous * SFT_LINES // total != step * SFT_LINES // total
