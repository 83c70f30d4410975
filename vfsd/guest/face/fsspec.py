"""fsspec's face of a virtio-fs share: `fsspec.filesystem("virtiofs", socket="/run/share.sock")`.

URLs are `virtiofs://PATH`, with `socket` among the storage options. Needs the extra `fsspec`.
"""

import datetime
import io
import os
import stat
from errno import EEXIST
from typing import Any

from fsspec.spec import AbstractFileSystem

from vfsd.guest.face.mount import mount

KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}


class VirtioFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A share. socket: the daemon's; further arguments as for `vfsd.guest.mount`."""

    protocol = "virtiofs"
    root_marker = "/"

    def __init__(
        self, socket: str, *args: Any, mount_options: dict[str, Any] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.socket = socket
        self._fs = mount(socket, **(mount_options or {}))

    def close(self) -> None:
        """Unmount. The object is of no more use."""
        self._fs.close()
        self.clear_instance_cache()

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return "/" + str(super()._strip_protocol(path)).strip("/")

    def _entry(self, path: str) -> dict[str, Any]:
        st = self._fs.lstat(path)
        return {
            "name": path, "size": st.st_size, "type": KINDS.get(stat.S_IFMT(st.st_mode), "other"),
            "mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid, "mtime": st.st_mtime,
            "ino": st.st_ino, "nlink": st.st_nlink, "islink": stat.S_ISLNK(st.st_mode),
        }  # fmt: skip

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        entry = self._entry(path)
        if entry["islink"]:
            entry["destination"] = os.fsdecode(self._fs.readlink(path))
        return entry

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if not stat.S_ISDIR(self._fs.stat(path).st_mode):
            found = [path]
        else:
            found = [path.rstrip("/") + "/" + name for name in sorted(self._fs.listdir(path))]
        return [self._entry(name) for name in found] if detail else found

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        path = self._strip_protocol(path)
        if create_parents and self._fs.exists(path):
            raise FileExistsError(EEXIST, os.strerror(EEXIST), path)
        (self._fs.makedirs if create_parents else self._fs.mkdir)(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._fs.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        self._fs.rmdir(self._strip_protocol(path))

    def _rm(self, path: str) -> None:
        path = self._strip_protocol(path)
        (self._fs.rmdir if self.isdir(path) else self._fs.unlink)(path)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self._fs.rename(self._strip_protocol(path1), self._strip_protocol(path2))

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
            return
        with self.open(path1) as source, self.open(path2, "wb") as target:
            while data := source.read(self.blocksize):
                target.write(data)

    def modified(self, path: str) -> Any:
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        raw = self._fs.open(self._strip_protocol(path), mode.replace("b", ""))
        if "r" in mode and "+" not in mode:
            return io.BufferedReader(raw)
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
