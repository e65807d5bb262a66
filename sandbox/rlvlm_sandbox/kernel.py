"""System calls that Python's `os` lacks, through ctypes. x86-64 and aarch64."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable, Iterable

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_ARM = platform.machine() == "aarch64"
_PIVOT_ROOT, _SECCOMP = (41, 277) if _ARM else (155, 317)
_CLONE3, _MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 435, 442, 444, 445, 446
_CLONE_PIDFD, _CLONE_CHILD_SETTID, _CLONE_CHILD_CLEARTID = 0x1000, 0x01000000, 0x00200000
_libc = ctypes.CDLL(None, use_errno=True)
_clone3 = ctypes.PyDLL(None, use_errno=True).syscall
_clone3.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t]


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    converted = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    return int(_libc.syscall(ctypes.c_long(number), *converted))


def prctl(option: int, *arguments: int) -> int:
    return int(_libc.prctl(option, *(ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4])))


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def sethostname(name: str) -> None:
    _check(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "sethostname")


def clone(flags: int, in_init: Callable[[], None] | None = None) -> tuple[int, int]:
    """fork() into new namespaces: (pid, pidfd) in the parent, (0, -1) in the child.

    in_init: called first thing in the child, for one that forks once more and comes back in the grandchild alone: then
    it is the grandchild that goes on. The process between never becomes a whole Python again, which is what costs.
    PyDLL keeps the GIL, and Python's own preparations for a fork are made by hand.
    """
    pidfd = ctypes.c_int(-1)
    arguments = _fork_arguments(flags | _CLONE_PIDFD, ctypes.addressof(pidfd))
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _clone3(_CLONE3, ctypes.addressof(arguments), ctypes.sizeof(arguments))
    if pid == 0:
        if in_init is not None:
            in_init()
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return _check(pid, "clone into new namespaces"), pidfd.value


def _fork_arguments(flags: int, pidfd: int) -> ctypes.Array[ctypes.c_uint64]:
    """As libc's fork has them: it keeps the main thread's id where the kernel writes the child's."""
    pr_get_tid_address, place = 40, ctypes.c_void_p()
    if _libc.prctl(pr_get_tid_address, ctypes.byref(place), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    return (ctypes.c_uint64 * 11)(flags, pidfd, place.value or 0, 0, signal.SIGCHLD)


def fork_between() -> int:
    """fork() inside of `in_init`."""
    arguments = _fork_arguments(0, 0)
    return _check(_clone3(_CLONE3, ctypes.addressof(arguments), ctypes.sizeof(arguments)), "fork")


# ---- file systems


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()), f"mount {kind or source} on {target}")


def make_read_only(target: str) -> None:
    """With every mount below it, which MS_REMOUNT would leave out."""
    attributes = struct.pack("=4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    at_fdcwd, at_recursive = -100, 0x8000
    result = _syscall(_MOUNT_SETATTR, at_fdcwd, target.encode(), at_recursive, attributes, len(attributes))
    _check(result, f"mount_setattr {target}")


def detach(target: str) -> None:
    _check(_libc.umount2(target.encode(), 2), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _check(_syscall(_PIVOT_ROOT, new.encode(), old.encode()), "pivot_root")


# ---- privileges


def is_mapped(uid: int) -> bool:
    """Whether this user namespace knows the user; that of a rootless container may know its root alone."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(inside <= uid < inside + count for inside, _, count in ranges)


def drop_capabilities() -> None:
    capability = 0
    while _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # some forty calls in every run: no detours
        capability += 1
    prctl(PR_CAP_AMBIENT, 4)  # clear all
    give_up_capabilities()


def give_up_capabilities() -> None:
    """Those of this process; what it executes could still be given some."""
    header, none = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)
    _check(_libc.capset(header, none), "capset")


def forbid_new_privileges() -> None:
    _check(prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


def install_filter(program: bytes) -> None:
    """A seccomp filter, for this thread and all it starts; needs forbid_new_privileges first."""
    code = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    set_mode_filter = 1
    _check(_syscall(_SECCOMP, set_mode_filter, 0, ctypes.create_string_buffer(pointer)), "seccomp")


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


def landlock_version() -> int:
    """The ABI version, or less than 1 where there is no landlock."""
    create_ruleset_version = 1
    return _syscall(_LANDLOCK_CREATE, None, 0, create_ruleset_version)


def landlock_ruleset(readable: Iterable[str], writable: Iterable[str]) -> int:
    """A descriptor of rules that leave only these paths to be opened; as far as the kernel knows how, also no TCP, no
    signals to and no abstract sockets of outsiders. A path that does not exist is left out."""
    version = _check(landlock_version(), "landlock")
    files = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        files |= right if version >= since else 0
    network = 3 if version >= 4 else 0
    scopes = 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(_syscall(_LANDLOCK_CREATE, struct.pack("=3Q", files, network, scopes), size, 0), "landlock")
    for path in readable:
        _landlock_rule(ruleset, path, files & (_EXECUTE | _READ_FILE | _READ_DIR))
    for path in writable:
        _landlock_rule(ruleset, path, files)
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Puts the rules on this thread and all it starts; needs forbid_new_privileges first."""
    _check(_syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")


def _landlock_rule(ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        allowed = access if os.path.isdir(path) else access & _ON_FILES
        path_beneath = 1
        rule = struct.pack("=Qi", allowed, place)
        _check(_syscall(_LANDLOCK_ADD, ruleset, path_beneath, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(place)
