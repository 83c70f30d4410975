"""A running front end: whether its guest's memory is shared, so that a daemon can reach it."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vfsd.doctor.finding import Finding, ok, warning, wrong

MIB = 1 << 20
SUFFIXES = {"K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}
QEMU_MEMORY = 128 * MIB  # without -m
GENERIC = "vhost-user-test-device"
DEVICE = re.compile(f"vhost-user-fs|{GENERIC}")
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)")
SHARE = (
    "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem (libvirt:"
    " <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>)"
)


class Mapping(NamedTuple):
    size: int
    shared: bool
    name: str


def check(pid: int) -> list[Finding]:
    root = Path(f"/proc/{pid}")
    try:
        words = [os.fsdecode(word) for word in (root / "cmdline").read_bytes().split(b"\0")][:-1]
        mappings = read_mappings((root / "maps").read_text(errors="surrogateescape"))
    except FileNotFoundError:
        return [wrong("front end", f"there is no process {pid}", "name the front end's process with --pid")]
    except PermissionError:
        return [warning("front end", f"process {pid} may not be looked at", "run this as its user or root")]
    program = os.path.basename(words[0]) if words else "?"
    is_qemu = program.startswith(("qemu", "kvm"))
    memory = shared_memory(words, mappings, is_qemu)
    return [memory, *(device(words) if is_qemu else [])]


def read_mappings(text: str) -> list[Mapping]:
    """Those that can be written to."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match and "w" in match[3]:
            found.append(Mapping(int(match[2], 16) - int(match[1], 16), match[3][3] == "s", match[4]))
    return found


def shared_memory(words: list[str], mappings: list[Mapping], is_qemu: bool) -> Finding:
    """By what is mapped, which no option can belie."""
    shared = sum(mapping.size for mapping in mappings if mapping.shared)
    wanted = guest_memory(words) if is_qemu else 64 * MIB
    if shared >= wanted:
        return ok("guest memory", f"{shared // MIB} MiB are shared")
    backends = [word for word in words if "memory-backend-" in word]
    if backends:
        why = f"its memory backend has no share=on: {backends[0]}"
    else:
        why = "it has no memory backend" if is_qemu else "its memory is private"
    return wrong(
        "guest memory", f"{wanted // MIB} MiB of it are private, so that no daemon can reach them: {why}",
        SHARE.replace("SIZE", f"{wanted // MIB}M") if is_qemu else "start it with shared memory",
    )  # fmt: skip


def guest_memory(words: list[str]) -> int:
    """Bytes, of QEMU's -m: [size=]N[KMGT], in MiB without a letter."""
    for option, value in pairwise(words):
        match = re.match(r"(?:size=)?(\d+)([KMGT]?)", value.upper().replace("SIZE=", "size="))
        if option == "-m" and match:
            return int(match[1]) * SUFFIXES[match[2] or "M"]
    return QEMU_MEMORY


def device(words: list[str]) -> list[Finding]:
    devices = [word for option, word in pairwise(words)
               if option == "-device" and DEVICE.search(word)]  # fmt: skip
    if not devices:
        return [warning(
            "device", "this QEMU has no virtio-fs device on its command line",
            "-chardev socket,id=fs,path=SOCKET -device vhost-user-fs-pci,chardev=fs,tag=TAG",
        )]  # fmt: skip
    if any(GENERIC in word for word in devices):
        return [ok("device", f"{GENERIC}-pci: the tag is the daemon's, and its DAX window can be used")]
    return [ok("device", "vhost-user-fs, which has no DAX window (docs/dax.md tells of one that has)")]
