"""From what was given on a command line to checked values."""

import os
from collections.abc import Mapping
from typing import Any

from vfsd.errors import ConfigError
from vfsd.hostfs.ids.idmap import IDENTITY
from vfsd.options.o_list import Given
from vfsd.options.table import SERVE_OPTIONS, ServeOptions
from vfsd.sandbox.userns import check_allowed


def check_options(given: Mapping[str, Given]) -> ServeOptions:
    """By Option.key what was given, to checked values. ConfigError."""
    values: dict[str, Any] = {}
    for option in SERVE_OPTIONS:
        spelled, text = given.get(option.key, (option.name, None))
        if option.check is None:
            values[option.key] = option.on if text is None else text
            continue
        if text is None:
            text = () if option.multiple else option.default
        if text is None and option.required:
            raise ConfigError(option.name, f"is missing; add {option.name} {option.metavar}")
        values[option.key] = None if text is None else option.check(spelled, text)
    options = ServeOptions(**values)
    check_together(options)
    return options


def check_together(options: ServeOptions) -> None:
    """What is missing, and what can't be combined. ConfigError."""
    check_socket_options(options)
    if options.dax_policy is not None and options.dax_window is None:
        raise ConfigError("--dax-policy", "there is no window; add --dax-window")
    if options.zero_message_open:
        check_zero_message_open(options)
    if options.uid_map or options.gid_map:
        check_allowed(options.uid_map, options.gid_map)
    translated = {options.translate_uid, options.translate_gid} != {IDENTITY}
    if options.posix_acl != "never" and translated:
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
