"""One run, in a fresh interpreter: `python -I -S -B launch.py CONFIG`. Imports nothing of ours; nobody else imports it.

Three processes, each with less than the one before:
    launcher   outside; keeps the time and the memory, kills, reports
    init       pid 1 of the new namespaces; builds the root, reaps; its death kills everything inside
    program    no capabilities, no way back; becomes the interpreter that runs the code
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
SYS_CLONE, SYS_PIVOT_ROOT, SYS_SECCOMP, SYS_MOUNT_SETATTR = 56, 155, 317, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 38, 47
# cgroup, uts, ipc, user, pid, net, mount
NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000
UID, NOBODY = 1000, 65534  # inside; and outside, when the launcher is root
HOST = "/.host"  # where the old root hangs while the new one is built
TICK_S, STACK_BYTES = 0.02, 32 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    check(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()), f"mount {kind or source} on {target}")


def prctl(option: int, *arguments: int) -> int:
    return int(_libc.prctl(option, *(ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4])))


def clone(flags: int) -> int:
    """fork() into new namespaces. PyDLL keeps the GIL, and Python's own preparations for a fork are made by hand."""
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = syscall(*(ctypes.c_long(value) for value in (SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return check(pid, "clone into new user, pid, mount, network, ipc, uts and cgroup namespaces")


# ---- launcher


def launch(config: dict[str, Any]) -> None:
    """Runs the program to its end and writes the report, one JSON object, to `result_fd`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != config["parent"]:
        raise OSError("whoever asked for this run is gone")
    for fd in (config["code_fd"], config["stdin_fd"], config["result_fd"]):
        os.set_inheritable(fd, False)
    for fd in (1, 2):
        os.fchmod(fd, 0o666)  # /dev/stdout can be opened by the program's user too
    here, there = socket.socketpair()
    report_in, report_out = os.pipe()
    init = clone(NAMESPACES)
    if init == 0:
        here.close()
        os.close(report_in)
        os.close(config["result_fd"])
        run_inside(config, there, report_out)
    there.close()
    os.close(report_out)
    here.recv(1)
    write_maps(init)
    started = time.monotonic()
    here.send(b"g")
    cause = watch(init, started + config["wall_s"], config["memory_bytes"] if config["fork"] else None)
    _, _, usage = os.wait4(init, 0)  # returns when nothing is left in the namespace
    with open(report_in) as stream:
        lines = [json.loads(line) for line in stream]
    report = {key: value for line in lines for key, value in line.items()}
    report |= {"cause": cause, "wall_s": time.monotonic() - started, "cpu_s": usage.ru_utime + usage.ru_stime}
    report["peak_rss_bytes"] = usage.ru_maxrss * 1024
    os.write(config["result_fd"], json.dumps(report).encode())


def write_maps(init: int) -> None:
    """Inside, the program is user 1000: nobody outside if we are root, else ourselves. Root keeps a 0 for set-up."""
    uid, gid = os.geteuid(), os.getegid()
    # Without rights, a group map may be written only once groups can no longer be dropped.
    maps = {"setgroups": "deny", "uid_map": f"{UID} {uid} 1", "gid_map": f"{UID} {gid} 1"}
    if uid == 0:
        maps = dict.fromkeys(("uid_map", "gid_map"), f"0 0 1\n{UID} {NOBODY} 1")
    for name, text in maps.items():
        with open(f"/proc/{init}/{name}", "w") as file:
            file.write(text)


def watch(init: int, deadline: float, memory_bytes: int | None) -> str | None:
    """Waits for init to end. Kills it when time or memory is used up or SIGTERM comes, and says which it was."""
    while os.waitid(os.P_PID, init, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        left = deadline - time.monotonic()
        wait_s = max(left, 0) if memory_bytes is None else max(min(left, TICK_S), 0)
        got = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, wait_s)
        if got is not None and got.si_signo == signal.SIGTERM:
            cause = "stop"
        elif left <= 0:
            cause = "wall"
        elif memory_bytes is not None and resident_bytes(init) > memory_bytes:
            cause = "memory"
        else:
            continue
        os.kill(init, signal.SIGKILL)
        return cause
    return None


def resident_bytes(pid: int) -> int:
    """Proportional resident memory of a process and its descendants: pages shared after a fork count once."""
    try:
        total = proportional_bytes(pid)
        children = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended just now; its children are init's by the next tick
    return total + sum(resident_bytes(int(child)) for child in children)


def proportional_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except PermissionError:  # a process may make itself unreadable to its user, but never its plain resident size
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()


# ---- init


def run_inside(config: dict[str, Any], launcher: socket.socket, report: int) -> NoReturn:
    """Pid 1: builds the root, starts the program, reaps until the program ends, and takes the rest with it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        launcher.send(b"r")
        if launcher.recv(1) != b"g":
            os._exit(1)
        launcher.close()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 is deaf to signals from inside, but for those it handles
        build_root(config)
        prctl(PR_SET_DUMPABLE, 0)  # a program of the same user cannot look into init
        program = os.fork()
        if program == 0:
            become_program(config)
        while True:
            pid, status = os.wait()
            if pid == program:
                os.write(report, json.dumps({"exit_code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                os._exit(0)
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not pass for an exit status of the program)
        os.write(report, json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode() + b"\n")
    finally:
        os._exit(1)


def build_root(config: dict[str, Any]) -> None:
    os.umask(0o022)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    size = os.fstat(config["code_fd"]).st_size + (1 << 20)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=256,mode=755")
    os.mkdir(f"/tmp{HOST}")
    check(_libc.syscall(SYS_PIVOT_ROOT, b"/tmp", f"/tmp{HOST}".encode()), "pivot_root")
    os.chdir("/")
    for directory in ("/dev", "/etc", "/proc", "/tmp"):
        os.mkdir(directory)
    for source, target in config["binds"]:
        bind(source, target, read_only=True)
    for device in ("null", "zero", "full", "random", "urandom"):
        bind(f"/dev/{device}", f"/dev/{device}", read_only=False)
    links = {"/dev/fd": "/proc/self/fd", "/dev/shm": "/tmp"} | config["links"]
    links |= {f"/dev/{name}": f"/proc/self/fd/{fd}" for fd, name in enumerate(("stdin", "stdout", "stderr"))}
    for link, target in links.items():
        os.symlink(target, link)
    with open("/etc/passwd", "w") as file:
        file.write(f"user:x:{UID}:{UID}::/tmp:/\n")
    with open("/main.py", "wb") as target_file, open(config["code_fd"], "rb") as code:
        target_file.write(code.read())
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    options = f"size={config['tmp_bytes']},nr_inodes={config['inodes']},mode=700,uid={UID},gid={UID}"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    check(_libc.umount2(HOST.encode(), MNT_DETACH), "umount of the old root")
    os.rmdir(HOST)
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def bind(source: str, target: str, read_only: bool) -> None:
    if os.path.isdir(HOST + source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(HOST + source, target, None, MS_BIND | MS_REC)
    if read_only:  # with every mount below it, which MS_REMOUNT would leave out; the bits are RDONLY, NOSUID and NODEV
        attributes = struct.pack("=4Q", 1 | 2 | 4, 0, 0, 0)
        at_recursive = ctypes.c_uint(0x8000)
        call = _libc.syscall(SYS_MOUNT_SETATTR, -100, target.encode(), at_recursive, attributes, ctypes.c_size_t(32))
        check(call, f"mount_setattr {target}")


# ---- program


def become_program(config: dict[str, Any]) -> NoReturn:
    os.setsid()
    os.chdir("/tmp")
    os.dup2(config["stdin_fd"], 0)
    set_limits(config)
    drop_privileges()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    install_filter(bytes.fromhex(config["filter"]))
    os.execve(config["argv"][0], config["argv"], config["env"])


def set_limits(config: dict[str, Any]) -> None:
    cpu_s = math.ceil(config["cpu_s"])
    init = 0 if os.geteuid() == 0 else 1  # init is counted with the program where both are the same user
    wanted = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # SIGXCPU, and a second later SIGKILL
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_NPROC: config["processes"] + init,
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_NOFILE: config["open_files"],
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, value in wanted.items():
        ceiling = resource.getrlimit(which)[1]
        soft, hard = value if isinstance(value, tuple) else (value, value)
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))


def drop_privileges() -> None:
    capability = 0
    while prctl(PR_CAPBSET_DROP, capability) == 0:
        capability += 1
    prctl(PR_CAP_AMBIENT, 4)  # clear all
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
    check(_libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
    check(prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


def install_filter(program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    check(_libc.syscall(SYS_SECCOMP, 1, 0, header), "seccomp")


if __name__ == "__main__":
    try:
        launch(json.loads(sys.argv[1]))
    except OSError as error:
        sys.exit(str(error))
