"""The reward `code`: the response's program passes its tests, in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from rlvlm_sandbox import Limits, Outcome, Sandbox, SandboxUnavailable
from rlvlm_sandbox.grading import InvalidTests, StdioTests, Tests, Verdict
from rlvlm_sandbox.images import IMAGES

from rlvlm_rewards.code.extract import LANGUAGES, Program, extract
from rlvlm_rewards.code.reference import Reference, read_reference
from rlvlm_rewards.code.shared import Options, borrow, release
from rlvlm_rewards.records import Failure, Sample, Score

_MIB = 1 << 20
_SLICE = 4  # tests of stdin and stdout, after the first, that go on together

# Compiling is not for this process: some sources crash the interpreter that compiles them.
_COMPILES = "import sys; compile(sys.stdin.buffer.read(), 'solution.py', 'exec', dont_inherit=True)"


@dataclass(frozen=True)
class Code:
    """Scores the program in a response (`extract` says where it is) by the tests in the reference (`reference` says in
    which forms): graded by rlvlm_sandbox, the program in one sandbox and the tests in another.

    score: `fraction` of the tests that pass, or 1 for `all` of them, else 0. language: `python`, or `cpp`, `javascript`
    and `bash` for tests of stdin and stdout. wall_s: seconds, and memory_mb: MiB, that the program has for each of
    these tests, or for all calls and asserts together; once the time is up, the tests that were still to come have
    failed. backend, image, workers, url: as for `rlvlm_sandbox.Sandbox`. token_env: the environment variable that
    holds the token of a remote pool.

    The sandbox is opened when first needed, is shared by all with equal options in an event loop, and is closed by
    `aclose`, or with its loop. Parts of a score: `passed` (share of the tests), `extracted`, `compiled` (0 or 1, only
    for Python). A sandbox that failed is Failure.INFRASTRUCTURE: it says nothing about the program.
    """

    score: Literal["fraction", "all"] = "fraction"
    language: str = "python"
    wall_s: float = 4.0
    memory_mb: int = 1024
    backend: str = "auto"
    image: str = "py"
    workers: int | None = None
    url: str | None = None
    token_env: str | None = None

    def __post_init__(self) -> None:
        if self.score not in ("fraction", "all"):
            raise ValueError(f"score is {self.score!r}; give 'fraction' or 'all'")
        if self.language not in LANGUAGES:
            raise ValueError(f"language is {self.language!r}; give one of {sorted(LANGUAGES)}")
        if self.image not in IMAGES:
            raise ValueError(f"image is {self.image!r}; give one of {sorted(IMAGES)}")
        for name in ("wall_s", "memory_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give more than 0")
        self._options.sandbox()  # it checks its own

    async def __call__(self, sample: Sample) -> Score:
        try:
            reference = read_reference(sample.answer, split=self.score == "fraction")
            self._check(reference)
        except InvalidTests as error:
            return _unparsable(sample, error)
        program = extract(sample.completion, sample.thinking, self.language)
        if program is None:
            return self._nothing("the response has no program")
        try:
            sandbox = await borrow(self._options, id(self))
            return await self._graded(sandbox, program, reference)
        except InvalidTests as error:  # a prelude that raises is only seen when it runs
            return _unparsable(sample, error)
        except SandboxUnavailable as error:
            return Score(failure=Failure.INFRASTRUCTURE, detail=str(error))

    async def aclose(self) -> None:
        """Closes the running loop's sandbox, unless others use it."""
        await release(self._options, id(self))

    @property
    def _options(self) -> Options:
        return Options(self.backend, self.image, self.workers, self.url, self.token_env)

    @property
    def _limits(self) -> Limits:
        return Limits(wall_s=self.wall_s, cpu_s=self.wall_s, memory_bytes=self.memory_mb * _MIB)

    def _check(self, reference: Reference) -> None:
        if self.language != "python" and not isinstance(reference.tests, StdioTests):
            raise InvalidTests(f"it tests Python functions, the language is {self.language!r}; give stdin and stdout")

    async def _graded(self, sandbox: Sandbox, program: Program, reference: Reference) -> Score:
        if self.language == "python":
            source = program.source.encode("utf-8", "surrogatepass")
            run = await sandbox.run(_COMPILES, stdin=source, limits=self._limits)
            if run.outcome is Outcome.SANDBOX_ERROR:
                return Score(failure=Failure.INFRASTRUCTURE, detail=run.detail)
            if run.outcome is not Outcome.OK:
                said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
                return self._nothing(f"the program does not compile: {said}", extracted=program.fenced)
        verdicts = await self._verdicts(sandbox, program.source + reference.ending, reference.tests)
        cases = reference.tests.cases if isinstance(reference.tests, StdioTests) else verdicts[0].cases
        return self._scored(verdicts, len(cases))

    async def _verdicts(self, sandbox: Sandbox, code: str, tests: Tests) -> list[Verdict]:
        """One, or one for each slice of the tests of stdin and stdout: a program that never ends costs one test."""
        fail_fast = self.score == "all"
        verdicts: list[Verdict] = []
        for part in [tests] if fail_fast else _slices(tests):
            verdict = await sandbox.grade(code, part, self._limits, fail_fast=fail_fast, language=self.language)
            verdicts.append(verdict)
            if {Outcome.TIME, Outcome.SANDBOX_ERROR} & {case.outcome for case in verdict.cases}:
                break
        return verdicts

    def _scored(self, verdicts: Sequence[Verdict], total: int) -> Score:
        broken = next((one for one in verdicts if one.outcome is Outcome.SANDBOX_ERROR), None)
        if broken is not None:
            return Score(failure=Failure.INFRASTRUCTURE, detail=broken.detail)
        passed = sum(one.passed for one in verdicts)
        mean = sum(case.score for one in verdicts for case in one.cases) / total
        worst = next((one for one in verdicts if one.passed < one.total), None)
        detail = f"{passed} of {total} tests pass" + (f"; {worst.outcome}: {worst.detail}" if worst else "")
        value = mean if self.score == "fraction" else float(passed == total)
        return Score(value, self._parts(passed / total, extracted=True, compiled=True), detail=detail)

    def _nothing(self, detail: str, extracted: bool = False) -> Score:
        return Score(0.0, self._parts(0.0, extracted, compiled=False), detail=detail)

    def _parts(self, passed: float, extracted: bool, compiled: bool) -> dict[str, float]:
        parts = {"passed": passed, "extracted": float(extracted)}
        return parts | {"compiled": float(compiled)} if self.language == "python" else parts


def _unparsable(sample: Sample, error: InvalidTests) -> Score:
    detail = f"task {sample.task!r}: the reference cannot be read: {error}"
    return Score(failure=Failure.UNPARSABLE_REFERENCE, detail=detail)


def _slices(tests: Tests) -> list[Tests]:
    if not isinstance(tests, StdioTests):
        return [tests]
    starts = [0, *range(1, len(tests.cases), _SLICE), len(tests.cases)]
    return [replace(tests, cases=tests.cases[start:end]) for start, end in pairwise(starts)]
