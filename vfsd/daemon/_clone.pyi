__all__ = ("fork_sharing_descriptors",)

def fork_sharing_descriptors() -> int:
    """As os.fork(), for a process with one thread. What one of the two opens or closes is so for both;
    when the child has died its descriptors are still there, under their numbers. OSError.

    clone(2), CLONE_FILES."""
