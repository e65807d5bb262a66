"""Grading of programs by tests, apart from each other: no code of the candidate runs where its answers are judged."""

from rlvlm_sandbox.grading.grade import grade
from rlvlm_sandbox.grading.tests import AssertTests, CallTests, InvalidTests, StdioTests, Tests
from rlvlm_sandbox.grading.verdict import Case, Verdict

__all__ = ["AssertTests", "CallTests", "Case", "InvalidTests", "StdioTests", "Tests", "Verdict", "grade"]
