"""What depends on the share and the host: its file system's own operations, --readonly, one file."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Daemon
from mounts import MountCommand, force_unmount, is_mounted, mounting

HOSTOPS = Path(__file__).resolve().parents[2] / "linux" / "workloads" / "hostops.py"
FS_IOC_SETFLAGS = 0x40086602


def fails(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as found:
        call(*arguments)
    assert found.value.errno == number, found.value


def test_what_only_a_local_file_system_can_do(tmp_path: Path) -> None:
    options = ("--num-request-queues", "2", "--modcaps=+linux_immutable")
    with mounting(tmp_path, "vfsd", options, ("--queues", "2")) as it:
        answers = json.loads(it.run(sys.executable, HOSTOPS, it.root))
        assert [question for question, answer in answers.items() if answer is not True] == []
        assert (it.share / "named").read_bytes() == b"data"


def test_a_readonly_share(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_bytes(b"content")
    with mounting(tmp_path, "vfsd", ("--readonly", "--xattr")) as it:
        file = it.root / "file"
        assert file.read_bytes() == b"content"
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            fails(errno.EROFS, os.open, file, flags)
        fails(errno.EROFS, os.open, it.root / "new", os.O_WRONLY | os.O_CREAT)
        fails(errno.EROFS, os.open, it.root, os.O_WRONLY | os.O_TMPFILE)
        fails(errno.EROFS, os.mkdir, it.root / "new")
        fails(errno.EROFS, os.symlink, "x", it.root / "new")
        fails(errno.EROFS, os.link, file, it.root / "new")
        fails(errno.EROFS, os.rename, file, it.root / "new")
        fails(errno.EROFS, os.unlink, file)
        fails(errno.EROFS, os.truncate, file, 0)
        fails(errno.EROFS, os.chmod, file, 0)
        fails(errno.EROFS, os.utime, file)
        fails(errno.EROFS, os.setxattr, file, "user.a", b"b")
        found = subprocess.run(["chattr", "+d", file], capture_output=True, text=True)
        assert "Read-only file system" in found.stderr
        fails(errno.EEXIST, os.mkdir, file)  # as where nothing may be made locally
        assert os.statvfs(it.root).f_flag & os.ST_RDONLY == 0
        assert it.run("cat", "file") == "content"
        assert os.listdir(it.share) == ["file"]


def test_a_share_that_is_one_file(place: Path, tmp_path: Path) -> None:
    """It is mounted on a file; on a directory the kernel finds that its root is none."""
    shared, point = tmp_path / "shared", tmp_path / "point"
    shared.write_bytes(b"content")
    point.write_bytes(b"covered")
    with Daemon(shared, tag=None) as daemon:
        assert "is a file" in daemon.log
        command = MountCommand(daemon.socket, point)
        try:
            assert point.read_bytes() == b"content"
            with point.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(b" and more")
                os.fsync(file.fileno())
            assert shared.read_bytes() == b"content and more"
            os.truncate(point, 4)
            os.chmod(point, 0o640)
            st = os.stat(point)
            assert (st.st_ino, st.st_size, st.st_mode) == (os.stat(shared).st_ino, 4, 0o100640)
            fails(errno.ENOTDIR, os.listdir, point)
            fails(errno.EBUSY, os.unlink, point)
            assert command.end() == 0, command.log
        finally:
            force_unmount(point)
            command.kill()
        assert not is_mounted(point)
        assert point.read_bytes() == b"covered"
        command = MountCommand(daemon.socket, place)
        try:
            fails(errno.EIO, os.stat, place)
        finally:
            force_unmount(place)
            command.kill()
