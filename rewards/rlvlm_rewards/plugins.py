"""Importing what a user names, `package.module` or `path/to/file.py`: rewards here, task generators in rlvlm."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

_files: dict[Path, ModuleType] = {}
_files_lock = threading.RLock()  # re-entrant: a plugin may load another one while it is imported


class PluginError(Exception):
    """problem: what is wrong. mend: what to do about it."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(problem, mend)
        self.problem, self.mend = problem, mend

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}"


class PluginNotFound(PluginError):
    """There is no such file or module."""


class PluginBroken(PluginError):
    """Importing it raised; the problem names the exception, the file and the line."""

    @classmethod
    def by(cls, error: BaseException, what: str, file: Path | None = None) -> PluginBroken:
        """what: what was imported. file: the plugin's own file, if known, whose last line in the traceback is named."""
        told = error.msg if isinstance(error, SyntaxError) else error
        return cls(f"importing {what} raised {type(error).__name__}: {told} ({_place(error, file)})", "mend it there")


def import_plugin(place: str) -> ModuleType:
    """The module at `place`: `package.module`, or `path/to/file.py` (relative to the working directory).

    A file is executed once per process. Raises PluginNotFound, or PluginBroken whatever the plugin itself raises.
    """
    return _import_file(Path(place)) if place.endswith(".py") else _import_module(place)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no name is alike."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # foreign code may raise anything; it ends the loading either way
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            mend = "install its package, put its folder on PYTHONPATH, or name the file: `path/to/file.py:attr`"
            raise PluginNotFound(f"there is no module {error.name!r}", mend) from error
        raise PluginBroken.by(error, f"module {name!r}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    with _files_lock:
        if path not in _files:
            _files[path] = _execute(path)
        return _files[path]


def _execute(path: Path) -> ModuleType:
    """Its module name carries the path's hash: files may share a stem."""
    if not path.is_file():
        near = nearest(path.name, (other.name for other in path.parent.glob("*.py")))
        raise PluginNotFound(f"there is no file {str(path)!r}{near}", f"give a path from {Path.cwd()}")
    unique = f"rlvlm_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None  # a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickle look the module up while and after it runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # as above
        del sys.modules[unique]
        raise PluginBroken.by(error, f"file {str(path)!r}", path) from error
    return module


def _place(error: BaseException, file: Path | None) -> str:
    """`file:line` of what raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if frame.filename == str(file)]
    return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"
