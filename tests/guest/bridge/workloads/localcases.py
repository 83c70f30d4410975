"""Cases of the conformance table that public suites of tests ask of a local file system.

After pjdfstest (which times change), xfstests' generic group (holes, kinds of fallocate and rename,
positions in listings, extended attributes, set-id bits, ACLs) and LTP (locks). A case works in a
directory of its own and returns what came of it: results, errnos, what is left. Standard library only.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import shutil
import stat
import struct
import time

OLD_NS = 1_000_000_000 * 10**9
OTHER = 1001
COARSE = 5  # CLOCK_REALTIME_COARSE: the clock of files' times
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
SYS_LINKAT, SYS_RENAMEAT2 = (37, 276) if os.uname().machine == "aarch64" else (265, 316)
FS_IOC_SETFLAGS, FS_APPEND_FL, FS_IMMUTABLE_FL = 0x40086602, 0x20, 0x10
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 3, 0x10  # fallocate(2); a hole is punched within the size
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CASES = {}


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


# --- what Python lacks ---


def attempt(call, *words, **named):
    """Its result, or the errno's name."""
    try:
        return call(*words, **named)
    except OSError as problem:
        return errno.errorcode.get(problem.errno, str(problem.errno))


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def rename2(old, new, flags):
    checked(libc.syscall(SYS_RENAMEAT2, AT_FDCWD, old.encode(), AT_FDCWD, new.encode(), flags))


def link_open(fd, name):
    """Give an open file a name: os.link(follow_symlinks=True) does not follow before Python 3.13."""
    path = f"/proc/self/fd/{fd}".encode()
    checked(libc.syscall(SYS_LINKAT, AT_FDCWD, path, AT_FDCWD, name.encode(), AT_SYMLINK_FOLLOW))


def fallocate(fd, mode, at, n):
    checked(libc.fallocate64(fd, mode, ctypes.c_int64(at), ctypes.c_int64(n)))


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR | os.O_CREAT, mode=0o644, **named):
    fd = os.open(path, flags, mode, **named)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def acting_as(uid):
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def touch(path, content=b"content", mode=0o644):
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        os.write(fd, content)
    os.chmod(path, mode)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def onto(path, flags, call):
    """Do something with the file open."""
    with opened(path, flags) as fd:
        return call(fd)


def as_other(call):
    with acting_as(OTHER):
        return call()


def copy(n, source="twin", target="file"):
    with opened(source, os.O_RDONLY) as a, opened(target, os.O_WRONLY) as b:
        os.copy_file_range(a, b, n)


def named_afterwards(directory):
    with opened(directory, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
        link_open(fd, "new")


def write_mapped(fd):
    with mmap.mmap(fd, 7) as mapped:
        mapped[0:1] = b"z"


def change_flags(path, flags):
    with opened(path, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))


# --- which times change ---

W, R, RW = os.O_WRONLY, os.O_RDONLY, os.O_RDWR
TIMED = {
    "chmod": lambda: os.chmod("file", 0o600),
    "chmod same": lambda: os.chmod("file", 0o644),
    "chmod directory": lambda: os.chmod("dir", 0o700),
    "chmod fifo": lambda: os.chmod("fifo", 0o600),
    "fchmod": lambda: onto("file", R, lambda fd: os.fchmod(fd, 0o640)),
    "chmod refused": lambda: as_other(lambda: os.chmod("file", 0o666)),
    "chown": lambda: os.chown("file", 7, 8),
    "chown same": lambda: os.chown("file", 0, 0),
    "chown nobody": lambda: os.chown("file", -1, -1),
    "lchown": lambda: os.lchown("link", 7, 8),
    "fchown": lambda: onto("file", R, lambda fd: os.fchown(fd, 5, 5)),
    "chown refused": lambda: as_other(lambda: os.chown("file", 7, 8)),
    "truncate": lambda: os.truncate("file", 3),
    "truncate same": lambda: os.truncate("file", 7),
    "truncate up": lambda: os.truncate("file", 100),
    "truncate refused": lambda: as_other(lambda: os.truncate("file", 3)),
    "ftruncate": lambda: onto("file", RW, lambda fd: os.ftruncate(fd, 3)),
    "ftruncate same": lambda: onto("file", RW, lambda fd: os.ftruncate(fd, 7)),
    "open": lambda: onto("file", RW, int),
    "open truncate": lambda: onto("file", RW | os.O_TRUNC, int),
    "open create": lambda: onto("new", RW | os.O_CREAT, int),
    "open create below": lambda: onto("dir/new", RW | os.O_CREAT, int),
    "open exclusive": lambda: onto("file", RW | os.O_CREAT | os.O_EXCL, int),
    "open refused": lambda: as_other(lambda: onto("dir/new", RW | os.O_CREAT, int)),
    "read": lambda: onto("file", R, lambda fd: os.read(fd, 100)),
    "write": lambda: onto("file", W, lambda fd: os.write(fd, b"x")),
    "write nothing": lambda: onto("file", W, lambda fd: os.write(fd, b"")),
    "append": lambda: onto("file", W | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "write mapped": lambda: onto("file", RW, write_mapped),
    "link": lambda: os.link("file", "dir/new"),
    "link exists": lambda: os.link("file", "twin"),
    "link directory": lambda: os.link("dir", "new"),
    "link fifo": lambda: os.link("fifo", "new"),
    "unlink": lambda: os.unlink("file"),
    "unlink one of two": lambda: os.unlink("dir/second"),
    "unlink refused": lambda: as_other(lambda: os.unlink("dir/inside")),
    "mkdir": lambda: os.mkdir("dir/new"),
    "mkdir exists": lambda: os.mkdir("dir"),
    "rmdir": lambda: os.rmdir("empty"),
    "rmdir full": lambda: os.rmdir("dir"),
    "mkfifo": lambda: os.mkfifo("dir/new"),
    "mknod": lambda: os.mknod("dir/new", stat.S_IFREG | 0o600),
    "symlink": lambda: os.symlink("to", "dir/new"),
    "symlink exists": lambda: os.symlink("to", "file"),
    "rename": lambda: os.rename("file", "new"),
    "rename over": lambda: os.rename("file", "twin"),
    "rename away": lambda: os.rename("file", "dir/new"),
    "rename to itself": lambda: os.rename("twin", "dir/second"),
    "rename directory": lambda: os.rename("dir", "other/dir"),
    "rename directory over": lambda: os.rename("dir", "empty"),
    "rename onto full": lambda: os.rename("empty", "dir"),
    "exchange": lambda: rename2("file", "dir/inside", 2),
    "rename noreplace": lambda: rename2("file", "twin", 1),
    "utime": lambda: os.utime("file", ns=(5, 7)),
    "utime now": lambda: os.utime("file"),
    "utime refused": lambda: as_other(lambda: os.utime("file")),
    "utime link": lambda: os.utime("link", follow_symlinks=False),
    "readlink": lambda: os.readlink("link"),
    "listdir": lambda: str(sorted(os.listdir("dir"))),
    "setxattr": lambda: os.setxattr("file", "user.new", b"1"),
    "setxattr same": lambda: os.setxattr("file", "user.old", b"1"),
    "removexattr": lambda: os.removexattr("file", "user.old"),
    "removexattr missing": lambda: os.removexattr("file", "user.none"),
    "fallocate": lambda: onto("file", RW, lambda fd: fallocate(fd, 0, 0, 9000)),
    "fallocate beyond": lambda: onto("file", RW, lambda fd: fallocate(fd, KEEP_SIZE, 0, 9000)),
    "punch": lambda: onto("file", RW, lambda fd: fallocate(fd, PUNCH_HOLE, 0, 5)),
    "zero range": lambda: onto("file", RW, lambda fd: fallocate(fd, ZERO_RANGE, 0, 5)),
    "copy into": lambda: copy(4),
    "tmpfile": lambda: onto("dir", RW | os.O_TMPFILE, int),
    "tmpfile named": lambda: named_afterwards("dir"),
}
TIMED_PATHS = (".", "file", "dir", "dir/inside", "empty", "link", "fifo", "other")


def next_tick():
    """Until the clock of files' times is past this moment; it lags by 10 ms and more.

    By multigrain times a file may have got a finer time, later than the clock after its next tick. tmpfs
    then gives a directory the same one again (shmem_unlink takes the removed file's).
    """
    now = time.clock_gettime_ns(time.CLOCK_REALTIME)
    while time.clock_gettime_ns(COARSE) <= now:
        time.sleep(0.001)


def changed_times(call):
    for path in ("file", "twin"):
        touch(path)
    for path in ("dir", "empty", "other"):
        os.mkdir(path)
    touch("dir/inside")
    os.link("twin", "dir/second")
    os.symlink("file", "link")
    os.mkfifo("fifo")
    os.setxattr("file", "user.old", b"1")
    for path in TIMED_PATHS:
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    next_tick()
    before = {path: os.lstat(path) for path in TIMED_PATHS}
    said = attempt(call)
    changes = {}
    for path, old in before.items():
        st = attempt(os.lstat, path)
        if isinstance(st, str):
            changes[path] = st
            continue
        changes[path] = "".join(
            which
            for which in "amc"
            if getattr(old, f"st_{which}time_ns") != getattr(st, f"st_{which}time_ns")
        )
    return [said if isinstance(said, str) else "ok", changes]


for name, call in TIMED.items():
    CASES[f"times {name}"] = lambda call=call: changed_times(call)


# --- data and holes ---


def layout(fd):
    """Where data begin and end."""
    found, at, end = [], 0, os.fstat(fd).st_size
    while at < end:
        start = attempt(os.lseek, fd, at, os.SEEK_DATA)
        if isinstance(start, str):
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


@case
def holes_and_data():
    layouts = (
        [], [(0, 4096)], [(MIB, 4096)], [(0, 10), (2 * MIB, 10)], [(MIB, MIB), (4 * MIB, 100)],
    )  # fmt: skip
    allocations = (None, (0, 0, MIB), (KEEP_SIZE, 0, 4 * MIB), (PUNCH_HOLE, 65536, 65536))
    found = []
    for n, (written, allocation) in enumerate(itertools.product(layouts, allocations)):
        with opened(f"file{n}") as fd:
            for at, length in written:
                os.pwrite(fd, b"d" * length, at)
            if allocation:
                fallocate(fd, *allocation)
            os.fsync(fd)
            size = os.fstat(fd).st_size
            seeks = itertools.product((0, 1, 4095, MIB, size - 1, size, -1), (os.SEEK_DATA, os.SEEK_HOLE))
            found.append([size, layout(fd), [attempt(os.lseek, fd, *seek) for seek in seeks]])
    return found


def allocate(mode):
    touch("file", b"0123456789abcdef" * 1024)
    with opened("file") as fd:
        said = attempt(fallocate, fd, mode, 4096, 4096)
        return [said, os.fstat(fd).st_size, os.pread(fd, 30000, 0).count(0)]


for mode in range(0x80):
    CASES[f"fallocate mode {mode:#x}"] = lambda mode=mode: allocate(mode)


@case
def fallocate_arguments():
    touch("file", b"x" * 10000)
    ranges = ((0, 1), (0, 0), (-1, 1), (0, -1), (2**63 - 1, 1), (2**62, 2**62), (20000, 100))
    found = []
    for flags, mode, (at, n) in itertools.product(
        (R, W, RW | os.O_APPEND), (0, KEEP_SIZE, PUNCH_HOLE, 2, ZERO_RANGE), ranges
    ):
        with opened("file", flags) as fd:
            found.append([attempt(fallocate, fd, mode, at, n), os.fstat(fd).st_size])
    return found


@case
def copied_ranges():
    touch("a", bytes(range(256)) * 64)
    os.mkdir("dir")
    os.mkfifo("fifo")
    whole = ((0, 0, 100), (1000, 5000, 1000), (0, 0, 1 << 30), (16380, 100, 10), (20000, 0, 10), (0, 0, 0))
    found = []
    with opened("a", RW) as a:
        for source, target, n in whole:
            with opened("b", RW | os.O_CREAT | os.O_TRUNC) as b:
                found.append([attempt(os.copy_file_range, a, b, n, source, target), read("b").hex()[-20:]])
        for source, target, n in ((0, 50, 100), (0, 100, 100), (0, 16384, 5000), (10, 10, 0)):
            found.append([attempt(os.copy_file_range, a, a, n, source, target), os.fstat(a).st_size])
        for path, flags in (("b", R), ("b", W | os.O_APPEND), ("b", W), ("dir", R), ("fifo", RW)):
            with opened(path, flags) as other:
                found.append(attempt(os.copy_file_range, a, other, 10, 0))
                found.append(attempt(os.copy_file_range, other, a, 10, 0, 0))
    return found


@case
def mapped_and_cut():
    with opened("file") as fd:
        os.ftruncate(fd, 10000)
        with mmap.mmap(fd, 10000) as mapped:
            mapped[0:4] = b"abcd"
            os.pwrite(fd, b"WXYZ", 2)
            found = [mapped[0:6].decode(), read("file")[:6].decode()]
            mapped[:] = b"m" * 10000
            os.ftruncate(fd, 5000)
            os.ftruncate(fd, 10000)
            found += [mapped[4999], mapped[5000], os.pread(fd, 10000, 0).count(0)]
            mapped[:] = b"m" * 10000
            fallocate(fd, PUNCH_HOLE, 1000, 6000)
            found += [mapped[999], mapped[1000], mapped[6999], mapped[7000], read("file").count(0)]
    return found


@case
def cached_and_direct():
    page = mmap.mmap(-1, 4096)
    page[:] = b"D" * 4096
    with opened("file", RW | os.O_CREAT | os.O_DIRECT) as direct, opened("file", RW) as fd:
        os.pwrite(fd, b"b" * 8192, 0)
        found = [os.preadv(direct, [page], 4096), page[:1].decode()]
        page[:] = b"D" * 4096
        with mmap.mmap(fd, 8192) as mapped:
            found += [mapped[0], os.pwritev(direct, [page], 0), mapped[0], os.pread(fd, 1, 0).decode()]
            mapped[4096:4097] = b"n"
            found += [os.preadv(direct, [page], 4096), page[:2].decode()]
        os.ftruncate(fd, 100)
        found += [os.preadv(direct, [page], 0), os.preadv(direct, [page], 4096)]
    return found


@case
def appending():
    with opened("file", RW | os.O_CREAT | os.O_APPEND) as a, opened("file", RW) as b:
        found = [os.write(a, b"one"), os.pwrite(a, b"two", 0), os.lseek(a, 0, 1), os.pwrite(b, b"XX", 10)]
        found += [
            os.write(a, b"three"),
            attempt(os.ftruncate, a, 2),
            os.write(a, b"four"),
            read("file").hex(),
        ]
        fcntl.fcntl(b, fcntl.F_SETFL, os.O_APPEND)
        found += [os.pwrite(b, b"five", 0), read("file").hex()]
    return found


@case
def flagged_files():
    """chattr +a and +i: what may still be done."""
    found = []
    for flags in (FS_APPEND_FL, FS_IMMUTABLE_FL):
        touch("file")
        change_flags("file", flags)
        calls = (
            lambda: onto("file", W, int), lambda: onto("file", W | os.O_TRUNC, int),
            lambda: onto("file", W | os.O_APPEND, lambda fd: os.write(fd, b"more")),
            lambda: onto("file", RW | os.O_APPEND, lambda fd: os.pwrite(fd, b"most", 2)),
            lambda: os.truncate("file", 2), lambda: os.chmod("file", 0o600),
            lambda: os.utime("file", ns=(1, 1)),
            lambda: os.link("file", "new"), lambda: os.rename("file", "new"), lambda: os.unlink("file"),
            lambda: os.setxattr("file", "user.new", b"1"), lambda: read("file").decode(),
        )  # fmt: skip
        found.append([attempt(call) for call in calls])
        change_flags("file", 0)
        os.unlink("file")
    return found


# --- names ---


def make(path, kind):
    if kind == "file":
        touch(path)
    elif kind == "link":
        os.symlink("to", path)
    elif kind != "nothing":
        os.mkdir(path)
    if kind == "full":
        touch(f"{path}/inside")


def rename_kinds(flags):
    found = {}
    for kinds in itertools.product(("file", "link", "empty", "full", "nothing"), repeat=2):
        os.mkdir("in")
        for name, kind in zip("ab", kinds, strict=True):
            make(f"in/{name}", kind)
        said = attempt(rename2, "in/a", "in/b", flags)
        left = {name: os.lstat(f"in/{name}") for name in sorted(os.listdir("in"))}
        found[" ".join(kinds)] = [
            said, {name: f"{stat.S_IFMT(st.st_mode):o} {st.st_rdev}" for name, st in left.items()}
        ]  # fmt: skip
        shutil.rmtree("in")
    return found


for flags in range(9):
    CASES[f"rename flags {flags}"] = lambda flags=flags: rename_kinds(flags)


@case
def files_without_names():
    with opened(".", os.O_TMPFILE | RW, 0o6751) as fd:
        os.write(fd, b"text")
        found = [os.fstat(fd).st_nlink, oct(os.fstat(fd).st_mode), os.listdir(".")]
        os.setxattr(fd, "user.name", b"1")
        found += [attempt(link_open, fd, "new"), read("new").decode(), os.listxattr("new")]
        found += [os.fstat(fd).st_nlink, attempt(link_open, fd, "new"), os.unlink("new")]
        found += [attempt(link_open, fd, "again"), os.fstat(fd).st_nlink]
    with opened(".", os.O_TMPFILE | os.O_EXCL | RW, 0o600) as fd:
        found.append(attempt(link_open, fd, "no"))
    touch("file")
    for path, flags in ((".", R), (".", W | os.O_CREAT), ("file", RW), ("missing", RW)):
        found.append(attempt(lambda path=path, flags=flags: onto(path, os.O_TMPFILE | flags, int)))
    return found


@case
def unlinked_files():
    touch("file")
    os.setxattr("file", "user.name", b"1")
    with opened("file", RW) as fd, opened("file", os.O_PATH) as path:
        os.unlink("file")
        touch("file", b"another")
        found = [os.fstat(fd).st_nlink, os.fstat(path).st_nlink, os.pwrite(fd, b"more", 7)]
        again = f"/proc/self/fd/{path}"
        calls = (
            lambda: os.pread(fd, 99, 0).decode(), lambda: os.ftruncate(fd, 4), lambda: os.fchmod(fd, 0o400),
            lambda: os.fchown(fd, 1, 2), lambda: os.utime(fd, ns=(1, 2)), lambda: os.chmod(again, 0o640),
            lambda: os.getxattr(fd, "user.name").decode(), lambda: os.setxattr(fd, "user.b", b"2"),
            lambda: fallocate(fd, 0, 0, 100), lambda: os.fsync(fd), lambda: os.truncate(again, 2),
            lambda: onto(again, R, lambda other: os.read(other, 9).decode()),
            lambda: oct(os.stat(again).st_mode),
            lambda: link_open(fd, "back"), lambda: read("file").decode(),
        )  # fmt: skip
        return found + [attempt(call) for call in calls]


# --- listings ---


class Listing:
    """opendir(3) and its like."""

    def __init__(self, path):
        libc.opendir.restype = ctypes.c_void_p
        libc.telldir.restype = ctypes.c_long
        libc.readdir64.restype = ctypes.c_void_p
        self.stream = ctypes.c_void_p(libc.opendir(path.encode()))

    def next(self):
        entry = libc.readdir64(self.stream)
        return ctypes.string_at(entry + 19).decode() if entry else None

    def rest(self):
        return list(iter(self.next, None))

    def tell(self):
        return libc.telldir(self.stream)

    def seek(self, position):
        libc.seekdir(self.stream, ctypes.c_long(position))

    def names(self):
        libc.rewinddir(self.stream)
        return sorted(self.rest())

    def close(self):
        libc.closedir(self.stream)


@case
def listing_positions():
    os.mkdir("dir")
    for i in range(200):
        os.mknod(f"dir/{i}")
    with contextlib.closing(Listing("dir")) as listing:
        marks = []
        while True:
            position = listing.tell()
            name = listing.next()
            if name is None:
                break
            marks.append((position, name))
        wrong = 0
        for mark, name in marks[::7] + marks[::-11]:
            listing.seek(mark)
            wrong += listing.next() != name
        listing.seek(position)
        return [len(marks), len(set(marks)), wrong, listing.next(), len(listing.names())]


@case
def listing_of_what_changes():
    os.mkdir("dir")
    for i in range(500):
        os.mknod(f"dir/{i}")
    with contextlib.closing(Listing("dir")) as listing:
        seen = []
        for name in iter(listing.next, None):
            if not name.startswith("."):
                seen.append(name)
                os.rename(f"dir/{name}", "away")
                os.rename("away", f"dir/{name}") if len(seen) % 2 else os.unlink("away")
            assert len(seen) < 5000, "a listing without an end"
        left = listing.names()
        os.mknod("dir/new")
        return [len(set(seen)), len(left), len(listing.names()), os.unlink("dir/new"), len(listing.names())]


@case
def links_of_directories():
    os.mkdir("dir")
    for i in range(5):
        os.mkdir(f"dir/{i}")
    found = [os.stat("dir").st_nlink]
    os.rename("dir/0", "out")
    found += [os.stat("dir").st_nlink, os.stat(".").st_nlink]
    os.rename("out", "dir/1")
    touch("file")
    rename2("file", "dir/2", 2)
    return [*found, os.stat("dir").st_nlink, os.stat(".").st_nlink]
