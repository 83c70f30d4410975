"""A served virtqueue: its thread, what its requests wait for, and what it gives back."""
