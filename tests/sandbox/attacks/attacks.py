"""The attacks of SANDBOX.md, in its order. Standard library only: this runs as nobody, too.

Bombs are bounded: where no wall holds them they fail the test, not the machine.
"""

from __future__ import annotations

from .cases import OWN_ROOT, Case

MIB = 1 << 20
SHORT = {"wall_s": 0.6}

# name, number on x86-64, number on aarch64 (`-`: it does not exist there)
_FORBIDDEN_CALLS = """
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, bpf 321 280, userfaultfd 323 282,
perf_event_open 298 241, add_key 248 217, request_key 249 218, keyctl 250 219, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_open 434 434, pidfd_getfd 438 438,
pidfd_send_signal 424 424, process_madvise 440 440, process_mrelease 448 448, mount 165 40, umount2 166 39,
pivot_root 155 41, chroot 161 51, mknodat 259 33, mknod 133 -, sethostname 170 161, setdomainname 171 162,
setns 308 268, unshare 272 97, open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431,
fsmount 432 432, fspick 433 433, mount_setattr 442 442, swapon 167 224, swapoff 168 225, reboot 169 142,
kexec_load 246 104, init_module 175 105, finit_module 313 273, delete_module 176 106, settimeofday 164 170,
clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, syslog 103 116, acct 163 89, quotactl 179 60,
open_by_handle_at 304 265, name_to_handle_at 303 264, fanotify_init 300 262, personality 135 92, modify_ldt 154 -,
ioperm 173 -, iopl 172 -, setuid 105 146, setgid 106 144, setreuid 113 145, setresuid 117 147, setresgid 119 149,
setgroups 116 159, setfsuid 122 151, capset 126 91, memfd_create 319 279, memfd_secret 447 447, seccomp 317 277,
vmsplice 278 75, splice 275 76, tee 276 77, shmget 29 194, shmat 30 196, msgget 68 186, semget 64 190,
mq_open 240 180, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, setpriority 141 140,
ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239, mbind 237 235, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, get_robust_list 274 100, vhangup 153 58, inotify_init1 294 26, lookup_dcookie 212 18,
uselib 134 -, clone3 435 435
"""


def _calls() -> dict[str, tuple[int, int | None]]:
    rows = [row.split() for row in _FORBIDDEN_CALLS.replace("\n", " ").split(",")]
    return {name: (int(x86), None if arm == "-" else int(arm)) for name, x86, arm in rows}


_PROCESSES_AND_THREADS = [
    Case(
        "fork, in every way there is",
        """
attempt("fork", os.fork)
attempt("forkpty", os.forkpty)
attempt("posix_spawn", os.posix_spawn, "/bin/true", ["true"], {})
attempt("execv", os.execv, "/bin/true", ["true"])
import subprocess
attempt("subprocess", subprocess.run, ["/bin/true"])
attempt("vfork", syscall, (58, None))
attempt("clone", syscall, (56, 220), 17, 0, 0, 0, 0)
attempt("execveat", syscall, (322, 281), os.open(sys.executable, os.O_RDONLY), b"", 0, 0, 0x1000)
""",
    ),
    Case(
        "fork bomb",
        """
import time
end, generation = time.monotonic() + 3, 0
while time.monotonic() < end:
    try:
        generation += generation < 7 and os.fork() == 0
        time.sleep(0.001)
    except OSError:
        time.sleep(0.01)
""",
        outcomes=("time",),
        profile="tool",
        limits={"wall_s": 1.0, "processes": 16},
        backends=OWN_ROOT,
        elsewhere={"bubblewrap": ("time", "signal")},  # killed where the kernel does not count
    ),
    Case(
        "processes and threads are counted together",
        """
import threading, time
for _ in range(4):
    if os.fork() == 0:
        break
for _ in range(100):
    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
""",
        outcomes=("runtime_error", "time"),
        profile="tool",
        limits={"wall_s": 1.0, "processes": 16},
        backends=OWN_ROOT,
        elsewhere={"bubblewrap": ("runtime_error", "time", "signal")},
    ),
    Case(
        "thread bomb",
        """
import threading, time
threading.stack_size(32768)
count = 0
try:
    while count < 3000:
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
print("GOT THROUGH: threads" if count > 32 else "stopped", count, flush=True)
os._exit(3)
""",
        outcomes=("runtime_error",),
        limits={"wall_s": 2.0, "processes": 16},
        elsewhere={"bubblewrap": ("runtime_error", "signal"), "landlock": ("signal",)},
    ),
    Case(
        "threads that end and start again",
        """
import threading
for _ in range(500):
    threading.Thread(target=int).start()
""",
        outcomes=("ok", "runtime_error"),
    ),
]

_MEMORY = [
    Case("memory by one object", "x = bytearray(1 << 34)", outcomes=("memory",)),
    Case(
        "memory bit by bit",
        "x = []\nwhile True: x.append(bytearray(1 << 16))",
        outcomes=("memory",),
        limits={"memory_bytes": 200 * MIB},
    ),
    Case(
        "memory by threads",
        """
import threading
def hold():
    x = bytearray(100 << 20)
    threading.Event().wait(2)
try:
    for _ in range(8):
        threading.Thread(target=hold, daemon=True).start()
except RuntimeError as error:  # no room for its stack
    raise MemoryError from error
threading.Event().wait(0.5)
""",
        outcomes=("ok", "memory", "runtime_error"),  # a MemoryError in a thread ends that thread
        limits={"wall_s": 2.0, "memory_bytes": 200 * MIB},
        complains="MemoryError",
    ),
    Case(
        "memory by many children",
        """
import time
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(150 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(3)
        os._exit(0)
time.sleep(3)
""",
        outcomes=("memory",),
        profile="tool",
        limits={"wall_s": 4.0, "memory_bytes": 300 * MIB},
        backends=OWN_ROOT,
    ),
    Case(
        "memory by a shared mapping",
        """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 32 << 20))
    for i in range(0, 32 << 20, 4096): held[-1][i] = 1
""",
        outcomes=("runtime_error", "memory"),
        limits={"memory_bytes": 200 * MIB},
        complains="Cannot allocate memory|MemoryError",
    ),
    Case(
        "memory by many shared mappings of many children",
        """
import mmap, time
for _ in range(8):
    if os.fork() == 0:
        x = mmap.mmap(-1, 150 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(3)
        os._exit(0)
time.sleep(3)
""",
        outcomes=("memory",),
        profile="tool",
        limits={"wall_s": 4.0, "memory_bytes": 300 * MIB},
        backends=OWN_ROOT,
    ),
    Case(
        "memory of children whose parents are gone",
        """
import time
for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        x = bytearray(150 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(3)
        os._exit(0)
time.sleep(3)
""",
        outcomes=("memory",),
        profile="tool",
        limits={"wall_s": 4.0, "memory_bytes": 300 * MIB},
        backends=OWN_ROOT,
    ),
    Case(
        "zip bomb",
        """
import zlib
packer = zlib.compressobj(1)
bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
print(len(zlib.decompress(bomb)))
""",
        outcomes=("memory",),
        limits={"memory_bytes": 100 * MIB},
    ),
    Case("memory for a number", "x = 1 << (1 << 36)", outcomes=("memory",)),
    Case(
        "limits lifted again",
        """
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "STACK", "DATA", "MEMLOCK"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(kind, (hard + 1, hard + 1))
        except ValueError as error:
            print(name, "refused:", error)
        else:
            print("GOT THROUGH:", name)
    else:
        assert name == "DATA", name
""",
    ),
]

_CRASHES = [
    Case("endless recursion", "def f(): f()\nf()", outcomes=("runtime_error",), complains="RecursionError"),
    Case(
        "endless recursion without Python's limit",
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()",
        outcomes=("memory", "signal", "runtime_error"),  # of CPython 3.11 a SystemError, where it loses the MemoryError
        limits={"wall_s": 8.0, "memory_bytes": 100 * MIB},
        within_s=8,
    ),
    Case(
        "endless recursion through C",
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return max(map(f, [x]))\nf(1)",
        outcomes=("signal", "memory"),
        exit_code=-11,
    ),
    Case("segmentation fault", "import ctypes; ctypes.string_at(0)", outcomes=("signal",), exit_code=-11),
    Case("abort", "import os; os.abort()", outcomes=("signal",), exit_code=-6),
    Case(
        "core dump",
        """
import resource
try:
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
except ValueError:
    os.abort()
""",
        outcomes=("signal",),
        exit_code=-6,
    ),
    Case("killed by itself", "import os; os.kill(os.getpid(), 9)", outcomes=("signal",), exit_code=-9, told=False),
]

_TIME = [
    Case("endless loop", "while True: pass", outcomes=("time",), limits={"cpu_s": 1, "wall_s": 4}, exit_code=-24),
    Case("sleep", "import time; time.sleep(60)", outcomes=("time",), limits=SHORT, within_s=2),
    Case(
        "every signal ignored",
        """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
while True: time.sleep(1)
""",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "busy with every signal ignored",
        """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
""",
        outcomes=("time",),
        limits={"cpu_s": 1, "wall_s": 6},
        exit_code=-9,
        within_s=8,
    ),
    Case(
        "SIGXCPU caught",
        """
import signal
def no(*_): raise KeyboardInterrupt
signal.signal(signal.SIGXCPU, no)
while True:
    try:
        x = 0
        while True: x += 1
    except BaseException: pass
""",
        outcomes=("time",),
        limits={"cpu_s": 1, "wall_s": 6},
        within_s=8,
    ),
    Case("stopped", "import os; os.kill(os.getpid(), 19)", outcomes=("time",), limits=SHORT, within_s=2, told=False),
    Case(
        "a loop in C that looks at no signal",
        "import re; re.match('(a*)*b', 'a' * 64)",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "stuck at the end",
        "import atexit, time; atexit.register(time.sleep, 60)",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "stuck in its excepthook",
        "import sys, time\ndef hook(*_): time.sleep(60)\nsys.excepthook = hook\n1 / 0",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "a thread that does not end",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "waiting for input that does not come",
        "import socket; a, b = socket.socketpair(); a.recv(1)",
        outcomes=("time",),
        limits=SHORT,
        within_s=2,
    ),
    Case(
        "CPU time used up by children",
        """
for _ in range(4):
    if os.fork() == 0:
        while True: pass
os.wait()
""",
        outcomes=("time", "ok"),  # each may use up its own; the first that does ends the run
        profile="tool",
        limits={"cpu_s": 1, "wall_s": 1.5},
        backends=OWN_ROOT,
    ),
]

_OUTPUT = [
    Case(
        "gigabytes on stdout",
        "while True: print('x' * 65536)",
        outcomes=("output",),
        limits={"output_bytes": 100_000},
        says=b"x" * 65536 + b"\n" + b"x" * 34463,
    ),
    Case(
        "gigabytes on stderr",
        "import sys\nwhile True: sys.stderr.write('x' * 65536)",
        outcomes=("output",),
        limits={"output_bytes": 100_000},
    ),
    Case(
        "one write of a hundred megabytes",
        "import os\ndata = bytes(100 << 20)\nwhile data: data = data[os.write(1, data):]",
        outcomes=("output",),
    ),
    Case(
        "output of a thread",
        "import threading\ndef f():\n    while True: print('x' * 65536)\nthreading.Thread(target=f).start()",
        outcomes=("output",),
    ),
    Case(
        "output of children",
        "import os\nwhile os.fork() == 0: os.write(1, b'x' * 300_000)\nos.wait()",
        outcomes=("output",),
        profile="tool",
        backends=OWN_ROOT,
    ),
    Case(
        "output with every signal ignored and no end",
        "import os, signal\nsignal.signal(signal.SIGPIPE, signal.SIG_IGN)\n"
        "while True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass",
        outcomes=("output",),
    ),
    Case("binary output", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 3)", says=bytes(range(256)) * 3),
]

_FILES = [
    Case(
        "huge file",
        "with open('/tmp/huge', 'wb') as file:\n    for _ in range(100): file.write(bytes(1 << 20))",
        outcomes=("runtime_error",),
        complains="File too large|Permission denied|Operation not permitted",
    ),
    Case(
        "huge file, by SIGXFSZ's own hand",
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "with open('/tmp/huge', 'wb') as file:\n    for _ in range(100): file.write(bytes(1 << 20))",
        outcomes=("signal",),
        elsewhere={"landlock": ("runtime_error",)},
    ),
    Case(
        "sparse file",
        "with open('/tmp/sparse', 'wb') as file: file.truncate(1 << 40)",
        outcomes=("runtime_error",),
        complains="File too large|Permission denied",
    ),
    Case(
        "many files",
        "for i in range(20_000): open(f'/tmp/{i}', 'w').close()",
        outcomes=("runtime_error",),
        complains="No space left|Permission denied",
        within_s=8,
    ),
    Case(
        "many directories, deep",
        "import os\nfor i in range(20_000):\n    os.mkdir('d')\n    os.chdir('d')",
        outcomes=("runtime_error",),
        complains="No space left|Permission denied|Operation not permitted",
    ),
    Case(
        "full tmp",
        "for i in range(100):\n    with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(1 << 20))",
        outcomes=("runtime_error",),
        complains="No space left|Permission denied",
    ),
    Case(
        "descriptors",
        "import os\nfor i in range(10_000): os.dup(1)",
        outcomes=("runtime_error",),
        complains="Too many open files",
    ),
]

_WRITES = [
    Case(
        "writes to the system",
        """
name = HOST["token"]
for place in ("", "/usr", "/usr/lib", "/etc", "/dev", "/proc", "/bin", "/lib", "/home", "/root", "/var/tmp", "/run",
              "/sys", "/python", "/python/lib", "/packages", "/packages/0", "/opt", "/boot", "/dev/mqueue"):
    attempt("write in " + place, open, f"{place}/{name}", "w")
    attempt("mkdir in " + place, os.mkdir, f"{place}/{name}")
    attempt("link in " + place, os.symlink, "/", f"{place}/{name}")
for path in ("/etc/passwd", "/etc/ld.so.cache", "/usr/bin/env", "/bin/sh", sys.executable, os.__file__,
             "/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern",
             "/proc/sys/vm/drop_caches", "/proc/1/oom_score_adj", "/proc/1/mem", "/proc/1/uid_map", "/proc/kcore",
             "/dev/mem", "/dev/kmsg", "/dev/tty", "/dev/sda", "/dev/vda", "/sys/power/state"):
    attempt("change " + path, os.open, path, os.O_WRONLY)
for path in ("/usr/bin/env", "/bin", sys.executable, os.__file__, "/dev/null", "/"):
    attempt("chmod " + path, os.chmod, path, os.stat(path).st_mode & 0o7777)  # nothing lost where it gets through
    attempt("chown " + path, os.chown, path, -1, -1)
    attempt("rename " + path, os.rename, path, path)
quietly(open, f"/tmp/{name}", "w")
quietly(open, f"/dev/shm/{name}", "w")
""",
    ),
    Case(
        "writes to the host's files",
        """
canary = HOST["canary"]
for path in (canary, "/proc/1/root" + canary, "/../../.." + canary, "/proc/self/root/.." + canary):
    attempt("write", open, path, "w")
    attempt("append", open, path, "a")
    attempt("truncate", os.truncate, path, 0)
    attempt("unlink", os.unlink, path)
    attempt("chmod", os.chmod, path, 0)
    attempt("utime", os.utime, path)
    attempt("link", os.link, path, path + "2")
    attempt("rename", os.rename, path, path + "2")
    attempt("mkdir", os.mkdir, path + "2")
    attempt("setxattr", os.setxattr, path, "user.x", b"x")
    attempt("mkfifo", os.mkfifo, path + "2")
""",
        harms_unwalled=True,
    ),
    Case(
        "remount, umount, mknod, sysctl, chroot",
        """
def check(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
attempt("remount", lambda: check(libc.mount(None, b"/", None, ctypes.c_ulong(32 | 4096), None)))
attempt("mount", lambda: check(libc.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)))
attempt("mount proc", lambda: check(libc.mount(b"none", b"/tmp", b"proc", ctypes.c_ulong(0), None)))
for place in (b"/proc", b"/tmp", b"/usr", b"/usr/lib", b"/dev/null", b"/"):
    attempt("umount", lambda: check(libc.umount2(place, 2)))
for mode in (0o020666, 0o060666):
    attempt("mknod", os.mknod, "/tmp/device", mode, os.makedev(1, 1))
    attempt("mknod", os.mknod, "device", mode, os.makedev(8, 0))
attempt("chroot", os.chroot, "/tmp")
attempt("sethostname", socket.sethostname, "x")
attempt("setuid", os.setuid, 0)
attempt("setresuid", os.setresuid, 0, 0, 0)
attempt("setgroups", os.setgroups, [])
""",
    ),
]

_READS = [
    Case(
        "the host's files",
        """
secret = HOST["secret"]
up = "/".join([".."] * 40)
paths = [secret, up + secret, "/proc/1/root" + secret, "/proc/self/root" + secret, "/proc/1/cwd/" + up + secret,
         f"/proc/{os.getppid()}/root" + secret, f"/proc/self/task/{os.getpid()}/root" + secret]
paths += [f"/proc/{victim}/root" + secret for victim in HOST["victims"]]
paths += ["/etc/shadow", "/root/.bashrc", "/root/.ssh", "/home", "/var/log", "/proc/kcore", "/proc/kmsg", "/dev/mem"]
for path in paths:
    attempt("read " + path, lambda: open(path).read())
    attempt("list " + path, os.listdir, path)
root = os.open("/", os.O_PATH | os.O_DIRECTORY)
attempt("from a descriptor", os.open, up + secret, os.O_RDONLY, dir_fd=root)
attempt("list the directory", os.listdir, os.path.dirname(secret))
quietly(os.symlink, secret, "/tmp/link")
attempt("by a link", lambda: open("/tmp/link").read())
attempt("by a hard link", os.link, secret, "/tmp/hard")
attempt("by exec", os.execv, secret, ["x"])
attempt("by mapping", ctypes.CDLL, secret)
""",
        harms_unwalled=True,
    ),
    Case(
        "secrets in env and argv",
        """
import gc
print(os.environ, os.environb, sys.argv, sys.orig_argv)
pids = ["self", 1, os.getppid(), *HOST["victims"]]
quietly(lambda: pids.extend(filter(str.isdigit, os.listdir("/proc"))))
for pid in pids:
    for name in ("environ", "cmdline", "auxv", "stack"):
        quietly(lambda: print(open(f"/proc/{pid}/{name}", "rb").read()))
frame = sys._getframe()
while frame := frame.f_back:
    print(frame.f_locals, frame.f_code)
for thing in gc.get_objects():
    for word in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple, set)) else ():
        if isinstance(word, (str, bytes)) and "CRET-" in str(word):
            print(word)
""",
    ),
    Case(
        "secrets in its own memory",
        r"""
import re
found = set()
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if line.split()[1][0] == "r" and "[v" not in line:
            memory.seek(start)
            try:
                found |= set(re.findall(rb"SECRE[T]-[a-z]+-[0-9a-f]{32}", memory.read(end - start)))
            except OSError:
                pass
print(found)
""",
        backends=OWN_ROOT,
        says=b"set()\n",
    ),
    Case(
        "inherited descriptors",
        """
for fd in range(3, 4096):
    try:
        os.fstat(fd)
    except OSError:
        continue
    print("GOT THROUGH:", fd, os.fstat(fd))
    quietly(lambda: print(os.pread(fd, 1000, 0)))
attempt("stdin written", os.write, 0, b"x")
attempt("stdin opened anew and written", lambda: os.write(os.open("/proc/self/fd/0", os.O_RDWR), b"x"))
""",
        stdin=b"given",
    ),
]

_NETWORK = [
    Case(
        "sockets of every family",
        """
families = dict(inet=2, inet6=10, packet=17, netlink=16, vsock=40, alg=38, bluetooth=31, can=29, tipc=30, xdp=44,
                rds=21, nfc=39, key=15, ax25=3, kcm=41, qipcrtr=42, smc=43, mctp=45, unspec=0)
for name, family in families.items():
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt(name, socket.socket, family, kind)
        attempt(name + " pair", socket.socketpair, family, kind)
""",
    ),
    Case(
        "sockets of the host",
        """
attempt("tcp", socket.create_connection, ("127.0.0.1", HOST["tcp"]), 0.5)
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", HOST["udp"])))
""",
        harms_unwalled=True,
    ),
    Case(
        "the network",
        """
import urllib.request
attempt("metadata", socket.create_connection, ("169.254.169.254", 80), 0.5)
attempt("metadata", urllib.request.urlopen, "http://169.254.169.254/latest/meta-data/", timeout=0.5)
attempt("v6", socket.create_connection, ("::1", HOST["tcp"]), 0.5)
attempt("names", socket.getaddrinfo, "example.com", 80)
""",
    ),
    Case(
        "unix sockets",
        """
def connect(kind, address): socket.socket(socket.AF_UNIX, kind).connect(address)
for kind, suffix in ((socket.SOCK_STREAM, ""), (socket.SOCK_DGRAM, "_datagrams"), (socket.SOCK_SEQPACKET, "")):
    attempt("abstract", connect, kind, HOST["abstract" + suffix])
    attempt("path", connect, kind, HOST["unix" + suffix])
    attempt("1/root", connect, kind, "/proc/1/root" + HOST["unix" + suffix])
""",
        harms_unwalled=True,
    ),
    Case(
        "unix sockets, through a pair's unconnected sending",
        """
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    for name in ("abstract_datagrams", "unix_datagrams", "abstract", "unix"):
        try:
            one, other = socket.socketpair(socket.AF_UNIX, kind)
        except OSError as error:
            print("no pair:", error)
            continue
        quietly(one.sendto, b"x", HOST[name])
        quietly(one.sendmsg, [b"x"], [], 0, HOST[name])
        quietly(one.connect, HOST[name])
        quietly(one.send, b"x")
""",
        harms_unwalled=True,
    ),
    Case(
        "the network, of a tool",
        """
attempt("tcp", socket.create_connection, ("127.0.0.1", HOST["tcp"]), 0.5)
attempt("metadata", socket.create_connection, ("169.254.169.254", 80), 0.5)
for family in (2, 10, 16, 17, 38, 40):
    attempt("family", socket.socket, family, socket.SOCK_STREAM)
def connect(kind, address): socket.socket(socket.AF_UNIX, kind).connect(address)
for kind, suffix in ((socket.SOCK_STREAM, ""), (socket.SOCK_DGRAM, "_datagrams")):
    attempt("abstract", connect, kind, HOST["abstract" + suffix])
    attempt("path", connect, kind, HOST["unix" + suffix])
    attempt("1/root", connect, kind, "/proc/1/root" + HOST["unix" + suffix])
""",
        profile="tool",
        backends=OWN_ROOT,
    ),
]

_OTHERS = """
import fcntl, resource, signal, struct
outside = HOST["victims"] + OUTSIDE
for pid in outside:
    for number in (0, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        attempt(f"kill {pid}", os.kill, pid, number)
        attempt(f"killpg {pid}", os.killpg, pid, number)
        attempt(f"tkill {pid}", syscall, (200, 130), pid, number)
        attempt(f"tgkill {pid}", syscall, (234, 131), pid, pid, number)
    attempt("pidfd", os.pidfd_open, pid)
    attempt("queue", syscall, (129, 138), pid, 9, ctypes.create_string_buffer(128))
    attempt("attach", syscall, (101, 117), 16, pid, 0, 0)
    attempt("seize", syscall, (101, 117), 0x4206, pid, 0, 0)
    vector = struct.pack("PN", ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    attempt("vm_readv", syscall, (310, 270), pid, vector, 1, vector, 1, 0)
    attempt("vm_writev", syscall, (311, 271), pid, vector, 1, vector, 1, 0)
    attempt("prlimit", resource.prlimit, pid, resource.RLIMIT_NOFILE)
    attempt("prlimit", resource.prlimit, pid, resource.RLIMIT_NOFILE, (10, 10))
    attempt("renice", os.setpriority, os.PRIO_PROCESS, pid, 19)
    attempt("renice the group", os.setpriority, os.PRIO_PGRP, pid, 19)
    attempt("scheduler", os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
    attempt("affinity", os.sched_setaffinity, pid, {0})
    attempt("affinity", os.sched_getaffinity, pid)
    attempt("group", os.setpgid, pid, pid)
    for command in (fcntl.F_SETOWN, 15):
        one, other = socket.socketpair()
        owner = pid if command == fcntl.F_SETOWN else struct.pack("ii", 1, pid)
        attempt("owner", fcntl.fcntl, one, command, owner)
        attempt("owner's group", fcntl.fcntl, one, fcntl.F_SETOWN, -pid)
        quietly(fcntl.fcntl, one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        quietly(other.send, b"x")
    attempt("ioctl", fcntl.ioctl, one, 0x8901, struct.pack("i", pid))
    for name in ("mem", "environ", "root", "cwd", "oom_score_adj", "maps", "fd/0", "task"):
        attempt(name, os.open, f"/proc/{pid}/{name}", os.O_RDONLY)
attempt("everybody", os.kill, -1, 0)
attempt("the user's", os.setpriority, os.PRIO_USER, os.getuid(), 0)
"""

_PROCESSES = [
    Case("other processes", _OTHERS.replace("OUTSIDE", "[]"), harms_unwalled=True),
    Case("the process it comes from", _OTHERS.replace("OUTSIDE", "[os.getppid()]"), backends=("landlock",)),
    Case("other processes, of a tool", _OTHERS.replace("OUTSIDE", "[]"), profile="tool", backends=OWN_ROOT),
    Case(
        "its own init",
        """
import fcntl, resource, signal
for number in signal.Signals:
    quietly(os.kill, 1, number)
    quietly(syscall, (200, 130), 1, int(number))
for name in ("CPU", "FSIZE", "NOFILE", "AS", "DATA"):
    quietly(resource.prlimit, 1, getattr(resource, "RLIMIT_" + name), (0, 0))
for name in ("mem", "environ", "root", "cwd", "maps", "auxv", "fd/0", "fd/3", "fd/16", "exe"):
    attempt(name, os.open, f"/proc/1/{name}", os.O_RDONLY)
    attempt(name, os.open, f"/proc/1/{name}", os.O_RDWR)
attempt("attach", syscall, (101, 117), 16, 1, 0, 0)
quietly(os.sched_setaffinity, 1, {0})
end = __import__("time").monotonic() + 0.2
while __import__("time").monotonic() < end: os.getpid()
""",
        backends=OWN_ROOT,
    ),
    Case(
        "its own init, of a tool",
        """
import resource, signal
for name in ("CPU", "FSIZE", "NOFILE", "AS", "DATA"):
    quietly(resource.prlimit, 1, getattr(resource, "RLIMIT_" + name), (0, 0))
for _ in range(400):  # work for init: it reaps all of these
    if os.fork() == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.wait()
quietly(os.kill, 1, signal.SIGKILL)
quietly(os.kill, -1, signal.SIGKILL)
""",
        profile="tool",
        backends=OWN_ROOT,
    ),
    Case("its own group", "import os\nos.killpg(0, 9)", outcomes=("signal", "runtime_error"), told=False),
]

_KERNEL = [
    Case(
        "forbidden system calls",
        f"for name, numbers in {_calls()!r}.items():\n    attempt(name, syscall, numbers, *[-1] * 6)",
    ),
    Case(
        "forbidden system calls, of a tool",
        f"for name, numbers in {_calls()!r}.items():\n    attempt(name, syscall, numbers, *[-1] * 6)",
        profile="tool",
        backends=OWN_ROOT,
    ),
    Case(
        "calls that are newer than the table",
        "for number in range(451, 600): attempt(number, syscall, (number, number), *[-1] * 6)",
    ),
    Case(
        "x32 calls",
        """
if platform.machine() != "x86_64": os.kill(os.getpid(), 31)
libc.syscall(ctypes.c_long(0x40000000 + 39))
print("GOT THROUGH: x32 getpid")
""",
        outcomes=("signal",),
        exit_code=-31,
    ),
    Case(
        "calls of 32-bit programs",
        r"""
import mmap
if platform.machine() != "x86_64": os.kill(os.getpid(), 31)
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
print("GOT THROUGH:", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
""",
        outcomes=("signal",),
    ),
    Case(
        "nested namespaces",
        """
flags = dict(user=0x10000000, pid=0x20000000, net=0x40000000, mount=0x20000, ipc=0x8000000, uts=0x4000000,
             cgroup=0x2000000, time=0x80)
for name, flag in flags.items():
    attempt("unshare " + name, syscall, (272, 97), flag)
    attempt("unshare user and " + name, syscall, (272, 97), flag | flags["user"])
    attempt("clone " + name, syscall, (56, 220), flag | 17, 0, 0, 0, 0)
    attempt("clone user and " + name, syscall, (56, 220), flag | flags["user"] | 17, 0, 0, 0, 0)
arguments = (ctypes.c_uint64 * 11)(flags["user"], 0, 0, 0, 17)
attempt("clone3", syscall, (435, 435), arguments, ctypes.sizeof(arguments))
for name in ("user", "pid", "mnt", "net"):
    for pid in ("self", 1, os.getppid()):
        attempt("setns", lambda: syscall((308, 268), os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY), 0))
""",
    ),
    Case(
        "nested namespaces, of a tool",
        """
for flag in (0x10000000, 0x30000000, 0x50000000, 0x10020000):
    attempt("unshare", syscall, (272, 97), flag)
    attempt("clone", syscall, (56, 220), flag | 17, 0, 0, 0, 0)
import subprocess
done = subprocess.run(["/usr/bin/unshare", "-Ur", "/bin/true"], capture_output=True)
print(done.returncode, done.stderr)
assert done.returncode
""",
        profile="tool",
        backends=OWN_ROOT,
    ),
    Case(
        "programs that give more rights",
        """
import subprocess
for program in (["/bin/su", "-c", "id"], ["/usr/bin/passwd", "-d", "root"], ["/bin/mount", "-t", "tmpfs", "x", "/tmp"]):
    try:
        print(subprocess.run(program, capture_output=True, stdin=subprocess.DEVNULL).returncode or "GOT THROUGH")
    except OSError as error:
        print(error)
""",
        profile="tool",
        backends=OWN_ROOT,
    ),
]

_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 32):
            if number not in (9, 19): __import__("signal").signal(number, 1)
        KEEP
        __import__("time").sleep(30)
    os._exit(0)
os.wait()
print("done")
"""

_SURVIVORS = [
    Case(
        "double fork with setsid",
        _DAEMON.replace("KEEP", "os.closerange(0, 10)"),
        profile="tool",
        backends=OWN_ROOT,
        says=b"done\n",
        within_s=2,
        harms_unwalled=True,
    ),
    Case(
        "a daemon that keeps stdout open",
        _DAEMON.replace("KEEP", "pass"),
        profile="tool",
        backends=OWN_ROOT,
        says=b"done\n",
        within_s=2,
    ),
    Case(
        "many daemons, and the one that started them crashes",
        """
for _ in range(10):
    if os.fork() == 0:
        os.setsid()
        __import__("time").sleep(30)
os.abort()
""",
        outcomes=("signal",),
        profile="tool",
        backends=OWN_ROOT,
        within_s=2,
    ),
]

ATTACKS = [
    *_PROCESSES_AND_THREADS, *_MEMORY, *_CRASHES, *_TIME, *_OUTPUT, *_FILES, *_WRITES, *_READS, *_NETWORK, *_PROCESSES,
    *_KERNEL, *_SURVIVORS,
]  # fmt: skip
