"""Kernel and first file system of the QEMU guest, made of this machine's packages and programs.

The kernel is Debian's cloud kernel, downloaded with apt-get but not installed. The file system
holds busybox, the modules virtio-fs needs and a Python interpreter with the modules the workloads
import. Both are kept in a cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"

# In the order in which they can be loaded.
KERNEL_MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "fs/fuse/fuse",
    "fs/fuse/virtiofs",
)

PYTHON_MODULES = (
    "__future__,argparse,collections,contextlib,ctypes,dataclasses,encodings.ascii,encodings.idna,"
    "encodings.latin_1,encodings.utf_8,errno,fcntl,hashlib,json,mmap,os,pathlib,random,select,"
    "shutil,signal,socket,sqlite3,stat,struct,subprocess,sys,tarfile,threading,time,zlib"
)


class Unavailable(Exception):
    """What a QEMU guest is made of cannot be had here; the text says what and why."""


def kernel(cache: Path) -> tuple[Path, Path]:
    """The newest downloaded cloud kernel: its image and its directory of modules.

    Downloads it with apt-get, into `cache`, when there is none yet.
    """
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    unpacked = cache / "kernel"
    images = sorted(unpacked.glob("boot/vmlinuz-*"))
    if not images:
        _download_kernel(unpacked)
        images = sorted(unpacked.glob("boot/vmlinuz-*"))
    release = images[-1].name.removeprefix("vmlinuz-")
    return images[-1], unpacked / "lib/modules" / release / "kernel"


def _download_kernel(unpacked: Path) -> None:
    depends = _output(["apt-cache", "depends", "--important", META_PACKAGE])
    packages = [line.split()[1] for line in depends.splitlines() if "Depends: linux-image" in line]
    if not packages:
        raise Unavailable(f"apt-cache knows no kernel for {META_PACKAGE}; run apt-get update")
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as name:
        work = Path(name)
        _output(["apt-get", "-qq", "download", packages[0]], cwd=work)
        archive = next(work.glob("*.deb"))
        _output(["dpkg", "-x", str(archive), str(work / "root")])
        # Another test run may have been faster.
        if not unpacked.exists():
            (work / "root").rename(unpacked)


def _output(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def base_archive(cache: Path, init: Path, python: str, image: Path | None = None) -> Path:
    """The first file system, without the files of one test: a cpio archive, made when needed.

    image: a kernel that needs no modules; None for the downloaded one and its modules.
    """
    names: tuple[str, ...] = ()
    modules = Path()
    if image is None:
        image, modules = kernel(cache)
        names = KERNEL_MODULES
    else:
        cache.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256(Path(__file__).read_bytes() + init.read_bytes())
    recipe.update(f"{image.name} {python} {os.stat(python).st_mtime_ns}".encode())
    archive = cache / f"initrd-{recipe.hexdigest()[:16]}.cpio"
    if archive.exists():
        return archive
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        raise Unavailable("/bin/busybox is not installed (Debian package busybox-static)")
    content: dict[str, Path | bytes] = {
        "bin/busybox": busybox,
        "init": init,
        "modules/order": "".join(f"{Path(name).name}.ko\n" for name in names).encode(),
    }
    for name in names:
        content[f"modules/{Path(name).name}.ko"] = modules / f"{name}.ko"
    for path in _python_files(python):
        content[path.lstrip("/")] = Path(path)
    partial = archive.with_suffix(f".{os.getpid()}")
    partial.write_bytes(cpio(content))
    partial.rename(archive)
    return archive


def _python_files(python: str) -> set[str]:
    """The interpreter, what `PYTHON_MODULES` loads, and every shared library of these."""
    report = (
        f"import sys\nimport {PYTHON_MODULES}\n"
        "for m in list(sys.modules.values()):\n"
        "    for a in ('__file__', '__cached__'):\n"
        "        p = getattr(m, a, None)\n"
        "        print(p or '')\n"
        "import re\n"
        "for line in open('/proc/self/maps'):\n"
        "    print((line.split(maxsplit=5) + [''])[5].strip())\n"
    )
    output = _output([python, "-S", "-E", "-s", "-c", report])
    files = {line for line in output.splitlines() if line.startswith("/") and os.path.isfile(line)}
    # Libraries are asked for by the name in the ELF file, which /proc/self/maps resolves.
    for line in _output(["ldd", python, *(name for name in files if ".so" in name)]).splitlines():
        for word in line.split():
            if word.startswith("/") and os.path.isfile(word):
                files.add(word)
    return files | {python}


def tree(top: Path, target: str) -> dict[str, Path | bytes]:
    """The regular files below `top`, to be found below `target` in the guest."""
    return {
        f"{target.strip('/')}/{path.relative_to(top)}": path
        for path in sorted(top.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def cpio(content: dict[str, Path | bytes]) -> bytes:
    """A cpio archive in the format the kernel unpacks ("newc"), parents of all files included."""
    parents = {str(parent) for name in content for parent in Path(name).parents} - {"."}
    # The kernel opens the console before it starts init: without it init has no output.
    parts = [
        _member(name, b"", stat.S_IFDIR | 0o755, 0) for name in sorted(parents | {"dev", "proc"})
    ]
    parts.append(_member("dev/console", b"", stat.S_IFCHR | 0o600, 0, device=(5, 1)))
    for name, source in content.items():
        if isinstance(source, bytes):
            parts.append(_member(name, source, stat.S_IFREG | 0o644, 0))
        else:
            status = source.stat()
            parts.append(_member(name, source.read_bytes(), status.st_mode, int(status.st_mtime)))
    parts.append(_member("TRAILER!!!", b"", 0, 0))
    return b"".join(parts)


def _member(
    name: str, data: bytes, mode: int, mtime: int, device: tuple[int, int] = (0, 0)
) -> bytes:
    encoded = os.fsencode(name) + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device of the file, own device, name size, check
    numbers = (0, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def concatenated(target: Path, parts: Iterable[bytes | Path]) -> None:
    """Write archives one after the other, which the kernel accepts as one."""
    with target.open("wb") as out:
        for part in parts:
            if isinstance(part, bytes):
                out.write(part)
            else:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
