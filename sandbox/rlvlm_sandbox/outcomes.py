"""From what the sandbox saw of a run to its Outcome; the same for every local backend."""

from __future__ import annotations

from collections.abc import Mapping
from signal import SIGXCPU
from typing import Any

from rlvlm_sandbox.records import Limits, Outcome, Run


def run_of(
    report: Mapping[str, Any], stdout: bytes, stderr: bytes, truncated: bool, limits: Limits, backend: str
) -> Run:
    """report: `error` (what failed in the sandbox) or `exit_code` (minus the signal), `cause` (`wall`, `memory`,
    `threads` or `stop` where the sandbox killed it), `wall_s`, `cpu_s`, `peak_rss_bytes`."""
    outcome, detail = _outcome(report, truncated, stderr, limits)
    return Run(
        outcome=outcome,
        exit_code=None if outcome is Outcome.SANDBOX_ERROR else report.get("exit_code"),
        stdout=stdout,
        stderr=stderr,
        truncated=truncated,
        wall_s=report.get("wall_s", 0.0),
        cpu_s=report.get("cpu_s", 0.0),
        peak_rss_bytes=report.get("peak_rss_bytes", 0),
        backend=backend,
        detail=detail,
    )


def _outcome(report: Mapping[str, Any], truncated: bool, stderr: bytes, limits: Limits) -> tuple[Outcome, str]:
    """The outcome, and the detail if it is SANDBOX_ERROR. What the sandbox saw goes before what the program says."""
    exit_code, cause = report.get("exit_code"), report.get("cause")
    if "error" in report:
        return Outcome.SANDBOX_ERROR, report["error"]
    if truncated:
        return Outcome.OUTPUT, ""
    if cause in ("wall", "memory"):
        return (Outcome.TIME if cause == "wall" else Outcome.MEMORY), ""
    if exit_code is None:
        return Outcome.SANDBOX_ERROR, "the run ended without an exit status"
    if exit_code == -SIGXCPU or (exit_code < 0 and report["cpu_s"] >= (limits.cpu_s or 0)):
        return Outcome.TIME, ""
    if exit_code < 0:
        return Outcome.SIGNAL, ""
    if exit_code == 1 and _last_exception(stderr).endswith(b"MemoryError"):
        return Outcome.MEMORY, ""
    return (Outcome.OK if exit_code == 0 else Outcome.RUNTIME_ERROR), ""


def _last_exception(stderr: bytes) -> bytes:
    """The name of the exception on the last line of a traceback. A program can only forge its own failure with it."""
    return stderr.rstrip().rpartition(b"\n")[2].partition(b":")[0]
