"""The numbers of system calls are Linux's, for each architecture; the filter answers as its rules say."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from vfsd.sandbox import seccomp
from vfsd.sandbox.calls import ARCHITECTURES, NUMBERS, numbers

HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"),),
}
NEWER = {"fchmodat2"}  # than some headers


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_linuxs(machine: str) -> None:
    header = next((path for path in HEADERS[machine] if path.exists()), None)
    if header is None:
        pytest.skip(f"there is none of {', '.join(map(str, HEADERS[machine]))}")
    found = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.M)
    }
    ours = numbers(machine)
    # The generic names of what has two widths: fstatat is newfstatat in 64 bits.
    found["newfstatat"] = found.get("newfstatat", found.get("fstatat", -1))
    assert {name: found.get(name) for name in ours if name not in NEWER} == {
        name: number for name, number in ours.items() if name not in NEWER
    }
    column = ARCHITECTURES.index(machine)
    absent = {name for name, both in NUMBERS.items() if both[column] is None}
    assert not absent & found.keys() - NEWER


def answer(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would do for that call."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == seccomp.LOAD:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == seccomp.RETURN:
            return int(value)
        else:
            taken = {
                seccomp.JUMP_EQUAL: accumulator == value,
                seccomp.JUMP_AT_LEAST: accumulator >= value,
                seccomp.JUMP_ANY_BIT: bool(accumulator & value),
            }[operation]
            at += if_true if taken else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("file_handles", [False, True])
def test_the_filter_answers_as_its_rules_say(machine: str, file_handles: bool) -> None:
    program = seccomp.program(machine, "kill", 77, file_handles)
    arch, calls = seccomp.AUDIT_ARCH[machine], numbers(machine)
    rules = seccomp.rules_of(77)
    for name, number in calls.items():
        if name in rules or name in ("rt_sigaction", "kexec_load"):
            continue
        expected = seccomp.RET_TRAP
        if name in seccomp.ALLOWED or (file_handles and name in seccomp.HANDLES):
            expected = seccomp.RET_ALLOW
        elif name not in seccomp.FATAL:
            expected = seccomp.RET_ERRNO | 38  # ENOSYS
        assert answer(program, arch, number) == expected, name
    allowed = [
        ("clone", (0x3D0F00,)), ("unshare", (0x200,)), ("tgkill", (77, 78)), ("ioctl", (1, 0x80086601)),
        ("fcntl", (1, 3)), ("prctl", (15,)), ("mmap", (0, 4096, 3)), ("mprotect", (0, 4096, 1)),
        ("prlimit64", (0, 7, 0, 1)), ("rt_sigaction", (15,)),
    ]  # fmt: skip
    refused = [
        ("clone", (17,)), ("clone", (0x3D0F00 | 0x40000000,)), ("unshare", (0x20000,)), ("tgkill", (1, 1)),
        ("ioctl", (2, 0x5412)), ("fcntl", (1, 8)), ("prctl", (4, 1)), ("mmap", (0, 4096, 5)),
        ("mprotect", (0, 4096, 4)), ("prlimit64", (0, 7, 1)), ("rt_sigaction", (31,)), ("kexec_load", ()),
    ]  # fmt: skip
    for name, arguments in allowed:
        assert answer(program, arch, calls[name], *arguments) == seccomp.RET_ALLOW, (name, arguments)
    for name, arguments in refused:
        assert answer(program, arch, calls[name], *arguments) != seccomp.RET_ALLOW, (name, arguments)
    assert answer(program, arch, 5000) == seccomp.RET_ERRNO | 38
    for other in seccomp.AUDIT_ARCH.values():
        if other != arch:
            assert answer(program, other, calls["read"]) == seccomp.RET_KILL_PROCESS
    if machine == "x86_64":
        assert answer(program, arch, calls["read"] | seccomp.X32_BIT) == seccomp.RET_KILL_PROCESS
