"""Fixtures that boot guests; one daemon and one guest serve all tests of a file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from guests import DaxGuest, QemuGuest, StartDaemon, UmlGuest
from share import WORKLOADS, Share

# A copy of the large file, in the guest's memory, is the most a test needs.
UML_MEMORY = 1280


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot be booted here, and say what is missing."""

    def no_dax() -> str | None:
        return DaxGuest.missing() if config.getoption("--dax") else "make test-dax runs it"

    for mark, missing in (("uml", UmlGuest.missing), ("qemu", QemuGuest.missing), ("dax", no_dax)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def uml_module(
    module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Share]:
    """A directory of the test disk, shared with a user-mode Linux guest."""
    host = tmp_path_factory.mktemp("shared")
    # What is mounted below it while a guest runs is to be seen in the server's own namespace.
    subprocess.run(["mount", "--bind", host, host], check=True)
    subprocess.run(["mount", "--make-shared", host], check=True)
    with Share(
        host,
        module_daemon,
        lambda daemon: UmlGuest(
            daemon.socket, memory=UML_MEMORY, files=WORKLOADS
        ),
        options=["--modcaps=+linux_immutable"],
    ) as share:
        yield share
    subprocess.run(["umount", "--lazy", host], check=True)


@pytest.fixture
def share(uml_module: Share) -> Share:
    """`uml_module` with a guest that runs, also when the test before has ended it."""
    return uml_module.ready()


@pytest.fixture(scope="module", params=[1, 2], ids=["queues-1", "queues-2"])
def qemu_module(
    request: pytest.FixtureRequest,
    module_daemon: StartDaemon,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Share]:
    """A directory of the test disk, shared with a QEMU guest over one and two request queues."""
    if request.param > 1 and request.config.getoption("--daemon") == "qemu-virtiofsd":
        pytest.skip("QEMU's own daemon has one request queue")
    host = tmp_path_factory.mktemp("shared")
    with Share(
        host,
        module_daemon,
        lambda daemon: QemuGuest(
            daemon.socket, files=WORKLOADS, request_queues=request.param
        ),
        tag=None,
    ) as share:
        yield share


@pytest.fixture
def qemu_share(qemu_module: Share) -> Share:
    """`qemu_module` with a guest that runs, also when the test before has ended it."""
    return qemu_module.ready()
