"""What a run may use (`Limits`) and what came of it (`Run`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class SandboxUnavailable(RuntimeError):
    """This machine does not allow what the backend needs; the message says what."""


class Outcome(StrEnum):
    """How a run ended; a closed set. SANDBOX_ERROR says nothing about the program: it is never a score of 0."""

    OK = "ok"  # exit status 0
    RUNTIME_ERROR = "runtime_error"  # any other exit status
    TIME = "time"  # wall clock or CPU time used up
    MEMORY = "memory"  # ended by a MemoryError, or its processes together grew over the limit
    OUTPUT = "output"  # more than `output_bytes` on stdout or on stderr
    SIGNAL = "signal"  # died of a signal, e.g. a segmentation fault
    SANDBOX_ERROR = "sandbox_error"  # the sandbox itself failed


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use; the defaults are for judging a program. Raises ValueError for what is not positive.

    wall_s, cpu_s: seconds; CPU time counts per process and is rounded up to a whole second.
    memory_bytes: address space of each process; with `fork` also the resident memory of all processes together.
    processes: processes and threads at one time. fork: whether processes may be started (threads always may).
    output_bytes: of stdout and of stderr, each. file_bytes: of any one file.
    tmp_bytes, inodes: of /tmp, the only writable place. open_files: descriptors of each process.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 16
    fork: bool = False
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    tmp_bytes: int = 32 << 20
    inodes: int = 2048
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "fork" and not value > 0:
                raise ValueError(f"Limits.{name} is {value}; a run needs some: give more than 0")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a run.

    exit_code: the exit status, minus the signal's number if a signal ended it, None if the sandbox did.
    stdout, stderr: what was written, up to `output_bytes` each. truncated: whether anything was cut off.
    wall_s: from the set-up of the namespaces to the death of the last process. cpu_s: of all processes.
    peak_rss_bytes: of the largest process; at least that of the sandbox's own init (about 10 MB).
    detail: what went wrong, for SANDBOX_ERROR.
    """

    outcome: Outcome
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    backend: str
    detail: str = ""
