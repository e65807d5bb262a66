"""The filter, run by an interpreter of classic BPF written here, and its numbers against the kernel's headers."""

import errno
import re
import struct
from pathlib import Path

import pytest
from rlvlm_sandbox.seccomp import MACHINES, OWN_PID, filter_program, for_process

KILL, ALLOW = "kill", "allow"
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD, CLONE_NEWUSER = 0x10000, 0x10000000


def answer(program: bytes, machine: str, number: int, *arguments: int) -> str | int:
    """What the kernel would do: `allow`, `kill` or an errno."""
    data = struct.pack("=IIQ6Q", number, ARCH[machine], 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    instructions = list(struct.iter_unpack("=HBBI", program))
    register = counter = 0
    while True:
        code, if_true, if_false, operand = instructions[counter]
        counter += 1
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, operand)
        elif code == 0x05:
            counter += operand
        elif code == 0x06:
            action, value = operand & 0xFFFF0000, operand & 0xFFFF
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(action, value)
        else:
            holds = {0x15: register == operand, 0x35: register >= operand, 0x45: bool(register & operand)}[code]
            counter += if_true if holds else if_false


def call(name: str, *arguments: int, profile: str = "judge", machine: str = "x86_64", **options: object) -> str | int:
    program = filter_program(profile, machine=machine, **options)  # type: ignore[arg-type]
    return answer(program, machine, MACHINES[machine].numbers[name], *arguments)


def header(machine: str) -> dict[str, int]:
    path = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
    if not Path(path[machine]).exists():
        pytest.skip(f"{path[machine]} is not installed")
    text = Path(path[machine]).read_text()
    return {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_kernels_headers(machine):
    numbers, known = MACHINES[machine].numbers, header(machine)
    renamed = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    assert {name: known[renamed.get(name, name)] for name in numbers} == numbers


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", ["judge", "tool"])
def test_every_number_up_to_1000_is_answered_as_the_table_says(machine, profile):
    program = filter_program(profile, machine=machine)
    numbers = MACHINES[machine].numbers
    by_argument = {"clone", "socket", "socketpair", "ioctl", "prctl"}
    starting = {"fork", "vfork", "execve", "execveat"}
    named = {"bind", "listen", "accept", "accept4", "connect", "sendmmsg", "recvmmsg", "fchown", "fchownat", "chown"}
    refused = set() if profile == "tool" else starting | named | {"lchown"}
    names = {number: name for name, number in numbers.items()}
    for number in range(1000):
        name = names.get(number)
        if name in by_argument:
            continue
        allowed = name is not None and name not in refused and name != "clone3"
        newer = number > MACHINES[machine].newest
        expected = ALLOW if allowed else errno.ENOSYS if newer or name == "clone3" else errno.EPERM
        assert answer(program, machine, number) == expected, (number, name)


USELESS = [
    "ptrace", "process_vm_readv", "process_vm_writev", "bpf", "perf_event_open", "userfaultfd",
    "io_uring_setup", "keyctl", "add_key", "mount", "umount2", "pivot_root", "chroot", "unshare", "setns",
    "mknod", "mknodat", "memfd_create", "shmget", "semget", "msgget", "mq_open", "setuid", "setpriority",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "rt_sigqueueinfo", "vmsplice", "kexec_load",
    "init_module", "reboot",
]  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_what_no_program_needs_is_refused(name):
    number = header("x86_64")[name]
    for profile in ("judge", "tool"):
        assert answer(filter_program(profile, machine="x86_64"), "x86_64", number) == errno.EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_and_the_x32_calls_end_the_program(machine):
    program = filter_program("judge", machine=machine)
    other = "aarch64" if machine == "x86_64" else "x86_64"
    assert answer(program, other, MACHINES[other].numbers["read"]) == KILL
    assert answer(program, machine, 0x40000000) == KILL


def test_a_judged_program_gets_threads_and_a_tool_processes_but_neither_gets_namespaces():
    assert call("clone", CLONE_THREAD) == ALLOW
    assert call("clone", 17) == errno.EPERM
    assert call("clone", 17, profile="tool") == ALLOW
    for profile in ("judge", "tool"):
        assert call("clone", CLONE_NEWUSER | CLONE_THREAD, profile=profile) == errno.EPERM


def test_sockets():
    unix, inet, stream, datagram, cloexec = 1, 2, 1, 2, 0x80000
    assert call("socketpair", unix, stream | cloexec) == ALLOW
    assert call("socketpair", unix, datagram | cloexec) == errno.EACCES
    assert call("socketpair", unix, datagram, profile="tool") == ALLOW
    assert call("socketpair", inet, stream) == errno.EACCES
    assert call("socket", unix) == errno.EACCES
    assert call("socket", unix, profile="tool") == ALLOW
    for family in (inet, 10, 16, 17, 40):  # IPv6, netlink, packet, vsock
        assert call("socket", family, profile="tool") == errno.EACCES


def test_terminals_and_processes_cannot_be_reached_through_ioctl_and_prctl():
    tcgets, tiocsti, tioclinux = 0x5401, 0x5412, 0x541C
    assert [call("ioctl", 0, command) for command in (tcgets, tiocsti, tioclinux)] == [
        ALLOW,
        errno.ENOTTY,
        errno.ENOTTY,
    ]
    set_name, set_pdeathsig, set_dumpable, set_mm = 15, 1, 4, 35
    assert [call("prctl", option) for option in (set_name, set_pdeathsig, set_dumpable, set_mm)] == [
        ALLOW, errno.EINVAL, errno.EINVAL, errno.EINVAL,
    ]  # fmt: skip


def test_a_program_that_shares_the_pid_space_reaches_itself_only():
    for name in ("kill", "tgkill"):
        assert call(name, 77, alone=False, own_pid=77) == ALLOW
        assert [call(name, pid, alone=False, own_pid=77) for pid in (78, 1, 0, 2**32 - 1)] == [errno.EPERM] * 4
    for name in ("prlimit64", "sched_setaffinity", "setpgid"):
        assert [call(name, pid, alone=False, own_pid=77) for pid in (0, 77, 78)] == [ALLOW, ALLOW, errno.EPERM]
    f_getfl, f_setown, f_setlease = 3, 8, 1024
    commands = (f_getfl, f_setown, f_setlease)
    assert [call("fcntl", 0, command, alone=False, own_pid=77) for command in commands] == [
        ALLOW,
        errno.EPERM,
        errno.EPERM,
    ]
    assert call("tkill", 77, alone=False, own_pid=77) == errno.EPERM
    assert call("chmod", own_files=False) == errno.EPERM
    assert call("chmod") == ALLOW


def test_no_program_sets_the_limits_of_its_init():
    for profile in ("judge", "tool"):
        assert [call("prlimit64", pid, profile=profile, own_pid=2) for pid in (0, 2, 1)] == [ALLOW, ALLOW, errno.EPERM]
        assert [call("prlimit64", pid, profile=profile) for pid in (0, 1, 2)] == [ALLOW, errno.EPERM, errno.EPERM]


def test_a_program_made_before_the_pid_is_known_is_the_same_once_it_is():
    made_before = filter_program("judge", alone=False, own_pid=OWN_PID, machine="x86_64")
    assert for_process(made_before, 4242) == filter_program("judge", alone=False, own_pid=4242, machine="x86_64")


def test_a_judge_may_execute_only_where_the_sandbox_has_to():
    assert call("execve") == errno.EPERM
    assert call("execve", execs=True) == ALLOW
    assert call("fork", execs=True) == errno.EPERM
