"""Two hosts of one distributed file system, each with a daemon, and a guest of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guest" / "bridge"))

from gluster import Cluster, StartGuest, missing
from guests import Daemon
from mounts import MountCommand, Mounted


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def share(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    """Name of a new directory of the volume."""
    name = request.node.name.replace("/", "-")
    (cluster.hosts[0] / name).mkdir()
    return name


@pytest.fixture
def guest_of(cluster: Cluster, share: str, tmp_path: Path) -> StartGuest:
    """A daemon on one of the two hosts, and the kernel's FUSE client on it: (host, *the daemon's options)."""

    @contextmanager
    def start(host: int, *options: str) -> Iterator[Mounted]:
        directory = cluster.hosts[host] / share
        root = tmp_path / f"guest-{host}"
        root.mkdir(exist_ok=True)
        with ExitStack() as stack:
            daemon = Daemon(directory, options=options)
            stack.callback(daemon.kill)
            command = MountCommand(daemon.socket, root)
            stack.callback(command.kill)
            yield Mounted("vfsd", directory, root, daemon, command)
            if daemon.running():
                assert command.end() == 0, command.log
                daemon.stop()

    return start
