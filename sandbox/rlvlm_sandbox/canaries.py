"""What a backend promises, as a program that looks for itself: it prints `holds`, or which promises are broken."""

from __future__ import annotations

_SOURCE = """
import ctypes, os, signal, socket, threading
def succeeds(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
def opens(path, mode="r"):
    return succeeds(lambda: open(path, mode).close())
def thread():
    done = []
    threading.Thread(target=lambda: done.append(True)).start()
    return True
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *arguments) == -1
broken = {
    "it may open a network socket": succeeds(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "it may open a unix socket": succeeds(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)),
    "it may start processes": succeeds(os.fork),
    "it may write to the root": opens("/x", "w"),
    "it may not start threads": not thread(),
    "it may make io_uring": not refused(425, 1, None),
    "it has host's home": opens("/root/.bashrc") or opens("/etc/shadow"),
    "its files are not limited": __import__("resource").getrlimit(__import__("resource").RLIMIT_FSIZE)[0] > (1 << 30),
    "it is root": os.getuid() == 0 and MAY_NOT_BE_ROOT,
}
"""
_OWN_ROOT = """
status = dict(line.rstrip("\\n").partition(":\\t")[::2] for line in open("/proc/self/status"))
files = set("bin dev etc lib lib32 lib64 packages proc python tmp usr main.py".split())
broken |= {
    "it has capabilities": any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
    "it may gain privileges": status["NoNewPrivs"] != "1",
    "system calls are not filtered": status["Seccomp"] != "2",
    "it sees other processes": len([name for name in os.listdir("/proc") if name.isdigit()]) > 3,
    "it sees other files": not set(os.listdir("/")) <= files,
    "it sees network interfaces": any("lo:" not in line for line in open("/proc/net/dev").readlines()[2:]),
    "it may write to the libraries": opens("/python/lib/x", "w"),
    "it may not write to /tmp": not opens("/tmp/x", "w"),
}
"""
_HOST_ROOT = """
broken |= {
    "it sees processes": succeeds(lambda: os.listdir("/proc")) or opens("/proc/self/status"),
    "it may write to /tmp": opens(f"/tmp/rlvlm-sandbox-canary-{os.getpid()}", "w"),
    "it may write to /dev/shm": opens(f"/dev/shm/rlvlm-sandbox-canary-{os.getpid()}", "w"),
    "it may read /etc": opens("/etc/passwd"),
    "it may signal others": succeeds(lambda: os.kill(os.getppid(), 0)),
}
"""
_END = """
print(*[what for what, is_so in broken.items() if is_so] or ["holds"], sep="; ")
"""


def canary(backend: str) -> bytes:
    """The program for a backend; it runs under the profile `judge`."""
    own_root = backend != "landlock"
    source = _SOURCE.replace("MAY_NOT_BE_ROOT", str(own_root))
    return (source + (_OWN_ROOT if own_root else _HOST_ROOT) + _END).encode()
