"""Runs Python programs that nobody trusts, and grades them. Linux, standard library only."""

from rlvlm_sandbox.grading import AssertTests, CallTests, Case, InvalidTests, StdioTests, Verdict
from rlvlm_sandbox.records import Limits, Outcome, Run, SandboxUnavailable
from rlvlm_sandbox.sandbox import BACKENDS, Sandbox, probe
from rlvlm_sandbox.session import Session, SessionRun

__all__ = [
    "BACKENDS",
    "AssertTests",
    "CallTests",
    "Case",
    "InvalidTests",
    "Limits",
    "Outcome",
    "Run",
    "Sandbox",
    "SandboxUnavailable",
    "Session",
    "SessionRun",
    "StdioTests",
    "Verdict",
    "probe",
]
