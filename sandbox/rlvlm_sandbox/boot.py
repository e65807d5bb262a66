"""What the interpreter of a one-process run does first; sent to it as text, never imported.

It builds the last of its walls, says that it is there, then runs the code as `python main.py` would. All of it is in
every run's time, so that it imports little: `posix` is what `os` is made of, `_ctypes` what `ctypes` is.

With walls it is pid 1 of its namespace and becomes two processes: init, which reaps, reports the program's exit status
and takes everything else with it; and the program. Nothing inside can look into init, and no signal reaches it.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def boot(
    code: int,
    ready: int,
    channel: int | None,
    walls: "dict[str, Any] | None",
    limits: list[tuple[str, int, int]],
    argv: list[str],
    file: str,
    packages: list[str],
) -> None:
    """code, ready, channel: descriptors. walls: as enclose takes them. argv: what is executed in place of the code."""
    import posix

    if walls:
        install_filter = enclose(ready, **walls)
    source = b"" if argv else take_code(code, file)
    if channel is not None:
        posix.dup2(channel, 3)
    # After the interpreter's start: by the stack's limit every thread would map as much.
    limit(limits)
    posix.write(ready, b".")
    posix.closerange(3 if channel is None else 4, 1 << 16)
    if walls:
        install_filter()
    if argv:
        posix.execv(argv[0], argv)
    run(source, file, packages)


def enclose(ready: int, filter: int, inodes: int, uid: "int | None") -> "Callable[[], None]":
    """Uses up the capabilities that were left to it. Returns in the program, with what puts the seccomp filter on it.

    uid: the program's user and group, where it is not init's.
    """
    import _ctypes
    import posix

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL

    libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # all that is loaded already

    def call(name: str, *arguments: "int | bytes | None") -> None:
        if Function(_ctypes.dlsym(libc, name))(*arguments) != 0:
            raise OSError(f"{name}{arguments} failed")

    remount, nosuid, nodev = 32, 2, 4
    call("mount", None, b"/tmp", None, remount | nosuid | nodev, b"nr_inodes=%d" % inodes)
    set_dumpable, set_seccomp, drop_from_bounding_set, ambient = 4, 22, 24, 47
    for capability in (21, 7, 6, 8):  # CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_SETPCAP
        call("prctl", drop_from_bounding_set, capability, 0, 0, 0)
    call("prctl", ambient, 4, 0, 0, 0)  # clear all
    program = posix.pread(filter, 1 << 16, 0)
    call("prctl", set_dumpable, 0, 0, 0, 0)
    is_init = fork_as(uid)
    call("capset", (0x20080522).to_bytes(4, "little") + bytes(4), bytes(24))
    if is_init:
        be_init(is_init, ready)

    def install() -> None:
        call("prctl", set_dumpable, 1, 0, 0, 0)
        address = id(program) + bytes.__basicsize__ - 1
        pointer = (len(program) // 8).to_bytes(8, "little") + address.to_bytes(8, "little")
        call("prctl", set_seccomp, 2, pointer, 0, 0)

    return install


def fork_as(uid: "int | None") -> int:
    """Returns the program's pid in init, 0 in the program."""
    import _signal
    import posix

    interrupt = _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    child = posix.fork()
    if child == 0:
        _signal.signal(_signal.SIGINT, interrupt)
        posix.setsid()
        if uid is not None:
            posix.setgroups([])
            posix.setresgid(uid, uid, uid)
            posix.setresuid(uid, uid, uid)
    return child


def be_init(child: int, ready: int) -> None:
    import posix

    posix.closerange(0, ready)
    posix.closerange(ready + 1, 1 << 16)
    while True:
        pid, status = posix.wait()
        if pid == child:
            posix.write(ready, b"%d" % posix.waitstatus_to_exitcode(status))
            posix._exit(0)


def take_code(fd: int, file: str) -> bytes:
    """Also writes it to its file, for tracebacks and `inspect`, unless it is huge."""
    with open(fd, "rb", closefd=False) as stream:
        code = stream.read()
    if len(code) <= 1 << 20:
        with open(file, "wb") as stream:
            stream.write(code)
    return code


def limit(limits: list[tuple[str, int, int]]) -> None:
    import resource

    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    for name, soft, hard in limits:
        kind = getattr(resource, name)
        soft, hard = (limit + mapped if name == "RLIMIT_AS" else limit for limit in (soft, hard))
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def run(code: bytes, file: str, packages: list[str]) -> None:
    """The program, as the interpreter's `__main__`. Its end is not the interpreter's, which would take its time to free
    what the process's end frees anyway."""
    import _sitebuiltins
    import builtins
    import posix
    import sys

    sys.argv[:] = [file]
    sys.path[:0] = [file.rpartition("/")[0]]
    sys.path += packages
    for name in ("exit", "quit"):  # all of `site` that programs use
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    main = sys.modules["__main__"].__dict__
    at_end = finish
    for name in OWN_NAMES:
        del main[name]
    main.update(__doc__=None, __file__=file)
    status = 0
    try:
        exec(compile(code, file, "exec", dont_inherit=True), main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if status == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 (as the interpreter itself does at the end of a program)
        status = 1
        inside = error.__traceback__ and error.__traceback__.tb_next
        try:
            sys.excepthook(type(error), error.with_traceback(inside), inside)
        except BaseException as second:  # noqa: BLE001 (the program's hook, or no memory left for ours)
            posix.write(2, type(second).__name__.encode() + b"\n")
    posix._exit(at_end(status & 0xFF))


def finish(status: int) -> int:
    """What the interpreter does at its end: waits for threads, calls atexit, flushes. Returns the exit status."""
    import atexit
    import posix
    import sys

    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    except BaseException as error:  # noqa: BLE001 (the program's own threads and functions)
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:  # noqa: BLE001 (a closed descriptor, what the program put there)
            posix.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
            status = 120
    return status


OWN_NAMES = (
    "TYPE_CHECKING", "OWN_NAMES", "marshal", "posix", "boot", "enclose", "fork_as", "be_init", "take_code", "limit",
    "run",
    "finish",
)  # fmt: skip
