"""Checkpoints of a run, whole or not at all:

step-N/hf       a plain checkpoint, for transformers and vLLM
step-N/adapter  with LoRA, the adapters alone, for PEFT
step-N/state    what an exact resume needs, and manifest.json: what wrote it, and how long each file is
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlvlm.recipe.errors import RunError

MANIFEST = Path("state") / "manifest.json"
_FORMAT = 1
_VERSIONS = ("rlvlm", "torch", "deepspeed", "transformers")
_SHOWN = 5  # differences of tensors


class CheckpointRefused(RunError):
    """A checkpoint is damaged, or is not of this run's policy."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a learner's state is the state of. ranks, zero_stage: how it is cut; another learner cuts it anew, unless
    the experts are shared out (expert_parallel above 1). model: the family. dtype: of the weights. lora: `policy.lora`,
    null without. trained: shapes of the parameters that train, by name."""

    ranks: int
    zero_stage: int
    expert_parallel: int
    model: str
    dtype: str
    lora: Mapping[str, Any] | None
    trained: Mapping[str, list[int]]

    def write(self, folder: Path) -> None:
        """Into the checkpoint that is being written to `folder`."""
        versions = {name: metadata.version(name) for name in _VERSIONS}
        (folder / MANIFEST).write_text(
            json.dumps({"format": _FORMAT, "versions": versions, "learner": asdict(self)}, indent=1)
        )

    @classmethod
    def read(cls, folder: Path) -> Facts:
        return cls(**json.loads((folder / MANIFEST).read_text())["learner"])

    def check(self, of: Facts, folder: Path) -> None:
        """Raises CheckpointRefused if this, which `folder` says, is not the state of a learner like `of`."""
        found = list(self._differences(of))
        if found:
            raise CheckpointRefused(
                f"{folder} is the state of another policy: {'; '.join(found)}",
                mend="give the recipe that it was written with, or start another run from its weights: stages=[rl] "
                f"policy.model={folder / 'hf'}",
            )

    def _differences(self, of: Facts) -> Iterator[str]:
        fixed = ("ranks", "zero_stage") if self.expert_parallel > 1 else ()
        for name in ("model", "dtype", "lora", "expert_parallel", *fixed):
            if getattr(self, name) != getattr(of, name):
                yield f"{name} {_shown(getattr(self, name))} there, {_shown(getattr(of, name))} here"
        if self.lora != of.lora:
            return  # else each adapter would be told too
        names = [name for name in {**self.trained, **of.trained} if self.trained.get(name) != of.trained.get(name)]
        for name in names[:_SHOWN]:
            there, here = (_shape(facts.trained.get(name)) for facts in (self, of))
            yield f"{name} {there} there, {here} here"
        if len(names) > _SHOWN:
            yield f"and {len(names) - _SHOWN} more parameters"


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value) if isinstance(value, Mapping) else str(value)


def _shape(shape: list[int] | None) -> str:
    return "does not train" if shape is None else "x".join(map(str, shape)) or "a number"


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
        _write_sizes(unfinished)
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
        """The trainer's part. Raises CheckpointRefused if a file of the checkpoint is not what was written."""
        self._verify(step)
        state: dict[str, Any] = json.loads((self.path(step) / "state" / "trainer.json").read_text())
        return state

    def _verify(self, step: int) -> None:
        folder = self.path(step)
        manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
        if manifest.get("format") != _FORMAT:
            raise self._refused(step, "is of a form that this version of rlvlm does not read")
        found = _sizes(folder)
        for name, size in manifest["files"].items():
            if name not in found:
                raise self._refused(step, f"is damaged: {name} is missing")
            if found[name] != size:
                raise self._refused(step, f"is damaged: {name} has {found[name]:,} bytes of {size:,}")

    def _refused(self, step: int, problem: str) -> CheckpointRefused:
        older = [one for one in self.steps() if one < step]
        before = f"{self.path(older[-1]).name} is the one before it" if older else "there is none before it"
        return CheckpointRefused(f"{self.path(step)} {problem}", f"remove it, and `--resume` again: {before}")


def _write_sizes(folder: Path) -> None:
    """The last thing that is written to a checkpoint."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.is_file() else {"format": _FORMAT}
    path.write_text(json.dumps({**manifest, "files": _sizes(folder)}, indent=1))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file but the manifest, by its path in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name != str(MANIFEST)}
