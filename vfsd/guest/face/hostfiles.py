"""The host's files by the same methods as `Filesystem`, for what works on both."""

import os
import stat
from errno import ELOOP


class HostFile:
    """An open file of the host; as far as `RawFile` has it too."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, count: int, offset: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(self._fd, data, offset)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int, /) -> int:
        os.ftruncate(self._fd, size)
        return size

    def close(self) -> None:
        os.close(self._fd)


class HostFiles:
    """Calls of `os`, none of which follows a symlink at the end of a path."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> HostFile:
        return HostFile(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode))

    def lstat(self, path: str) -> os.stat_result:
        return os.lstat(path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def mknod(self, path: str, mode: int, device: int = 0) -> None:
        os.mknod(path, mode, device)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def chmod(self, path: str, mode: int) -> None:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise OSError(ELOOP, os.strerror(ELOOP), path)
            os.chmod(f"/proc/self/fd/{fd}", mode)
        finally:
            os.close(fd)

    def lchown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(path, uid, gid)

    def utime(self, path: str, *, ns: tuple[int, int], follow_symlinks: bool = False) -> None:
        os.utime(path, ns=ns, follow_symlinks=follow_symlinks)

    def listxattr(self, path: str, *, follow_symlinks: bool = False) -> list[str]:
        return os.listxattr(path, follow_symlinks=follow_symlinks)

    def getxattr(self, path: str, name: str, *, follow_symlinks: bool = False) -> bytes:
        return os.getxattr(path, name, follow_symlinks=follow_symlinks)

    def setxattr(self, path: str, name: str, value: bytes, *, follow_symlinks: bool = False) -> None:
        os.setxattr(path, name, value, follow_symlinks=follow_symlinks)

    def removexattr(self, path: str, name: str, *, follow_symlinks: bool = False) -> None:
        os.removexattr(path, name, follow_symlinks=follow_symlinks)
