"""The Python face, call by call, against each daemon: what `os` would say of the same tree."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.fuse.abi import Rename
from vfsd.guest import Filesystem

from .conftest import requests

MIB = 1 << 20


def fails(number: int, call: Callable[..., object], *arguments: object) -> OSError:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, caught.value
    return caught.value


def test_stat_says_what_the_host_says(fs: Filesystem, shared: Path) -> None:
    (shared / "file").write_bytes(b"x" * 5000)
    os.chmod(shared / "file", 0o4750)
    os.utime(shared / "file", ns=(1_600_000_000_123_456_789, -1_000_000_001))
    there, here = fs.stat("/file"), os.stat(shared / "file")
    for name in ("mode", "ino", "nlink", "uid", "gid", "size", "blocks", "blksize", "rdev",
                 "atime_ns", "mtime_ns", "ctime_ns"):  # fmt: skip
        assert getattr(there, f"st_{name}") == getattr(here, f"st_{name}"), name
    assert there.st_mtime == here.st_mtime


def test_errors_carry_errno_and_the_paths_given(fs: Filesystem) -> None:
    assert fails(errno.ENOENT, fs.stat, "no/such").filename == "no/such"
    assert fails(errno.ENOENT, fs.open, b"no").filename == b"no"
    both = fails(errno.ENOENT, fs.rename, "a", "b")
    assert (both.filename, both.filename2) == ("a", "b")
    with pytest.raises(FileNotFoundError):
        fs.unlink("/no")
    with pytest.raises(ValueError, match="null byte"):
        fs.stat("a\0b")


def test_names_are_bytes_for_who_asks_in_bytes(fs: Filesystem, shared: Path) -> None:
    name = b"caf\xe9"
    (Path(os.fsdecode(os.fsencode(shared) + b"/" + name))).touch()
    assert fs.listdir(b"/") == [name]
    assert fs.listdir("/") == [os.fsdecode(name)]
    assert fs.stat(os.fsdecode(name)).st_size == 0


def test_a_file_is_written_and_read_back(fs: Filesystem, shared: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    fs.write_bytes("/file", data)
    assert (shared / "file").read_bytes() == data
    assert fs.read_bytes("/file") == data
    fs.drop_caches()
    assert fs.read_bytes("/file") == data
    with fs.open("/file", "r+") as file:
        assert file.pwrite(b"new", 4094) == 3
        assert file.pread(5, 4093) == data[4093:4094] + b"new" + data[4097:4098]
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        assert file.read(1) == b""
        assert file.truncate(5) == 5
        assert fs.fstat(file).st_size == 5
    assert (shared / "file").read_bytes() == data[:5]


def test_a_raw_file_serves_python_s_buffers(fs: Filesystem) -> None:
    with io.TextIOWrapper(io.BufferedWriter(fs.open("/text", "w"))) as text:
        text.writelines(f"{number}\n" for number in range(20_000))
    with io.TextIOWrapper(io.BufferedReader(fs.open("/text"))) as text:
        assert [int(line) for line in text] == list(range(20_000))
    with fs.open("/text") as raw:
        assert raw.readable() and raw.seekable() and not raw.writable()
        with pytest.raises(io.UnsupportedOperation):
            raw.fileno()
    with pytest.raises(ValueError, match="closed file"):
        raw.read(1)


def test_append_goes_to_the_end(fs: Filesystem, shared: Path) -> None:
    (shared / "log").write_bytes(b"one\n")
    with fs.open("/log", "a") as file:
        file.write(b"two\n")
        file.write(b"three\n")
        assert file.tell() == 14
    assert (shared / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_a_write_past_the_end_leaves_zeros(fs: Filesystem, shared: Path) -> None:
    with fs.open("/sparse", "w+") as file:
        file.pwrite(b"end", 100_000)
        assert file.pread(8, 99_996) == b"\0\0\0\0end"
        assert file.pread(4096, 4096) == bytes(4096)
    assert (shared / "sparse").stat().st_size == 100_003


def test_numbers_that_fit_nowhere_are_refused(fs: Filesystem) -> None:
    with fs.open("/file", "w+") as file:
        fails(errno.EINVAL, file.pread, 1, -1)
        fails(errno.EINVAL, file.pread, 10, 2**63 - 5)
        fails(errno.EINVAL, file.pwrite, b"x", 2**63 - 1 + 1)
        fails(errno.EFBIG, file.pwrite, b"x", 2**62)
    for call in (lambda: fs.chown("/file", 2**32, 0), lambda: fs.truncate("/file", 2**64)):
        with pytest.raises(OverflowError):
            call()


def test_open_flags_mean_what_they_mean(fs: Filesystem, shared: Path) -> None:
    (shared / "file").write_bytes(b"old")
    (shared / "dir").mkdir()
    os.symlink("file", shared / "link")
    os.symlink("made", shared / "dangling")
    fails(errno.EEXIST, fs.open, "/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails(errno.ELOOP, fs.open, "/link", os.O_RDONLY | os.O_NOFOLLOW)
    fails(errno.EISDIR, fs.open, "/dir", os.O_RDWR)
    fails(errno.ENOTDIR, fs.open, "/file", os.O_RDONLY | os.O_DIRECTORY)
    fails(errno.EEXIST, fs.open, "/dangling", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fs.open("/dangling", "w").close()
    assert (shared / "made").exists()
    with fs.open("/link", os.O_RDWR | os.O_TRUNC) as file:
        assert file.read() == b""
    assert (shared / "file").read_bytes() == b""
    fs.umask = 0o027
    fs.open("/masked", os.O_CREAT | os.O_RDWR, 0o666).close()
    assert (shared / "masked").stat().st_mode & 0o777 == 0o640
    with fs.open("/masked") as file, pytest.raises(OSError):
        file.write(b"x")


def test_names_are_made_moved_and_removed(fs: Filesystem, shared: Path) -> None:
    fs.makedirs("/a/b/c")
    fails(errno.EEXIST, fs.makedirs, "/a/b/c")
    fs.makedirs("/a/b/c", exist_ok=True)
    fails(errno.ENOTEMPTY, fs.rmdir, "/a/b")
    fs.write_bytes("/a/file", b"1")
    fs.link("/a/file", "/a/second")
    assert fs.stat("/a/file").st_nlink == 2
    assert fs.stat("/a/file").st_ino == fs.stat("/a/second").st_ino
    fails(errno.EEXIST, fs.link, "/a/file", "/a/second")
    fails(errno.EPERM, fs.link, "/a/b", "/a/d")
    fs.symlink("../a/file", "/a/link")
    assert fs.readlink("/a/link") == "../a/file"
    assert fs.read_bytes("/a/link") == b"1"
    assert stat.S_ISLNK(fs.lstat("/a/link").st_mode)
    fails(errno.EINVAL, fs.readlink, "/a/file")
    fs.rename("/a/file", "/a/b/moved")
    fails(errno.ENOENT, fs.stat, "/a/file")
    fails(errno.EISDIR, fs.unlink, "/a/b")
    fails(errno.ENOTDIR, fs.rmdir, "/a/b/moved")
    fs.unlink("/a/b/moved")
    assert fs.stat("/a/second").st_nlink == 1
    fs.rmdir("/a/b/c")
    assert sorted(os.listdir(shared / "a")) == ["b", "link", "second"]


def test_rename_follows_the_rules(fs: Filesystem, shared: Path) -> None:
    fs.makedirs("/dir/below")
    fs.write_bytes("/one", b"1")
    fs.write_bytes("/two", b"2")
    fails(errno.EINVAL, fs.rename, "/dir", "/dir/below/dir")
    fails(errno.ENOTEMPTY, fs.rename, "/dir/below", "/dir")
    fails(errno.ENOTDIR, fs.rename, "/dir", "/one")
    fails(errno.EISDIR, fs.rename, "/one", "/dir")
    fails(errno.EEXIST, fs.rename, "/one", "/two", Rename.NOREPLACE)
    fs.rename("/one", "/two", Rename.EXCHANGE)
    assert (fs.read_bytes("/one"), fs.read_bytes("/two")) == (b"2", b"1")
    fs.rename("/one", "/two")
    assert fs.listdir("/two".replace("two", "")) and fs.read_bytes("/two") == b"2"
    fs.rename("/dir", "/other")
    assert fs.listdir("/other") == ["below"]
    assert sorted(os.listdir(shared)) == ["other", "two"]


def test_an_open_file_survives_its_name(fs: Filesystem) -> None:
    with fs.open("/file", "w+") as file:
        file.write(b"still here")
        fs.unlink("/file")
        fails(errno.ENOENT, fs.stat, "/file")
        assert file.pread(100, 0) == b"still here"
        assert fs.fstat(file).st_nlink == 0


def test_listings_are_complete(fs: Filesystem, shared: Path) -> None:
    for number in range(3000):
        (shared / f"file-{number:05}-{'x' * (number % 100)}").touch()
    (shared / "dir").mkdir()
    os.symlink("dir", shared / "link")
    assert sorted(fs.listdir("/")) == sorted(os.listdir(shared))
    kinds = {entry.name: (entry.is_dir(), entry.is_file(), entry.is_symlink()) for entry in fs.scandir("/")}
    assert kinds["dir"] == (True, False, False)
    assert kinds["link"] == (True, False, True)
    assert kinds["file-00000-"] == (False, True, False)
    with fs.scandir("/") as entries:
        entry = next(entries)
        assert entry.inode() == fs.lstat(entry.path).st_ino
    fails(errno.ENOTDIR, fs.listdir, "/file-00000-")


def test_walk_visits_what_os_walk_visits(fs: Filesystem, shared: Path) -> None:
    for path in ("a/b/c", "a/d", "e"):
        (shared / path).mkdir(parents=True)
        (shared / path / "file").touch()
    os.symlink("a", shared / "loop")
    for topdown in (True, False):
        found = {top: (sorted(dirs), sorted(files)) for top, dirs, files in fs.walk("/", topdown)}
        expected = {
            "/" + os.path.relpath(top, shared).removeprefix("."): (sorted(dirs), sorted(files))
            for top, dirs, files in os.walk(shared, topdown)
        }
        assert found == expected


def test_paths_go_through_symlinks_and_dots(fs: Filesystem, shared: Path) -> None:
    (shared / "a" / "b").mkdir(parents=True)
    (shared / "a" / "file").write_bytes(b"found")
    os.symlink("/a", shared / "absolute")
    os.symlink("../a/b", shared / "a" / "relative")
    os.symlink("self", shared / "self")
    for path in ("/a/file", "a//./file", "/absolute/file", "/a/relative/../file", "/../../a/b/../file"):
        assert fs.read_bytes(path) == b"found", path
    fails(errno.ELOOP, fs.stat, "/self")
    fails(errno.ENOTDIR, fs.stat, "/a/file/x")
    fails(errno.ENOTDIR, fs.stat, "/a/file/")
    fails(errno.ENOENT, fs.stat, "")
    assert stat.S_ISDIR(fs.lstat("/absolute/").st_mode)


def test_forty_symlinks_are_followed_and_no_more(fs: Filesystem, shared: Path) -> None:
    (shared / "0").write_bytes(b"end")
    for number in range(41):
        os.symlink(str(number), shared / str(number + 1))
    assert fs.read_bytes("/40") == b"end"
    fails(errno.ELOOP, fs.read_bytes, "/41")


def test_attributes_are_changed(fs: Filesystem, shared: Path) -> None:
    fs.write_bytes("/file", b"0123456789")
    fs.chmod("/file", 0o640)
    fs.chown("/file", 1234, 5678)
    fs.utime("/file", ns=(10**18, 10**18 + 1))
    fs.truncate("/file", 4)
    here = os.stat(shared / "file")
    assert (here.st_mode & 0o7777, here.st_uid, here.st_gid, here.st_size) == (0o640, 1234, 5678, 4)
    assert here.st_atime_ns == 10**18
    fs.utime("/file", (1.5, 2.5))
    assert (shared / "file").stat().st_mtime_ns == 2_500_000_000
    fs.utime("/file")
    assert fs.stat("/file").st_mtime > 1.7e9
    os.symlink("file", shared / "link")
    fs.lchown("/link", 7, 8)
    assert os.lstat(shared / "link").st_uid == 7
    fails(errno.EISDIR, fs.truncate, "/", 0)


def test_chown_takes_the_setid_bits(fs: Filesystem, shared: Path) -> None:
    fs.write_bytes("/file", b"")
    fs.chmod("/file", 0o6755)
    fs.chown("/file", 1, 1)
    assert (shared / "file").stat().st_mode & 0o7777 == 0o755


def test_access_is_decided_in_the_guest(fs: Filesystem) -> None:
    fs.write_bytes("/file", b"")
    fs.chmod("/file", 0o600)
    since = requests(fs)
    assert fs.access("/file", os.R_OK | os.W_OK)
    assert not fs.access("/file", os.X_OK)
    assert not fs.access("/none", os.F_OK)
    with fs.as_user(1000, 1000):
        assert fs.access("/file", os.F_OK) and not fs.access("/file", os.R_OK)
        fails(errno.EACCES, fs.open, "/file")
        fails(errno.EACCES, fs.open, "/new", "w")
    assert since("ACCESS") == 0


def test_what_a_user_creates_is_his(fs: Filesystem, shared: Path) -> None:
    fs.chmod("/", 0o777)
    with fs.as_user(1000, 2000):
        fs.write_bytes("/his", b"")
        fs.mkdir("/dir")
    for name in ("his", "dir"):
        assert ((shared / name).stat().st_uid, (shared / name).stat().st_gid) == (1000, 2000)


def test_statvfs_says_what_the_host_says(fs: Filesystem, shared: Path) -> None:
    there, here = fs.statvfs("/"), os.statvfs(shared)
    assert (there.f_bsize, there.f_frsize, there.f_blocks, there.f_files, there.f_namemax) == (
        here.f_bsize, here.f_frsize, here.f_blocks, here.f_files, here.f_namemax
    )  # fmt: skip


def test_extended_attributes_are_kept(fs: Filesystem, shared: Path) -> None:
    fs.write_bytes("/file", b"")
    fs.setxattr("/file", "user.small", b"value")
    fs.setxattr("/file", "user.large", b"v" * 1000)
    fs.setxattr("/file", "user.empty", b"")
    assert fs.getxattr("/file", "user.small") == os.getxattr(shared / "file", "user.small") == b"value"
    assert fs.getxattr("/file", b"user.large") == b"v" * 1000
    assert fs.getxattr("/file", "user.empty") == b""
    assert set(fs.listxattr("/file")) >= {"user.small", "user.large", "user.empty"}
    fails(errno.EEXIST, fs.setxattr, "/file", "user.small", b"", os.XATTR_CREATE)
    fs.removexattr("/file", "user.small")
    fails(errno.ENODATA, fs.getxattr, "/file", "user.small")
    fails(errno.ENODATA, fs.removexattr, "/file", "user.small")


def test_special_files_are_made_but_not_opened(fs: Filesystem, shared: Path) -> None:
    fs.mknod("/fifo", stat.S_IFIFO | 0o600)
    fs.mknod("/device", stat.S_IFCHR | 0o600, os.makedev(300, 70_000))
    fs.mknod("/plain", 0o644)
    assert stat.S_ISFIFO((shared / "fifo").lstat().st_mode)
    assert fs.lstat("/device").st_rdev == os.makedev(300, 70_000) == (shared / "device").lstat().st_rdev
    assert stat.S_ISREG(fs.lstat("/plain").st_mode)
    fails(errno.ENXIO, fs.open, "/fifo")
    fails(errno.EINVAL, fs.mknod, "/dir", stat.S_IFDIR)


def test_flock_is_kept_in_the_guest(fs: Filesystem) -> None:
    fs.write_bytes("/file", b"")
    since = requests(fs)
    with fs.open("/file") as one, fs.open("/file") as other:
        fs.flock(one, fcntl.LOCK_SH)
        fs.flock(other, fcntl.LOCK_SH)
        fails(errno.EWOULDBLOCK, fs.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fs.flock(one, fcntl.LOCK_UN)
        fs.flock(other, fcntl.LOCK_EX)
        fails(errno.EWOULDBLOCK, fs.flock, one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        waiter = threading.Thread(target=fs.flock, args=(one, fcntl.LOCK_EX))
        waiter.start()
        other.close()
        waiter.join(10)
        assert not waiter.is_alive()
    assert since("SETLK", "SETLKW") == 0


def test_lockf_ranges_belong_to_a_process(fs: Filesystem) -> None:
    fs.write_bytes("/file", b"x" * 100)
    with fs.open("/file", "r+") as one, fs.open("/file", "r+") as other:
        fs.lockf(one, fcntl.LOCK_EX, 10, 0)
        fs.lockf(other, fcntl.LOCK_EX, 10, 0)  # the same process
        with pytest.raises(BlockingIOError):
            fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 9, owner=-1)
        fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 10, owner=-1)
        fs.lockf(one, fcntl.LOCK_UN, 5, 5)
        fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 9, owner=-1)
        other.close()  # all locks of this process on the file go, see fcntl(2)
        with fs.open("/file", "r+") as third:
            fs.lockf(third, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0, owner=-1)


def test_fallocate_makes_room_and_holes(fs: Filesystem, shared: Path) -> None:
    with fs.open("/file", "w+") as file:
        fs.posix_fallocate(file, 0, 65536)
        assert fs.fstat(file).st_size == 65536
        file.pwrite(b"x" * 65536, 0)
        fs.fallocate(file, 3, 8192, 8192)  # PUNCH_HOLE | KEEP_SIZE
        assert file.pread(10, 8190) == b"xx" + bytes(8)
        fails(errno.EINVAL, fs.fallocate, file, 0, 0, 0)
    assert (shared / "file").read_bytes()[8192:16384] == bytes(8192)


def test_lseek_finds_data_and_holes(fs: Filesystem) -> None:
    with fs.open("/file", "w+") as file:
        file.truncate(MIB)
        file.pwrite(b"data", MIB // 2)
        data = fs.lseek(file, 0, os.SEEK_DATA)
        assert data in (0, MIB // 2)  # a host that knows no holes sees data everywhere
        assert fs.lseek(file, MIB // 2, os.SEEK_HOLE) > MIB // 2
        fails(errno.ENXIO, fs.lseek, file, MIB, os.SEEK_DATA)
        fails(errno.EINVAL, fs.lseek, file, -1, os.SEEK_SET)


def test_copy_file_range_copies_also_where_the_daemon_can_t(fs: Filesystem) -> None:
    data = os.urandom(2 * MIB)
    fs.write_bytes("/one", data)
    with fs.open("/one") as one, fs.open("/two", "w+") as two:
        done = 0
        while count := fs.copy_file_range(one, two, 4 * MIB):
            done += count
        assert done == len(data) == one.tell() == two.tell()
        assert fs.copy_file_range(one, two, 100, 5, 3 * MIB) == 100
        assert fs.fstat(two).st_size == 3 * MIB + 100
        fails(errno.EINVAL, fs.copy_file_range, two, two, 100, 0, 50)
        fails(errno.EBADF, fs.copy_file_range, two, one, 100, 0, 0)
    assert fs.read_bytes("/two")[: 2 * MIB] == data
    assert fs.read_bytes("/two")[-100:] == data[5:105]


def test_fsync_and_syncfs_reach_the_daemon(fs: Filesystem) -> None:
    with fs.open("/file", "w") as file:
        file.write(b"x")
        since = requests(fs)
        fs.fsync(file)
        fs.fdatasync(file)
        assert since("FSYNC") == 2
        fs.syncfs(file)
        fs.syncfs()
        assert 1 <= since("SYNCFS") <= 2
    with fs.open("/", os.O_RDONLY | os.O_DIRECTORY) as directory:
        fs.fsync(directory)


def test_ioctl_without_support_is_enotty(fs: Filesystem) -> None:
    with fs.open("/file", "w") as file:
        for command in (0x80081272, 0xC0045878):  # BLKGETSIZE64, FIFREEZE
            fails(errno.ENOTTY, fs.ioctl, file, command, bytes(8))


def test_a_read_only_mount_changes_nothing(
    kind: str, mounted: Callable[..., Filesystem], shared: Path
) -> None:
    (shared / "file").write_bytes(b"x")
    fs = mounted(kind, options="ro,noatime")
    assert fs.read_bytes("/file") == b"x"
    for call, arguments in (
        (fs.open, ("/file", "r+")), (fs.open, ("/new", "w")), (fs.mkdir, ("/dir",)), (fs.unlink, ("/file",)),
        (fs.rename, ("/file", "/f")), (fs.chmod, ("/file", 0)), (fs.truncate, ("/file", 0)),
        (fs.symlink, ("a", "/b")), (fs.utime, ("/file",)),
    ):  # fmt: skip
        fails(errno.EROFS, call, *arguments)
    fails(errno.EEXIST, fs.mkdir, "/file")
    assert not fs.access("/file", os.W_OK)
    assert fs.statvfs("/").f_flag == os.ST_RDONLY | os.ST_NOATIME
    assert os.listdir(shared) == ["file"]


def test_threads_share_a_mount(kind: str, mounted: Callable[..., Filesystem], shared: Path) -> None:
    fs = mounted(kind, **({"queues": 2} if kind == "vfsd" else {}))
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                path = f"/{number}-{turn % 3}"
                fs.write_bytes(path, bytes([number]) * 20_000)
                assert fs.read_bytes(path) == bytes([number]) * 20_000
                fs.write_bytes("/common", b"c" * 5000)
                fs.rename(path, path + "r")
                assert f"{path}r"[1:] in fs.listdir("/")
                fs.unlink(path + "r")
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed, failed[0]
    assert os.listdir(shared) == ["common"]


def test_stats_count_requests_queues_and_hits(fs: Filesystem) -> None:
    fs.write_bytes("/file", b"x")
    fs.stat("/file")
    stats = fs.stats()
    assert stats["requests"]["CREATE"] == 1
    assert stats["queues"]["requests.0"]["kicks"] > 0
    assert set(stats["hits"]) <= {"names", "negative names", "attributes", "pages", "listings"}
