"""An open file as Python sees it."""

import io
import os
from contextlib import AbstractContextManager
from errno import EINVAL, ESPIPE
from typing import Protocol

from vfsd.fuse import abi
from vfsd.fuse.abi import Fopen
from vfsd.guest.buffer import Buffer
from vfsd.guest.client import daxfile, fileops, files
from vfsd.guest.client.openfile import OpenFile


class FileOwner(Protocol):
    """The file system that a raw file belongs to, as far as the file needs it."""

    @property
    def lock_owner(self) -> int: ...
    def errors(self, path: str | bytes) -> AbstractContextManager[None]: ...
    def forget_file(self, file: "RawFile") -> None: ...
    def fstat(self, file: "RawFile") -> os.stat_result: ...
    def ftruncate(self, file: "RawFile", length: int) -> None: ...


class RawFile(io.RawIOBase):
    """A raw, unbuffered file; io.BufferedReader and the like go around it.

    It has no descriptor of this machine: `fileno()` is refused. Errors name `name`.
    """

    def __init__(self, fs: FileOwner, file: OpenFile, path: str | bytes) -> None:
        super().__init__()
        self.fs = fs
        self.file = file
        self.name = path

    # ---- io.RawIOBase

    def readable(self) -> bool:
        return self.file.readable and not self.file.inode.is_dir

    def writable(self) -> bool:
        return self.file.writable

    def seekable(self) -> bool:
        return not self.file.open_flags & (Fopen.NONSEEKABLE | Fopen.STREAM)

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self.fs.errors(self.name):
                files.close(self.file, self.fs.lock_owner)
        finally:
            super().close()
            self.fs.forget_file(self)

    def readinto(self, buffer: Buffer, /) -> int:
        with memoryview(buffer).cast("B") as view, self.file.position_lock:
            count = self.preadinto(view, self.file.position)
            self.file.position += count
        return count

    def readall(self) -> bytes:
        """To the end, with one buffer of the file's size."""
        self._check_open()
        expected = self.fs.fstat(self).st_size - self.file.position
        buffer = bytearray(max(expected + 1, abi.PAGE_SIZE))
        done = 0
        while count := self.readinto(memoryview(buffer)[done:]):
            done += count
            if done == len(buffer):
                buffer += bytes(len(buffer))
        return bytes(memoryview(buffer)[:done])

    def write(self, data: Buffer, /) -> int:
        self._check_open()
        file = self.file
        with memoryview(data).cast("B") as view, file.position_lock, self.fs.errors(self.name):
            position = None if file.flags & os.O_APPEND else file.position
            count, file.position = files.write_at(file, position, view)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """whence: SEEK_DATA and SEEK_HOLE too."""
        self._check_open()
        with self.fs.errors(self.name):
            if not self.seekable():
                raise OSError(ESPIPE, os.strerror(ESPIPE))
            return fileops.lseek(self.file, offset, whence)

    def tell(self) -> int:
        self._check_open()
        return self.file.position

    def truncate(self, size: int | None = None, /) -> int:
        wanted = self.file.position if size is None else size
        self.fs.ftruncate(self, wanted)
        return wanted

    # ---- what os has for descriptors

    def preadinto(self, buffer: Buffer, offset: int) -> int:
        """os.preadv with one buffer."""
        self._check_open()
        with memoryview(buffer).cast("B") as view, self.fs.errors(self.name):
            return files.read_at(self.file, offset, view)

    def pread(self, count: int, offset: int) -> bytes:
        buffer = bytearray(count)
        return bytes(memoryview(buffer)[: self.preadinto(buffer, offset)])

    def pwrite(self, data: Buffer, offset: int) -> int:
        """With O_APPEND the data goes to the end, as Linux does it."""
        self._check_open()
        file = self.file
        with memoryview(data).cast("B") as view, self.fs.errors(self.name):
            if offset < 0:
                raise OSError(EINVAL, os.strerror(EINVAL))
            return files.write_at(file, None if file.flags & os.O_APPEND else offset, view)[0]

    def mmap(self, offset: int, length: int) -> memoryview:
        """That part of the file in the DAX window: shared memory, writable if the file is.

        It stays valid while anybody has it, also when the file is closed; its ranges of the window are
        busy until then. ValueError: not within the file. OSError ENODEV: the file has no DAX; ENOMEM:
        views hold the window."""
        self._check_open()
        with self.fs.errors(self.name):
            return daxfile.mmap(self.file, offset, length)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
