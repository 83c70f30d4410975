"""Every method of the control socket, once: `vfsd ctl` and its manual are made from this table."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

from vfsd import __version__
from vfsd.control.rpc import FAILED, INVALID_PARAMS, METHOD_NOT_FOUND, Request, RpcError
from vfsd.options.table import LOG_LEVELS

Done = Callable[[Any], None]

REPORT_S: Final = 1.0  # for the servers of guests to say what they have done


class Daemon(Protocol):
    """What the methods need of who serves the socket; nothing of it waits."""

    def describe(self) -> dict[str, Any]:
        """Its shares and guests, as JSON has it."""

    def ask_reports(self, within_s: float, then: Callable[[], None]) -> None:
        """Have every server say what it has done, for describe(); then when all have, or in that time."""

    def stop(self) -> None:
        """As SIGTERM."""

    def stop_guest(self, pid: int) -> bool:
        """End the server of one guest. False: there is none of that process id."""

    def set_log_level(self, level: str) -> None:
        """Its own, and that of every server."""


class Param(NamedTuple):
    """One parameter. choices: the strings that may be given; empty for any of that kind."""

    name: str
    kind: type[str] | type[int]
    help: str
    required: bool = False
    choices: tuple[str, ...] = ()


class Method(NamedTuple):
    """call: given the daemon, checked parameters, and what takes the result, now or later. RpcError."""

    help: str
    params: tuple[Param, ...]
    call: Callable[[Daemon, Mapping[str, Any], Done], None]


def status(daemon: Daemon, _params: Mapping[str, Any], done: Done) -> None:
    daemon.ask_reports(REPORT_S, lambda: done({"version": __version__, **daemon.describe()}))


def stop(daemon: Daemon, params: Mapping[str, Any], done: Done) -> None:
    pid = params.get("guest")
    if pid is None:
        daemon.stop()
    elif not daemon.stop_guest(pid):
        raise RpcError(FAILED, f"no guest has the server {pid}; ask for the status")
    done(True)


def log_level(daemon: Daemon, params: Mapping[str, Any], done: Done) -> None:
    daemon.set_log_level(params["level"])
    done(True)


def methods(_daemon: Daemon, _params: Mapping[str, Any], done: Done) -> None:
    done({
        name: {
            "help": method.help,
            "params": {
                param.name: {
                    "type": "integer" if param.kind is int else "string", "help": param.help,
                    "required": param.required, **({"choices": param.choices} if param.choices else {}),
                }
                for param in method.params
            },
        }
        for name, method in METHODS.items()
    })  # fmt: skip


METHODS: Final[Mapping[str, Method]] = {
    "status": Method(
        "Shares that are served, guests, and what each has asked for so far. A guest whose server does not"
        " say so within a second has no numbers.", (), status,
    ),
    "stop": Method(
        "End the server of a guest, or, without one, the daemon as SIGTERM does.",
        (Param("guest", int, "Process id of its server, as the status shows it."),), stop,
    ),
    "log-level": Method(
        "Say more or less from now on, in running servers too.",
        (Param("level", str, "The least severe messages to show.", True, LOG_LEVELS),), log_level,
    ),
    "methods": Method("What can be asked for, with its parameters.", (), methods),
}  # fmt: skip


def call(daemon: Daemon, request: Request, done: Done) -> None:
    """Done is called once, unless this raises RpcError."""
    method = METHODS.get(request.method)
    if method is None:
        there_are = ", ".join(METHODS)
        raise RpcError(METHOD_NOT_FOUND, f"no method {request.method[:100]!r}; there are {there_are}")
    check_params(request, method)
    method.call(daemon, request.params, done)


def check_params(request: Request, method: Method) -> None:
    known = {param.name: param for param in method.params}
    for name, value in request.params.items():
        param = known.get(name)
        if param is None:
            raise RpcError(INVALID_PARAMS, f"{request.method} has no parameter {name[:100]!r}")
        if not isinstance(value, param.kind) or isinstance(value, bool):
            raise RpcError(INVALID_PARAMS, f"{name} is no {'number' if param.kind is int else 'string'}")
        if param.choices and value not in param.choices:
            raise RpcError(INVALID_PARAMS, f"{name} is none of {', '.join(param.choices)}")
    for param in method.params:
        if param.required and param.name not in request.params:
            raise RpcError(INVALID_PARAMS, f"{request.method} needs {param.name}")
