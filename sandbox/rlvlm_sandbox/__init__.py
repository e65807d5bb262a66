"""Runs Python programs that nobody trusts. Linux, standard library only."""

from rlvlm_sandbox.records import Limits, Outcome, Run, SandboxUnavailable
from rlvlm_sandbox.sandbox import Sandbox, probe

__all__ = ["Limits", "Outcome", "Run", "Sandbox", "SandboxUnavailable", "probe"]
