"""Fixtures that boot guests; one daemon and one guest serve all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import QemuGuest, StartDaemon, UmlGuest
from share import WORKLOADS, Share

# A copy of the large file, in the guest's memory, is the most a test needs.
UML_MEMORY = 1280


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot be booted here, and say what is missing."""
    for mark, guest in (("uml", UmlGuest), ("qemu", QemuGuest)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = guest.missing() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def uml_module(
    module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Share]:
    """A directory of the test disk, shared with a user-mode Linux guest."""
    host = tmp_path_factory.mktemp("shared")
    with Share(
        host,
        module_daemon,
        lambda daemon: UmlGuest(
            daemon.socket, tag=daemon.tag, memory=UML_MEMORY, files=WORKLOADS
        ),
    ) as share:
        yield share


@pytest.fixture
def share(uml_module: Share) -> Share:
    """`uml_module` with a guest that runs, also when the test before has ended it."""
    return uml_module.ready()


@pytest.fixture(scope="module", params=[1, 2], ids=lambda count: f"queues={count}")
def qemu_module(
    request: pytest.FixtureRequest,
    module_daemon: StartDaemon,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Share]:
    """A directory of the test disk, shared with a QEMU guest over one and two request queues."""
    host: Path = tmp_path_factory.mktemp("shared")
    with Share(
        host,
        module_daemon,
        lambda daemon: QemuGuest(
            daemon.socket, tag=daemon.tag, files=WORKLOADS, request_queues=request.param
        ),
    ) as share:
        yield share


@pytest.fixture
def qemu_share(qemu_module: Share) -> Share:
    """`qemu_module` with a guest that runs, also when the test before has ended it."""
    return qemu_module.ready()
