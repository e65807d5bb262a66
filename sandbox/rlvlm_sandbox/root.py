"""From the host into a root and namespaces of their own; there the fork server is executed.

Two processes: one stays outside the new pid namespace and waits, one becomes its pid 1, the fork server. Neither has
any privilege left. Run by forkserver.py in a fresh interpreter, without the rest of the package.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any, NoReturn

from rlvlm_sandbox import kernel
from rlvlm_sandbox.kernel import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT

UID, NOBODY = 1000, 65534  # inside; and outside, when started by root
_HOST = "/.host"  # where the old root hangs while the new one is built
_NAMESPACES = (
    kernel.NEW_USER | kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_UTS
    | kernel.NEW_CGROUP
)  # fmt: skip
_CAP_SYS_ADMIN = 21


def main(text: str) -> NoReturn:
    """text: JSON with `argv` and `env` of the fork server, `server` (what it is told), `binds`, `links`, and `control`,
    a descriptor that it inherits."""
    config = json.loads(text)
    if _may_mount():
        # Paths that only root can reach are bound while we still are root.
        kernel.unshare(kernel.NEW_MOUNTS)
        _build_root(config)
        _leave_root()
        _enter_namespaces()
    else:
        _leave_root()
        _enter_namespaces()
        _build_root(config)
    kernel.sethostname("sandbox")
    server = os.fork()  # the first process in the new pid namespace
    if server:
        _wait_for(server, config["control"])
    _become_server(config)


def _may_mount() -> bool:
    with open("/proc/self/status") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff"))
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)


def _leave_root() -> None:
    """Root becomes nobody. One that is the only user of its namespace is an ordinary user outside, and stays."""
    if os.geteuid() != 0 or not kernel.is_mapped(NOBODY):
        return
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # our own uid_map is ours to write only then


def _enter_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(_NAMESPACES)
    # A group map may be written without privilege only once groups can no longer be dropped.
    for name, line in {"setgroups": "deny", "uid_map": f"{UID} {uid} 1", "gid_map": f"{UID} {gid} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _build_root(config: dict[str, Any]) -> None:
    os.umask(0o022)
    kernel.mount(None, "/", None, MS_REC | MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=256,mode=755")
    os.mkdir(f"/tmp{_HOST}")
    kernel.pivot_root("/tmp", f"/tmp{_HOST}")
    os.chdir("/")
    for directory in ("/dev", "/etc", "/proc", "/tmp"):
        os.mkdir(directory)
    for source, target in config["binds"]:
        _bind(source, target, read_only=True)
    for device in ("null", "zero", "full", "random", "urandom"):
        _bind(f"/dev/{device}", f"/dev/{device}", read_only=False)
    links = {"/dev/fd": "/proc/self/fd", "/dev/shm": "/tmp"} | config["links"]
    links |= {f"/dev/{name}": f"/proc/self/fd/{fd}" for fd, name in enumerate(("stdin", "stdout", "stderr"))}
    for link, target in links.items():
        os.symlink(target, link)
    with open("/etc/passwd", "w") as file:
        file.write(f"user:x:{UID}:{UID}::/tmp:/bin/sh\n")
    # A fresh /proc may be mounted later only where a whole one is in sight.
    kernel.mount(f"{_HOST}/proc", "/proc", None, MS_BIND | MS_REC)
    kernel.detach(_HOST)
    os.rmdir(_HOST)
    kernel.mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind(source: str, target: str, read_only: bool) -> None:
    if os.path.isdir(_HOST + source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(_HOST + source, target, None, MS_BIND | MS_REC)
    if read_only:
        kernel.make_read_only(target)


def _wait_for(server: int, control: int) -> NoReturn:
    """Stays until the server ends, as its parent outside: the server dies with it."""
    os.close(control)
    kernel.drop_capabilities()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is our client's affair
    os.waitpid(server, 0)
    os._exit(0)


def _become_server(config: dict[str, Any]) -> NoReturn:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    proc = os.open("/proc", os.O_PATH)
    # What is mounted over it is for judged programs, and shows them no process but their own.
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=invisible")
    kernel.drop_capabilities()
    for fd in (config["control"], proc):
        os.set_inheritable(fd, True)
    order = json.dumps(config["server"] | {"proc": f"/proc/self/fd/{proc}"})
    os.execve(config["argv"][0], [*config["argv"], order], config["env"])
