"""A running front end: whether a daemon can reach its guest's memory, its DAX window, who confines it."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vfsd.doctor.confinement import LOOK, confinements
from vfsd.doctor.finding import Finding, ok, warning, wrong
from vfsd.fuse.abi import DAX_RANGE

MIB = 1 << 20
SUFFIXES = {"K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}
QEMU_MEMORY = 128 * MIB  # without -m
GENERIC = "vhost-user-test-device"
DEVICE = re.compile(f"vhost-user-fs|{GENERIC}.*virtio-id\"?[=:] *26\\b")
EMULATOR = re.compile(r"(qemu|kvm)(-system|-kvm|-spice|$)")
LIBRARY = "qemu-shmem"
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)")
SHARE = (
    "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem (libvirt:"
    " <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>)"
)


class Mapping(NamedTuple):
    size: int
    writable: bool
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
    programs = [*words[:1], *(mapping.name for mapping in mappings if not mapping.shared)]
    is_qemu = any(EMULATOR.match(os.path.basename(name)) for name in programs)
    memory = shared_memory(words, mappings, is_qemu)
    return [memory, *(device(words, mappings) if is_qemu else []), confined(root)]


def read_mappings(text: str) -> list[Mapping]:
    """Those that can be written to, or are shared."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        size = int(match[2], 16) - int(match[1], 16)
        mapping = Mapping(size, "w" in match[3], match[3][3] == "s", match[4])
        if mapping.writable or mapping.shared:
            found.append(mapping)
    return found


def shared_memory(words: list[str], mappings: list[Mapping], is_qemu: bool) -> Finding:
    """By what is mapped, which no option can belie."""
    shared = sum(mapping.size for mapping in mappings if mapping.shared and mapping.writable)
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


def device(words: list[str], mappings: list[Mapping]) -> list[Finding]:
    devices = [word for option, word in pairwise(words)
               if option == "-device" and DEVICE.search(word)]  # fmt: skip
    if not devices:
        return [warning(
            "device", "this QEMU has no virtio-fs device on its command line",
            "-chardev socket,id=fs,path=SOCKET -device vhost-user-fs-pci,chardev=fs,tag=TAG",
        )]  # fmt: skip
    if any(GENERIC in word for word in devices):
        return [ok("device", f"{GENERIC}, whose tag is the daemon's"), window(words, mappings)]
    return [
        ok("device", "vhost-user-fs"),
        ok("DAX window", "none: this device never has one (docs/dax.md tells of one that has)"),
    ]


def window(words: list[str], mappings: list[Mapping]) -> Finding:
    """Its size is the daemon's choice; what is in it are parts of files beside the guest's memory."""
    own = [match[1] for word in words for match in re.finditer(r'mem-path"?[=:] *"?([^,"]+)', word)]
    sizes = [mapping.size for mapping in mappings
             if mapping.shared and mapping.name.startswith("/") and mapping.size % DAX_RANGE == 0
             and not mapping.name.startswith(("/memfd:", "/dev/", *own))]  # fmt: skip
    parts = sum(sizes) // DAX_RANGE
    text = f"as large as the daemon's --dax-window; {parts} ranges of 2 MiB are mapped now"
    if any(LIBRARY in os.path.basename(mapping.name) for mapping in mappings):
        return ok("DAX window", f"{text}, and every file can be ({LIBRARY}.so is loaded)")
    return warning(
        "DAX window", f"{text}. As it is, QEMU maps only files of whole 2 MiB that may be written",
        "mount without dax=always and leave --dax-policy at auto: then all others go by request; or preload"
        " the library of docs/dax.md into QEMU",
    )  # fmt: skip


def confined(root: Path) -> Finding:
    check = "front end's security modules"
    found = confinements(root)
    if any(confinement.enforced for confinement in found):
        return warning(
            check, ", ".join(map(str, found)),
            "see to it that the profile or policy lets it connect to the daemon's socket, and with a DAX"
            f" window map the files of the share; {LOOK}",
        )  # fmt: skip
    return ok(check, ", ".join(map(str, found)) or "neither AppArmor nor SELinux confines it")
