"""The kinds of failure, never mixed (docs/architecture.md, "Three kinds of errors").

What a guest does wrong is no exception: it is an errno in the reply, or a code of `_ring` that
stops its queue.
"""

EXIT_USAGE = 2  # the operator's mistake
EXIT_BUG = 70  # ours


class ConfigError(Exception):
    """The operator asked for what cannot be: one line, names the option, says what to do. Exit 2."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option


class HostError(ConfigError):
    """What the operator asked for is well written, but this host lacks or refuses it.

    virtiofsd has a status of its own for it, 1.
    """


class ProtocolError(Exception):
    """The front end broke the vhost-user protocol: its connection ends, the daemon lives."""
