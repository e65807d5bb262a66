"""The system calls that a sandboxed program may make, as a classic BPF program (seccomp(2)); all others fail.

An allow-list: a call that a later kernel brings is refused until somebody has looked at it. Numbers are those of the
kernel's own headers (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Per line: name, number on x86-64, number on aarch64 (`-`: it does not exist there).
_ALWAYS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, newfstatat 262 79, statx 332 291, ppoll 271 73, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, msync 26 227, mincore 27 232, madvise 28 233,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pread64 17 67, pwrite64 18 68, readv 19 65,
writev 20 66, preadv 295 69, pwritev 296 70, preadv2 327 286, pwritev2 328 287, openat 257 56, faccessat 269 48,
faccessat2 439 439, pipe2 293 59, pselect6 270 72, sched_yield 24 124, dup 32 23, dup3 292 24, nanosleep 35 101,
clock_nanosleep 230 115, getitimer 36 102, setitimer 38 103, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, times 100 153, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getsid 124 156,
setsid 112 157, sendfile 40 71, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210,
getsockname 51 204, getpeername 52 205, getsockopt 55 209, setsockopt 54 208, exit 60 93, exit_group 231 94,
wait4 61 260, waitid 247 95, uname 63 160, fsync 74 82, fdatasync 75 83, fadvise64 221 223, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, readlinkat 267 78, umask 95 166, getxattr 191 8, lgetxattr 192 9,
fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, statfs 137 43, fstatfs 138 44,
getrlimit 97 163, setrlimit 160 164, getrusage 98 165, sysinfo 99 179, getcpu 309 168, sched_getparam 143 121,
sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, futex 202 98,
set_tid_address 218 96, set_robust_list 273 99, rseq 334 293, membarrier 324 283, getrandom 318 278,
epoll_create1 291 20, epoll_ctl 233 21, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd2 290 19, signalfd4 289 74,
timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87, timer_create 222 107, timer_settime 223 110,
timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, close_range 436 436, open 2 -, stat 4 -,
lstat 6 -, poll 7 -, access 21 -, pipe 22 -, select 23 -, dup2 33 -, pause 34 -, alarm 37 -, getpgrp 111 -,
getdents 78 -, readlink 89 -, time 201 -, epoll_create 213 -, epoll_wait 232 -, eventfd 284 -, signalfd 282 -,
arch_prctl 158 -
"""
# Changing files: not where the file system is the host's own.
_FILES = """
fchmod 91 52, fchmodat 268 53, utimensat 280 88, renameat 264 38, renameat2 316 276, mkdirat 258 34, linkat 265 37,
unlinkat 263 35, symlinkat 266 36, ftruncate 77 46, truncate 76 45, fallocate 285 47, copy_file_range 326 285,
flock 73 32, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -, chmod 90 -,
utime 132 -, utimes 235 -, futimesat 261 -
"""
# Other processes: the tool profile has them.
_PROCESSES = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281
"""
# Sockets with a name, of the family AF_UNIX only (see _socket), and owners: the tool profile has them.
_NAMED_SOCKETS = """
bind 49 200, listen 50 201, accept 43 202, accept4 288 242, connect 42 203, sendmmsg 307 269, recvmmsg 299 243,
fchown 93 55, fchownat 260 54, chown 92 -, lchown 94 -
"""
# Allowed by their arguments.
_BY_ARGUMENT = """
clone 56 220, clone3 435 435, socket 41 198, socketpair 53 199, ioctl 16 29, prctl 157 167, fcntl 72 25,
kill 62 129, tkill 200 130, tgkill 234 131, prlimit64 302 261, sched_getaffinity 204 123, sched_setaffinity 203 122,
getpriority 140 141, setpgid 109 154, getpgid 121 155
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """An architecture: its AUDIT_ARCH constant, and the numbers of the system calls that it has by name."""

    audit_arch: int
    numbers: dict[str, int]
    newest: int  # calls above it came after the table was made


def _machine(audit_arch: int, column: int, newest: int) -> Machine:
    entries = (_ALWAYS + _FILES + _PROCESSES + _NAMED_SOCKETS + _BY_ARGUMENT).replace("\n", ", ").split(", ")
    rows = [entry.rstrip(",").split() for entry in entries if entry.strip(", ")]
    return Machine(audit_arch, {row[0]: int(row[column]) for row in rows if row[column] != "-"}, newest)


MACHINES = {"x86_64": _machine(0xC000003E, 1, 450), "aarch64": _machine(0xC00000B7, 2, 451)}

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x10000
_CLONE_NEW_ANY = 0x7E020080  # every namespace flag: time, mount, cgroup, uts, ipc, user, pid, net
_AF_UNIX = 1
# SOCK_STREAM and SOCK_SEQPACKET, each plain and with SOCK_NONBLOCK, SOCK_CLOEXEC or both
_CONNECTED = tuple(kind | flags for kind in (1, 5) for flags in (0, 0x800, 0x80000, 0x80800))
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: nothing that reaches a device or another process.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# GET_PDEATHSIG, GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, CAPBSET_READ, GET_TIMERSLACK,
# SET_NO_NEW_PRIVS, GET_NO_NEW_PRIVS, and SET_VMA, with which malloc names its memory
_PRCTLS = (2, 3, 15, 16, 21, 23, 30, 38, 39, 0x53564D41)
# SETOWN, SETSIG, SETOWN_EX, SETLEASE, NOTIFY: signals to whoever is named, and holding up those who write
_FCNTLS_OF_OTHERS = (8, 10, 15, 1024, 1026)

OWN_PID = 0x5AFEB0C5  # stands for a pid that is not known yet; no pid is that large

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
Segment = tuple[int, list[Instruction]]  # the first number, and what to do from it on


def filter_program(
    profile: str,
    *,
    execs: bool = False,
    alone: bool = True,
    own_files: bool = True,
    own_pid: int = 0,
    machine: str = platform.machine(),
) -> bytes:
    """The program for a profile (`judge` or `tool`), as an array of `struct sock_filter`.

    execs: lets a `judge` execute files, for a sandbox that has to start its interpreter after the filter is on.
    alone: the program has a pid namespace of its own; else it may signal and tune nobody but itself.
    own_files: it has a file system of its own; else it may change no file.
    own_pid: by which it may mean itself, beside 0. Raises KeyError for an architecture that has no table.
    """
    m = MACHINES[machine]
    tool = profile == "tool"
    names = _names(_ALWAYS) + (_names(_FILES) if own_files else [])
    names += _names(_PROCESSES) + _names(_NAMED_SOCKETS) if tool else []
    if execs and not tool:
        names += ["execve", "execveat"]
    answers: dict[int, list[Instruction]] = {m.numbers[name]: [_allow()] for name in names if name in m.numbers}
    answers |= {m.numbers[name]: body for name, body in _by_argument(tool, alone, own_pid).items()}
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, m.audit_arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        *_search(_segments(answers, m.newest)),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _segments(answers: Mapping[int, list[Instruction]], newest: int) -> list[Segment]:
    """The number line, cut where the answer changes: (first number, answer)."""
    segments: list[Segment] = [(0, [])]
    for number in range(newest + 1):
        answer = answers.get(number, [_refuse(errno.EPERM)])
        if answer != segments[-1][1]:
            segments.append((number, answer))
    # What is newer than the table does not exist, as libraries expect that ask for a call and fall back.
    return [*segments[1:], (newest + 1, [_refuse(errno.ENOSYS)])]


def _search(segments: Sequence[Segment]) -> list[Instruction]:
    """A binary search: the kernel walks the program once for every call there is whenever it is installed."""
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    left, right = _search(segments[:middle]), _search(segments[middle:])
    pivot = segments[middle][0]
    if len(left) < 256:
        return [(_AT_LEAST, len(left), 0, pivot), *left, *right]
    return [(_AT_LEAST, 0, 1, pivot), (_JUMP, 0, 0, len(left)), *left, *right]


def for_process(program: bytes, own_pid: int) -> bytes:
    """The program that was made for OWN_PID, for this process."""
    return program.replace(struct.pack("=I", OWN_PID), struct.pack("=I", own_pid))


def _by_argument(tool: bool, alone: bool, own_pid: int) -> dict[str, list[Instruction]]:
    """What decides on a call of which only some uses are allowed. clone3 keeps its flags in memory, out of the
    filter's sight: it "does not exist", and libc falls back to clone."""
    new_process = [] if tool else [(_ANY_BIT, 1, 0, _CLONE_THREAD), _refuse(errno.EPERM)]
    clone = [_argument(0), (_ANY_BIT, 0, 1, _CLONE_NEW_ANY), _refuse(errno.EPERM), *new_process, _allow()]
    unix = _one_of(0, [_AF_UNIX], errno.EACCES)
    # Of a datagram pair, either end could still send to any socket that has a name.
    connected = [_argument(0), (_EQUAL, 1, 0, _AF_UNIX), _refuse(errno.EACCES), *_one_of(1, _CONNECTED, errno.EACCES)]
    itself = _one_of(0, [0, own_pid], errno.EPERM)
    rules = {
        "clone": clone,
        "clone3": [_refuse(errno.ENOSYS)],
        "socket": unix if tool else [_refuse(errno.EACCES)],
        "socketpair": unix if tool else connected,
        "ioctl": _one_of(1, _IOCTLS, errno.ENOTTY),
        "prctl": _one_of(0, _PRCTLS, errno.EINVAL),
        # The limits of its init are not its to set.
        "prlimit64": itself,
        "sched_setaffinity": itself,
    }
    for name in ("sched_getaffinity", "getpgid", "setpgid"):
        rules[name] = [_allow()] if alone else itself
    rules["fcntl"] = [_allow()] if alone else _none_of(1, _FCNTLS_OF_OTHERS, errno.EPERM)
    # kill(0) and kill(-1) reach whole groups; tkill names a thread that may be anybody's.
    rules["kill"] = rules["tgkill"] = [_allow()] if alone else _one_of(0, [own_pid], errno.EPERM)
    rules["tkill"] = rules["getpriority"] = [_allow()] if alone else [_refuse(errno.EPERM)]
    return rules


def _argument(index: int) -> Instruction:
    """Loads the low half of an argument; the kernel looks at no more of those that are compared here."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _one_of(argument: int, values: Iterable[int], error: int) -> list[Instruction]:
    tests = [((_EQUAL, 0, 1, value), _allow()) for value in values]
    return [_argument(argument), *(instruction for test in tests for instruction in test), _refuse(error)]


def _none_of(argument: int, values: Iterable[int], error: int) -> list[Instruction]:
    tests = [((_EQUAL, 0, 1, value), _refuse(error)) for value in values]
    return [_argument(argument), *(instruction for test in tests for instruction in test), _allow()]


def _allow() -> Instruction:
    return (_RETURN, 0, 0, _ALLOW)


def _refuse(error: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | error)


def _names(table: str) -> list[str]:
    return [entry.split()[0] for entry in table.replace("\n", ", ").split(", ") if entry.strip(", ")]
