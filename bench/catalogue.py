"""Every workload of every level, by name: its title and what it is counted by."""

from __future__ import annotations

from . import fiojobs, programs
from .mapped import MAPPED
from .tasks import Task
from .workloads import WORKLOADS

TASKS: dict[str, Task] = {task.name: task for task in (*programs.PROGRAMS, *fiojobs.JOBS)}


def title(workload: str) -> str:
    """For people; the name itself when the report is of another version."""
    row = TASKS.get(workload) or WORKLOADS.get(workload) or MAPPED.get(workload)
    return row.title if row else workload


def unit(workload: str) -> str:
    """What figures are by: op, MB (op, with a throughput), entry, file, ..."""
    row = TASKS.get(workload) or WORKLOADS.get(workload) or MAPPED.get(workload)
    return row.unit if row else "op"


def items(workload: str, large: int) -> int:
    """How many units one operation has, in a directory of so many entries; tasks count units themselves."""
    row = WORKLOADS.get(workload)
    return row.items(large) if row else 1
