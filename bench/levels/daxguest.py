"""Linux with a DAX window, in QEMU: pages of a file by mapping it, and by requests."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import _copies
from ..daemons import TAG, Running, Target
from ..fixture import SEED
from ..harness import harness
from ..histogram import Histogram
from ..machine import Foreign
from ..mapped import MAPPED
from ..model import Cell, Failed, Sample, Setting
from .guest import GuestSession
from .kernel import TOOLS
from .place import Place

KIND = "qemu-dax"
SETTING = Setting("dax", completions="event", dax=True, guest=KIND)
SCATTERED = "mapped-4k"
# An emulated CPU takes one step for each byte of a rep movsb; glibc's memcpy has loops that are none.
TUNABLES = "GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=1073741824"


def missing() -> str | None:
    """Why there is no such guest here. It is only looked for: fetching one takes minutes."""
    try:
        folder: Path = harness().dax.FOLDER
    except ImportError:
        return "what boots guests is only in a source checkout, in tools/guests"
    if not (folder / "ready").exists():
        return f"a Linux guest with a window: {folder} has none; make test-dax fetches it"
    return None


class DaxGuestSession(GuestSession):
    """See vfsd_bench.level.Session. The share is mounted anew for each cell, with the window or without."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="vfsd-bench-")
        shutil.copy(TOOLS / "mapped.py", self._files.name)
        shutil.copy(_copies.__file__, self._files.name)
        self._path = place.trees[setting.backing].part("big").relative_to(place.trees[setting.backing].base)
        super().__init__(target, running, setting, place, Path(self._files.name))

    def _make(self, tools: Path) -> Any:
        return harness().DaxGuest([self.running.socket], tag=TAG, files=tools, request_queues=1)

    def close(self) -> None:
        super().close()
        self._files.cleanup()

    def run(self, cell: Cell, seconds: float, warm: float) -> Sample:
        mapped = cell.workload in MAPPED
        self.execute(["umount", self.directory], "while it was unmounted")
        options = "dax=always" if mapped else "dax=never"
        self._watched(lambda: self._guest.mount(options) or "", "while it was mounted")
        words = ["map" if mapped else "read", f"{self.directory}/{self._path}"]
        argv = ["env", TUNABLES, self._guest.python, "-S", f"{self._guest.files}/mapped.py", *words]
        self.execute([*argv, f"{warm:g}", str(SEED)], "before it was measured")
        before, others = self.running.cpu(), Foreign(self.driver_cpu)
        said = self.execute([*argv, f"{seconds:g}", str(SEED)], f"in the middle of {cell.workload}")
        used = self.running.cpu() - before
        share = others.share(used)
        try:
            took, wrong, n, total, low, high, counts = json.loads(said)
        except ValueError as problem:
            raise Failed(f"in the guest: {said.strip().splitlines()[-1:]}") from problem
        if wrong:
            raise Failed(f"{wrong} pages that the guest has read are not what is in the file")
        sample = Sample(n, took / 1e9, 4096 * n, daemon_cpu=used, foreign=share)
        sample.latencies(Histogram.of((n, total, low, high, bytes.fromhex(counts))))
        return sample
