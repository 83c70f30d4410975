"""Locks granted by the host and waited for."""
