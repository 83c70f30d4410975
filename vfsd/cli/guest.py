"""vfsd guest: use a virtio-fs daemon from the command line, without a virtual machine.

Exit status 1: the daemon could not be reached, or something could not be done, with a line for each.
"""

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, Self

import click

from vfsd.cli.output import Complaints, echo, shown
from vfsd.errors import ConfigError
from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest import mount
from vfsd.guest.client.connection import FLAGS2, FLAGS_ALL, MAX_READAHEAD
from vfsd.guest.driver.device import Device
from vfsd.guest.face.copytree import CHUNK, Files, TreeCopy
from vfsd.guest.face.filesystem import DirEntry, Filesystem
from vfsd.guest.face.hostfiles import HostFiles
from vfsd.vhost.orders import ORDERS

ROUND_TRIPS = 1000
PROGRESS_S = 0.2
EXIT_FAILED = 1


@click.group()
def guest() -> None:
    """Use a virtio-fs daemon without a virtual machine.

    `info` is the first thing to run when a daemon misbehaves. Paths are those of the share; for
    cp, the share's begin with a colon.
    """


with_socket = click.option("--socket", required=True, metavar="PATH",
                           help="The daemon's socket.")  # fmt: skip
with_order = click.option("--order", type=click.Choice(sorted(ORDERS)), default="qemu", show_default=True,
                          help="The front end whose order of messages to follow.")  # fmt: skip


def with_share(command: Callable[..., None]) -> click.Command:
    """A command on a mounted share: options to reach it, a line for each error."""

    @with_socket
    @with_order
    @wraps(command)
    def run(socket: str, order: str, dax: bool = False, **given: Any) -> None:
        if dax and order == "qemu":
            order = "qemu-generic"  # the one of QEMU's devices that has a window
        complaints = Complaints()
        with failures(complaints), mount(socket, options="dax" if dax else "", order=order) as fs:
            complaints.hopeless = lambda: fs.device.gone is not None
            command(fs, complaints, **given)
        if complaints.any:
            sys.exit(EXIT_FAILED)

    return guest.command(command.__name__.removeprefix("show_"))(run)


with_dax = click.option("--dax", is_flag=True,
                        help="Read and write through the daemon's DAX window.")  # fmt: skip


@contextmanager
def failures(complaints: Complaints) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has had enough
        sys.exit(EXIT_FAILED)
    except OSError as problem:
        complaints.tell_error(problem)
        sys.exit(EXIT_FAILED)


# ---- info


@guest.command()
@with_socket
@with_order
def info(socket: str, order: str) -> None:
    """What the daemon says of itself: vhost-user, INIT, limits, round-trip time."""
    with failures(Complaints()):
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
@click.option("-R", "recursive", is_flag=True, help="Directories below, too.")
def ls(
    fs: Filesystem, complaints: Complaints, paths: tuple[str, ...], long: bool, hidden: bool, recursive: bool
) -> None:
    """List directories."""
    todo = []
    for path in paths or ("/",):
        with complaints.each(path):
            if stat.S_ISDIR(fs.lstat(path).st_mode):
                todo.append(path)
            else:
                show_entry(fs, path, path, long)
    with_titles = len(paths) > 1 or recursive
    todo.reverse()
    while todo:
        path = todo.pop()
        with complaints.each(path):
            names = sorted(name for name in fs.listdir(path) if hidden or not name.startswith("."))
            if with_titles:
                echo(f"{shown(path)}:")
            below = []
            for name in names:
                inside = join(path, name)
                with complaints.each(inside):
                    show_entry(fs, name, inside, long)
                    if recursive and stat.S_ISDIR(fs.lstat(inside).st_mode):
                        below.append(inside)
            todo += reversed(below)


def join(path: str, name: str) -> str:
    return str(PurePosixPath(path, name))


def show_entry(fs: Filesystem, name: str, path: str, long: bool) -> None:
    if not long:
        echo(shown(name))
        return
    st = fs.lstat(path)
    target = f" -> {shown(os.fsdecode(fs.readlink(path)))}" if stat.S_ISLNK(st.st_mode) else ""
    is_device = stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)
    size = f"{os.major(st.st_rdev)}, {os.minor(st.st_rdev)}" if is_device else str(st.st_size)
    echo(
        f"{stat.filemode(st.st_mode)} {st.st_nlink:3} {st.st_uid:5} {st.st_gid:5} {size:>12} "
        f"{date(st.st_mtime_ns // 10**9)} {shown(name)}{target}"
    )


def date(seconds: int) -> str:
    """Local time, or the number of seconds where the calendar ends."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError):
        return f"@{seconds}"


@with_share
@click.argument("path", default="/")
def tree(fs: Filesystem, complaints: Complaints, path: str) -> None:
    """Show a directory and all below it."""
    echo(shown(path))
    levels = [(path, "", entries_of(fs, complaints, path))]
    while levels:
        above, indent, entries = levels[-1]
        if not entries:
            levels.pop()
            continue
        entry = entries.pop()
        echo(f"{indent}{'├── ' if entries else '└── '}{shown(entry.name)}")
        below = join(above, entry.name)
        with complaints.each(below):
            if entry.is_dir(follow_symlinks=False):
                deeper = indent + ("│   " if entries else "    ")
                levels.append((below, deeper, entries_of(fs, complaints, below)))


def entries_of(fs: Filesystem, complaints: Complaints, path: str) -> list[DirEntry]:
    """The last by name first."""
    with complaints.each(path):
        return sorted(fs.scandir(path), key=lambda entry: str(entry.name), reverse=True)
    return []


@with_share
@click.argument("paths", nargs=-1, required=True)
@with_dax
def cat(fs: Filesystem, complaints: Complaints, paths: tuple[str, ...]) -> None:
    """Write files to standard output."""
    for path in paths:
        with complaints.each(path), fs.open(path) as file:
            while data := file.read(CHUNK):
                sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@with_share
@click.argument("paths", nargs=-1, required=True)
def show_stat(fs: Filesystem, complaints: Complaints, paths: tuple[str, ...]) -> None:
    """Show attributes."""
    for path in paths:
        with complaints.each(path):
            show_attributes(path, fs.lstat(path))


def show_attributes(path: str, st: os.stat_result) -> None:
    echo(f"{shown(path)}: {stat.filemode(st.st_mode)} {stat.S_IMODE(st.st_mode):04o}")
    click.echo(f"  device {st.st_dev}, inode {st.st_ino}, links {st.st_nlink}")
    click.echo(f"  owner {st.st_uid}:{st.st_gid}")
    click.echo(f"  size {st.st_size} bytes in {st.st_blocks} blocks of 512, i/o block {st.st_blksize}")
    times = {"accessed": st.st_atime_ns, "modified": st.st_mtime_ns, "changed": st.st_ctime_ns}
    for name, at in times.items():
        seconds, nanoseconds = divmod(at, 10**9)
        click.echo(f"  {name:8} {date(seconds)}.{nanoseconds:09}")


@with_share
def df(fs: Filesystem, complaints: Complaints) -> None:
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
def mkdir(fs: Filesystem, complaints: Complaints, paths: tuple[str, ...], parents: bool) -> None:
    """Make directories."""
    for path in paths:
        with complaints.each(path):
            if parents:
                fs.makedirs(path, exist_ok=True)
            else:
                fs.mkdir(path)


@with_share
@click.argument("paths", nargs=-1, required=True)
@click.option("-r", "recursive", is_flag=True, help="Directories and all below them.")
def rm(fs: Filesystem, complaints: Complaints, paths: tuple[str, ...], recursive: bool) -> None:
    """Remove files."""
    for path in paths:
        with complaints.each(path):
            if recursive and stat.S_ISDIR(fs.lstat(path).st_mode):
                remove_tree(fs, complaints, path)
            else:
                fs.unlink(path)


def remove_tree(fs: Filesystem, complaints: Complaints, top: str) -> None:
    """What can't be removed is told, and the directories it is in stay without a word."""
    todo = [(top, False)]
    kept: set[str] = set()
    while todo:
        path, emptied = todo.pop()
        above = str(PurePosixPath(path).parent)
        try:
            if emptied:
                if path not in kept:
                    fs.rmdir(path)
                    continue
            elif stat.S_ISDIR(fs.lstat(path).st_mode):
                todo.append((path, True))
                todo += [(join(path, name), False) for name in fs.listdir(path)]
                continue
            else:
                fs.unlink(path)
                continue
        except OSError as problem:
            complaints.tell_error(problem, path)
            kept.add(path)
        kept.add(above)


# ---- copying


@with_share
@click.argument("sources", nargs=-1, required=True)
@click.argument("target")
@click.option("-r", "recursive", is_flag=True, help="Directories and all below them.")
@with_dax
def cp(
    fs: Filesystem, complaints: Complaints, sources: tuple[str, ...], target: str, recursive: bool
) -> None:
    """Copy to the share, from it, or within it: its paths begin with a colon.

    As cp -a: modes, owners, times, links, holes, special files and extended attributes are kept, symlinks
    are not followed. Exit status 1 when something was left out, which is told.
    """
    sides: dict[bool, Files] = {True: fs, False: HostFiles()}
    there, target = side_of(target)
    into = is_directory(fs, target) if there else Path(target).is_dir()
    if len(sources) > 1 and not into:
        raise ConfigError(target, "is no directory; several sources need one")
    with Progress() as progress:
        copies = {
            here: TreeCopy(sides[here], sides[there], progress.tell_above(complaints), progress.add)
            for here in sides
        }
        for source in sources:
            here, path = side_of(source)
            if not here and not there:
                raise ConfigError("cp", "copies to or from a share; begin the share's paths with a colon")
            with complaints.each(path):
                if stat.S_ISDIR(sides[here].lstat(path).st_mode) and not recursive:
                    raise ConfigError(path, "is a directory; add -r")
                copies[here].copy(path, join(target, PurePosixPath(path).name) if into else target)


def side_of(path: str) -> tuple[bool, str]:
    """Whether a path of cp is the share's, and the path itself."""
    return (True, path[1:] or "/") if path.startswith(":") else (False, path)


class Progress:
    """How much has been copied, on a terminal's standard error."""

    def __init__(self) -> None:
        self._done = 0
        self._next = 0.0
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._clear()

    def add(self, count: int) -> None:
        self._done += count
        if sys.stderr.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_S
            self._shown = True
            click.echo(f"\r{self._done >> 20} MiB copied", err=True, nl=False)

    def tell_above(self, complaints: Complaints) -> Callable[[str, str], None]:
        """Complaints that begin on a line of their own."""

        def tell(path: str, reason: str) -> None:
            self._clear()
            complaints.tell(path, reason)

        return tell

    def _clear(self) -> None:
        if self._shown:
            self._shown = False
            click.echo("\r\033[K", err=True, nl=False)


def is_directory(fs: Filesystem, path: str) -> bool:
    try:
        return stat.S_ISDIR(fs.stat(path).st_mode)
    except FileNotFoundError:
        return False
