"""The run folder: where everything that a run writes has its place, and that only one process writes it."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rlvlm.recipe.errors import ABSENT, RecipeError
from rlvlm.recipe.load import load_recipe, save_recipe
from rlvlm.recipe.schema import Recipe
from rlvlm.recipe.yaml12 import show
from rlvlm.report.files import replace_file

_LOCK = ".lock"
# What may change when a run goes on: where it lies and is reached, and what does not touch the numbers.
_MAY_DIFFER = (
    "output",
    *(f"learner.{key}" for key in ("ranks", "zero_stage", "offload", "gradient_checkpointing")),  # cut another way
    *(f"learner.{key}" for key in ("port", "ray_address", "limit_s")),
    "checkpoint",
    "report",
)
_MAY_GROW = ("rl.iterations",)


class RunFolder:
    """Paths of a run, and its lock. `create` or `resume` takes the lock; `close`, the end of a `with` block, or the end
    of the process, however it comes, gives it back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: TextIO | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        return cls(Path(recipe.output).expanduser() / recipe.name)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def create(self, recipe: Recipe) -> None:
        """Starts a run here: the folders, the resolved recipe, the lock.

        Raises RecipeError if the folder holds another run or other files, or another process writes it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if self._foreign():
            mend = f"choose another name, like name={self._free_name()}"
            raise self._error(recipe, f"{self.root} holds other files", mend)
        self._take_lock(recipe)
        if self.recipe.exists():
            self.close()
            mend = f"go on with it: --resume, or choose another name, like name={self._free_name()}"
            raise self._error(recipe, f"{self.root} already holds a run", mend)
        self._lay_out(recipe)

    def resume(self, recipe: Recipe) -> None:
        """Takes up the run that is here.

        Raises RecipeError if there is none, if another process writes it, or if `recipe` would change what the run
        computes (rl.iterations may be raised).
        """
        if not self.recipe.is_file():
            raise self._error(recipe, f"{self.root} holds no run to resume", "leave out --resume to start it")
        self._take_lock(recipe)
        try:
            self._check_same(recipe)
        except RecipeError:
            self.close()
            raise
        self._lay_out(recipe)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _lay_out(self, recipe: Recipe) -> None:
        for folder in (self.trajectories, self.checkpoints, self.images):
            folder.mkdir(exist_ok=True)
        replace_file(self.recipe, lambda path: save_recipe(recipe, path))

    def _foreign(self) -> bool:
        ours = {_LOCK, f".{self.recipe.name}.tmp", self.trajectories.name, self.checkpoints.name, self.images.name}
        return not self.recipe.exists() and any(entry.name not in ours for entry in self.root.iterdir())

    def _take_lock(self, recipe: Recipe) -> None:
        # lockf, not flock: flock's lock lives on in children that outlast a killed run, and it could not be resumed.
        lock = open(self.root / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            problem = f"process {holder} is writing {self.root}"
            raise self._error(recipe, problem, f"wait for it or stop it, or choose name={self._free_name()}") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _check_same(self, recipe: Recipe) -> None:
        try:
            started = load_recipe(self.recipe)
        except RecipeError as error:
            problem = f"{self.recipe} cannot be read: {error}"
            raise self._error(recipe, problem, "resume it with the version of rlvlm that started it") from None
        errors = [
            RecipeError(key, new, f"the run was started with {_shown(old)}", _mend(key, old))
            for key, (old, new) in _differences(started, recipe).items()
            if not _allowed(key, old, new)
        ]
        if errors:
            raise RecipeError.of(errors)

    def _free_name(self) -> str:
        names = (f"{self.root.name}-{number}" for number in itertools.count(2))
        return next(name for name in names if not (self.root.parent / name).exists())

    def _error(self, recipe: Recipe, problem: str, mend: str) -> RecipeError:
        return RecipeError("name", recipe.name, problem, mend)


def _allowed(key: str, old: Any, new: Any) -> bool:
    if key in _MAY_GROW:
        return bool(new > old)
    return any(key == free or key.startswith(f"{free}.") for free in _MAY_DIFFER)


def _mend(key: str, old: Any) -> str:
    if key in _MAY_GROW:
        return f"give at least {old}"
    return f"give {key}={_shown(old)}, or start a new run under another name"


def _shown(value: Any) -> str:
    return "nothing" if value is ABSENT else show(value)


def _differences(old: Recipe, new: Recipe) -> Mapping[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), lists as a whole, for every key that differs."""
    before, after = dict(_flat("", old.model_dump(mode="json"))), dict(_flat("", new.model_dump(mode="json")))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{key}.{name}" if key else name, part)
    else:
        yield key, value


@contextmanager
def whole_write() -> Iterator[None]:
    """A Ctrl-C inside the block takes effect at its end, so that the write at hand is finished first."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        signal.raise_signal(signal.SIGINT)
