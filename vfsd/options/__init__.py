"""The daemon's options."""
