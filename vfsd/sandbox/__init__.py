"""What keeps the daemon apart from the rest of the host."""
