"""What of the host a program behind walls must not reach. Standard library only: it runs as nobody, too."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SECRET = re.compile(rb"SECRET-[a-z]+-[0-9a-f]{32}")  # programs look for it without knowing it
_PLACES = ("/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/dev/mqueue", "/etc", "/usr", "/usr/lib", "/run", "/proc")


def secret(kind: str) -> str:
    return f"SECRET-{kind}-{uuid.uuid4().hex}"


class Host:
    """Victims of the user ids `uids`, listening sockets, a secret file, a canary file that anybody may write.

    `harm` is what happened to them since they were made.
    """

    def __init__(self, directory: Path, uids: Sequence[int]) -> None:
        self._token = f"sandboxattack{uuid.uuid4().hex[:12]}"
        self._directory = directory / self._token
        self._make_files()
        self._make_sockets()
        own = os.geteuid()
        self._victims = [self._victim(None if uid == own else uid) for uid in uids]
        self._before = [_process(victim.pid) for victim in self._victims]
        self._files = self._seen_files()

    def facts(self) -> dict[str, Any]:
        """What a program is told, so that its attempts are aimed well. No secret is among it."""
        return {
            "token": self._token, "victims": [victim.pid for victim in self._victims],
            "tcp": self._sockets["tcp"].getsockname()[1], "udp": self._sockets["udp"].getsockname()[1],
            "abstract": f"\0{self._token}", "abstract_datagrams": f"\0{self._token}-datagrams",
            "unix": f"{self._directory}/unix", "unix_datagrams": f"{self._directory}/unix-datagrams",
            "secret": f"{self._directory}/secret", "canary": f"{self._directory}/open/canary",
        }  # fmt: skip

    def harm(self) -> list[str]:
        found = [f"something arrived at the {name} socket" for name in self._touched_sockets()]
        if self._seen_files() != self._files:
            found.append(f"the canary's directory is now {self._seen_files()}, it was {self._files}")
        for victim, before in zip(self._victims, self._before, strict=True):
            if victim.poll() is not None:
                found.append(f"victim {victim.pid} ended with {victim.returncode}")
            elif (now := _process(victim.pid)) != before:
                found.append(f"victim {victim.pid} is now {now}, it was {before}")
        return found + [f"there is {path}" for path in self._left_files()]

    def close(self) -> None:
        for victim in self._victims:
            victim.send_signal(signal.SIGCONT)
            victim.kill()
            victim.wait()
        for one in self._sockets.values():
            one.close()

    def _make_files(self) -> None:
        (self._directory / "open").mkdir(parents=True)
        for path, text in {"secret": secret("file"), "open/canary": "sings"}.items():
            (self._directory / path).write_text(text)
        (self._directory / "open").chmod(0o777)
        (self._directory / "open/canary").chmod(0o666)

    def _make_sockets(self) -> None:
        tcp, udp = (socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))
        for one in (tcp, udp):
            one.bind(("127.0.0.1", 0))
        self._sockets = {"tcp": tcp, "udp": udp}
        for name, address in {"abstract": f"\0{self._token}", "unix": f"{self._directory}/unix"}.items():
            for suffix, kind in {"": socket.SOCK_STREAM, "-datagrams": socket.SOCK_DGRAM}.items():
                one = self._sockets[name + suffix] = socket.socket(socket.AF_UNIX, kind)
                one.bind(address + suffix)
                if name == "unix":
                    os.chmod(address + suffix, 0o777)
        for one in self._sockets.values():
            one.setblocking(False)
            if one.type == socket.SOCK_STREAM:
                one.listen()

    def _victim(self, uid: int | None) -> subprocess.Popen[bytes]:
        other: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": ()}
        return subprocess.Popen(
            [secret("argv"), "1000"], executable="/bin/sleep", env={"TOKEN": secret("env")}, cwd="/", **other,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def _touched_sockets(self) -> Iterator[str]:
        for name, one in self._sockets.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    if one.type == socket.SOCK_STREAM:
                        one.accept()[0].close()
                    else:
                        one.recv(1)
                    yield name

    def _seen_files(self) -> dict[str, tuple[Any, ...]]:
        """By path: what can be changed about it, the canary's content, and when the secret was read last."""
        seen: dict[str, tuple[Any, ...]] = {}
        for path in (*self._directory.iterdir(), *(self._directory / "open").iterdir()):
            stat = path.lstat()
            seen[path.name] = stat.st_mode, stat.st_uid, stat.st_nlink, stat.st_size, stat.st_mtime_ns
            if path.name == "secret":
                seen[path.name] += (stat.st_atime_ns,)
            elif path.name == "canary":
                seen[path.name] += (path.read_text(),)
        return seen

    def _left_files(self) -> list[str]:
        """Files that an attack has named after the token, in places where it should not be able to make any."""
        found = [f"{place.rstrip('/')}/{name}" for place in _PLACES for name in _names(place) if self._token in name]
        return [path for path in found if path != str(self._directory)]


def _names(place: str) -> list[str]:
    try:
        return os.listdir(place)
    except OSError:
        return []


def _process(pid: int) -> tuple[Any, ...]:
    """All that others can change about a sleeping process."""
    end = time.monotonic() + 1
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "S" or time.monotonic() > end:
            break
    state, nice, priority, started = fields[0], fields[16], fields[15], fields[19]
    limits = Path(f"/proc/{pid}/limits").read_text()
    oom = Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
    return state, nice, priority, started, sorted(os.sched_getaffinity(pid)), os.sched_getscheduler(pid), limits, oom


def descendants(pid: int) -> set[int]:
    """Pids of the live processes below `pid`; what has died and was left to us is reaped."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                continue
            parents[int(name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}
