"""What a grading says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlvlm_sandbox.records import Outcome


@dataclass(frozen=True, slots=True)
class Case:
    """One test. outcome: OK if the candidate ran to its end, right or wrong. score: 1 or 0, or what a checker says.
    detail: what was wrong; may hold text of the candidate's."""

    passed: bool
    outcome: Outcome = Outcome.OK
    detail: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the tests passed. outcome: OK if the candidate ran to its end in all cases, right or wrong; else the
    first that is not OK; SANDBOX_ERROR if the sandbox failed anywhere, which says nothing of the candidate.
    backend: where it ran. detail: of the first case that failed.
    """

    passed: int
    total: int
    outcome: Outcome
    cases: tuple[Case, ...]
    backend: str
    detail: str = ""

    @property
    def fraction(self) -> float:
        """The mean score of the cases, in [0, 1]."""
        return sum(case.score for case in self.cases) / self.total if self.total else 0.0


def passed() -> Case:
    return Case(True, score=1.0)


def failed(detail: str, outcome: Outcome = Outcome.OK) -> Case:
    return Case(False, outcome, detail)


def verdict_of(cases: Sequence[Case], backend: str) -> Verdict:
    broken = [case for case in cases if case.outcome is Outcome.SANDBOX_ERROR]
    outcome = next((case.outcome for case in (*broken, *cases) if case.outcome is not Outcome.OK), Outcome.OK)
    worst = next((case for case in (*broken, *cases) if not case.passed), None)
    right = sum(case.passed for case in cases)
    return Verdict(right, len(cases), outcome, tuple(cases), backend, worst.detail if worst else "")
