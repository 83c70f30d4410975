"""The Python face of a mounted share: names, arguments and results as in `os`."""

import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EBADF, EINVAL, EISDIR, ENODEV, ENOENT, ESTALE
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from vfsd.fuse import abi
from vfsd.fuse.abi import Rename
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.buffer import Buffer
from vfsd.guest.client import attributes, directories, fileops, files, ioctls, namei
from vfsd.guest.client.attributes import MAY_WRITE, Times, check_writable, permission, update_attributes
from vfsd.guest.client.connection import acting_as, revalidating
from vfsd.guest.client.create import open_path
from vfsd.guest.client.directories import Dirent
from vfsd.guest.client.inodes import Inode
from vfsd.guest.client.mountpoints import Mount
from vfsd.guest.client.namei import Place, error, masked
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.face.rawfile import RawFile

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
P = ParamSpec("P")
R = TypeVar("R")
MODES = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


def retry_estale(operation: Callable[P, R]) -> Callable[P, R]:
    """Walk the path once more, asking for each name, if what it led to is stale (retry_estale of namei.h)."""

    @wraps(operation)
    def walked_anew(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return operation(*args, **kwargs)
        except OSError as problem:
            if problem.errno != ESTALE:
                raise
        with revalidating():
            return operation(*args, **kwargs)

    return walked_anew


class DirEntry:
    """As os.DirEntry: the type comes from the listing, the rest by stat."""

    def __init__(self, fs: "Filesystem", name: Any, path: Any, entry: Dirent) -> None:
        self.name = name
        self.path = path
        self._fs = fs
        self._entry = entry

    def inode(self) -> int:
        return self._entry.ino

    @retry_estale
    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return self._fs.stat(self.path, follow_symlinks=follow_symlinks)

    def is_symlink(self) -> bool:
        return self._is(stat.S_IFLNK, follow_symlinks=False)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_IFDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_IFREG, follow_symlinks)

    def _is(self, kind: int, follow_symlinks: bool) -> bool:
        known = self._entry.type << 12
        if known and not (known == stat.S_IFLNK and follow_symlinks):
            return known == kind
        try:
            return stat.S_IFMT(self.stat(follow_symlinks=follow_symlinks).st_mode) == kind
        except FileNotFoundError:
            return False

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"


class Scan:
    """The iterator of scandir; a context manager."""

    def __init__(self, entries: Iterator[DirEntry]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[DirEntry]:
        return self

    def __next__(self) -> DirEntry:
        return next(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self._entries, "close"):
            self._entries.close()


class Filesystem:
    """A mounted share. Threads may use it together.

    Relative paths begin at its root. The end of its `with` block closes open files and unmounts,
    submounts too. umask: of what is created; the process's own at the time of the mount.
    """

    def __init__(self, mount: Mount) -> None:
        self.root = mount
        self.sb = mount.sb
        self.conn = mount.sb.conn
        self.device = self.conn.device
        self.umask = process_umask()
        self.lock_owner = os.getpid()
        self.ends_with = ExitStack()  # a device made for this mount
        self._lock = threading.Lock()
        self._files: set[RawFile] = set()
        self._mounted = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open and unmount, as the end of the last process and umount -R do. Idempotent."""
        if not self._mounted:
            return
        with self._lock:
            left = list(self._files)
        for file in left:
            with suppress(OSError):
                file.close()
        for mount in self.root.walk():
            for view in list(mount.views):
                view.release()
        self.umount(recursive=True)

    def umount(self, path: StrPath | None = None, *, recursive: bool = False) -> None:
        """The share, or a submount. OSError EBUSY: a file is open, has a view, or a mount is below."""
        if self.conn.dax is not None:
            self.conn.dax.settle()
        if path is not None:
            with self.errors(path):
                with self._walk(path, automount=False) as place:
                    mount = place.mount
                    if place.dentry is not mount.root or mount is self.root:
                        raise error(EINVAL)
                mount.umount(recursive)
            return
        with self.errors("/"):
            self.root.umount(recursive)
        self._mounted = False
        self.ends_with.close()

    @property
    def options(self) -> str:
        """As the mount is shown in /proc/mounts."""
        shown = self.sb.options.show()
        return shown.replace("rw", "ro", 1) if self.root.readonly else shown

    @contextmanager
    def as_user(self, uid: int, gid: int, groups: Sequence[int] = ()) -> Iterator[None]:
        """This thread's calls are that user's, who is also in these groups."""
        with acting_as(uid, gid, groups):
            yield

    def stats(self) -> dict[str, Any]:
        """requests by opcode; cache hits; what the queues count; of a DAX window its ranges."""
        dax = {} if self.conn.dax is None else {"dax": self.conn.dax.stats()}
        return dax | {
            "requests": {opcode.name: count for opcode, count in sorted(self.conn.requests.items())},
            "hits": dict(self.conn.hits),
            "queues": self.device.transport.counters(),
        }

    def drop_caches(self) -> None:
        """Forget every name nobody uses, and every clean page: /proc/sys/vm/drop_caches."""
        for mount in self.root.walk():
            with mount.sb.tree.lock:
                inodes = list(mount.sb.tree.by_nodeid.values())
            for inode in inodes:
                inode.pages.clear()
                inode.listing = None
            mount.sb.tree.shrink()

    # ---- help

    @contextmanager
    def errors(self, path: StrPath, path2: StrPath | None = None) -> Iterator[None]:
        """An error gets the path the caller gave, as those of `os` have."""
        try:
            if not self._mounted:
                raise OSError(ENODEV, "unmounted")
            yield
        except struct.error as problem:
            raise OverflowError(f"argument out of range: {problem}") from None
        except OSError as problem:
            if problem.filename is not None or problem.errno is None:
                raise
            text = problem.strerror or os.strerror(problem.errno)
            names = (os.fspath(path),) if path2 is None else (os.fspath(path), None, os.fspath(path2))
            raise OSError(problem.errno, text, *names) from problem.__cause__

    def _walk(self, path: StrPath, *, follow: bool = True, automount: bool = True) -> Place:
        return namei.walk(self.root, encode(path), follow=follow, automount=automount)

    def forget_file(self, file: RawFile) -> None:
        with self._lock:
            self._files.discard(file)

    # ---- files

    @retry_estale
    def open(self, path: StrPath, flags: int | str = "r", mode: int = 0o666) -> RawFile:
        """flags: those of os.open, or a mode as "rb" or "a+" of the built-in open."""
        with self.errors(path):
            wanted = flags if isinstance(flags, int) else parse_mode(flags)
            file = open_path(self.root, encode(path), wanted, mode & 0o7777, self.umask)
            raw = RawFile(self, file, decode_like(path, encode(path)))
            with self._lock:
                self._files.add(raw)
            return raw

    def read_bytes(self, path: StrPath) -> bytes:
        with self.open(path) as file:
            return file.read() or b""

    def write_bytes(self, path: StrPath, data: Buffer, mode: int = 0o666) -> None:
        with self.open(path, "w", mode) as file, memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                done += file.write(view[done:])

    def ftruncate(self, file: RawFile, length: int) -> None:
        with self._on(file) as opened:
            if length < 0 or not opened.writable:
                raise error(EINVAL)
            files.flush_dirty(opened.inode)
            attributes.truncate(opened.inode, length, opened.fh)

    def fstat(self, file: RawFile) -> os.stat_result:
        with self._on(file) as opened:
            files.flush_quietly(opened.inode)  # else st_blocks would not have it
            update_attributes(opened.inode, abi.STATX_BASIC)
            return attributes.stat_result(opened.inode)

    def fsync(self, file: RawFile) -> None:
        with self._on(file) as opened:
            files.fsync(opened, datasync=False)

    def fdatasync(self, file: RawFile) -> None:
        with self._on(file) as opened:
            files.fsync(opened, datasync=True)

    def syncfs(self, file: RawFile | None = None) -> None:
        """The superblock of that file, or of the root."""
        sb = self.sb if file is None else file.file.inode.sb
        with self.errors("/" if file is None else file.name):
            files.sync_filesystem(sb)

    def sync(self) -> None:
        """sync(2): the root and every submount."""
        for mount in self.root.walk():
            with suppress(OSError):
                files.sync_filesystem(mount.sb)

    def lseek(self, file: RawFile, offset: int, whence: int) -> int:
        return file.seek(offset, whence)

    def fallocate(self, file: RawFile, mode: int, offset: int, length: int) -> None:
        """fallocate(2)"""
        with self._on(file) as opened:
            fileops.fallocate(opened, mode, offset, length)

    def posix_fallocate(self, file: RawFile, offset: int, length: int) -> None:
        self.fallocate(file, 0, offset, length)

    def copy_file_range(
        self, source: RawFile, target: RawFile, count: int,
        offset_src: int | None = None, offset_dst: int | None = None,
    ) -> int:  # fmt: skip
        with self._on(source) as at, self._on(target) as to:
            start = at.position if offset_src is None else offset_src
            end = to.position if offset_dst is None else offset_dst
            done = fileops.copy_file_range(at, to, count, start, end)
            if offset_src is None:
                at.position += done
            if offset_dst is None:
                to.position += done
            return done

    def flock(self, file: RawFile, operation: int) -> None:
        """fcntl.flock"""
        with self._on(file) as opened:
            fileops.flock(opened, operation)

    def lockf(
        self, file: RawFile, command: int, length: int = 0, start: int = 0, whence: int = os.SEEK_SET,
        *, owner: int | None = None,
    ) -> None:  # fmt: skip
        """fcntl.lockf. owner: another process than this one, as far as locks go."""
        with self._on(file) as opened:
            if whence == os.SEEK_CUR:
                start += opened.position
            elif whence == os.SEEK_END:
                update_attributes(opened.inode, abi.STATX_BASIC)
                start += opened.inode.size
            fileops.lockf(opened, command, length, start, self.lock_owner if owner is None else owner)

    def ioctl(self, file: RawFile, command: int, data: bytes = b"") -> bytes:
        """An ioctl whose number tells its sizes (flags are an int); gives the data that came back."""
        with self._on(file) as opened:
            return ioctls.ioctl(opened, command & 0xFFFFFFFF, data)[1]

    @contextmanager
    def _on(self, file: RawFile) -> Iterator[OpenFile]:
        with self.errors(file.name):
            if file.closed:
                raise error(EBADF)
            yield file.file

    # ---- attributes

    def stat(self, path: StrPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """Mounts no submount, as stat(2): the place of one not yet mounted has its parent's st_dev."""
        with self.errors(path), self._walk(path, follow=follow_symlinks, automount=False) as place:
            files.flush_quietly(place.inode)  # else st_blocks would not have it
            update_attributes(place.inode, abi.STATX_BASIC)
            return attributes.stat_result(place.inode)

    def lstat(self, path: StrPath) -> os.stat_result:
        return self.stat(path, follow_symlinks=False)

    @retry_estale
    def birthtime_ns(self, path: StrPath) -> int | None:
        """stx_btime of statx(2); None if the host's file system has none."""
        with self.errors(path), self._walk(path, follow=True) as place:
            return attributes.birthtime_ns(place.inode)

    def exists(self, path: StrPath) -> bool:
        try:
            self.stat(path)
        except OSError:
            return False
        return True

    @retry_estale
    def chmod(self, path: StrPath, mode: int) -> None:
        with self._change(path) as inode:
            attributes.chmod(inode, mode)

    @retry_estale
    def chown(self, path: StrPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        with self._change(path, follow_symlinks) as inode:
            attributes.chown(inode, uid, gid)

    def lchown(self, path: StrPath, uid: int, gid: int) -> None:
        self.chown(path, uid, gid, follow_symlinks=False)

    @retry_estale
    def utime(
        self, path: StrPath, times: tuple[float, float] | None = None, *,
        ns: tuple[int, int] | None = None, follow_symlinks: bool = True,
    ) -> None:  # fmt: skip
        if times is not None and ns is not None:
            raise ValueError("utime: you may specify either 'times' or 'ns' but not both")
        if times is not None:
            ns = (round(times[0] * 10**9), round(times[1] * 10**9))
        with self._change(path, follow_symlinks) as inode:
            attributes.utime(inode, Times(None, None) if ns is None else Times(*ns))

    @retry_estale
    def truncate(self, path: StrPath, length: int) -> None:
        with self._change(path) as inode:
            if length < 0 or not inode.is_reg:
                raise error(EISDIR if inode.is_dir else EINVAL)
            permission(inode, MAY_WRITE)
            files.flush_dirty(inode)
            attributes.truncate(inode, length)

    @contextmanager
    def _change(self, path: StrPath, follow: bool = True) -> Iterator[Inode]:
        with self.errors(path), self._walk(path, follow=follow) as place:
            check_writable(place.mount.readonly)
            yield place.inode

    @retry_estale
    def access(self, path: StrPath, mode: int) -> bool:
        try:
            with self.errors(path), self._walk(path) as place:
                return namei.access(place.inode, mode, place.mount.readonly)
        except OSError:
            return False

    @retry_estale
    def statvfs(self, path: StrPath = "/") -> os.statvfs_result:
        with self.errors(path), self._walk(path, automount=False) as place:
            out, _ = self.conn.call(Opcode.STATFS, place.inode.nodeid, out=abi.KSTATFS.size)
            blocks, bfree, bavail, nfiles, ffree, bsize, namelen, frsize, _ = abi.KSTATFS.unpack(out)
            flags = place.mount.flags | (os.ST_RDONLY if place.mount.readonly else 0)
            return os.statvfs_result((
                bsize, frsize or bsize, blocks, bfree, bavail, nfiles, ffree, ffree, flags, namelen
            ))  # fmt: skip

    # ---- extended attributes

    @retry_estale
    def getxattr(self, path: StrPath, name: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        with self.errors(path), self._walk(path, follow=follow_symlinks) as place:
            return attributes.getxattr(place.inode, os.fsencode(name))

    @retry_estale
    def setxattr(
        self, path: StrPath, name: str | bytes, value: Buffer, flags: int = 0, *,
        follow_symlinks: bool = True,
    ) -> None:  # fmt: skip
        with self._change(path, follow_symlinks) as inode:
            attributes.setxattr(inode, os.fsencode(name), bytes(value), flags)

    @retry_estale
    def listxattr(self, path: StrPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        with self.errors(path), self._walk(path, follow=follow_symlinks) as place:
            return [os.fsdecode(name) for name in attributes.listxattr(place.inode)]

    @retry_estale
    def removexattr(self, path: StrPath, name: str | bytes, *, follow_symlinks: bool = True) -> None:
        with self._change(path, follow_symlinks) as inode:
            attributes.removexattr(inode, os.fsencode(name))

    # ---- names

    @retry_estale
    def mkdir(self, path: StrPath, mode: int = 0o777) -> None:
        head = abi.MKDIR_IN.pack(masked(self.conn, mode & 0o1777, self.umask), self.umask)
        with self.errors(path):
            namei.create(self.root, encode(path), Opcode.MKDIR, head, stat.S_IFDIR)

    def makedirs(self, path: StrPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        head, tail = os.path.split(encode(path).rstrip(b"/"))
        if head and tail and not self.exists(head):
            with suppress(FileExistsError):
                self.makedirs(head, exist_ok=exist_ok)
        try:
            self.mkdir(path, mode)
        except OSError:
            if not exist_ok or not self._is_dir(path):
                raise

    def _is_dir(self, path: StrPath) -> bool:
        try:
            return stat.S_ISDIR(self.stat(path).st_mode)
        except OSError:
            return False

    @retry_estale
    def mknod(self, path: StrPath, mode: int = 0o600, device: int = 0) -> None:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        major, minor = os.major(device), os.minor(device)
        rdev = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
        allowed = masked(self.conn, kind | stat.S_IMODE(mode), self.umask)
        head = abi.MKNOD_IN.pack(allowed, rdev, self.umask, 0)
        with self.errors(path):
            if kind == stat.S_IFDIR:
                raise error(EINVAL)
            namei.create(self.root, encode(path), Opcode.MKNOD, head, kind)

    @retry_estale
    def symlink(self, target: StrPath, path: StrPath) -> None:
        with self.errors(target, path):
            if not encode(target):
                raise error(ENOENT)
            namei.create(self.root, encode(path), Opcode.SYMLINK, b"", stat.S_IFLNK, encode(target) + b"\0")

    @retry_estale
    def link(self, source: StrPath, target: StrPath) -> None:
        with self.errors(source, target):
            namei.link(self.root, encode(source), encode(target))

    @retry_estale
    def link_open(self, file: RawFile, target: StrPath) -> None:
        """linkat(2) with AT_EMPTY_PATH: a name for an open file, of O_TMPFILE for one."""
        with self.errors(file.name, target), self._on(file) as opened:
            namei.link_open(self.root, namei.Place(opened.mount, opened.dentry), encode(target))

    @retry_estale
    def readlink(self, path: StrPath) -> str | bytes:
        with self.errors(path), self._walk(path, follow=False) as place:
            if not place.inode.is_link:
                raise error(EINVAL)
            target: str | bytes = decode_like(path, namei.readlink(place.inode))
            return target

    @retry_estale
    def unlink(self, path: StrPath) -> None:
        with self.errors(path):
            namei.remove(self.root, encode(path), directory=False)

    remove = unlink

    @retry_estale
    def rmdir(self, path: StrPath) -> None:
        with self.errors(path):
            namei.remove(self.root, encode(path), directory=True)

    @retry_estale
    def rename(self, source: StrPath, target: StrPath, flags: int = 0) -> None:
        """flags: those of renameat2(2), abi.Rename."""
        with self.errors(source, target):
            if flags & ~(Rename.NOREPLACE | Rename.EXCHANGE | Rename.WHITEOUT):
                raise error(EINVAL)
            namei.rename(self.root, encode(source), encode(target), flags)

    replace = rename

    # ---- listings

    def listdir(self, path: StrPath = "/") -> list[Any]:
        with self.errors(path):
            return [decode_like(path, entry.name) for entry in self._entries(path)]

    def scandir(self, path: StrPath = "/") -> Scan:
        with self.errors(path):
            entries = self._entries(path)
        text = os.fspath(path)

        def found() -> Iterator[DirEntry]:
            for entry in entries:
                name: Any = decode_like(path, entry.name)
                yield DirEntry(self, name, os.path.join(text, name), entry)

        return Scan(found())

    @retry_estale
    def _entries(self, path: StrPath) -> list[Dirent]:
        file = open_path(self.root, encode(path), os.O_RDONLY | os.O_DIRECTORY, 0, self.umask)
        try:
            return [entry for entry in directories.read_directory(file) if entry.name not in (b".", b"..")]
        finally:
            files.close(file, self.lock_owner)

    def walk(
        self, top: StrPath = "/", topdown: bool = True, onerror: Any = None, followlinks: bool = False
    ) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """os.walk"""
        text: Any = os.fspath(top)
        dirs: list[Any] = []
        others: list[Any] = []
        try:
            entries = self.scandir(top)
        except OSError as problem:
            if onerror is not None:
                onerror(problem)
            return
        for entry in entries:
            is_dir = False
            with suppress(OSError):  # a symlink that can't be followed
                is_dir = entry.is_dir()
            (dirs if is_dir else others).append(entry.name)
        if topdown:
            yield text, dirs, others
        for name in dirs:
            path = os.path.join(text, name)
            if followlinks or not stat.S_ISLNK(self.lstat(path).st_mode):
                yield from self.walk(path, topdown, onerror, followlinks)
        if not topdown:
            yield text, dirs, others


def encode(path: StrPath) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    return name


def decode_like(path: StrPath, name: bytes) -> Any:
    """bytes for who asked in bytes, else str."""
    return name if isinstance(os.fspath(path), bytes) else os.fsdecode(name)


def parse_mode(text: str) -> int:
    letters = set(text) - {"b"}
    kinds = letters & set(MODES)
    if len(kinds) != 1 or letters - kinds - {"+"} or len(text) > 3:
        raise ValueError(f"invalid mode: {text!r}")
    flags = MODES[kinds.pop()]
    return (flags & ~os.O_ACCMODE) | os.O_RDWR if "+" in letters else flags


def process_umask() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
