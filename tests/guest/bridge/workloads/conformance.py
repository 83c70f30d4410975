"""Runs the table of POSIX cases below a directory and prints what came of each, as JSON.

conformance.py DIR GROUP...: a case starts from a fresh laboratory (one object of every kind, known
times), does one thing as one user, and is told by its errno and by what the laboratory looks like
then: kinds, modes, owners, links, sizes, targets, which times have changed. Two directories behave
alike when the output is equal. Standard library only: it runs in guests as well.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import socket
import stat
import sys

from rightscases import CASES

OLD_NS = 1_000_000_000 * 10**9
OWNER, MEMBER, OTHER = 1000, 1001, 1002  # users; the first owns what there is
GROUP, OTHER_GROUP = 2000, 2001
USERS = {
    "root": (0, 0, []),
    "owner": (OWNER, GROUP, []),
    "member": (MEMBER, OTHER_GROUP, [GROUP]),
    "other": (OTHER, OTHER_GROUP, []),
}
LONGEST = "n" * 255


@contextlib.contextmanager
def acting_as(user):
    """Do what follows with this user's rights."""
    uid, gid, groups = USERS[user]
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])


def touch(path, mode=0o644, content=b"content"):
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


def make_laboratory(top):
    """One of everything, all of it the owner's."""
    os.mkdir(top)
    touch(f"{top}/file")
    touch(f"{top}/twin")
    os.mkdir(f"{top}/empty")
    os.mkdir(f"{top}/full")
    touch(f"{top}/full/inside")
    os.symlink("file", f"{top}/link")
    os.symlink("full", f"{top}/dirlink")
    os.symlink("nowhere", f"{top}/dangling")
    os.symlink("loop", f"{top}/loop")
    os.mkfifo(f"{top}/fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(f"{top}/socket")
    os.mknod(f"{top}/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in everything(top):
        os.chown(path, OWNER, GROUP, follow_symlinks=False)
    age(top)


def everything(top):
    """All paths, a directory after what is in it."""
    for name in sorted(os.listdir(top)):
        path = f"{top}/{name}"
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from everything(path)
        else:
            yield path
    yield top


def age(top):
    for path in everything(top):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)


def look(top):
    """What there is, as text without anything that differs between two places."""
    found = {}
    numbers = {}
    for path in everything(top):
        st = os.lstat(path)
        same = numbers.setdefault(st.st_ino, len(numbers))
        size = st.st_size if stat.S_ISREG(st.st_mode) or stat.S_ISLNK(st.st_mode) else 0
        links = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
        changed = "changed" if st.st_mtime_ns != OLD_NS else ""
        target = os.readlink(path) if stat.S_ISLNK(st.st_mode) else ""
        device = st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0
        found[path.removeprefix(top)] = (
            f"#{same} {st.st_mode:o} {st.st_uid}:{st.st_gid} links {links} size {size}"
            f" device {device} {target} {changed}"
        )
    return found


def outcome(call):
    """Its result, or the errno's name."""
    try:
        result = call()
    except OSError as problem:
        return errno.errorcode.get(problem.errno, str(problem.errno))
    except ValueError as problem:
        return str(problem)
    return "ok" if result is None or isinstance(result, int) else repr(result)


def opening(flags, mode=0o600):
    def call(path):
        os.close(os.open(path, flags | os.O_NONBLOCK, mode))

    return call


def binding(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        # A path may be longer than an address: from within.
        parent, _, name = path.rpartition("/")
        here = os.open(".", os.O_PATH)
        try:
            os.chdir(parent)
            listener.bind(name)
        finally:
            os.fchdir(here)
            os.close(here)


def lengthening(path):
    os.truncate(path, 1 << 62)


def limited(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        os.truncate(path, 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ONE_PATH = {
    "chmod": lambda p: os.chmod(p, 0o4751),
    "chmod sticky": lambda p: os.chmod(p, 0o1777),
    "chown": lambda p: os.chown(p, MEMBER, OTHER_GROUP),
    "chown nobody": lambda p: os.chown(p, -1, -1),
    "lchown": lambda p: os.lchown(p, MEMBER, -1),
    "chgrp own": lambda p: os.chown(p, -1, GROUP),
    "mkdir": lambda p: os.mkdir(p, 0o7755),
    "mkfifo": lambda p: os.mkfifo(p, 0o640),
    "mknod file": lambda p: os.mknod(p, stat.S_IFREG | 0o6711),
    "mknod device": lambda p: os.mknod(p, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
    "bind": binding,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "readlink": os.readlink,
    "symlink": lambda p: os.symlink("to somewhere", p),
    "symlink long": lambda p: os.symlink("t" * 4095, p),
    "symlink too long": lambda p: os.symlink("t" * 4096, p),
    "truncate": lambda p: os.truncate(p, 3),
    "truncate up": lambda p: os.truncate(p, 12345),
    "truncate negative": lambda p: os.truncate(p, -1),
    "truncate too large": lengthening,
    "truncate limited": limited,
    "utime": lambda p: os.utime(p, ns=(5 * 10**9 + 7, 6 * 10**9 + 8)),
    "utime now": lambda p: os.utime(p),
    "utime link": lambda p: os.utime(p, ns=(5, 6), follow_symlinks=False),
    "open": opening(os.O_RDONLY),
    "open write": opening(os.O_WRONLY),
    "open both": opening(os.O_RDWR),
    "open truncate": opening(os.O_WRONLY | os.O_TRUNC),
    "open create": opening(os.O_RDWR | os.O_CREAT, 0o6755),
    "open exclusive": opening(os.O_RDWR | os.O_CREAT | os.O_EXCL),
    "open nofollow": opening(os.O_RDONLY | os.O_NOFOLLOW),
    "open directory": opening(os.O_RDONLY | os.O_DIRECTORY),
    "open create directory": opening(os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600),
    "open path": opening(os.O_PATH),
    "stat": lambda p: os.stat(p) and None,
    "lstat": lambda p: os.lstat(p) and None,
    "access": lambda p: str(os.access(p, os.R_OK | os.W_OK, effective_ids=True)),
    "access x": lambda p: str(os.access(p, os.X_OK, effective_ids=True)),
    "listdir": lambda p: sorted(os.listdir(p)),
    "chdir": lambda p: os.chdir(p),
    "listxattr": lambda p: str([n for n in os.listxattr(p) if n.startswith("user.")]),
}  # fmt: skip
TWO_PATHS = {
    "rename": os.rename,
    "link": os.link,
    "link followed": lambda a, b: os.link(a, b, follow_symlinks=True),
}
OBJECTS = (
    "file", "twin", "empty", "full", "link", "dirlink", "dangling", "loop", "fifo", "socket", "device",
)  # fmt: skip
# Names that are not, and paths that can't be.
PLACES = (
    "missing", "file/below", "missing/below", "full/new", "dirlink/new", "dangling/new", "loop/new",
    "full/.", "full/..", ".", "full/inside/", "file/", "empty/", "missing/", "link/", "dirlink/",
    LONGEST, LONGEST + "n", "d/" * 2050, "",
)  # fmt: skip


class Suite:
    """Cases by name, each run on a laboratory of its own below `top`."""

    def __init__(self, top):
        self.top = top
        self.home = os.getcwd()
        self.results = {}

    def case(self, name, user, prepare, call):
        """Run it: what the call came to and what it left."""
        lab = f"{self.top}/lab"
        prepare(lab)
        with acting_as(user):
            said = outcome(lambda: call(lab))
        os.chdir(self.home)
        left = look(lab)
        assert name not in self.results, name
        self.results[name] = [said, left]
        shutil.rmtree(lab)

    # --- groups of cases ---

    def one_path(self):
        for (op, call), place in itertools.product(ONE_PATH.items(), OBJECTS + PLACES):
            user = "root" if "mknod device" in op else "owner"
            self.case(
                f"{op} {place[:20]}{len(place)}", user, make_laboratory,
                lambda lab, call=call, place=place: call(f"{lab}/{place}"),
            )  # fmt: skip

    def two_paths(self):
        few = ("missing", "full/new", "file/below", "full/.", ".", "empty/", "link/", LONGEST + "n", "")
        for (op, call), old, new in itertools.product(TWO_PATHS.items(), OBJECTS + few, OBJECTS + few):
            self.case(
                f"{op} {old[:20]}{len(old)} {new[:20]}{len(new)}", "owner", make_laboratory,
                lambda lab, call=call, old=old, new=new: call(f"{lab}/{old}", f"{lab}/{new}"),
            )  # fmt: skip
        for name, old, new in (("into itself", "full", "full/below"), ("over parent", "full/inside", "full")):
            self.case(
                f"rename {name}", "owner", make_laboratory,
                lambda lab, old=old, new=new: os.rename(f"{lab}/{old}", f"{lab}/{new}"),
            )  # fmt: skip

    def rights(self):
        """Every class of users against every mode of a directory and of what is in it."""
        calls = {
            "read": lambda p: opening(os.O_RDONLY)(f"{p}/file"),
            "write": lambda p: opening(os.O_WRONLY)(f"{p}/file"),
            "truncate": lambda p: os.truncate(f"{p}/file", 1),
            "chmod": lambda p: os.chmod(f"{p}/file", 0o2777),
            "chown": lambda p: os.chown(f"{p}/file", OTHER, -1),
            "chgrp": lambda p: os.chown(f"{p}/file", -1, OTHER_GROUP),
            "utime": lambda p: os.utime(f"{p}/file", ns=(1, 1)),
            "utime now": lambda p: os.utime(f"{p}/file"),
            "stat": lambda p: os.stat(f"{p}/file") and None,
            "access": lambda p: str([os.access(f"{p}/file", m, effective_ids=True) for m in range(8)]),
            "list": lambda p: sorted(os.listdir(p)),
            "create": lambda p: opening(os.O_RDWR | os.O_CREAT)(f"{p}/new"),
            "mkdir": lambda p: os.mkdir(f"{p}/new"),
            "unlink": lambda p: os.unlink(f"{p}/file"),
            "rename": lambda p: os.rename(f"{p}/file", f"{p}/new"),
            "link": lambda p: os.link(f"{p}/file", f"{p}/new"),
        }
        shift = {"owner": 6, "member": 3, "other": 0, "root": 0}
        for (op, call), user, above, below in itertools.product(
            calls.items(), shift, (0o7, 0o5, 0o3, 0o1), (0o7, 0o4, 0o2, 0o0)
        ):
            if user == "root" and (above != 0o1 or below):
                continue

            def prepare(lab, above=above << shift[user], below=below << shift[user]):
                os.mkdir(lab)
                touch(f"{lab}/file", below)
                os.chmod(lab, above)
                for path in (lab, f"{lab}/file"):
                    os.chown(path, OWNER, GROUP)
                age(lab)

            self.case(f"{op} by {user} {above}{below}", user, prepare, call)

    def special_bits(self):
        """Sticky directories, set-group directories, and who takes set-user bits away."""
        calls = {
            "unlink": lambda p: os.unlink(f"{p}/dir/file"),
            "rmdir": lambda p: os.rmdir(f"{p}/dir/sub"),
            "rename": lambda p: os.rename(f"{p}/dir/file", f"{p}/dir/new"),
            "rename out": lambda p: os.rename(f"{p}/dir/file", f"{p}/new"),
            "replace": lambda p: os.rename(f"{p}/source", f"{p}/dir/file"),
            "create": lambda p: opening(os.O_RDWR | os.O_CREAT, 0o2777)(f"{p}/dir/new"),
            "mkdir": lambda p: os.mkdir(f"{p}/dir/new", 0o777),
            "symlink": lambda p: os.symlink("to", f"{p}/dir/new"),
            "mkfifo": lambda p: os.mkfifo(f"{p}/dir/new", 0o2770),
            "chmod": lambda p: os.chmod(f"{p}/dir/file", 0o6777),
            "chgrp": lambda p: os.chown(f"{p}/dir/file", -1, GROUP),
            "chown": lambda p: os.chown(f"{p}/dir/file", -1, -1),
            "write": lambda p: write(f"{p}/dir/file"),
            "truncate": lambda p: os.truncate(f"{p}/dir/file", 2),
            "open truncate": lambda p: opening(os.O_WRONLY | os.O_TRUNC)(f"{p}/dir/file"),
            "fallocate": lambda p: allocate(f"{p}/dir/file"),
        }
        owners = {"owner": (OWNER, GROUP), "member": (MEMBER, GROUP), "other": (OTHER, OTHER_GROUP)}
        for (op, call), user, bits, of, mask in itertools.product(
            calls.items(), USERS, (0o1777, 0o2777, 0o777), owners, (0o022, 0o077)
        ):
            if mask == 0o077 and op not in ("create", "mkdir", "mkfifo"):
                continue

            def prepare(lab, bits=bits, of=owners[of], mask=mask):
                os.umask(0)
                os.mkdir(lab, 0o777)
                os.mkdir(f"{lab}/dir")
                os.mkdir(f"{lab}/dir/sub")
                touch(f"{lab}/dir/file")
                touch(f"{lab}/source")
                for path in (f"{lab}/dir/sub", f"{lab}/dir/file", f"{lab}/source"):
                    os.chown(path, *of)
                os.chmod(f"{lab}/dir/file", 0o6777)
                os.chown(f"{lab}/dir", OWNER, GROUP)
                os.chmod(f"{lab}/dir", bits)
                age(lab)
                os.umask(mask)

            self.case(f"{op} {bits:o} of {of} by {user} mask {mask:o}", user, prepare, call)
        os.umask(0o022)

    def local(self):
        """What public suites ask besides: localcases.py, rightscases.py."""
        for name, call in CASES.items():
            lab = f"{self.top}/lab"
            os.mkdir(lab)
            os.chdir(lab)
            try:
                self.results[f"local {name}"] = call()
            finally:
                os.chdir(self.home)
            shutil.rmtree(lab)

    def files(self):
        """What an open file can do."""
        calls = {
            "unlinked": unlinked, "renamed over": renamed_over, "append": append, "holes": holes,
            "punch": punch, "negative seek": lambda p: seek(p, -5), "far write": far_write,
            "read of write only": wrong_mode, "running": running, "many names": many_names,
            "listing while it changes": changing_listing, "directory gone": gone_directory,
        }  # fmt: skip
        for op, call in calls.items():
            self.case(
                f"file {op}", "root", make_laboratory, lambda lab, call=call: call(f"{lab}/file", lab)
                if call.__code__.co_argcount == 2 else call(f"{lab}/file"),
            )  # fmt: skip


def write(path):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


def allocate(path):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.posix_fallocate(fd, 0, 5000)
    finally:
        os.close(fd)


def unlinked(path):
    fd = os.open(path, os.O_RDWR)
    try:
        os.unlink(path)
        os.pwrite(fd, b"more", 7)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 10)
        st = os.fstat(fd)
        return [os.pread(fd, 100, 0), st.st_nlink, st.st_size, f"{st.st_mode:o}"]
    finally:
        os.close(fd)


def renamed_over(path, lab):
    fd = os.open(f"{lab}/twin", os.O_RDWR)
    try:
        os.rename(path, f"{lab}/twin")
        return [os.pread(fd, 100, 0), os.fstat(fd).st_nlink]
    finally:
        os.close(fd)


def append(path):
    first, second = (os.open(path, os.O_WRONLY | os.O_APPEND) for _ in range(2))
    try:
        for fd, text in ((first, b"1"), (second, b"2"), (first, b"3")):
            os.write(fd, text)
        with open(path, "rb") as file:
            return [file.read()]
    finally:
        os.close(first)
        os.close(second)


def holes(path):
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    try:
        os.pwrite(fd, b"d" * 65536, 1 << 20)
        found = [os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 1 << 20, os.SEEK_HOLE)]
        return [found, outcome(lambda: os.lseek(fd, 1 << 30, os.SEEK_DATA))]
    finally:
        os.close(fd)


def punch(path):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"d" * 65536, 0)
        found = []
        for mode, at, n in ((3, 4096, 8192), (0, 60000, 20000), (1, 100000, 4096), (0, -1, 5), (3, 0, 0)):
            rc = fallocate(fd, mode, at, n)
            found.append([rc and errno.errorcode[ctypes.get_errno()], os.fstat(fd).st_size])
        return [found, os.pread(fd, 65536, 0).count(0)]
    finally:
        os.close(fd)


def seek(path, where):
    fd = os.open(path, os.O_RDWR)
    try:
        return [outcome(lambda: os.lseek(fd, where, os.SEEK_SET)), outcome(lambda: os.pread(fd, 5, where))]
    finally:
        os.close(fd)


def far_write(path):
    fd = os.open(path, os.O_RDWR)
    try:
        return [outcome(lambda at=at: os.pwrite(fd, b"x", at)) for at in (2**63 - 1, 2**63 - 2)]
    finally:
        os.close(fd)


def wrong_mode(path):
    reader, writer = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
    try:
        return [
            outcome(lambda: os.read(writer, 1)), outcome(lambda: os.write(reader, b"1")),
            outcome(lambda: os.ftruncate(reader, 1)), outcome(lambda: os.fsync(reader)),
            outcome(lambda: fcntl.flock(reader, fcntl.LOCK_EX)),
        ]  # fmt: skip
    finally:
        os.close(reader)
        os.close(writer)


def running(path):
    """ETXTBSY both ways."""
    shutil.copy("/bin/true", path)
    os.chmod(path, 0o755)
    writer = os.open(path, os.O_WRONLY)
    try:
        said = [outcome(lambda: os.posix_spawn(path, [path], {}) and None)]
    finally:
        os.close(writer)
    pid = os.posix_spawn(path, [path], {})
    said.append(os.waitpid(pid, 0)[1])
    os.truncate(path, 0)
    return said


def many_names(path, lab):
    for i in range(100):
        os.link(path, f"{lab}/empty/{i}")
    for i in range(0, 100, 3):
        os.unlink(f"{lab}/empty/{i}")
    return [os.stat(path).st_nlink, len(os.listdir(f"{lab}/empty"))]


def changing_listing(path, lab):
    """What was there all the time is listed once."""
    for i in range(500):
        os.mknod(f"{lab}/full/{i:04}")
    seen = []
    with os.scandir(f"{lab}/full") as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n == 100:
                for i in range(500, 600):
                    os.mknod(f"{lab}/full/{i:04}")
    stayed = [name for name in seen if name == "inside" or int(name) < 500]
    return [len(stayed), len(set(stayed))]


def gone_directory(path, lab):
    fd = os.open(f"{lab}/empty", os.O_RDONLY)
    try:
        os.rmdir(f"{lab}/empty")
        create = lambda: os.close(os.open("new", os.O_RDWR | os.O_CREAT, dir_fd=fd))  # noqa: E731
        return [os.listdir(fd), outcome(create), outcome(lambda: os.stat("..", dir_fd=fd) and None)]
    finally:
        os.close(fd)


GROUPS = ("one_path", "two_paths", "rights", "special_bits", "files", "local")


def main(top, *groups):
    os.umask(0o022)
    # Relative from here on: who may go where this directory lies does not matter.
    os.chdir(top)
    suite = Suite(".")
    for group in groups or GROUPS:
        getattr(suite, group)()
    json.dump(suite.results, sys.stdout)


main(*sys.argv[1:])
