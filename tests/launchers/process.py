"""vfsd-virtiofsd as a launcher starts it: that command line, those descriptors, nothing else."""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from guests.daemon import eventually

BINARY = str(Path(sys.executable).parent / "vfsd-virtiofsd")
PATIENCE_S = 30


class Started:
    """A daemon in a session and process group of its own, stderr in a file."""

    def __init__(
        self, words: Sequence[str], log: Path, *, handed: Mapping[int, int] | None = None,
        cwd: Path | None = None, environment: Mapping[str, str] | None = None, before: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """handed: our descriptors by the numbers they are to have there. before: a command that runs the
        one at its end in its own process."""
        chdir = [] if cwd is None else ["/usr/bin/env", f"--chdir={cwd}"]
        argv = [*chdir, *before, BINARY, *words]
        spare = {number: os.dup(fd) for number, fd in (handed or {}).items()}
        self._log = log
        self.status: int | None = None
        self.pid = os.posix_spawn(
            argv[0], argv, os.environ if environment is None else environment, setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in spare.items()),
            ],
        )  # fmt: skip
        for fd in spare.values():
            os.close(fd)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self) -> int:
        """Its exit status, or minus the signal."""
        assert eventually(lambda: not self.running(), PATIENCE_S), f"it does not end:\n{self.log}"
        assert self.status is not None
        return self.status

    def group(self) -> list[int]:
        """The processes of its group that live."""
        return [pid for pid in processes() if is_in_group(pid, self.pid)]

    def kill_all(self) -> None:
        for pid in self.group():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


def processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def is_in_group(pid: int, group: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[2]) == group and fields[0] != "Z"


@contextmanager
def started(*arguments: object, **more: object) -> Iterator[Started]:
    daemon = Started(*arguments, **more)  # type: ignore[arg-type]
    try:
        yield daemon
    finally:
        daemon.kill_all()


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener
