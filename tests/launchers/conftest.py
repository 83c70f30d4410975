import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for sockets, logs and the share."""
    with tempfile.TemporaryDirectory(prefix="vfsd-") as folder:
        (Path(folder) / "share").mkdir()
        yield Path(folder)
