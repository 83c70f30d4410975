"""Operations on names and attributes: the reply, exactly, and what the host then has."""

import errno
import os
import socket
import stat
import time
from errno import (
    EBADF,
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENODATA,
    ENOENT,
    ENOSYS,
    ENOTDIR,
    ENOTEMPTY,
    EOPNOTSUPP,
    EPERM,
    ERANGE,
    ESTALE,
)  # fmt: skip
from pathlib import Path

import pytest
from fuse import wire
from fuse.fixtures import StartGuest, guests_of
from fuse.ops import FORGET_MAX, refused
from fuse.rawguest import Framing, Guest, linux, scrambled, single
from fuse.wire import ROOT, parse_entry
from guests import StartDaemon

from vfsd.fuse.abi import Fattr, Rename

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can create as somebody else")
USER, GROUP = 1234, 5678
TARGET = b"some/where else"


@pytest.fixture
def tree(share: Path) -> Path:
    """One of each kind."""
    (share / "file").write_bytes(b"content")
    (share / "dir").mkdir(mode=0o750)
    (share / "dir" / "below").write_bytes(b"")
    (share / "link").symlink_to(TARGET.decode())
    os.mkfifo(share / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(share / "socket"))
    if os.geteuid() == 0:
        os.mknod(share / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(share / "far", stat.S_IFBLK | 0o600, os.makedev(0x123, 0x45678))
    return share


# LOOKUP, FORGET


def test_lookup_and_getattr_of_every_kind(guest: Guest, tree: Path) -> None:
    for name in os.listdir(tree):
        entry = guest.lookup(ROOT, os.fsencode(name))
        assert entry.nodeid not in (0, ROOT)
        assert entry.entry_ns == entry.attr_ns == 10**9
        entry.attr.check(os.lstat(tree / name))
        guest.getattr(entry.nodeid).check(os.lstat(tree / name))
    guest.getattr(ROOT).check(os.stat(tree))


def test_lookup_is_of_the_inode(guest: Guest, tree: Path) -> None:
    os.link(tree / "file", tree / "dir" / "same")
    same = guest.walk("dir/same")
    assert guest.lookup(ROOT, b"file").nodeid == same
    assert guest.getattr(same).nlink == 2


@pytest.mark.parametrize("name", [b"x", b"X" * 255, b"\xff\xfe", b"...", b" ", b"a\nb", "ä€".encode()])
def test_lookup_of_any_name(guest: Guest, share: Path, name: bytes) -> None:
    with refused(ENOENT):
        guest.lookup(ROOT, name)
    (share / os.fsdecode(name)).touch()
    guest.lookup(ROOT, name).attr.check(os.stat(share / os.fsdecode(name)))


def test_forget_balances_lookups(guest: Guest, tree: Path) -> None:
    hiprio = guest.on(0)
    nodeid = guest.lookup(ROOT, b"file").nodeid
    for _ in range(4):
        assert guest.lookup(ROOT, b"file").nodeid == nodeid
    hiprio.forget(nodeid, 3)
    hiprio.batch_forget((nodeid, 1))
    assert guest.getattr(nodeid).size == 7
    hiprio.forget(nodeid, 1)
    with refused(ESTALE):
        guest.getattr(nodeid)
    assert guest.lookup(ROOT, b"file").nodeid != nodeid


def test_batch_forget(guest: Guest, share: Path) -> None:
    names = [b"f%d" % i for i in range(100)]
    for name in names:
        (share / name.decode()).touch()
    nodeids = [guest.lookup(ROOT, name).nodeid for name in names]
    guest.batch_forget(*((nodeid, 1) for nodeid in nodeids[:99]))
    for nodeid in nodeids[:99]:
        with refused(ESTALE):
            guest.getattr(nodeid)
    guest.getattr(nodeids[99])


def test_every_new_entry_counts_one_lookup(guest: Guest, tree: Path) -> None:
    file = guest.lookup(ROOT, b"file").nodeid
    created, fh = guest.create(ROOT, b"new", os.O_RDWR)
    guest.release(created.nodeid, fh)
    entries = [
        created,
        guest.mkdir(ROOT, b"d"),
        guest.mknod(ROOT, b"n", stat.S_IFREG | 0o644),
        guest.symlink(ROOT, b"s", b"t"),
    ]
    assert guest.link(file, ROOT, b"again").nodeid == file
    guest.forget(file, 1)
    guest.getattr(file)
    for nodeid in (file, *(entry.nodeid for entry in entries)):
        guest.getattr(nodeid)
        guest.forget(nodeid, 1)
        with refused(ESTALE):
            guest.getattr(nodeid)


def test_an_unlinked_inode_lives_as_long_as_it_is_known(guest: Guest, tree: Path) -> None:
    nodeid = guest.lookup(ROOT, b"file").nodeid
    guest.unlink(ROOT, b"file")
    assert guest.getattr(nodeid).nlink == 0
    fh = guest.open(nodeid)
    guest.forget(nodeid)
    assert guest.read(nodeid, fh, 0, 100) == b"content"
    assert guest.getattr(nodeid, fh).size == 7


# Making, removing and moving names


@needs_root
@pytest.mark.parametrize(("uid", "gid"), [(0, 0), (USER, GROUP), (0, GROUP), (USER, 0)])
def test_what_is_made_is_the_callers(guest: Guest, share: Path, uid: int, gid: int) -> None:
    os.chmod(share, 0o777)
    try:
        entry, _ = guest.create(ROOT, b"file", os.O_RDWR, 0o4751, uid=uid, gid=gid)
        entries = [
            (b"file", entry),
            (b"dir", guest.mkdir(ROOT, b"dir", 0o1770, uid=uid, gid=gid)),
            (b"fifo", guest.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o606, uid=uid, gid=gid)),
            (b"link", guest.symlink(ROOT, b"link", TARGET, uid=uid, gid=gid)),
        ]
    finally:
        os.chmod(share, 0o755)
    modes = [stat.S_IFREG | 0o4751, stat.S_IFDIR | 0o1770, stat.S_IFIFO | 0o606, stat.S_IFLNK | 0o777]
    for (name, entry), mode in zip(entries, modes, strict=True):
        st = os.lstat(share / name.decode())
        assert (st.st_uid, st.st_gid, oct(st.st_mode)) == (uid, gid, oct(mode))
        entry.attr.check(st)
    # The queue's thread is itself again.
    guest.mkdir(ROOT, b"roots")
    assert (os.stat(share / "roots").st_uid, os.stat(share / "roots").st_gid) == (0, 0)


@needs_root
def test_the_caller_may_not_what_the_host_forbids(guest: Guest, share: Path) -> None:
    (share / "closed").mkdir(mode=0o755)
    closed = guest.lookup(ROOT, b"closed").nodeid
    for _ in range(2):
        with refused(errno.EACCES):
            guest.mkdir(closed, b"x", uid=USER, gid=GROUP)
    entry, _ = guest.create(closed, b"x")
    assert entry.attr.uid == entry.attr.gid == 0


def test_mknod(guest: Guest, share: Path) -> None:
    guest.mknod(ROOT, b"file", stat.S_IFREG | 0o600).attr.check(os.stat(share / "file"))
    guest.mknod(ROOT, b"plain", 0o600).attr.check(os.stat(share / "plain"))
    assert stat.S_ISREG(os.stat(share / "plain").st_mode)
    guest.mknod(ROOT, b"sock", stat.S_IFSOCK | 0o600).attr.check(os.stat(share / "sock"))
    with refused(EEXIST):
        guest.mknod(ROOT, b"file", stat.S_IFREG | 0o600)
    with refused(EPERM, EINVAL):
        guest.mknod(ROOT, b"dir", stat.S_IFDIR | 0o700)


@needs_root
@pytest.mark.parametrize("device", [os.makedev(1, 3), os.makedev(0xABC, 0xDEF12), os.makedev(8, 256)])
def test_mknod_of_a_device(guest: Guest, share: Path, device: int) -> None:
    entry = guest.mknod(ROOT, b"dev", stat.S_IFCHR | 0o600, device)
    assert os.stat(share / "dev").st_rdev == device
    assert entry.attr.rdev == wire.encode_dev(device)


def test_mkdir_and_rmdir(guest: Guest, share: Path) -> None:
    entry = guest.mkdir(ROOT, b"d", 0o711)
    entry.attr.check(os.stat(share / "d"))
    with refused(EEXIST):
        guest.mkdir(ROOT, b"d")
    guest.mkdir(entry.nodeid, b"e")
    with refused(ENOTEMPTY):
        guest.rmdir(ROOT, b"d")
    with refused(EISDIR):
        guest.unlink(ROOT, b"d")
    guest.rmdir(entry.nodeid, b"e")
    guest.rmdir(ROOT, b"d")
    assert os.listdir(share) == []
    with refused(ENOENT):
        guest.rmdir(ROOT, b"d")
    for again in (ESTALE, ENOENT):  # Linux looks the name up again, once
        with refused(again):
            guest.mkdir(entry.nodeid, b"in what is gone")


def test_unlink(guest: Guest, tree: Path) -> None:
    for name in ("file", "link", "fifo", "socket"):
        guest.unlink(ROOT, name.encode())
        assert not os.path.lexists(tree / name)
    with refused(ENOENT):
        guest.unlink(ROOT, b"file")
    with refused(ENOTDIR):
        guest.rmdir(guest.walk("dir"), b"below")


@pytest.mark.parametrize("target", [b"x", TARGET, b"/etc/passwd", b"..", b"/" + b"x" * 4094])
def test_symlink_and_readlink(guest: Guest, share: Path, target: bytes) -> None:
    entry = guest.symlink(ROOT, b"link", target)
    entry.attr.check(os.lstat(share / "link"))
    assert os.readlink(os.fsencode(share / "link")) == target
    assert guest.readlink(entry.nodeid) == target
    with refused(EEXIST):
        guest.symlink(ROOT, b"link", target)


def test_readlink_of_what_is_no_link(guest: Guest, tree: Path) -> None:
    for name in ("file", "dir", "fifo"):
        with refused(EINVAL, ENOENT):
            guest.readlink(guest.walk(name))


def test_link(guest: Guest, tree: Path) -> None:
    subdir = guest.walk("dir")
    for name in ("file", "link", "fifo"):
        nodeid = guest.walk(name)
        entry = guest.link(nodeid, subdir, name.encode())
        assert entry.nodeid == nodeid
        assert os.path.samestat(os.lstat(tree / name), os.lstat(tree / "dir" / name))
        entry.attr.check(os.lstat(tree / name))
        with refused(EEXIST):
            guest.link(nodeid, subdir, name.encode())
    with refused(EPERM):
        guest.link(subdir, ROOT, b"second")


def test_rename(guest: Guest, tree: Path) -> None:
    subdir, file = guest.walk("dir"), guest.walk("file")
    guest.rename(ROOT, b"file", subdir, b"moved")
    assert (tree / "dir" / "moved").read_bytes() == b"content"
    assert guest.lookup(subdir, b"moved").nodeid == file
    guest.rename(subdir, b"moved", subdir, b"below")  # over one that exists
    assert os.listdir(tree / "dir") == ["below"]
    with refused(ENOENT):
        guest.rename(ROOT, b"file", subdir, b"moved")
    with refused(EINVAL):
        guest.rename(ROOT, b"dir", subdir, b"into itself")
    with refused(ENOTEMPTY, EEXIST):
        guest.mkdir(ROOT, b"empty")
        guest.rename(ROOT, b"empty", ROOT, b"dir")


def test_rename2(guest: Guest, tree: Path) -> None:
    below = guest.walk("dir/below")
    subdir, file = guest.walk("dir"), guest.walk("file")
    with refused(EEXIST):
        guest.rename2(ROOT, b"file", subdir, b"below", Rename.NOREPLACE)
    guest.rename2(ROOT, b"file", subdir, b"below", Rename.EXCHANGE)
    assert guest.lookup(ROOT, b"file").nodeid == below
    assert guest.lookup(subdir, b"below").nodeid == file
    assert (tree / "dir" / "below").read_bytes() == b"content"
    guest.rename2(ROOT, b"file", subdir, b"other", Rename.NOREPLACE)
    assert sorted(os.listdir(tree / "dir")) == ["below", "other"]
    with refused(ENOENT):
        guest.rename2(ROOT, b"file", subdir, b"below", Rename.EXCHANGE)
    for flags in (8, 1 << 31, 2**32 - 1, Rename.NOREPLACE | Rename.EXCHANGE):
        with refused(EINVAL):
            guest.rename2(subdir, b"below", ROOT, b"new", flags)
    guest.rename2(subdir, b"below", ROOT, b"plain", 0)
    assert (tree / "plain").exists()


# Attributes


def test_setattr_mode(guest: Guest, tree: Path) -> None:
    for name, mode in (("file", 0o4711), ("dir", 0o2755), ("fifo", 0o600), ("file", 0)):
        attr = guest.setattr(guest.walk(name), Fattr.MODE, mode=stat.S_IFREG | mode)
        assert stat.S_IMODE(os.lstat(tree / name).st_mode) == mode
        attr.check(os.lstat(tree / name))
    target = tree / TARGET.decode()
    target.parent.mkdir(parents=True)
    target.write_bytes(b"")
    target.chmod(0o600)
    with refused(EOPNOTSUPP):
        guest.setattr(guest.walk("link"), Fattr.MODE, mode=0o777)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@needs_root
def test_setattr_owner(guest: Guest, tree: Path) -> None:
    for name in ("file", "dir", "link", "fifo"):
        nodeid = guest.walk(name)
        guest.setattr(nodeid, Fattr.UID, uid=USER, gid=7)
        guest.setattr(nodeid, Fattr.GID, gid=GROUP, uid=7).check(os.lstat(tree / name))
        st = os.lstat(tree / name)
        assert (st.st_uid, st.st_gid) == (USER, GROUP)
        guest.setattr(nodeid, Fattr.UID | Fattr.GID, uid=2**32 - 2, gid=2**31)
        st = os.lstat(tree / name)
        assert (st.st_uid, st.st_gid) == (2**32 - 2, 2**31)


@needs_root
def test_setattr_owner_and_mode_at_once(guest: Guest, tree: Path) -> None:
    """chown(2) takes the set-id bits away; a mode that comes with it is what is to be."""
    attr = guest.setattr(guest.walk("file"), Fattr.UID | Fattr.MODE, uid=USER, mode=0o4755)
    assert (attr.uid, oct(stat.S_IMODE(attr.mode))) == (USER, oct(0o4755))


def test_setattr_size(guest: Guest, tree: Path) -> None:
    nodeid = guest.walk("file")
    assert guest.truncate(nodeid, 3).size == 3
    assert (tree / "file").read_bytes() == b"con"
    guest.truncate(nodeid, 8192).check(os.stat(tree / "file"))
    assert (tree / "file").read_bytes() == b"con" + bytes(8189)
    fh = guest.open(nodeid, os.O_WRONLY)
    assert guest.truncate(nodeid, 1, fh).size == 1
    reader = guest.open(nodeid)
    with refused(EINVAL, EBADF):
        guest.truncate(nodeid, 0, reader)
    assert (tree / "file").read_bytes() == b"c"
    with refused(EISDIR):
        guest.truncate(guest.walk("dir"), 0)
    for name in ("link", "fifo", "socket"):
        with refused(EINVAL, EBADF, ELOOP):
            guest.truncate(guest.walk(name), 0)


def test_setattr_size_of_a_file_open_for_writing_only_to_this_guest(guest: Guest, share: Path) -> None:
    """The handle was opened while the mode allowed it; now nobody may write the file by name."""
    entry, fh = guest.create(ROOT, b"f", os.O_RDWR, 0o600)
    guest.setattr(entry.nodeid, Fattr.MODE, mode=0o400)
    assert guest.truncate(entry.nodeid, 10, fh).size == 10


MOMENT = 1_234_567_890


def test_setattr_times(guest: Guest, tree: Path) -> None:
    for name in ("file", "dir", "link", "fifo"):
        nodeid = guest.walk(name)
        attr = guest.setattr(
            nodeid, Fattr.ATIME | Fattr.MTIME, atime=MOMENT, atime_ns=123_456_789, mtime=-1,
            mtime_ns=999_999_999,
        )  # fmt: skip
        assert attr.atime_ns == MOMENT * 10**9 + 123_456_789
        assert attr.mtime_ns == -1
        attr.check(os.lstat(tree / name))
        # One alone leaves the other.
        attr = guest.setattr(nodeid, Fattr.ATIME, atime=5, atime_ns=6, mtime=7, mtime_ns=8)
        assert (attr.atime_ns, attr.mtime_ns) == (5 * 10**9 + 6, -1)
        attr = guest.setattr(nodeid, Fattr.MTIME, atime=5, atime_ns=7, mtime=7, mtime_ns=8)
        assert (attr.atime_ns, attr.mtime_ns) == (5 * 10**9 + 6, 7 * 10**9 + 8)
        assert not os.path.exists(tree / TARGET.decode())


def test_setattr_now(guest: Guest, tree: Path) -> None:
    nodeid = guest.walk("file")
    os.utime(tree / "file", (1, 2))
    before = time.time_ns() - 10**9  # the kernel's clock for files is coarse
    attr = guest.setattr(nodeid, Fattr.MTIME | Fattr.MTIME_NOW, atime=77, mtime=77)
    assert attr.atime_ns == 10**9
    assert before <= attr.mtime_ns <= time.time_ns()
    attr = guest.setattr(nodeid, Fattr.ATIME | Fattr.ATIME_NOW | Fattr.MTIME, atime=77, mtime=77)
    assert attr.mtime_ns == 77 * 10**9
    assert before <= attr.atime_ns <= time.time_ns()
    for ns in (10**9, 2**31, 2**32 - 1):
        with refused(EINVAL):
            guest.setattr(nodeid, Fattr.MTIME, mtime_ns=ns)


def test_setattr_of_nothing(guest: Guest, tree: Path) -> None:
    guest.setattr(guest.walk("file"), 0, mode=0, size=0).check(os.stat(tree / "file"))
    assert (tree / "file").read_bytes() == b"content"


def test_statfs(guest: Guest, tree: Path) -> None:
    for nodeid in (ROOT, guest.walk("file"), guest.walk("link")):
        found = guest.statfs(nodeid)
        st = os.statvfs(tree)
        assert (found[0], found[5:8]) == (st.f_blocks, (st.f_bsize, st.f_namemax, st.f_frsize))
        assert found[3] == st.f_files
        # Other programs write meanwhile.
        assert abs(found[1] - st.f_bfree) < st.f_blocks // 10
        assert 0 < found[2] <= found[1] and 0 < found[4] <= found[3]


# Extended attributes


def test_xattrs(guest: Guest, tree: Path) -> None:
    for name in ("file", "dir"):
        nodeid = guest.walk(name)
        assert guest.listxattr(nodeid) == b""
        guest.setxattr(nodeid, b"user.one", b"value\0with NUL")
        guest.setxattr(nodeid, b"user.empty", b"")
        assert os.getxattr(tree / name, "user.one") == b"value\0with NUL"
        assert guest.getxattr(nodeid, b"user.one") == b"value\0with NUL"
        assert guest.getxattr(nodeid, b"user.one", 0) == (14).to_bytes(8, "little")
        assert guest.getxattr(nodeid, b"user.one", 14) == b"value\0with NUL"
        assert guest.getxattr(nodeid, b"user.empty") == b""
        with refused(ERANGE):
            guest.getxattr(nodeid, b"user.one", 13)
        names = guest.listxattr(nodeid)
        assert sorted(names.split(b"\0")) == [b"", b"user.empty", b"user.one"]
        assert guest.listxattr(nodeid, 0) == len(names).to_bytes(8, "little")
        with refused(ERANGE):
            guest.listxattr(nodeid, len(names) - 1)
        with refused(EEXIST):
            guest.setxattr(nodeid, b"user.one", b"", os.XATTR_CREATE)
        with refused(ENODATA):
            guest.setxattr(nodeid, b"user.two", b"", os.XATTR_REPLACE)
        guest.setxattr(nodeid, b"user.one", b"new", os.XATTR_REPLACE)
        assert os.getxattr(tree / name, "user.one") == b"new"
        guest.removexattr(nodeid, b"user.one")
        with refused(ENODATA):
            guest.removexattr(nodeid, b"user.one")
        with refused(ENODATA):
            guest.getxattr(nodeid, b"user.one")
        assert os.listxattr(tree / name) == ["user.empty"]


def test_xattrs_of_a_link_are_not_its_targets(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    os.setxattr(share / "file", "user.of", b"file")
    nodeid = guest.symlink(ROOT, b"link", b"file").nodeid
    with refused(EPERM, EOPNOTSUPP):
        guest.setxattr(nodeid, b"user.x", b"y")
    with refused(EPERM, ENODATA, EOPNOTSUPP):
        guest.getxattr(nodeid, b"user.of")
    assert b"user.of" not in guest.listxattr(nodeid)
    assert os.listxattr(share / "file") == ["user.of"]


def test_posix_acls_are_not_stored(guest: Guest, tree: Path) -> None:
    nodeid = guest.walk("file")
    for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
        with refused(EOPNOTSUPP):
            guest.setxattr(nodeid, name, b"\2\0\0\0")
        with refused(EOPNOTSUPP, ENODATA):
            guest.getxattr(nodeid, name)


def test_xattrs_are_off_by_default(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.setxattr(tmp_path / "f", "user.a", b"b")
    with guests_of(daemon(tmp_path)) as start:
        guest = start()
        guest.init()
        nodeid = guest.lookup(ROOT, b"f").nodeid
        with refused(ENOSYS):
            guest.setxattr(nodeid, b"user.x", b"y")
        with refused(ENOSYS):
            guest.getxattr(nodeid, b"user.a")
        with refused(ENOSYS):
            guest.listxattr(nodeid)
        with refused(ENOSYS):
            guest.removexattr(nodeid, b"user.a")
    assert os.listxattr(tmp_path / "f") == ["user.a"]


# Framing


@pytest.mark.parametrize("framing", [linux, single, *(scrambled(seed) for seed in range(12))])
def test_elements_have_no_meaning(start_guest: StartGuest, share: Path, framing: Framing) -> None:
    guest = start_guest(num=256, framing=framing)
    guest.init()
    entry, fh = guest.create(ROOT, b"n" * 200, os.O_RDWR, 0o600)
    data = os.urandom(70_001)
    assert guest.write(entry.nodeid, fh, 3, data) == len(data)
    assert guest.read(entry.nodeid, fh, 0, 80_000) == bytes(3) + data
    guest.getattr(entry.nodeid, fh).check(os.stat(share / ("n" * 200)))
    guest.symlink(ROOT, b"l" * 150, b"t" * 3000)
    assert guest.readlink(guest.lookup(ROOT, b"l" * 150).nodeid) == b"t" * 3000
    guest.setxattr(entry.nodeid, b"user.x", b"v" * 100)
    assert guest.getxattr(entry.nodeid, b"user.x") == b"v" * 100
    assert {d.name for d in guest.listing(ROOT, size=1000, plus=True)} == {b"n" * 200, b"l" * 150}
    with refused(ENOENT):
        guest.lookup(ROOT, b"missing")
    guest.rename(ROOT, b"n" * 200, ROOT, b"m" * 200)
    guest.statfs()
    guest.on(0).batch_forget((entry.nodeid, 3), (ROOT, 5))
    with refused(ESTALE):
        guest.getattr(entry.nodeid)


# Opcodes


def test_unknown_opcodes(guest: Guest) -> None:
    for opcode in [n for n in range(80) if n not in wire.SERVED.values()] + [4096, 2**31, 2**32 - 1]:
        reply = guest.queue.ask(opcode, ROOT, bytes(64), out=128)
        assert (reply.error, reply.used_len) == (ENOSYS, wire.OUT_SIZE), opcode


def test_forget_of_more_than_there_is(guest: Guest, tree: Path) -> None:
    nodeid = guest.walk("file")
    guest.forget(nodeid, FORGET_MAX)
    with refused(ESTALE):
        guest.getattr(nodeid)
    again = parse_entry(guest.body("LOOKUP", ROOT, b"file\0"))
    guest.forget(again.nodeid, 1)
    with refused(ESTALE):
        guest.getattr(again.nodeid)
