"""How long each reward may take and how many samples it scores at a time, changeable while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlvlm_rewards import Limits, Reward
from rlvlm_rewards.loading import known_names

from rlvlm.recipe import yaml12
from rlvlm.recipe.schema import Named, Rewards
from rlvlm.tasks.errors import nearest

LIMITS_FILE = "rewards.yaml"  # in the run folder
_LIMITS: Mapping[str, tuple[type, ...]] = {"timeout_s": (int, float), "concurrency": (int,)}


class HotLimits:
    """The limits of each reward: what `file` says, if it is there, over what the recipe says.

    The file is YAML, lines like `judge: {timeout_s: 60, concurrency: 16}`. It is read again as soon as it changes; bad
    content is told through `tell` and the last good one stays.
    """

    def __init__(self, rewards: Rewards, file: Path | None, tell: Callable[[str], None]) -> None:
        self._rewards, self._file, self._tell = rewards, file, tell
        self._seen: tuple[int, int] | None = None
        self._said: dict[str, dict[str, Any]] = {}

    def __call__(self, reward: Reward) -> Limits:
        self._read()
        own: Named | None = self._rewards.named.get(reward.name)
        limits = Limits(self._rewards.timeout_s, self._rewards.concurrency, self._rewards.retries).of(reward)
        of_own = {"timeout_s": own.timeout_s, "concurrency": own.concurrency} if own else {}
        said = {key: value for key, value in of_own.items() if value is not None} | self._said.get(reward.name, {})
        return replace(limits, **said)

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            now = (status.st_mtime_ns, status.st_size)
            if now == self._seen:
                return
            self._seen, text = now, self._file.read_bytes()
        except FileNotFoundError:
            self._seen, self._said = None, {}
            return
        except OSError as error:
            self._tell(f"{self._file}: {(error.strerror or str(error)).lower()}; the limits stay as they were")
            return
        try:
            self._said = self._parsed(text)
        except ValueError as error:
            self._tell(f"{self._file}: {error}; the limits stay as they were")
        else:
            self._tell(f"{self._file}: limits of {', '.join(self._said) or 'no reward'} are in force")

    def _parsed(self, text: bytes) -> dict[str, dict[str, Any]]:
        """Raises ValueError for what is no table of limits."""
        said = yaml12.parse(text)
        if not isinstance(said, dict):
            raise ValueError("write lines like `judge: {timeout_s: 60, concurrency: 16}`")
        for name, limits in said.items():
            known = sorted({*self._rewards.named, *known_names()})
            if name not in known and ":" not in name:
                raise ValueError(f"{name!r} names no reward of this run; did you mean {nearest(name, known)!r}?")
            _check(name, limits)
        return said


def _check(name: str, limits: Any) -> None:
    if not isinstance(limits, dict) or not set(limits) <= set(_LIMITS):
        raise ValueError(f"{name} is {yaml12.show(limits)}; give timeout_s, concurrency or both")
    for key, value in limits.items():
        if not isinstance(value, _LIMITS[key]) or isinstance(value, bool):
            raise ValueError(f"{name}.{key} is {yaml12.show(value)}; give a number")
    Limits(**limits)
