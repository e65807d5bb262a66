"""Makes a CUDA-built torchvision importable beside a CPU-only torch. Does nothing anywhere else.

The defect: where the package index has no CPU build of torchvision, pip installs the CUDA build. Its C++ library cannot
load beside a CPU torch, the operators' schemas are then never declared, and `import torchvision` fails with "operator
torchvision::nms does not exist"; vLLM and the Kimi image processor fail with it. torchvision's transforms are pure
torch and work once the schemas exist. torchaudio and torchcodec cannot load at all beside a CPU torch: they are hidden,
so that `importlib.util.find_spec` finds nothing and their users take their other path.

It must run before anything imports torchvision, in every process (vLLM's spawned workers too), so the wheel installs it
as a top-level module with a `.pth` file that calls it at interpreter start. It imports nothing heavy: a hook on the
import system waits for `torchvision`. Checked with the versions below; for any other pair it stays out of the way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from types import ModuleType

CHECKED = {"torch": ("2.13.0+cpu",), "torchvision": ("0.28.0",)}
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # keeps the torch.library.Library alive: its schemas vanish with it


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def needed() -> bool:
    """Whether this installation is one that the mend was checked on: a CPU torch beside a CUDA-built torchvision."""
    return all(_version(name) in versions for name, versions in CHECKED.items())


class _DeclareSchemasFirst(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                library.define(schema)
            _declared.append(library)
        # Never finds anything itself: the ordinary finders go on.


def install() -> None:
    """Called by the `.pth` file at interpreter start."""
    if not needed():
        return
    for name in ("torchaudio", "torchcodec"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if "torchvision" not in sys.modules and not any(isinstance(f, _DeclareSchemasFirst) for f in sys.meta_path):
        sys.meta_path.insert(0, _DeclareSchemasFirst())
