"""Copying files and trees between the host and a share, or within a share, as `cp -a` does.

Kept: modes, owners, times, symlinks, hard links, holes, special files, extended attributes and ACLs. What
can't be copied, or kept, is told, and the rest goes on. Until it is complete nothing can be read by more
users than in the end: files are made with mode 0600, directories with 0700. A symlink in the way is
replaced, never followed.
"""

import os
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from errno import EEXIST, EINVAL, EISDIR, ENODATA, ENOTDIR, ENXIO, EOPNOTSUPP, EPERM
from typing import Any, NamedTuple, Protocol

from vfsd.guest.client import acl
from vfsd.guest.face.filesystem import Filesystem
from vfsd.guest.face.rawfile import RawFile

CHUNK = 1 << 20  # bytes copied at a time
ACCESS_ACL, DEFAULT_ACL = os.fsdecode(acl.ACCESS), os.fsdecode(acl.DEFAULT)
# By type of file; all others have the first.
ACLS: dict[int, tuple[str, ...]] = {stat.S_IFLNK: (), stat.S_IFDIR: (ACCESS_ACL, DEFAULT_ACL)}
PERMISSIONS = 0o777
SET_ID = stat.S_ISUID | stat.S_ISGID

Tell = Callable[[str, str], None]


class File(Protocol):
    """An open file of either side."""

    def pread(self, count: int, offset: int) -> bytes: ...
    def pwrite(self, data: bytes, offset: int) -> int: ...
    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def truncate(self, size: int, /) -> int: ...
    def close(self) -> None: ...


class Files(Protocol):
    """One side of a copy: `Filesystem` or `HostFiles`. OSError as of `os`."""

    def open(self, path: str, flags: int, mode: int = ...) -> File: ...
    def lstat(self, path: str) -> os.stat_result: ...
    def listdir(self, path: str) -> list[str]: ...
    def readlink(self, path: str) -> Any: ...
    def mkdir(self, path: str, mode: int = ...) -> None: ...
    def mknod(self, path: str, mode: int, device: int = ...) -> None: ...
    def symlink(self, target: str, path: str) -> None: ...
    def link(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def chmod(self, path: str, mode: int) -> None: ...
    def lchown(self, path: str, uid: int, gid: int) -> None: ...
    def utime(self, path: str, *, ns: tuple[int, int], follow_symlinks: bool = ...) -> None: ...
    def listxattr(self, path: str, *, follow_symlinks: bool = ...) -> list[str]: ...
    def getxattr(self, path: str, name: str, *, follow_symlinks: bool = ...) -> bytes: ...
    def setxattr(self, path: str, name: str, value: bytes, *, follow_symlinks: bool = ...) -> None: ...
    def removexattr(self, path: str, name: str, *, follow_symlinks: bool = ...) -> None: ...


class Item(NamedTuple):
    """Something to copy. made: a directory whose contents are copied, so that its attributes are next."""

    source: str
    target: str
    made: os.stat_result | None = None


class TreeCopy:
    """Copies from one side to the other. tell: of what is left out, and why. progress: bytes copied."""

    def __init__(self, source: Files, target: Files, tell: Tell, progress: Callable[[int], None]) -> None:
        self._from = source
        self._to = target
        self._tell = tell
        self._progress = progress
        self._links: dict[tuple[int, int], str] = {}  # first copies of files with several names
        self._made: set[tuple[int, int]] = set()  # directories of the target
        self._no_xattrs = False  # on the target, which has been told

    def copy(self, source: str, target: str) -> None:
        """What source names, and all that is below it."""
        todo = [Item(source, target)]
        while todo:
            item = todo.pop()
            try:
                if item.made is not None:
                    self._finish(item.source, item.target, item.made)
                else:
                    todo += self._copy_one(item)
            except OSError as problem:
                self._leave_out(item.source, problem)

    def _leave_out(self, path: str, problem: OSError, what: str = "") -> None:
        """OSError: the share has gone, and nothing else can be copied."""
        for side in (self._from, self._to):
            if isinstance(side, Filesystem) and side.device.gone is not None:
                raise problem
        name = problem.filename if isinstance(problem.filename, str) else path
        self._tell(name, f"{what}{problem.strerror or problem}")

    def _copy_one(self, item: Item) -> list[Item]:
        """Copy all of it but a directory's contents; what is to be done for them, the last first."""
        st = self._from.lstat(item.source)
        there = self._target_stat(item.target)
        self._check_target(item, st, there)
        if stat.S_ISDIR(st.st_mode):
            return self._copy_directory(item, st, there)
        if self._link_to_earlier(item.target, st, there):
            return []
        if stat.S_ISREG(st.st_mode):
            self._copy_regular(item, st, there)
        else:
            if there is not None:
                self._to.unlink(item.target)
            if stat.S_ISLNK(st.st_mode):
                self._to.symlink(self._from.readlink(item.source), item.target)
            else:
                self._to.mknod(item.target, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev)
        if st.st_nlink > 1:
            self._links[st.st_dev, st.st_ino] = item.target
        self._finish(item.source, item.target, st)
        return []

    def _target_stat(self, path: str) -> os.stat_result | None:
        try:
            return self._to.lstat(path)
        except FileNotFoundError:
            return None

    def _check_target(self, item: Item, st: os.stat_result, there: os.stat_result | None) -> None:
        """OSError: what is there can't give way to what comes."""
        same_side = self._from is self._to
        if stat.S_ISDIR(st.st_mode) and same_side and (st.st_dev, st.st_ino) in self._made:
            raise OSError(EINVAL, "is what is being copied to", item.source)
        if there is None:
            return
        if same_side and (st.st_dev, st.st_ino) == (there.st_dev, there.st_ino):
            raise OSError(EEXIST, f"is the same file as {item.target}", item.source)
        if stat.S_ISDIR(st.st_mode) != stat.S_ISDIR(there.st_mode):
            error = EISDIR if stat.S_ISDIR(there.st_mode) else ENOTDIR
            raise OSError(error, os.strerror(error), item.target)

    def _restrict(self, target: str, there: os.stat_result, allowed: int) -> None:
        """Take permissions from what is there, before it gets new contents."""
        if there.st_mode & ~allowed & PERMISSIONS:
            with suppress(PermissionError):  # another user's, which is told when it should get its mode
                self._to.chmod(target, there.st_mode & allowed & PERMISSIONS)

    def _copy_directory(self, item: Item, st: os.stat_result, there: os.stat_result | None) -> list[Item]:
        names = self._from.listdir(item.source)
        if there is None:
            self._to.mkdir(item.target, stat.S_IRWXU)
        else:
            self._restrict(item.target, there, st.st_mode | stat.S_IRWXU)
        made = there or self._to.lstat(item.target)
        self._made.add((made.st_dev, made.st_ino))
        inside = [Item(os.path.join(item.source, name), os.path.join(item.target, name)) for name in names]
        return [Item(item.source, item.target, st), *reversed(inside)]

    def _link_to_earlier(self, target: str, st: os.stat_result, there: os.stat_result | None) -> bool:
        """Whether it is another name of a file that was copied before, and is that on the target now."""
        first = self._links.get((st.st_dev, st.st_ino)) if st.st_nlink > 1 else None
        if first is None:
            return False
        if there is not None:
            known = self._to.lstat(first)
            if (known.st_dev, known.st_ino) == (there.st_dev, there.st_ino):
                return True
            self._to.unlink(target)
        try:
            self._to.link(first, target)
        except OSError as problem:
            self._leave_out(target, problem, f"copied, not linked to {first}: ")
            return False
        return True

    # ---- data

    def _copy_regular(self, item: Item, st: os.stat_result, there: os.stat_result | None) -> None:
        with closing(self._from.open(item.source, os.O_RDONLY | os.O_NOFOLLOW)) as reader:
            flags = os.O_WRONLY | os.O_NOFOLLOW
            if there is None or not stat.S_ISREG(there.st_mode):
                if there is not None:
                    self._to.unlink(item.target)
                flags |= os.O_CREAT | os.O_EXCL
            else:
                flags |= os.O_TRUNC
                self._restrict(item.target, there, 0o600)
            with closing(self._to.open(item.target, flags, 0o600)) as writer:
                if st.st_blocks * 512 < st.st_size:
                    self._copy_sparse(reader, writer)
                else:
                    self._copy_range(reader, writer, 0, None)

    def _copy_sparse(self, reader: File, writer: File) -> None:
        end = 0
        while True:
            try:
                start = reader.seek(end, os.SEEK_DATA)
            except OSError as problem:
                if problem.errno == ENXIO:
                    break
                self._copy_range(reader, writer, end, None)
                return
            end = reader.seek(start, os.SEEK_HOLE)
            self._copy_range(reader, writer, start, end)
        writer.truncate(reader.seek(0, os.SEEK_END))

    def _copy_range(self, reader: File, writer: File, start: int, end: int | None) -> None:
        """Up to there, or to the end of the file."""
        while end is None or start < end:
            count = CHUNK if end is None else min(CHUNK, end - start)
            done = self._copy_chunk(reader, writer, start, count)
            if done == 0:
                return
            start += done
            self._progress(done)

    def _copy_chunk(self, reader: File, writer: File, start: int, count: int) -> int:
        if self._from is self._to and isinstance(self._to, Filesystem):
            assert isinstance(reader, RawFile) and isinstance(writer, RawFile)
            return self._to.copy_file_range(reader, writer, count, start, start)
        data = reader.pread(count, start)
        done = 0
        while done < len(data):
            done += writer.pwrite(data[done:], start + done)
        return done

    # ---- attributes

    def _finish(self, source: str, target: str, st: os.stat_result) -> None:
        """Owner, extended attributes, mode and times, in the order in which none undoes another."""
        mode = stat.S_IMODE(st.st_mode)
        if not self._copy_owner(target, st):
            mode &= ~SET_ID
        self._copy_xattrs(source, target, stat.S_IFMT(st.st_mode))
        if not stat.S_ISLNK(st.st_mode):
            self._try(target, "mode: ", lambda: self._to.chmod(target, mode))
        times = (st.st_atime_ns, st.st_mtime_ns)
        self._try(target, "times: ", lambda: self._to.utime(target, ns=times, follow_symlinks=False))

    def _try(self, path: str, what: str, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, OverflowError) as problem:
            error = problem if isinstance(problem, OSError) else OSError(EINVAL, str(problem))
            self._leave_out(path, error, what)

    def _copy_owner(self, target: str, st: os.stat_result) -> bool:
        """Whether the owner is the same. Only root is told if not: others may give nothing away."""
        now = self._to.lstat(target)
        if (now.st_uid, now.st_gid) == (st.st_uid, st.st_gid):
            return True
        try:
            self._to.lchown(target, st.st_uid, st.st_gid)
        except OSError as problem:
            if problem.errno != EPERM or os.geteuid() == 0:
                self._leave_out(target, problem, "owner: ")
            return False
        return True

    def _copy_xattrs(self, source: str, target: str, kind: int) -> None:
        names = self._xattrs(self._from, source)
        for name in ACLS.get(kind, (ACCESS_ACL,)):
            if name not in names:  # made so by the default ACL of its directory
                try:
                    self._to.removexattr(target, name, follow_symlinks=False)
                except OSError as problem:
                    if problem.errno not in (ENODATA, EOPNOTSUPP):
                        self._leave_out(target, problem, f"{name}: ")
        for name in names:
            try:
                value = self._from.getxattr(source, name, follow_symlinks=False)
                self._to.setxattr(target, name, value, follow_symlinks=False)
            except OSError as problem:
                self._leave_xattr_out(target, name, problem)

    @staticmethod
    def _xattrs(side: Files, path: str) -> list[str]:
        try:
            return side.listxattr(path, follow_symlinks=False)
        except OSError as problem:
            if problem.errno != EOPNOTSUPP:
                raise
            return []

    def _leave_xattr_out(self, target: str, name: str, problem: OSError) -> None:
        """Labels are the host's or the guest's own matter; that there are no others is told once."""
        if name == "security.selinux":
            return
        if problem.errno == EOPNOTSUPP:
            if self._no_xattrs:
                return
            self._no_xattrs = True
        self._leave_out(target, problem, f"{name}: ")
