"""Where the time goes, and how much memory the run's processes take together."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Clock:
    """Seconds by part. Parts do not nest."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    def seconds(self, *names: str) -> dict[str, float]:
        """Seconds of each of the named parts, and `other`: what none of the parts accounts for."""
        parts = {name: self._parts[name] for name in names}
        return {**parts, "other": self.total - sum(self._parts.values())}


class MemoryWatch:
    """Peak of the summed resident memory of this process and all its children, sampled every second. Pages that
    processes share count once for each of them, so the figure errs on the high side."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _tree_rss())
            if self._stop.wait(self._every_s):
                return


# Between fork and exec a child shows its parent's memory as its own, so that starting a small program would double a
# large parent for a moment. That moment is milliseconds; a child counts from this age on.
_CHILD_COUNTS_FROM_S = 0.25


def _tree_rss() -> int:
    root = psutil.Process()
    total = root.memory_info().rss
    for process in root.children(recursive=True):
        try:
            if time.time() - process.create_time() >= _CHILD_COUNTS_FROM_S:
                total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended between the listing and the look
            continue
    return total
