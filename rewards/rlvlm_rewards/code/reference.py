"""What the answer column says of a code problem: its tests, as JSON.

{"stdio": [[stdin, stdout], ...]}            and "float_tolerance": 1e-6, "checker": "def check(...): ..."
{"calls": [[args, expected], ...], "entry_point": "f"}    [args, kwargs, expected] too; and "float_tolerance"
{"asserts": "assert f(1) == 2", "entry_point": "f"}       and "prelude": "class Helper: ..."
{"inputs": [...], "outputs": [...]}          programs, as APPS, TACO and their kin write them
{"inputs": [...], "outputs": [...], "fn_name": "f"}       functions, likewise
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlvlm_sandbox.grading import AssertTests, CallTests, InvalidTests, StdioTests, Tests

_KEPT = 256  # a group's samples come close together, and share their reference
ENTRY_POINT = "rlvlm_entry_point"

# Goes to the end of a candidate whose results are compared with JSON, which has lists where Python has tuples. Named
# anew, so that a candidate that calls itself gets its own results. LeetCode's functions are methods of a Solution.
_ENTRY_POINT = f"""

def {ENTRY_POINT}(*args, **kwargs):
    import builtins as b
    def listed(value):
        if b.isinstance(value, (b.list, b.tuple)):
            return [listed(item) for item in value]
        if b.isinstance(value, b.dict):
            return {{key: listed(item) for key, item in value.items()}}
        return value
    module = b.globals()
    function = module[%(name)r] if %(name)r in module else b.getattr(module["Solution"](), %(name)r)
    return listed(function(*args, **kwargs))
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """tests: what the program must pass. ending: source that goes to its end."""

    tests: Tests
    ending: str = ""


@lru_cache(maxsize=_KEPT)
def read_reference(answer: str, split: bool = False) -> Reference:
    """The tests in an answer. split: an assert of an assert file is a case of its own.

    Raises InvalidTests where it is none of the forms, or its tests are none.
    """
    try:
        reference = json.loads(answer)
    except (ValueError, RecursionError) as error:  # deeper than the interpreter's stack
        raise InvalidTests(f"it is no JSON ({error}); write {_known()}") from error
    if not isinstance(reference, dict):
        raise InvalidTests(f"it is a JSON {type(reference).__name__}, not an object; write {_known()}")
    for form, (read, keys) in _FORMS.items():
        if form in reference:
            _only(reference, form, keys)
            try:
                return read(reference, split)
            except InvalidTests:
                raise
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidTests(f"its {form!r} cannot be read: {error}; mend its values") from error
    raise InvalidTests(f"it has the keys {sorted(reference)}; write {_known()}")


def _only(reference: Mapping[str, Any], form: str, keys: Sequence[str]) -> None:
    for key in reference:
        if key not in (form, *keys):
            near = difflib.get_close_matches(key, keys, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"beside {form!r} give only {', '.join(map(repr, keys))}"
            raise InvalidTests(f"it has the key {key!r}; {mend}")


def _stdio(reference: Mapping[str, Any], split: bool) -> Reference:
    cases = [(_text(stdin, "stdin"), _text(stdout, "stdout")) for stdin, stdout in _rows(reference, "stdio", (2,))]
    return Reference(StdioTests(cases, **_given(reference, "float_tolerance", "checker")))


def _calls(reference: Mapping[str, Any], split: bool) -> Reference:
    name = _entry_point(reference, "entry_point")
    cases = [tuple(case) for case in _rows(reference, "calls", (2, 3))]
    tests = CallTests(ENTRY_POINT, cases, **_given(reference, "float_tolerance"))
    return Reference(tests, _ENTRY_POINT % {"name": name})


def _asserts(reference: Mapping[str, Any], split: bool) -> Reference:
    name, source = _entry_point(reference, "entry_point"), _text(reference["asserts"], "asserts")
    return Reference(AssertTests(source, name, split=split, **_given(reference, "prelude")))


def _dataset(reference: Mapping[str, Any], split: bool) -> Reference:
    inputs, outputs = _list(reference, "inputs"), _list(reference, "outputs")
    if len(inputs) != len(outputs):
        raise InvalidTests(f"it has {len(inputs)} inputs and {len(outputs)} outputs; give one output for each input")
    if reference.get("fn_name") is None:
        return Reference(StdioTests([*zip(map(_lines, inputs), map(_lines, outputs), strict=True)]))
    name = _entry_point(reference, "fn_name")
    cases = list(zip(*_values(inputs, outputs), strict=True))
    return Reference(CallTests(ENTRY_POINT, cases), _ENTRY_POINT % {"name": name})


def _values(inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[list[list[Any]], list[Any]]:
    """Arguments and results of function calls. LiveCodeBench writes a JSON text, with a line for each argument; APPS
    and TACO write values, each result in a list of its own."""
    if all(isinstance(value, str) for value in inputs):
        args = [[json.loads(line) for line in value.split("\n") if line.strip()] for value in inputs]
        return args, [json.loads(value) if isinstance(value, str) else value for value in outputs]
    for value in inputs:
        if not isinstance(value, list):
            raise InvalidTests(f"its input {value!r:.100} is not a list of arguments; write [arg, ...]")
    if all(isinstance(value, list) and len(value) == 1 for value in outputs):
        outputs = [value[0] for value in outputs]
    return [[_integer_keys(arg) for arg in value] for value in inputs], [_integer_keys(value) for value in outputs]


def _integer_keys(value: Any) -> Any:
    """JSON has made texts of a dict's integer keys; as in the graders of APPS and TACO they become integers again."""
    if isinstance(value, dict) and all(key.lstrip("-").isdecimal() for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _rows(reference: Mapping[str, Any], key: str, lengths: tuple[int, ...]) -> list[list[Any]]:
    rows = _list(reference, key)
    for row in rows:
        if not isinstance(row, list) or len(row) not in lengths:
            counts = " or ".join(map(str, lengths))
            raise InvalidTests(f"its {key!r} has the case {row!r:.100}; a case is a list of {counts}")
    return rows


def _list(reference: Mapping[str, Any], key: str) -> list[Any]:
    value = reference.get(key)
    if not isinstance(value, list) or not value:
        raise InvalidTests(f"its {key!r} is {value!r:.100}; give a list with at least one case")
    return value


def _lines(value: Any) -> str:
    """APPS writes some texts as a list of their lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return _text(value, "input or output")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidTests(f"its {what} {value!r:.100} is not a text; put it in quotes")
    return value


def _entry_point(reference: Mapping[str, Any], key: str) -> str:
    if key not in reference:
        raise InvalidTests(f"it has no {key!r}; name the function that the tests call")
    name = _text(reference[key], key)
    if not name.isidentifier():
        raise InvalidTests(f"its {key} {name!r:.100} is no name; name the function that the tests call")
    return name


def _given(reference: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: reference[key] for key in keys if reference.get(key) is not None}


def _known() -> str:
    return 'one of {"stdio": ...}, {"calls": ...}, {"asserts": ...}, {"inputs": ..., "outputs": ...}'


_FORMS: Mapping[str, tuple[Callable[[Mapping[str, Any], bool], Reference], tuple[str, ...]]] = {
    "stdio": (_stdio, ("float_tolerance", "checker")),
    "calls": (_calls, ("entry_point", "float_tolerance")),
    "asserts": (_asserts, ("entry_point", "prelude")),
    "inputs": (_dataset, ("outputs", "fn_name")),
}
