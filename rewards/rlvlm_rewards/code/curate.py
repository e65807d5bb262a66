"""Tests of a code problem from an input generator and known solutions, as Kimi k1.5 made them (arXiv 2501.12599,
"Test Case Generation for Coding"): a test counts when at least 7 of 10 solutions agree on its output, and the problem
is kept when at least 9 of 10 pass all tests that count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from operator import eq
from typing import Any

from rlvlm_sandbox import Limits, Outcome, Run, Sandbox
from rlvlm_sandbox.grading import CallTests, StdioTests
from rlvlm_sandbox.grading.compare import same_output

_ATTEMPTS = 3  # of a run that the sandbox itself failed
_MIN_SOLUTIONS = 2

# Calls a solution's function as the grader would. Solutions are the author's, so one process does for both.
_CALL = """
import contextlib, json, sys
order = json.load(sys.stdin)
solution = {"__name__": "solution"}
with contextlib.redirect_stdout(sys.stderr):
    exec(compile(order["source"], "solution.py", "exec"), solution)
    result = solution[order["entry_point"]](*order["args"])
print(json.dumps(result))
"""


@dataclass(frozen=True, slots=True)
class _Output:
    """given: what a solution printed (a text) or returned (plain data, perhaps None)."""

    given: Any


class GeneratorFailed(ValueError):
    """The input generator is broken; the message names the seed and what it said."""


class SandboxFailed(RuntimeError):
    """The sandbox failed again and again: nothing is known about the problem."""


@dataclass(frozen=True, slots=True)
class Curated:
    """What became of a problem.

    tests: those that count; None if none does. kept: whether it may be trained on. reasons: how it came to that, in
    words. inputs: all distinct inputs, in the order of their first seeds. agreement: for each of them, the share of
    solutions in the largest group that agrees. pass_share: for each solution, the share it passes of the tests that
    count (0 if none does).
    """

    tests: StdioTests | CallTests | None
    kept: bool
    reasons: tuple[str, ...]
    inputs: tuple[str, ...]
    agreement: tuple[float, ...]
    pass_share: tuple[float, ...]


async def curate(
    generator: str,
    solutions: Sequence[str],
    tests: int = 50,
    agree: float = 0.7,
    pass_share: float = 0.9,
    *,
    sandbox: Sandbox | None = None,
    entry_point: str | None = None,
    limits: Limits | None = None,
) -> Curated:
    """Makes a problem's tests and says whether to keep it.

    generator: Python source that prints one input for the seed on its stdin; it is given the seeds 0 to tests - 1 and
    has no randomness but theirs. An input that comes twice is used once. solutions: known-good Python sources; one that
    fails on an input agrees with nobody there. entry_point: the solutions are functions of this name, and the generator
    prints a JSON list of arguments; else they are programs, compared as StdioTests compares. sandbox: an open one; None
    opens one for this call. limits: of each run.

    Raises ValueError for options out of range or fewer than 2 solutions, GeneratorFailed, SandboxFailed.
    """
    _check(solutions, tests, agree, pass_share)
    async with AsyncExitStack() as opened:
        if sandbox is None:
            sandbox = await opened.enter_async_context(Sandbox())
        runner = _Runner(sandbox, limits or Limits())
        inputs = await _inputs(runner, generator, tests, entry_point)
        outputs = await _outputs(runner, solutions, inputs, entry_point)
    return _judged(inputs, outputs, agree, pass_share, entry_point)


@dataclass(frozen=True, slots=True)
class _Runner:
    sandbox: Sandbox
    limits: Limits

    async def __call__(self, code: str, stdin: str) -> Run:
        for _ in range(_ATTEMPTS):
            run = await self.sandbox.run(code, stdin=stdin.encode(), limits=self.limits)
            if run.outcome is not Outcome.SANDBOX_ERROR:
                return run
        raise SandboxFailed(f"the sandbox failed {_ATTEMPTS} times: {run.detail}; see `python -m rlvlm_sandbox probe`")


def _check(solutions: Sequence[str], tests: int, agree: float, pass_share: float) -> None:
    if len(solutions) < _MIN_SOLUTIONS:
        raise ValueError(f"solutions has {len(solutions)}; agreement takes at least {_MIN_SOLUTIONS}: give more")
    if tests < 1:
        raise ValueError(f"tests is {tests}; give 1 or more")
    if not 0.5 < agree <= 1:
        raise ValueError(f"agree is {agree}; two outputs may not both have it: give a share over 0.5, at most 1")
    if not 0 < pass_share <= 1:
        raise ValueError(f"pass_share is {pass_share}; give a share over 0, at most 1")


async def _inputs(run: _Runner, generator: str, tests: int, entry_point: str | None) -> tuple[str, ...]:
    runs = await asyncio.gather(*(run(generator, f"{seed}\n") for seed in range(tests)))
    return tuple(dict.fromkeys(_generated(seed, run, entry_point) for seed, run in enumerate(runs)))


def _generated(seed: int, run: Run, entry_point: str | None) -> str:
    where = f"the generator with seed {seed}"
    if run.outcome is not Outcome.OK:
        said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise GeneratorFailed(f"{where} ended with {run.outcome}: {said or 'no word'}; mend it, or the limits")
    try:
        text = run.stdout.decode()
        args = [] if entry_point is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise GeneratorFailed(f"{where} printed {run.stdout!r:.100}, which is no {kind} ({error}); mend it") from error
    if not isinstance(args, list):
        raise GeneratorFailed(f"{where} printed {text!r:.100}; print a JSON list of arguments")
    return text


async def _outputs(
    run: _Runner, solutions: Sequence[str], inputs: Sequence[str], entry_point: str | None
) -> list[list[_Output | None]]:
    """For each input, what each solution makes of it; None where it fails."""

    async def output(solution: str, text: str) -> _Output | None:
        if entry_point is None:
            return _printed(await run(solution, text))
        order = {"source": solution, "entry_point": entry_point, "args": json.loads(text)}
        return _returned(await run(_CALL, json.dumps(order)))

    flat = await asyncio.gather(*(output(solution, text) for text in inputs for solution in solutions))
    return [list(flat[start : start + len(solutions)]) for start in range(0, len(flat), len(solutions))]


def _printed(run: Run) -> _Output | None:
    if run.outcome is not Outcome.OK:
        return None
    try:
        return _Output(run.stdout.decode())
    except UnicodeDecodeError:
        return None


def _returned(run: Run) -> _Output | None:
    if run.outcome is not Outcome.OK:
        return None
    try:
        return _Output(json.loads(run.stdout))
    except (ValueError, RecursionError):  # an atexit handler that prints, a list a thousand deep
        return None


def _judged(
    inputs: Sequence[str],
    outputs: Sequence[Sequence[_Output | None]],
    agree: float,
    pass_share: float,
    entry_point: str | None,
) -> Curated:
    """k1.5's two rules. outputs: for each input, each solution's."""
    solutions = len(outputs[0])
    same = _same_text if entry_point is None else eq
    largest = [_largest_group(row, same) for row in outputs]
    agreement = [len(group) / solutions for group in largest]
    counting = [index for index, share in enumerate(agreement) if share >= agree]
    passed = [sum(solution in largest[index] for index in counting) for solution in range(solutions)]
    whole = sum(count == len(counting) for count in passed) if counting else 0
    reasons = (
        f"{len(counting)} of {len(inputs)} inputs count: a share of {agree:g} of {solutions} solutions agrees there",
        f"{whole} of {solutions} solutions pass all that count; a share of {pass_share:g} must",
    )
    return Curated(
        tests=_tests(entry_point, [(inputs[index], _first(largest[index], outputs[index])) for index in counting]),
        kept=whole / solutions >= pass_share,
        reasons=reasons,
        inputs=tuple(inputs),
        agreement=tuple(agreement),
        pass_share=tuple(count / len(counting) if counting else 0.0 for count in passed),
    )


def _largest_group(row: Sequence[_Output | None], same: Callable[[Any, Any], bool]) -> set[int]:
    """The solutions of the largest group with one output; empty if all failed."""
    groups: list[tuple[Any, set[int]]] = []
    for solution, output in enumerate(row):
        if output is not None:
            group = next((members for given, members in groups if same(given, output.given)), None)
            if group is None:
                groups.append((output.given, group := set()))
            group.add(solution)
    return max((members for _, members in groups), key=len, default=set())


def _same_text(one: str, other: str) -> bool:
    return one == other or same_output(one.encode(), other.encode(), None)


def _first(group: set[int], row: Sequence[_Output | None]) -> Any:
    """What the group's first solution gave."""
    output = row[min(group)]
    assert output is not None  # those who failed are in no group
    return output.given


def _tests(entry_point: str | None, cases: Sequence[tuple[str, Any]]) -> StdioTests | CallTests | None:
    if not cases:
        return None
    if entry_point is None:
        return StdioTests(list(cases))
    return CallTests(entry_point, [(json.loads(text), expected) for text, expected in cases])
