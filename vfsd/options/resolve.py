"""From what was given on a command line to checked values."""

from __future__ import annotations

import os

from vfsd.errors import ConfigError
from vfsd.options.table import SERVE_OPTIONS, Option, ServeOptions

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vfsd.options.o_list import Given


def check_options(given: Mapping[str, Given]) -> ServeOptions:
    """By Option.key what was given, to checked values. ConfigError."""
    values: dict[str, Any] = {}
    for option in SERVE_OPTIONS:
        values[option.key] = check_value(option, given.get(option.key))
    options = ServeOptions(values)
    check_together(options)
    return options


def check_value(option: Option, found: Given | None) -> Any:
    """Of one option, as it was given or not at all. ConfigError."""
    spelled, text = (option.name, None) if found is None else (found.spelled, found.value)
    if option.check is None:
        return option.on if text is None else text
    if text is None:
        text = option.default
    if text is None and option.required:
        raise ConfigError(option.name, f"is missing; add {option.name} {option.metavar}")
    unset = () if option.multiple else None
    return unset if text is None else option.check(spelled, text)


def check_together(options: ServeOptions) -> None:
    """What is missing, and what can't be combined. ConfigError."""
    check_socket_options(options)
    if options.dax_policy is not None and options.dax_window is None:
        raise ConfigError("--dax-policy", "there is no window; add --dax-window")
    if options.zero_message_open:
        check_zero_message_open(options)
    if options.uid_map or options.gid_map:
        from vfsd.sandbox.userns import check_allowed

        check_allowed(options.uid_map, options.gid_map)
        if options.sandbox != "namespace":
            raise ConfigError("--uid-map", "is for the user namespace of --sandbox namespace; add it")
    if options.posix_acl != "never" and (options.translate_uid or options.translate_gid):
        raise ConfigError("--posix-acl", "the ids in an ACL can't be translated; leave out --translate-*")


def check_socket_options(options: ServeOptions) -> None:
    if options.fd is None:
        if options.socket is None:
            raise ConfigError("--socket", "is missing; add --socket PATH or --fd N")
    elif options.socket is not None:
        raise ConfigError("--fd", "there is --socket too; leave one of them out")
    elif options.socket_group is not None:
        raise ConfigError("--socket-group", "the socket of --fd was made by others; leave one of them out")


def check_zero_message_open(options: ServeOptions) -> None:
    needs = {
        "--cache always, as the guest keeps all it has read of a file": options.cache == "always",
        "to go without --writeback, which depends on how files were opened": not options.writeback,
        "to go without --readonly, which an open for writing has to be told": not options.readonly,
        "to go without --flock and --posix-lock: locks end with an open file": not (
            options.flock or options.posix_lock
        ),
        "root: a file stays in use when its mode is changed": os.geteuid() == 0,
    }
    for what, met in needs.items():
        if not met:
            raise ConfigError("--zero-message-open", f"needs {what}")
