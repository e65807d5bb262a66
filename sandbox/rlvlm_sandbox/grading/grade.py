"""Grading: candidate and tests apart, in two sandboxes; comparison where the candidate has no code."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Literal

from rlvlm_sandbox.grading.compare import same_output, same_value
from rlvlm_sandbox.grading.inside.wire import NoLinks, WireError, decode
from rlvlm_sandbox.grading.programs import driver, order
from rlvlm_sandbox.grading.tests import AssertTests, CallTests, InvalidTests, StdioTests, Tests, as_bytes, brief
from rlvlm_sandbox.grading.verdict import Case, Verdict, failed, passed, verdict_of
from rlvlm_sandbox.records import PROFILES, Limits, Outcome, Program, Run

RunProgram = Callable[[Program], Awaitable[Run]]
_ANSWERS_BYTES = 4 << 20  # of all results of CallTests; no more, as they are read and compared in this process
_AT_ONCE = 4  # cases of one grading
_TESTS_LONGER_S = 2.0  # than the candidate: its end is what they have to tell


async def grade(
    run: RunProgram,
    code: str | bytes,
    tests: Tests,
    limits: Limits,
    *,
    fail_fast: bool = False,
    trust: Literal["split", "weak"] = "split",
    language: str = "python",
) -> Verdict:
    """Whether `code` passes the author's tests.

    run: a backend's. limits: all given; of each run of the candidate. fail_fast: after a case of StdioTests failed, the
    rest is not run and counts as failed. trust: "weak" runs AssertTests in the candidate's own process, where it can
    forge the verdict: for code that nobody has trained to cheat. language: of the candidate, for StdioTests.
    Raises InvalidTests for an error of the author that only shows when the tests run.
    """
    if trust not in ("split", "weak"):
        raise ValueError(f"trust is {trust!r}; give 'split' or 'weak'")
    if language != "python" and not isinstance(tests, StdioTests):
        raise ValueError(f"language is {language!r}; {type(tests).__name__} call Python: give StdioTests")
    source = code.encode("utf-8", "surrogatepass") if isinstance(code, str) else code
    if isinstance(tests, StdioTests):
        return await _stdio(run, Program(source, limits, language=language), tests, fail_fast)
    if isinstance(tests, CallTests):
        return await _calls(run, source, tests, limits)
    return await (_weak if trust == "weak" else _asserts)(run, source, tests, limits)


# ---- stdin and stdout


async def _stdio(run: RunProgram, candidate: Program, tests: StdioTests, fail_fast: bool) -> Verdict:
    backend = ""
    slots = asyncio.Semaphore(1 if fail_fast else _AT_ONCE)
    stopped = False

    async def one(number: int) -> Case:
        nonlocal backend, stopped
        async with slots:
            if stopped:
                return failed("not run, as a case before it failed")
            ran = await run(replace(candidate, stdin=as_bytes(tests.cases[number][0])))
            backend = ran.backend
            case = await _judged(run, ran, tests, number)
            stopped = stopped or (fail_fast and not case.passed)
            return case

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_quiet(one(number))) for number in range(len(tests.cases))]
    return verdict_of([_result(task.result()) for task in tasks], backend)


async def _quiet(case: Awaitable[Case]) -> Case | InvalidTests:
    """Keeps an error of the author out of the task group, which would wrap it."""
    try:
        return await case
    except InvalidTests as error:
        return error


def _result(case: Case | InvalidTests) -> Case:
    if isinstance(case, InvalidTests):
        raise case
    return case


async def _judged(run: RunProgram, ran: Run, tests: StdioTests, number: int) -> Case:
    stdin, expected = tests.cases[number]
    if ran.outcome is not Outcome.OK:
        return failed(_last_words(ran), ran.outcome)
    if tests.checker is None:
        if same_output(ran.stdout, as_bytes(expected), tests.float_tolerance):
            return passed()
        return failed(f"case {number + 1}: the output is {brief(ran.stdout)}, not {brief(expected)}")
    texts = {"stdin": _text(stdin), "stdout": _text(ran.stdout), "expected": _text(expected)}
    payload = json.dumps({"source": tests.checker, **texts}).encode()
    checked = await run(driver("checker", payload, PROFILES["judge"]))
    if checked.outcome is Outcome.SANDBOX_ERROR:
        return failed(checked.detail, Outcome.SANDBOX_ERROR)
    word = next(iter(_lines(checked.stdout)), None)
    if word is None:
        return failed(f"case {number + 1}: the checker ended with {checked.outcome}: {_last_words(checked)}")
    if "invalid" in word:
        raise InvalidTests(word["invalid"])
    return Case(word["score"] >= 1, score=word["score"], detail=word["said"])


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


def _last_words(run: Run) -> str:
    said = run.detail or run.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:500]
    return said or f"it ended with {run.outcome}"


# ---- calls


async def _calls(run: RunProgram, code: bytes, tests: CallTests, limits: Limits) -> Verdict:
    header = {"entry_point": tests.entry_point, "calls": tests.calls}
    # What the candidate prints goes nowhere: stdout is for the answers.
    larger = replace(limits, output_bytes=max(limits.output_bytes or 0, _ANSWERS_BYTES))
    ran = await run(driver("calls", order(header, code), larger))
    if ran.outcome is Outcome.SANDBOX_ERROR:
        return verdict_of([failed(ran.detail, ran.outcome)] * len(tests.expected), ran.backend)
    answers: dict[int, dict[str, Any]] = {}
    ended = failed(_last_words(ran), Outcome.RUNTIME_ERROR if ran.outcome is Outcome.OK else ran.outcome)
    for line in _lines(ran.stdout):
        if "unloaded" in line:
            ended = failed(str(line["unloaded"]), _raised(line))
        elif isinstance(line.get("call"), int):
            answers.setdefault(line["call"], line)
    cases = [
        _compared(number, answers[number], expected, tests.float_tolerance) if number in answers else ended
        for number, expected in enumerate(tests.expected)
    ]
    return verdict_of(cases, ran.backend)


def _compared(number: int, answer: dict[str, Any], expected: Any, tolerance: float | None) -> Case:
    if "raised" in answer:
        return failed(f"case {number + 1}: {answer['raised']}", _raised(answer))
    try:
        got, _ = decode(answer["value"], dict(enumerate(answer["entries"])), NoLinks())
        if same_value(got, expected, tolerance):
            return passed()
        return failed(f"case {number + 1}: {brief(got)} is returned, not {brief(expected)}")
    except (WireError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        return failed(f"case {number + 1}: what is returned cannot be compared: {error}")


def _raised(line: dict[str, Any]) -> Outcome:
    return Outcome.MEMORY if line.get("memory") else Outcome.RUNTIME_ERROR


def _lines(output: bytes) -> Iterable[dict[str, Any]]:
    """The objects in lines of JSON; what else there is was not written by our drivers."""
    for line in output.splitlines():
        try:
            word = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(word, dict):
            yield word


# ---- assert statements


async def _asserts(run: RunProgram, code: bytes, tests: AssertTests, limits: Limits) -> Verdict:
    shared = {"entry_point": tests.entry_point, "prelude": tests.prelude}
    header = {**shared, "source": tests.source, "split": tests.split, "checks": tests.checks}
    theirs = driver("solution", order(shared, code), limits)
    ours = driver("author", json.dumps(header).encode(), _limits_of_tests(limits))
    ran, candidate = await _together(run, ours, theirs)
    words = list(_lines(ran.stdout))
    for word in words:
        if "invalid" in word:
            raise InvalidTests(word["invalid"])
    return _verdict(words, ran, candidate)


async def _together(run: RunProgram, ours: Program, theirs: Program) -> tuple[Run, Run | None]:
    """Runs both on the ends of a channel. The candidate is waited for only if its end decided anything (else None)."""
    ends = socket.socketpair()
    tasks = []
    try:
        for side, end in zip((ours, theirs), ends, strict=True):
            task = asyncio.ensure_future(run(replace(side, channel=end.fileno())))
            task.add_done_callback(lambda _, end=end: end.close())  # type: ignore[misc]
            tasks.append(task)
        ran = await tasks[0]
        return ran, await tasks[1] if tasks[1].done() or not _decided(ran) else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            end.close()


def _decided(ran: Run) -> bool:
    """Whether the tests have said all, and lay nothing on the candidate's end."""
    words = list(_lines(ran.stdout))
    by_end = any(word.get("by") == "death" or "died" in word for word in words)
    return not by_end and any("end" in word or "unloaded" in word or "invalid" in word for word in words)


def _limits_of_tests(limits: Limits) -> Limits:
    """At least the profile's: the limits are the candidate's."""
    usual = PROFILES["judge"]
    larger = {field.name: max(getattr(limits, field.name), getattr(usual, field.name)) for field in fields(Limits)}
    larger["wall_s"] = (limits.wall_s or 0) + _TESTS_LONGER_S
    return Limits(**larger)


def _verdict(words: list[dict[str, Any]], ran: Run, candidate: Run | None) -> Verdict:
    for side in (ran, candidate):
        if side is not None and side.outcome is Outcome.SANDBOX_ERROR:
            return verdict_of([failed(side.detail, Outcome.SANDBOX_ERROR)], ran.backend)
    if not any("start" in word for word in words):
        return verdict_of([failed(f"the tests did not start: {_last_words(ran)}", Outcome.SANDBOX_ERROR)], ran.backend)
    return verdict_of(_cases(words, ran, candidate), ran.backend)


def _cases(words: list[dict[str, Any]], ran: Run, candidate: Run | None) -> list[Case]:
    """One for each that the tests have; those that they did not come to have failed like the last."""
    total = next((word["cases"] for word in words if "cases" in word), 1)
    cases = [_case(word, candidate) for word in words if "passed" in word]
    rest = next((_case(word, candidate) for word in words if "unloaded" in word or "died" in word), None)
    if rest is None and cases and not cases[-1].passed:
        rest = cases[-1]
    if rest is None:
        outcome = next((side.outcome for side in (candidate, ran) if side and side.outcome is not Outcome.OK), None)
        rest = failed("the tests did not come to their end", outcome or Outcome.RUNTIME_ERROR)
    return [*cases, *[rest] * (total - len(cases))]


def _case(word: dict[str, Any], candidate: Run | None) -> Case:
    if word.get("passed"):
        return passed()
    if "unloaded" in word:
        return failed(word["unloaded"], _raised(word))
    by, said = word.get("by", "death"), word.get("said", "the candidate ended before it was asked anything")
    if by == "tests":
        return failed(said)
    if by == "memory":
        return failed(said, Outcome.MEMORY)
    said = said or "the candidate's process has ended"
    ended = candidate.outcome if by == "death" and candidate is not None else Outcome.OK
    return failed(said, Outcome.RUNTIME_ERROR if ended is Outcome.OK else ended)


async def _weak(run: RunProgram, code: bytes, tests: AssertTests, limits: Limits) -> Verdict:
    try:
        text = code.decode()
    except UnicodeDecodeError as error:
        return verdict_of([failed(f"it is no text: {error}", Outcome.RUNTIME_ERROR)], "")
    token = secrets.token_hex(16)
    header = {"code": text, "prelude": tests.prelude, "source": tests.source, "checks": tests.checks, "token": token}
    header["entry_point"] = tests.entry_point
    ran = await run(driver("weak", json.dumps(header).encode(), limits))
    if ran.outcome is Outcome.OK and ran.stdout.endswith(token.encode()):
        return verdict_of([passed()], ran.backend)
    is_assertion = _last_words(ran).startswith("AssertionError")
    outcome = Outcome.OK if is_assertion else Outcome.RUNTIME_ERROR if ran.outcome is Outcome.OK else ran.outcome
    return verdict_of([failed(_last_words(ran), outcome)], ran.backend)
