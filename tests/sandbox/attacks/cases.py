"""A program, and how it must end; and what every attacking program starts with. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALL = ("namespaces", "bubblewrap", "landlock")
OWN_ROOT = ("namespaces", "bubblewrap")  # with processes and a /tmp of their own

# HOST: Host.facts(). What is tried and not refused by the system is said, and is a failure of the test; an attempt that
# fails in any other way than the system's refusal ends the program, and is one too.
_PRELUDE = """
import ctypes, errno, os, platform, socket, sys
HOST = @HOST@
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, action, *arguments, **named):
    try:
        got = action(*arguments, **named)
    except OSError as error:
        print(what, "refused:", error.strerror)
    else:
        print("GOT THROUGH:", what, repr(got)[:200])
def quietly(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        pass
def syscall(numbers, *arguments):
    number = numbers[platform.machine() == "aarch64"]
    if number is None:
        raise OSError(errno.ENOSYS, "no such call")
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *arguments) != -1:
        return "it worked"
    if ctypes.get_errno() in (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.ESRCH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "the kernel looked at it: " + os.strerror(ctypes.get_errno())
"""


@dataclass(frozen=True)
class Case:
    """outcomes: any of these is right; elsewhere: those of a backend where they are others. says: all of stdout, where
    it is known beforehand. within_s: the run is over then. told: the program starts with the prelude.
    harms_unwalled: it does harm where there are no walls, which shows that harm is seen."""

    name: str
    code: str
    outcomes: tuple[str, ...] = ("ok",)
    profile: str = "judge"
    limits: Mapping[str, float] = field(default_factory=dict)
    stdin: bytes = b""
    backends: tuple[str, ...] = ALL
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exit_code: int | None = None
    says: bytes | None = None
    complains: str = ""  # a pattern that stderr holds
    within_s: float = 5.0
    image: str = "py"
    told: bool = True
    harms_unwalled: bool = False

    def program(self, facts: Mapping[str, object]) -> str:
        return _PRELUDE.replace("@HOST@", repr(dict(facts))) + self.code if self.told else self.code

    def expected(self, backend: str) -> tuple[str, ...]:
        return self.elsewhere.get(backend, self.outcomes)
