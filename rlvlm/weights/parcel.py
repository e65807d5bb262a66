"""The learner's side of the weight transfer on one machine: a safetensors file in shared memory. Imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

_FOLDER = Path("/dev/shm")


class Parcel:
    """Weights in shared memory for as long as the `with` block lasts.

    write: puts a safetensors file with every weight under its checkpoint name to a path. `info` is what vLLM's
    `update_weights` takes.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._path = _FOLDER / f"rlvlm-weights-{os.getpid()}.safetensors"
        self._write = write

    @property
    def info(self) -> Mapping[str, str]:
        return {"path": str(self._path)}

    def __enter__(self) -> Parcel:
        self._write(self._path)
        return self

    def __exit__(self, *exc: object) -> None:
        self._path.unlink(missing_ok=True)
