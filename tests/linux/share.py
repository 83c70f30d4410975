"""A shared directory with its daemon and its guest, as the tests use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guests import Daemon, Guest, StartDaemon

WORKLOADS = Path(__file__).resolve().parent / "workloads"


class Share:
    """One directory seen from both sides.

    The daemon and the guest are started when a test needs them, and again when one is gone: so a
    test that breaks them fails alone.
    """

    def __init__(
        self,
        host: Path,
        start_daemon: StartDaemon,
        make_guest: Callable[[Daemon], Guest],
        *,
        cache: str = "auto",
        tag: str | None = "myfs",
        options: Sequence[str] = (),
    ) -> None:
        """options: further ones of the daemon."""
        self.host = host
        self._start_daemon = start_daemon
        self._make_guest = make_guest
        self._cache = cache
        self._tag = tag
        self._options = options
        self._daemon: Daemon | None = None
        self._guest: Guest | None = None

    def ready(self) -> Self:
        """Make sure that the guest runs and has the share mounted."""
        if self._guest is not None and self._guest.running:
            return self
        if self._guest is not None:
            self._guest.kill()
        if self._daemon is None or not self._daemon.running():
            self._daemon = self._start_daemon(
                self.host, cache=self._cache, tag=self._tag, options=self._options
            )
        self._guest = self._make_guest(self._daemon).start()
        self._guest.mount()
        return self

    @property
    def daemon(self) -> Daemon:
        """The running daemon."""
        assert self._daemon is not None
        return self._daemon

    @property
    def guest(self) -> Guest:
        """The running guest."""
        assert self._guest is not None
        return self._guest

    def directory(self, name: str) -> tuple[Path, str]:
        """A new directory: its paths on the host and in the guest."""
        path = self.host / name
        path.mkdir()
        return path, f"{self.guest.share}/{name}"

    def workload(self, name: str, *arguments: str, timeout: float = 90) -> Any:
        """What the script `name` in the guest printed, as JSON."""
        return json.loads(self.guest.workload(name, *arguments, timeout=timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._guest is not None and self._guest.running:
            self._guest.poweroff()
        elif self._guest is not None:
            self._guest.kill()
