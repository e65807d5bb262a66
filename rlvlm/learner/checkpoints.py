"""Checkpoints of a run: step-N/hf (a plain checkpoint) and step-N/state (what an exact resume needs), whole or not at
all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Checkpoints:
    """The checkpoints in `folder`, of which the last `keep` stay. A step's folder gets its name only once it is
    complete, so a half-written one is never taken for a checkpoint."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """The complete ones, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def write(self, step: int, fill: Callable[[Path], None], state: dict[str, Any]) -> None:
        """`fill(folder)` writes hf/ and state/; `state` is the trainer's part, JSON-able."""
        unfinished = self._folder / f"unfinished-{step}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        fill(unfinished)
        (unfinished / "state" / "trainer.json").write_text(json.dumps(state))
        if self.path(step).exists():
            self._remove(step)
        unfinished.rename(self.path(step))
        for old in self.steps()[: -self._keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        """By a rename first: half of a removed folder must not look like a checkpoint."""
        removed = self._folder / "removed"
        shutil.rmtree(removed, ignore_errors=True)
        self.path(step).rename(removed)
        shutil.rmtree(removed)

    def state(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.path(step) / "state" / "trainer.json").read_text())
        return state
