"""What goes between our server and our client, as JSON. Bytes are base64. Whoever sends it is not trusted."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args

from rlvlm_sandbox.grading import AssertTests, CallTests, Case, StdioTests, Tests, Verdict
from rlvlm_sandbox.grading.inside.wire import NoLinks, WireError, decode, encode
from rlvlm_sandbox.records import Limits, Outcome, Profile, Program, Run

Kinds = Mapping[str, type | tuple[type, ...]]
NUMBER, TEXT_OR_NONE = (int, float), (str, type(None))
_JSON_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
               list: "a list", type(None): "null"}  # fmt: skip
_LIMITS: Kinds = {f.name: (*NUMBER, type(None)) if f.name.endswith("_s") else (int, type(None)) for f in fields(Limits)}


class BadMessage(ValueError):
    """It is not what was agreed on; the message names the field."""


def checked(message: object, kinds: Kinds, required: frozenset[str], where: str = "the message") -> dict[str, Any]:
    """The message, if it is an object with these fields and no others. Raises BadMessage."""
    if not isinstance(message, dict):
        raise BadMessage(f"{where} is {_brief(message)}; give an object")
    for name, value in message.items():
        if name not in kinds:
            raise BadMessage(f"{_brief(name)} is no field of {where}; there are {', '.join(kinds)}")
        kind = kinds[name]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(_JSON_NAMES[one] for one in allowed if one is not int or float not in allowed)
            raise BadMessage(f"{name} is {_brief(value)}; give {wanted}")
    for name in required - message.keys():
        raise BadMessage(f"{name} is missing in {where}")
    return message


def text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def data(field: str, value: str) -> bytes:
    """Raises BadMessage."""
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadMessage(f"{field} is {_brief(value)}; give base64") from error


def limits_of(message: object) -> Limits:
    """Raises BadMessage."""
    try:
        return Limits(**checked(message, _LIMITS, frozenset(), "limits"))
    except ValueError as error:
        raise BadMessage(str(error)) from error


# ---- a run


def run_order(program: Program) -> dict[str, Any]:
    return {
        "code": text(program.code), "stdin": text(program.stdin), "profile": program.profile,
        "language": program.language, "limits": asdict(program.limits),
    }  # fmt: skip


def read_run_order(message: object) -> dict[str, Any]:
    """The arguments of Sandbox.run. Raises BadMessage."""
    kinds: Kinds = {"code": str, "stdin": str, "profile": str, "language": str, "limits": dict}
    order = dict(checked(message, kinds, frozenset({"code"})))
    if order.get("profile", "judge") not in get_args(Profile):
        raise BadMessage(f"profile is {_brief(order['profile'])}; give one of {get_args(Profile)}")
    order |= {name: data(name, order[name]) for name in ("code", "stdin") if name in order}
    return order | {"limits": limits_of(order.get("limits", {}))}


def run_answer(run: Run) -> dict[str, Any]:
    return asdict(run) | {"stdout": text(run.stdout), "stderr": text(run.stderr)}


def read_run_answer(message: object) -> Run:
    """Raises BadMessage."""
    kinds: Kinds = {
        "outcome": str, "exit_code": (int, type(None)), "stdout": str, "stderr": str, "truncated": bool,
        "wall_s": NUMBER, "cpu_s": NUMBER, "peak_rss_bytes": int, "backend": str, "detail": str,
    }  # fmt: skip
    answer = dict(checked(message, kinds, frozenset(kinds)))
    streams = {name: data(name, answer[name]) for name in ("stdout", "stderr")}
    return Run(**(answer | streams | {"outcome": _outcome(answer["outcome"])}))


# ---- a grading


def grade_order(code: bytes, tests: Tests, limits: Limits, **options: bool | str) -> dict[str, Any]:
    """options: fail_fast, trust, language."""
    return {"code": text(code), "tests": _tests(tests), "limits": asdict(limits)} | options


def read_grade_order(message: object) -> dict[str, Any]:
    """The arguments of Sandbox.grade. Raises BadMessage, InvalidTests."""
    kinds: Kinds = {"code": str, "tests": dict, "limits": dict, "fail_fast": bool, "trust": str, "language": str}
    order = checked(message, kinds, frozenset({"code", "tests"}))
    if order.get("trust", "split") not in ("split", "weak"):
        raise BadMessage(f"trust is {_brief(order['trust'])}; give 'split' or 'weak'")
    read = {"code": data("code", order["code"]), "tests": _read_tests(order["tests"])}
    return order | read | {"limits": limits_of(order.get("limits", {}))}


def verdict_answer(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict)


def read_verdict_answer(message: object) -> Verdict:
    """Raises BadMessage."""
    kinds: Kinds = {"passed": int, "total": int, "outcome": str, "cases": list, "backend": str, "detail": str}
    answer = dict(checked(message, kinds, frozenset(kinds)))
    kinds = {"passed": bool, "outcome": str, "detail": str, "score": NUMBER}
    cases = [checked(case, kinds, frozenset(kinds), "a case") for case in answer["cases"]]
    answer["cases"] = tuple(Case(**(case | {"outcome": _outcome(case["outcome"])})) for case in cases)
    return Verdict(**(answer | {"outcome": _outcome(answer["outcome"])}))


def _tests(tests: Tests) -> dict[str, Any]:
    if isinstance(tests, StdioTests):
        cases: Any = [[_stream(stream) for stream in case] for case in tests.cases]
        return {"kind": "stdio", "cases": cases, "float_tolerance": tests.float_tolerance, "checker": tests.checker}
    if isinstance(tests, CallTests):
        value, entries, _ = encode([tuple(case) for case in tests.cases], NoLinks())
        tolerance = tests.float_tolerance
        return {
            "kind": "call",
            "entry_point": tests.entry_point,
            "cases": [value, entries],
            "float_tolerance": tolerance,
        }
    return {"kind": "assert"} | {name: getattr(tests, name) for name in ("source", "entry_point", "prelude", "split")}


def _read_tests(message: dict[str, Any]) -> Tests:
    message = dict(message)
    kind = message.pop("kind", None)
    tolerance = (*NUMBER, type(None))
    if kind == "stdio":
        kinds: Kinds = {"cases": list, "float_tolerance": tolerance, "checker": TEXT_OR_NONE}
        given = dict(checked(message, kinds, frozenset({"cases"}), "tests"))
        if not all(isinstance(case, list) for case in given["cases"]):
            raise BadMessage(f"cases is {_brief(given['cases'])}; give a list of [stdin, expected stdout]")
        return StdioTests(**(given | {"cases": [tuple(map(_read_stream, case)) for case in given["cases"]]}))
    if kind == "call":
        kinds = {"cases": list, "entry_point": str, "float_tolerance": tolerance}
        given = dict(checked(message, kinds, frozenset({"cases", "entry_point"}), "tests"))
        return CallTests(**(given | {"cases": _read_cases(given["cases"])}))
    if kind == "assert":
        kinds = {"source": str, "entry_point": str, "prelude": str, "split": bool}
        return AssertTests(**checked(message, kinds, frozenset({"source", "entry_point"}), "tests"))
    raise BadMessage(f"kind is {_brief(kind)}; give 'stdio', 'call' or 'assert'")


def _stream(stream: str | bytes) -> str | dict[str, str]:
    return stream if isinstance(stream, str) else {"base64": text(stream)}


def _read_stream(stream: object) -> str | bytes:
    if isinstance(stream, str):
        return stream
    given = checked(stream, {"base64": str}, frozenset({"base64"}), "a case")
    return data("base64", given["base64"])


def _read_cases(cases: list[Any]) -> Any:
    """As our client makes them: a value and its entries. Raises BadMessage."""
    if len(cases) != 2 or not isinstance(cases[1], list):
        raise BadMessage(f"cases is {_brief(cases)}; give [value, entries]")
    try:
        return decode(cases[0], dict(enumerate(cases[1])), NoLinks(), fill=True)[0]
    except WireError as error:
        raise BadMessage(f"cases: {error}") from error


def _outcome(name: str) -> Outcome:
    try:
        return Outcome(name)
    except ValueError as error:
        raise BadMessage(f"outcome is {_brief(name)}; give one of {[*map(str, Outcome)]}") from error


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
