"""What a run may use (`Limits`), what came of it (`Run`), and what a backend is asked for (`Program`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, Protocol

Profile = Literal["judge", "tool"]


class SandboxUnavailable(RuntimeError):
    """No backend holds on this machine; the message gives the reason for each."""


class Outcome(StrEnum):
    """How a run ended; a closed set. SANDBOX_ERROR says nothing about the program: it is never a score of 0."""

    OK = "ok"  # exit status 0
    RUNTIME_ERROR = "runtime_error"  # any other exit status
    TIME = "time"  # wall clock or CPU time used up
    MEMORY = "memory"  # ended by a MemoryError, or its processes together grew over the limit
    OUTPUT = "output"  # more than `output_bytes` on stdout or on stderr
    SIGNAL = "signal"  # died of a signal, e.g. a segmentation fault
    SANDBOX_ERROR = "sandbox_error"  # the sandbox itself failed


_LONGEST_S = 10**7
_MOST = 1 << 50


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use; None takes the profile's (`PROFILES`). Raises ValueError for what no run can have.

    wall_s, cpu_s: seconds; CPU time counts per process and is rounded up to a whole second.
    memory_bytes: what each process may map beyond the interpreter; where processes may be started also the resident
    memory of all of them together. processes: processes and threads at one time.
    output_bytes: of stdout and of stderr, each. file_bytes: of any one file.
    tmp_bytes, inodes: of /tmp, the only writable place. open_files: descriptors of each process.
    """

    wall_s: float | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None
    processes: int | None = None
    output_bytes: int | None = None
    file_bytes: int | None = None
    tmp_bytes: int | None = None
    inodes: int | None = None
    open_files: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if not value > 0:
                raise ValueError(f"Limits.{name} is {value}; a run needs some: give more than 0")
            most = _LONGEST_S if name.endswith("_s") else _MOST
            if value > most or not (name.endswith("_s") or isinstance(value, int)):
                kind = "seconds" if name.endswith("_s") else "a whole number"
                raise ValueError(f"Limits.{name} is {value}; no system can keep that: give {kind}, at most {most}")

    def over(self, defaults: Limits) -> Limits:
        """These limits, and `defaults` where these say None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Limits(**{n: getattr(defaults, n) if value is None else value for n, value in values.items()})


_MIB = 1 << 20
# judge: a program that is judged; starts no process and executes no file. tool: a program that works for the user.
PROFILES: Mapping[Profile, Limits] = MappingProxyType(
    {
        "judge": Limits(
            wall_s=10, cpu_s=10, memory_bytes=1024 * _MIB, processes=16, output_bytes=_MIB,
            file_bytes=16 * _MIB, tmp_bytes=32 * _MIB, inodes=2048, open_files=64,
        ),
        "tool": Limits(
            wall_s=30, cpu_s=30, memory_bytes=2048 * _MIB, processes=32, output_bytes=_MIB,
            file_bytes=64 * _MIB, tmp_bytes=256 * _MIB, inodes=8192, open_files=256,
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a run.

    exit_code: the exit status, minus the signal's number if a signal ended it, None if the sandbox did.
    stdout, stderr: what was written, up to `output_bytes` each. truncated: whether anything was cut off.
    wall_s: from when the sandbox was told to the death of the last process. cpu_s: of all its processes.
    peak_rss_bytes: of its largest process; at least that of the fork server's, whose pages it starts with.
    backend: which backend ran it. detail: what went wrong, for SANDBOX_ERROR.
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


@dataclass(frozen=True, slots=True)
class Program:
    """What a backend runs. limits: all of them given. channel: a descriptor of ours that the program finds as its
    descriptor 3 (a socket to whoever works with it); the caller keeps and closes its own copy.
    """

    code: bytes
    limits: Limits
    stdin: bytes = b""
    profile: Profile = "judge"
    language: str = "python"
    channel: int | None = None


class Backend(Protocol):
    """One way to run a program behind walls. `run` never raises for what the program does: that is an Outcome."""

    name: str

    async def start(self) -> None:
        """Makes ready, and runs the canary. Raises SandboxUnavailable with the reason where it does not hold here."""

    async def run(self, program: Program) -> Run:
        """Runs it to its end; nothing of it is left then. Cancelling ends the program too."""

    async def stop(self) -> None:
        """Ends what is running and leaves nothing."""
