"""vfsd guest: use a virtio-fs daemon from the command line, without a virtual machine.

Exit status 1: the daemon could not be reached or said no, in one line.
"""

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import click

from vfsd.errors import ConfigError
from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest import mount
from vfsd.guest.client.connection import FLAGS2, FLAGS_ALL, MAX_READAHEAD
from vfsd.guest.driver.device import Device
from vfsd.guest.face.filesystem import Filesystem
from vfsd.vhost.orders import ORDERS

CHUNK = 1 << 20  # bytes copied at a time
ROUND_TRIPS = 1000
EXIT_FAILED = 1


@click.group()
def guest() -> None:
    """Use a virtio-fs daemon without a virtual machine.

    `info` is the first thing to run when a daemon misbehaves. Paths are those of the share; for
    cp, the share's begin with a colon.
    """


with_socket = click.option("--socket", required=True, metavar="PATH",
                           help="The daemon's socket.  [required]")  # fmt: skip
with_order = click.option("--order", type=click.Choice(sorted(ORDERS)), default="qemu", show_default=True,
                          help="The front end whose order of messages to follow.")  # fmt: skip


def with_share(command: Callable[..., None]) -> click.Command:
    """A command on a mounted share: options to reach it, errors as one line."""

    @with_socket
    @with_order
    @wraps(command)
    def run(socket: str, order: str, dax: bool = False, **given: Any) -> None:
        if dax and order == "qemu":
            order = "qemu-generic"  # the one of QEMU's devices that has a window
        with failures(), mount(socket, options="dax" if dax else "", order=order) as fs:
            command(fs, **given)

    return guest.command()(run)


with_dax = click.option("--dax", is_flag=True,
                        help="Read and write through the daemon's DAX window.")  # fmt: skip


@contextmanager
def failures() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has had enough
        sys.exit(EXIT_FAILED)
    except OSError as problem:
        where = os.fsdecode(problem.filename) if problem.filename else ""
        text = problem.strerror or str(problem)
        print(f"vfsd: {where}: {text}" if where else f"vfsd: {text}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


# ---- info


@guest.command()
@with_socket
@with_order
def info(socket: str, order: str) -> None:
    """What the daemon says of itself: vhost-user, INIT, limits, round-trip time."""
    with failures():
        device = Device.connect(socket, order=order)
        try:
            show_vhost(device)
            show_init(device)
            show_round_trip(device)
        finally:
            device.remove()


def show_vhost(device: Device) -> None:
    frontend = device.frontend
    click.echo("vhost-user")
    click.echo(f"  virtio features     {names_of(frontend.offered)}")
    click.echo(f"  protocol features   {names_of(frontend.offered_protocol)}")
    click.echo(f"  queues              {frontend.queues_max}, the first for forgets")
    click.echo(f"  memory slots        {frontend.slots_max}")
    window = "none" if device.window is None else f"{device.window.size >> 20} MiB"
    click.echo(f"  DAX window          {window}")
    click.echo(f"  tag                 {device.tag or '(left to the front end)'}")


def show_init(device: Device) -> None:
    offered = FLAGS_ALL | FLAGS2[abi.KERNEL_MINOR_VERSION]
    args = abi.INIT_IN.pack(
        abi.KERNEL_VERSION, abi.KERNEL_MINOR_VERSION, MAX_READAHEAD, offered & 0xFFFFFFFF, offered >> 32
    )
    reply, _ = device.transport.call(Opcode.INIT, 0, args, out=abi.INIT_OUT.size, argvar=True)
    (major, minor, readahead, low, background, congestion, max_write, gran, max_pages, _, high) = (
        abi.INIT_OUT.unpack(reply.ljust(abi.INIT_OUT.size, b"\0"))
    )
    flags = Init(low | (high << 32 if low & Init.INIT_EXT else 0))
    click.echo("FUSE")
    click.echo(f"  version             {major}.{minor}, offered 7.{abi.KERNEL_MINOR_VERSION}")
    click.echo(f"  flags               {names_of(flags)}")
    click.echo(f"  largest write       {max_write} bytes, {max_pages} pages a request")
    click.echo(f"  readahead           {readahead} bytes")
    click.echo(f"  background          {background}, congested at {congestion}")
    click.echo(f"  time granularity    {gran} ns")


def show_round_trip(device: Device) -> None:
    """GETATTR of the root, one at a time, both sides asleep in between."""
    times = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter_ns()
        args = abi.GETATTR_IN.pack(0, 0, 0)
        device.transport.call(Opcode.GETATTR, abi.ROOT_ID, args, out=abi.ATTR_OUT_SIZE)
        times.append(time.perf_counter_ns() - started)
    times.sort()
    counters = device.transport.counters()["requests.0"]
    click.echo(f"round trip of {ROUND_TRIPS} GETATTR")
    for name, share in (("median", 0.5), ("99 %", 0.99), ("longest", 1)):
        click.echo(f"  {name:19} {times[min(int(share * ROUND_TRIPS), ROUND_TRIPS - 1)] / 1000:.1f} us")
    click.echo(f"  kicks, calls        {counters['kicks']}, {counters['calls']}")


def names_of(flags: Any) -> str:
    known = [flag.name for flag in flags]
    unknown = int(flags) & ~sum(flag.value for flag in type(flags))
    return " ".join([*known, *([f"{unknown:#x}"] if unknown else [])]) or "none"


# ---- looking


@with_share
@click.argument("paths", nargs=-1)
@click.option("-l", "long", is_flag=True, help="Mode, links, owner, size and time too.")
@click.option("-a", "hidden", is_flag=True, help="Names that begin with a dot too.")
def ls(fs: Filesystem, paths: tuple[str, ...], long: bool, hidden: bool) -> None:
    """List directories."""
    for path in paths or ("/",):
        if not stat.S_ISDIR(fs.lstat(path).st_mode):
            show_entry(fs, path, path, long)
            continue
        if len(paths) > 1:
            click.echo(f"{path}:")
        for name in sorted(fs.listdir(path)):
            if hidden or not name.startswith("."):
                show_entry(fs, name, str(PurePosixPath(path, name)), long)


def show_entry(fs: Filesystem, name: str, path: str, long: bool) -> None:
    if not long:
        click.echo(name)
        return
    st = fs.lstat(path)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(st.st_mtime))
    target = f" -> {os.fsdecode(fs.readlink(path))}" if stat.S_ISLNK(st.st_mode) else ""
    click.echo(
        f"{stat.filemode(st.st_mode)} {st.st_nlink:3} {st.st_uid:5} {st.st_gid:5} {st.st_size:12} {when} "
        f"{name}{target}"
    )


@with_share
@click.argument("path", default="/")
def tree(fs: Filesystem, path: str) -> None:
    """Show a directory and all below it."""
    click.echo(path)
    show_tree(fs, path, "")


def show_tree(fs: Filesystem, path: str, indent: str) -> None:
    entries = sorted(fs.scandir(path), key=lambda entry: str(entry.name))
    for number, entry in enumerate(entries):
        last = number + 1 == len(entries)
        click.echo(f"{indent}{'└── ' if last else '├── '}{entry.name}")
        if entry.is_dir(follow_symlinks=False):
            show_tree(fs, str(PurePosixPath(path, entry.name)), indent + ("    " if last else "│   "))


@with_share
@click.argument("paths", nargs=-1, required=True)
@with_dax
def cat(fs: Filesystem, paths: tuple[str, ...]) -> None:
    """Write files to standard output."""
    for path in paths:
        with fs.open(path) as file:
            while data := file.read(CHUNK):
                sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@with_share
@click.argument("paths", nargs=-1, required=True)
def show_stat(fs: Filesystem, paths: tuple[str, ...]) -> None:
    """Show attributes."""
    for path in paths:
        st = fs.lstat(path)
        click.echo(f"{path}: {stat.filemode(st.st_mode)} {stat.S_IMODE(st.st_mode):04o}")
        click.echo(f"  device {st.st_dev}, inode {st.st_ino}, links {st.st_nlink}")
        click.echo(f"  owner {st.st_uid}:{st.st_gid}")
        click.echo(f"  size {st.st_size} bytes in {st.st_blocks} blocks of 512, i/o block {st.st_blksize}")
        times = {"accessed": st.st_atime_ns, "modified": st.st_mtime_ns, "changed": st.st_ctime_ns}
        for name, at in times.items():
            seconds, nanoseconds = divmod(at, 10**9)
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
            click.echo(f"  {name:8} {when}.{nanoseconds:09}")


guest.add_command(show_stat, "stat")
del guest.commands["show-stat"]


@with_share
def df(fs: Filesystem) -> None:
    """Show how full the share's file system is."""
    st = fs.statvfs("/")
    gib = st.f_frsize / 2**30
    for name, blocks in (("size", st.f_blocks), ("free", st.f_bfree), ("available", st.f_bavail)):
        click.echo(f"{name:9} {blocks * gib:.1f} GiB")
    click.echo(f"{'inodes':9} {st.f_files}, free {st.f_ffree}")


# ---- changing


@with_share
@click.argument("paths", nargs=-1, required=True)
@click.option("-p", "parents", is_flag=True, help="Make parents as needed; no error if it exists.")
def mkdir(fs: Filesystem, paths: tuple[str, ...], parents: bool) -> None:
    """Make directories."""
    for path in paths:
        if parents:
            fs.makedirs(path, exist_ok=True)
        else:
            fs.mkdir(path)


@with_share
@click.argument("paths", nargs=-1, required=True)
@click.option("-r", "recursive", is_flag=True, help="Directories and all below them.")
def rm(fs: Filesystem, paths: tuple[str, ...], recursive: bool) -> None:
    """Remove files."""
    for path in paths:
        if recursive and stat.S_ISDIR(fs.lstat(path).st_mode):
            remove_tree(fs, path)
        else:
            fs.unlink(path)


def remove_tree(fs: Filesystem, path: str) -> None:
    for entry in fs.scandir(path):
        below = str(PurePosixPath(path, entry.name))
        if entry.is_dir(follow_symlinks=False):
            remove_tree(fs, below)
        else:
            fs.unlink(below)
    fs.rmdir(path)


# ---- copying


class Copy:
    """One run of cp: from one side to the other, with a bar on a terminal's standard error."""

    def __init__(self, fs: Filesystem, recursive: bool, to_share: bool) -> None:
        self._fs = fs
        self._recursive = recursive
        self._to_share = to_share
        self._files: list[tuple[str, str, int]] = []

    def add(self, source: str, target: str) -> None:
        """Make the directories and links below target, note the files."""
        st = os.lstat(source) if self._to_share else self._fs.lstat(source)
        if stat.S_ISREG(st.st_mode):
            self._files.append((source, target, st.st_size))
        elif stat.S_ISLNK(st.st_mode):
            link = os.readlink(source) if self._to_share else os.fsdecode(self._fs.readlink(source))
            (self._fs.symlink if self._to_share else os.symlink)(link, target)
        elif not stat.S_ISDIR(st.st_mode):
            raise ConfigError(source, "is neither a file, a link nor a directory; leave it out")
        elif not self._recursive:
            raise ConfigError(source, "is a directory; add -r")
        else:
            self._make_directory(target)
            names = os.listdir(source) if self._to_share else self._fs.listdir(source)
            for name in names:
                self.add(str(PurePosixPath(source, name)), str(PurePosixPath(target, name)))

    def run(self) -> None:
        total = sum(size for _, _, size in self._files)
        with click.progressbar(length=total, label=f"{len(self._files)} files", file=sys.stderr) as bar:
            for source, target, _ in self._files:
                with self._open(source, "rb") as reader, self._open(target, "wb") as writer:
                    while data := reader.read(CHUNK):
                        write_all(writer, data)
                        bar.update(len(data))

    def _make_directory(self, path: str) -> None:
        if self._to_share:
            self._fs.makedirs(path, exist_ok=True)
        else:
            os.makedirs(path, exist_ok=True)

    def _open(self, path: str, mode: str) -> Any:
        on_share = self._to_share == (mode == "wb")
        return self._fs.open(path, mode) if on_share else open(path, mode, buffering=0)


def write_all(writer: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[writer.write(view) :]


@with_share
@click.argument("sources", nargs=-1, required=True)
@click.argument("target")
@click.option("-r", "recursive", is_flag=True, help="Directories and all below them.")
@with_dax
def cp(fs: Filesystem, sources: tuple[str, ...], target: str, recursive: bool) -> None:
    """Copy to the share or from it: exactly one side begins with a colon."""
    to_share = target.startswith(":")
    if any(source.startswith(":") == to_share for source in sources):
        raise ConfigError("cp", "copies between two sides; begin the share's paths with a colon")
    target = target.removeprefix(":") or "/"
    copy = Copy(fs, recursive, to_share)
    into = is_directory(fs, target) if to_share else Path(target).is_dir()
    if len(sources) > 1 and not into:
        raise ConfigError(target, "is no directory; several sources need one")
    for source in sources:
        source = source.removeprefix(":")
        copy.add(source, str(PurePosixPath(target, PurePosixPath(source).name)) if into else target)
    copy.run()


def is_directory(fs: Filesystem, path: str) -> bool:
    try:
        return stat.S_ISDIR(fs.stat(path).st_mode)
    except FileNotFoundError:
        return False
