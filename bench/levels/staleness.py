"""How long a guest goes on seeing what the host has changed, measured with eyes in the guest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..model import Failed, Setting, Staleness
from ..tasks import Work, said

LOOK_S = 0.001
CHANGES = ("attribute", "content", "created", "removed")


def prepare(work: Work) -> None:
    """What inside/watch.py looks at, in an old state."""
    (work.host / "attribute").write_bytes(b"1")
    (work.host / "content").write_bytes(b"old")
    (work.host / "removed").touch()


def change(work: Work) -> None:
    """All at once, on the host."""
    for name, content in (("attribute", b"12"), ("content", b"new"), ("created", b"")):
        (work.host / name).write_bytes(content)
    (work.host / "removed").unlink()


def measure(setting: Setting, who: str, work: Work, watch: Callable[[], str]) -> Staleness:
    """watch: runs inside/watch.py in the guest, which makes files that the host sees. Failed."""
    limit = work.profile.watch
    found = Staleness(setting, who, limit)
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        context = os.sched_getaffinity(0)

        def watched() -> str:
            os.sched_setaffinity(0, context)
            try:
                return watch()
            finally:
                ended.set()

        watching = pool.submit(watched)
        while not (work.host / "ready").exists() and not ended.wait(LOOK_S):
            pass
        change(work)
        changed = time.perf_counter()
        seen: dict[str, float] = {}
        last = False
        while not last and len(seen) < len(CHANGES):
            last = ended.wait(LOOK_S)  # and then look once more
            now = time.perf_counter() - changed
            for name in CHANGES:
                if name not in seen and (work.host / f"seen-{name}").exists():
                    seen[name] = now
        text = watching.result()
    if text.strip():
        raise Failed(f"watching ended with: {said(text)}")
    for name, after in seen.items():
        setattr(found, name, after)
    return found
