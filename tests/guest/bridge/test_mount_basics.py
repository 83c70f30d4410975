"""What every program needs of a file system, on a mounted share."""

import contextlib
import errno
import fcntl
import mmap
import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import Mounted

from vfsd.guest.bridge.mounting import mount_table

FS_IOC_GETFLAGS = 0x80086601


@pytest.fixture
def pair(mounted: Mounted, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """A new directory, by the mount and on the host."""
    name = request.node.originalname
    (mounted.root / name).mkdir()
    yield mounted.root / name, mounted.share / name
    mounted.run("rm", "-rf", name)
    assert not (mounted.share / name).exists()


def test_the_mount_table_shows_a_virtiofs(mounted: Mounted) -> None:
    (entry,) = [entry for entry in mount_table() if entry.point == str(mounted.root)]
    assert entry.fstype == "fuse.virtiofs"
    assert os.stat(mounted.root).st_ino == os.stat(mounted.share).st_ino
    assert os.path.ismount(mounted.root)


def test_what_is_written_is_read_on_both_sides(pair: tuple[Path, Path]) -> None:
    root, share = pair
    for size in (0, 1, 79, 80, 81, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1, 5_000_001):
        data = random.Random(size).randbytes(size)
        (root / f"w{size}").write_bytes(data)
        assert (share / f"w{size}").read_bytes() == data
        (share / f"r{size}").write_bytes(data)
        assert (root / f"r{size}").read_bytes() == data
        assert (root / f"r{size}").stat().st_size == size


def test_direct_reads_and_writes_of_unaligned_memory(pair: tuple[Path, Path]) -> None:
    """Each lies in one page more than its size says; requests hold no more than a queue carries."""
    root, share = pair
    size = 2 << 20
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    data = random.Random(7).randbytes(size)
    area[512 : 512 + size] = data
    fd = os.open(root / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with memoryview(area) as view, view[512 : 512 + size] as part:
        assert os.pwrite(fd, part, 0) == size
        assert (share / "direct").read_bytes() == data
        area[512 : 512 + size] = bytes(size)
        assert os.preadv(fd, [part], 0) == size
        assert part == data
        assert os.preadv(fd, [part[:100]], size - 50) == 50
    os.close(fd)
    area.close()


def test_names_are_listed_renamed_and_removed(pair: tuple[Path, Path]) -> None:
    root, share = pair
    names = {f"file {i} " + "x" * (i % 200) for i in range(1000)} | {"ä", "a" * 255}
    for name in names:
        (share / name).touch()
    assert set(os.listdir(root)) == names
    (root / "a").mkdir()
    os.rename(root / "ä", root / "a" / "b")
    assert os.listdir(share / "a") == ["b"]
    with pytest.raises(OSError) as found:
        (root / "a").rmdir()
    assert found.value.errno == errno.ENOTEMPTY
    os.replace(root / "a" / "b", root / "file 0 ")
    (root / "a").rmdir()
    os.unlink(root / ("a" * 255))
    assert set(os.listdir(root)) == names - {"ä", "a" * 255}
    with pytest.raises(OSError) as found:
        (root / ("a" * 256)).touch()
    assert found.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError):
        os.stat(root / "nowhere" / "a")


def test_links_and_special_files(pair: tuple[Path, Path]) -> None:
    root, share = pair
    (root / "file").write_text("here")
    os.link(root / "file", root / "other")
    assert os.stat(share / "other").st_nlink == 2
    for target in ("file", "x" * 4094):
        os.symlink(target, root / "link")
        assert os.readlink(root / "link") == os.readlink(share / "link") == target
        os.unlink(root / "link")
    os.symlink("file", root / "link")
    assert (root / "link").read_text() == "here"
    os.mkfifo(root / "fifo")
    assert stat.S_ISFIFO(os.lstat(share / "fifo").st_mode)
    # A special file is the kernel's own here, as in a guest: it works without the host's.
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root):
        listener.bind("socket")
    assert stat.S_ISSOCK(os.lstat(share / "socket").st_mode)


def test_attributes(pair: tuple[Path, Path]) -> None:
    root, share = pair
    file = root / "file"
    file.touch()
    os.chmod(file, 0o640)
    os.chown(file, 1000, 1001)
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    os.truncate(file, 12345)
    for found in (os.stat(file), os.stat(share / "file")):
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 1000, 1001)
        assert found.st_size == 12345
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    assert os.stat(share / "file").st_mtime_ns == 2_000_000_002
    whole, ours = os.statvfs(share), os.statvfs(root)
    assert (ours.f_blocks, ours.f_bsize, ours.f_namemax) == (whole.f_blocks, whole.f_bsize, whole.f_namemax)


def test_extended_attributes(mounted: Mounted, pair: tuple[Path, Path]) -> None:
    """The daemons have them only if told to; the errors then come through."""
    root, _ = pair
    with pytest.raises(OSError) as found:
        os.setxattr(root, "user.a", b"value")
    assert found.value.errno == errno.EOPNOTSUPP


def test_sparse_files(pair: tuple[Path, Path]) -> None:
    root, _ = pair
    with open(root / "sparse", "w+b") as file:
        os.pwrite(file.fileno(), b"data", 1 << 30)
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == (1 << 30) + 4
        with contextlib.suppress(OSError):  # a daemon may not know LSEEK, which is then all data
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) in (0, 1 << 30)
        os.posix_fallocate(file.fileno(), 0, 100_000)
        assert os.stat(root / "sparse").st_blocks * 512 >= 100_000


def test_errors_come_through(pair: tuple[Path, Path]) -> None:
    root, _ = pair
    (root / "file").touch()
    fd = os.open(root / "file", os.O_RDONLY)
    with pytest.raises(OSError) as found:
        # An ioctl that a daemon may not know: its answer, whatever that is, and no hang.
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytearray(8))
        raise OSError(errno.ENOTTY, "answered")
    assert found.value.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
    os.close(fd)
    with pytest.raises(FileExistsError):
        os.mkdir(root / "file")
    with pytest.raises(NotADirectoryError):
        os.listdir(root / "file")


def test_a_file_lives_as_long_as_it_is_open(pair: tuple[Path, Path]) -> None:
    root, _ = pair
    with open(root / "file", "w+b") as file:
        file.write(b"still here")
        file.flush()
        os.unlink(root / "file")
        assert os.listdir(root) == []
        assert os.pread(file.fileno(), 100, 0) == b"still here"
        assert os.fstat(file.fileno()).st_nlink == 0
