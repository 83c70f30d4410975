"""The operations: each has one home."""
