"""Random operations on a file, checked step by step: 100,000 on `vfsd serve`."""

import random
import subprocess
import sys
import time

import pytest
from mounts import WORKLOADS, Mounted

# vfsd's sum to 100,000.
STEPS = {"vfsd": 40_000, "vfsd-queues-4": 30_000, "vfsd-queue-of-8": 30_000, "qemu-virtiofsd": 20_000}


def test_random_operations(mounted: Mounted, request: pytest.FixtureRequest) -> None:
    """Two files at a time, so that requests of several threads are on their way together."""
    steps = STEPS[request.node.callspec.params["mounted"]]
    seeds = [random.randrange(1 << 32) for _ in range(2)]
    print("seeds", seeds)
    start = time.monotonic()
    mounted.workload("pair.py", *[part for seed in seeds for part in (seed, steps // 2)], timeout=150)
    print(f"{steps} steps in {time.monotonic() - start:.1f} s")
    for seed in seeds:
        found = (mounted.share / f"fsx.{seed}").read_bytes()
        assert found == (mounted.share / f"fsx.{seed}.mirror").read_bytes(), f"on the host, seed {seed}"


def test_the_checker_finds_a_difference(mounted: Mounted) -> None:
    """A checker that finds nothing shows nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(WORKLOADS)!r}); import fsx, os\n"
        "f = fsx.Fsx('checked', 1); f.write(); f.mirror[-1] ^= 1\n"
        "try: f.reopen(); f.check(os.pread(f.fd, fsx.SIZE_MAX, 0), 0, fsx.SIZE_MAX)\n"
        "except fsx.Different: print('found')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=mounted.root, capture_output=True, text=True, timeout=30
    )
    assert result.stdout == "found\n", result.stderr
