__all__ = ("die_with_parent", "set_name")

def die_with_parent(parent: int) -> bool:
    """Have the kernel send SIGKILL when the parent ends. False: it has ended already.

    Only threads that never change their credentials keep this (commit_creds of kernel/cred.c). OSError."""

def set_name(name: bytes) -> None:
    """Name the calling thread, at most 15 bytes: what ps(1) shows of a process for its first one."""
