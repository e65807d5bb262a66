"""metrics.jsonl: one JSON object a line, one line a step. The log survives kill -9: a line is either whole or dropped.

SFT lines have stage="sft", `step`, loss, mean_token_accuracy, grad_norm, learning_rate, `seconds` since SFT began.
RL lines have stage="rl", `iteration`, and TRL's key names where TRL has one.
With evaluation.every there are lines with stage="evaluation", and the `iteration` that they were made after.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvlm.report.files import replace_file

Record = dict[str, Any]

# What a machine's speed and memory decide, and the seed does not.
TIME_KEYS = frozenset(
    {
        "seconds",
        "tokens_per_s",
        "wall",
        "wall_s",
        "learner/tokens_per_s",
        "learner/mfu",
        "learner/peak_memory_bytes",
    }
)


class CorruptMetricsError(ValueError):
    """A whole line of metrics.jsonl that is not a JSON object."""


class MetricsLog:
    """The metrics of one run at `path`. Nothing is kept open, so that a report can read while the run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; on return it is on disk. A number that is not finite becomes null: JSON has nothing better.

        Raises TypeError if a value is not JSON's (a tensor, say).
        """
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
        with open(self.path, "a+b") as file:
            _drop_half_line(file.fileno())
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """All whole lines in order; none if there is no file yet. Raises CorruptMetricsError."""
        if not self.path.exists():
            return []
        whole, _, _half = self.path.read_bytes().rpartition(b"\n")
        return [self._parse(number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if line]

    def truncate_after(self, iteration: int) -> None:
        """For resuming: drops lines of later iterations and a half-written last line, atomically; keeps the rest."""
        kept = [r for r in self.read() if r.get("iteration", 0) <= iteration]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        replace_file(self.path, lambda temporary: temporary.write_bytes("".join(lines).encode()))

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorruptMetricsError(f"{self.path}, line {number}: {error}; remove the line") from error
        if not isinstance(record, dict):
            raise CorruptMetricsError(f"{self.path}, line {number}: {record!r} is not an object; remove the line")
        return record


def without_times(record: Mapping[str, Any]) -> Record:
    """The record without what legitimately differs between a run and its resumed twin: times, and rates over time."""
    return {key: value for key, value in record.items() if key not in TIME_KEYS and not key.startswith("seconds/")}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _drop_half_line(descriptor: int) -> None:
    """A run that was killed within a write left no line end: the next line must not be glued to the remains."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    os.ftruncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)
