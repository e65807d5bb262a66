"""What a program finds around it: the interpreter, the system's libraries, packages that are imported beforehand."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rlvlm_sandbox.records import SandboxUnavailable

_SYSTEM = (
    "/bin", "/lib", "/lib32", "/lib64", "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo",
    "/etc/alternatives", "/etc/ld.so.cache",
)  # fmt: skip
# Not what runs Python of its own after every fork (threading, random): all runs would pay for it.
_USUAL = (
    "abc", "array", "binascii", "bisect", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "io", "itertools", "json", "math", "numbers", "operator",
    "os", "re", "string", "struct", "textwrap", "time", "typing",
)  # fmt: skip
_SCIENCE = ("numpy", "sympy")
# Name -> packages beyond the standard library, imported beforehand.
IMAGES = {"py": (), "py-sci": _SCIENCE}


@dataclass(frozen=True, slots=True)
class Image:
    """python: the interpreter's file. libraries: its standard library's directories. packages: directories with
    further packages, that are put on sys.path. warm: modules that the fork server imports once, for all runs."""

    name: str
    python: str
    libraries: tuple[str, ...]
    packages: tuple[str, ...]
    warm: tuple[str, ...]

    @property
    def python_inside(self) -> str:
        """The interpreter moves to /python where there is a root of its own: its path may tell about the host."""
        return f"/python/bin/{os.path.basename(self.python)}"

    @property
    def packages_inside(self) -> tuple[str, ...]:
        return tuple(f"/packages/{index}" for index in range(len(self.packages)))

    def binds(self) -> list[tuple[str, str]]:
        """(path here, path inside) of all that can be read."""
        libraries = [(library, f"/python/{os.path.basename(library)}") for library in self.libraries]
        system = [(path, path) for path in _SYSTEM if os.path.exists(path) and not os.path.islink(path)]
        packages = list(zip(self.packages, self.packages_inside, strict=True))
        return [(self.python, self.python_inside), *libraries, *packages, *system]

    def links(self) -> dict[str, str]:
        """Link inside -> its target, for directories of the system that are links here."""
        return {path: os.path.realpath(path) for path in _SYSTEM if os.path.islink(path)}

    def environment(self, inside: bool = True) -> dict[str, str]:
        """What a program finds in os.environ; nothing of ours. inside: whether it has a root of its own."""
        prefix = "/python" if inside else os.path.dirname(os.path.dirname(self.python))
        return {
            "PATH": f"{prefix}/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": f"{prefix}/lib", "HOME": "/tmp",
            "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg",
            "MPLCONFIGDIR": "/tmp",
        }  # fmt: skip


def find_image(name: str) -> Image:
    """The image of this name, from this interpreter and its packages. Raises ValueError, SandboxUnavailable."""
    if name not in IMAGES:
        raise ValueError(f"image is {name!r}; give one of {sorted(IMAGES)}")
    python = os.path.realpath(sys.executable)
    if not sys.executable or not os.access(python, os.X_OK):
        raise SandboxUnavailable(f"image {name!r}: there is no interpreter at {python!r}")
    libraries = (os.path.realpath(f"{sys.base_prefix}/{directory}") for directory in ("lib", "lib64"))
    packages = dict.fromkeys(_directory(name, package) for package in IMAGES[name])
    return Image(
        name,
        python,
        tuple(dict.fromkeys(library for library in libraries if os.path.isdir(library))),
        tuple(packages),
        (*_USUAL, *IMAGES[name]),
    )


def _directory(image: str, package: str) -> str:
    """The directory that `package` is imported from. Raises SandboxUnavailable where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise SandboxUnavailable(
            f"image {image!r} needs {package}, which this environment lacks; pip install {package}"
        )
    return str(Path(spec.origin).resolve().parents[1])
