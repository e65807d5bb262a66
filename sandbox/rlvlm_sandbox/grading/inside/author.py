"""The tests' side: runs the author's source, with a stand-in for the candidate's function, and says what passed.

No code of the candidate is here, and nothing of what it sends is run: values are rebuilt as plain data, of this side's
own classes. The verdict leaves by a descriptor that the author's prints do not reach; the exit status says nothing.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import json
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rlvlm_sandbox.grading.inside.peer import Channel, Gone, Peer, Remote, RemoteCallable, builtin_exception
from rlvlm_sandbox.grading.inside.wire import Entry, WireError, decode

_CHANNEL = 3
_SETTLE = "__settle__"
_CONTROL = (
    StopIteration,
    StopAsyncIteration,
)  # exceptions that steer loops, and are not to be taken for the tests' own


class CandidateFailed(BaseException):
    """The candidate ended, or did what no test can expect. No `except Exception` takes it, and it is remembered."""


class AuthorPeer(Peer):
    """died: whether the candidate's process has ended. failure_said: why the candidate can pass no more."""

    def __init__(self, channel: Channel, module: types.ModuleType) -> None:
        super().__init__(channel)
        self._module = module
        self._unsettled: list[tuple[Any, dict[int, Entry], dict[int, Any]]] = []
        self.died = False
        self.failure_said = ""
        self.last_raised: BaseException | None = None

    def find_class(self, name: str) -> type | None:
        kind = self._module.__dict__.get(name)
        return kind if isinstance(kind, type) and kind.__module__ == "__main__" else None

    def class_name(self, kind: type) -> str | None:
        return kind.__name__ if kind.__module__ == "__main__" else None

    def may_get(self, value: object, name: str) -> bool:
        """Nothing that leads to the tests' globals or frames, and of the library nothing that leads to files: a path
        would do to write the verdict."""
        is_open = type(value).__module__ == "__main__" or type(value) in (io.StringIO, io.BytesIO)
        return is_open and not name.startswith("_")

    def raised(self, names: Sequence[str], args: tuple[Any, ...], said: str) -> BaseException:
        own = next((kind for name in names if (kind := self.find_class(name)) is not None), None)
        kind = own if own is not None and issubclass(own, Exception) else builtin_exception(names)
        if not issubclass(kind, Exception) or issubclass(kind, _CONTROL):
            return self.fail(said)
        try:
            error = kind.__new__(kind, *args)
        except Exception:  # noqa: BLE001 (arguments that the candidate has chosen)
            error = Exception(said)
        self.last_raised = error
        return error

    def hello(self) -> Any:
        """The first message: that the code is loaded, or what it raised."""
        return self._channel.receive()

    def fail(self, said: str) -> CandidateFailed:
        self.failure_said = self.failure_said or said
        return CandidateFailed(said)

    def ask(self, message: list[Any], own: dict[int, Any] | None = None) -> Any:
        self.settle()
        try:
            return super().ask(message, own)
        except Gone:
            self.died = True
            raise self.fail("the candidate's process has ended") from None
        except WireError as error:
            raise self.fail(f"its answer cannot be taken: {error}") from None

    def returned(self, value: Any, entries: Mapping[int, Entry], own: dict[int, Any]) -> Any:
        """What the candidate changed in place arrives with the next statement: in `f(items) == sorted(items)` the
        items are still the author's. A function that returns None is one that is called for its changes."""
        changed = {number: entry for number, entry in entries.items() if number in own}
        if changed:
            self._unsettled.append((value, dict(entries), own))
        if value is None:
            self.settle()
            return None
        unchanged = {number: item for number, item in own.items() if number not in changed}
        return decode(value, entries, self, unchanged)[0]

    def settle(self) -> None:
        while self._unsettled:
            value, entries, own = self._unsettled.pop(0)
            try:
                decode(value, entries, self, own, fill=True)
            except WireError as error:
                raise self.fail(f"what it changed cannot be taken: {error}") from None


class Borrowed:
    """A class that only the candidate defines. What it makes can be handed to the candidate, and nothing else: whatever
    else the tests did with it, the candidate's code would decide on."""

    def __init__(self, peer: AuthorPeer, kind: RemoteCallable) -> None:
        self._peer, self._kind = peer, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Held:
        made = self._kind(*args, **kwargs)
        if not isinstance(made, Remote):
            raise self._peer.fail(f"{self._kind.__name__} is no class of the candidate's")
        return Held(self._peer, made._number, made.__name__)


def _refuses(self: Held, *_: object) -> Any:
    name = self.__dict__["__name__"]
    raise NameError(f"name {name!r}: only the candidate defines this class", name=name)


class Held(Remote):
    """An object of a borrowed class."""

    __getattr__ = __bool__ = __len__ = __str__ = __iter__ = __getitem__ = __setitem__ = __delitem__ = _refuses
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __sub__ = __mul__ = _refuses
    __hash__ = object.__hash__


class _Settling(ast.NodeTransformer):
    """Puts a call of `settle` before every statement."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and statements and isinstance(statements[0], ast.stmt):
                setattr(node, field, list(self._settled(statements)))
        return node

    def _settled(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in statements:
            if not _stays_first(statement):
                call = ast.Call(ast.Name(_SETTLE, ast.Load()), [], [])
                yield ast.fix_missing_locations(ast.copy_location(ast.Expr(call), statement))
            yield statement


def _stays_first(statement: ast.stmt) -> bool:
    """Docstrings and imports from __future__."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return True
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


class Tests:
    """The author's source as cases: one, or one for each statement with an assert."""

    def __init__(self, source: str, split: bool, checks: str | None) -> None:
        tree = ast.parse(source, "tests")
        self.missing_names = _loaded(tree) - _bound(tree)
        body = _unwrapped(tree.body, checks) if split and checks else tree.body
        self._calls_check = bool(checks) and body is tree.body
        self.statements: list[tuple[types.CodeType, bool]] = []
        for statement in body if split else ():
            self.statements.append((_compiled([statement]), _asserts(statement)))
        if not any(is_case for _, is_case in self.statements):
            self.statements = [(_compiled(body), True)]

    def run(self, module: types.ModuleType, entry: object) -> Iterator[BaseException | None]:
        """What each case ended with; nothing more after a statement that is no case failed."""
        for code, is_case in self.statements:
            error = self._run(code, module, entry)
            if is_case:
                yield error
            if error is not None and (not is_case or isinstance(error, (CandidateFailed, SystemExit))):
                return

    def _run(self, code: types.CodeType, module: types.ModuleType, entry: object) -> BaseException | None:
        try:
            exec(code, module.__dict__)
            if self._calls_check:
                module.__dict__["check"](entry)
        except BaseException as error:  # noqa: BLE001 (the author's code: a test that fails raises something)
            return error
        return None


def _compiled(statements: list[ast.stmt]) -> types.CodeType:
    tree = _Settling().visit(ast.Module(list(statements), []))
    return compile(tree, "tests", "exec", dont_inherit=True)


def _unwrapped(body: list[ast.stmt], argument: str) -> list[ast.stmt]:
    """The statements of `check`, in place of its definition; unless one of them only works in a function."""
    for index, statement in enumerate(body):
        if isinstance(statement, ast.FunctionDef) and statement.name == "check":
            inner = [node for child in statement.body for node in ast.walk(child)]
            if any(isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom, ast.Nonlocal)) for node in inner):
                return body
            bind = ast.parse(f"{argument} = __entry__").body
            return [*body[:index], *body[index + 1 :], *bind, *statement.body]
    return body


def _asserts(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def _loaded(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            bound.add(node.name)
    return bound


class _Verdict:
    """One JSON object a line."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        nowhere = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.close(nowhere)

    def say(self, **what: Any) -> None:
        os.write(self._fd, json.dumps(what).encode() + b"\n")

    def end(self, **what: Any) -> NoReturn:
        self.say(**what)
        os._exit(0)


def main(payload: bytes) -> None:
    order = json.loads(payload)
    verdict = _Verdict()
    verdict.say(start=True)
    module = types.ModuleType("__main__")
    drivers_main, sys.modules["__main__"] = sys.modules["__main__"], module
    peer = AuthorPeer(Channel(_CHANNEL), module)
    setattr(builtins, _SETTLE, peer.settle)
    tests = _prepare(order, module, verdict)
    entry = _meet(peer, order["entry_point"], tests, module, verdict)
    module.__dict__[order["entry_point"]] = module.__dict__["__entry__"] = entry
    verdict.say(cases=sum(is_case for _, is_case in tests.statements))
    for error in tests.run(module, entry):
        verdict.say(**_case(error, peer, tests.missing_names))
        if error is not None and peer.died:
            break
    del drivers_main
    verdict.end(end=True)


def _prepare(order: dict[str, Any], module: types.ModuleType, verdict: _Verdict) -> Tests:
    """Runs the prelude; a failure is the author's."""
    try:
        tree = _Settling().visit(ast.parse(order["prelude"], "prelude"))
        exec(compile(tree, "prelude", "exec", dont_inherit=True), module.__dict__)
        return Tests(order["source"], order["split"], order["checks"])
    except BaseException as error:  # noqa: BLE001 (the author's code, whatever it raises)
        verdict.end(invalid=f"{_place(error, 'prelude')}: {type(error).__name__}: {error}")


def _meet(peer: AuthorPeer, entry_point: str, tests: Tests, module: types.ModuleType, verdict: _Verdict) -> object:
    """Waits for the candidate to load."""
    try:
        hello = peer.hello()
        if hello[0] != "ready":
            verdict.end(unloaded=str(hello[-1]), memory="MemoryError" in hello[1])
        peer.named.add(entry_point)
        _supply(peer, tests.missing_names - {entry_point, *dir(builtins), *module.__dict__}, module)
    except BaseException as error:  # noqa: BLE001 (nothing here is the author's: it did not load, or forges)
        verdict.end(died=True, said="" if isinstance(error, Gone) else f"{type(error).__name__}: {error}"[:500])
    return RemoteCallable(peer, 0, entry_point)


def _supply(peer: AuthorPeer, missing: set[str], module: types.ModuleType) -> None:
    """What the tests name and nobody here defines: modules of the standard library, which authors forget to import, are
    ours; of the candidate's there are its classes, to make arguments of. A function of its would judge itself."""
    for name in missing & sys.stdlib_module_names:
        module.__dict__[name] = importlib.import_module(name)
    missing -= sys.stdlib_module_names
    if missing:
        for name, value in peer.ask(["classes", sorted(missing)]):
            if name in missing and type(value) is RemoteCallable:
                module.__dict__[name] = Borrowed(peer, value)


def _case(error: BaseException | None, peer: AuthorPeer, missing: set[str]) -> dict[str, Any]:
    """by: who is to blame for a failure, the candidate if its exception came through all tests."""
    is_exit = isinstance(error, SystemExit) and not error.code
    if (error is None or is_exit) and not peer.failure_said:
        return {"passed": True}
    if peer.died:
        return {"passed": False, "by": "death", "said": peer.failure_said}
    if isinstance(error, ImportError) and error is not peer.last_raised:
        return {"invalid": f"{_place(error, 'tests')}: {type(error).__name__}: {error}"}
    if isinstance(error, NameError) and error is not peer.last_raised and error.name in missing:
        mend = "neither the tests nor the prelude define it; put it into the prelude"
        return {"invalid": f"{_place(error, 'tests')}: {error}: {mend}"}
    is_candidates = error is None or isinstance(error, CandidateFailed) or error is peer.last_raised
    said = peer.failure_said or (_text(error) if error else "")
    where = "" if error is None else f"{_place(error, 'tests')}: "
    by = "memory" if isinstance(error, MemoryError) else "candidate" if is_candidates else "tests"
    return {"passed": False, "by": by, "said": where + said}


def _place(error: BaseException, source: str) -> str:
    """`tests, line 3`: the innermost line of the author's."""
    if isinstance(error, SyntaxError) and error.filename in ("tests", "prelude"):
        return f"{error.filename}, line {error.lineno}"
    place, step = source, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in ("tests", "prelude"):
            place = f"{step.tb_frame.f_code.co_filename}, line {step.tb_lineno}"
        step = step.tb_next
    return place


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (an exception class of the author's)
        text = ""
    return f"{type(error).__name__}: {text}"[:500].removesuffix(": ")
