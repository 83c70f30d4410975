"""Facts about the machine, and whether others used it while something was measured."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

from vfsd import __version__

TICK = 1 / os.sysconf("SC_CLK_TCK")


def first(path: str, default: str = "unknown") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def cpu_model() -> str:
    for line in first("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def virtual() -> str:
    flags = next((line for line in first("/proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    return "yes" if " hypervisor" in flags else "no"


def distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown"


def facts() -> dict[str, str]:
    """For the report: what the figures depend on."""
    return {
        "cpu": cpu_model(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gb():.1f} GB",
        "virtual machine": virtual(),
        "kernel": f"{platform.system()} {platform.release()}",
        "system": distribution(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "vfsd": __version__,
        "huge pages of shared memory": first("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "frequency governor": first("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "descriptors a process may have": str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "user": "root" if os.geteuid() == 0 else "not root",
    }


def busy() -> float:
    """Seconds of CPU used by everybody since the start of the machine, stolen time included."""
    words = first("/proc/stat").split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK


class Foreign:
    """How much of the CPUs others used, from here to share(): what we and a daemon used is not theirs.

    ours: CPU seconds that we have used so far.
    """

    def __init__(self, ours: Callable[[], float] = time.process_time) -> None:
        self._cpus = os.cpu_count() or 1
        self._busy = busy()
        self._count = ours
        self._ours = ours()
        self._began = time.perf_counter()

    def share(self, daemon_cpu: float) -> float:
        """0 to 1. The kernel counts in ticks: what is below two of them is not seen."""
        elapsed = time.perf_counter() - self._began
        ours = self._count() - self._ours + daemon_cpu
        others = busy() - self._busy - ours - 2 * TICK
        return max(0.0, min(1.0, others / (elapsed * self._cpus)))
