"""`-o name[=value],...`: the options as libvirt and the older daemons spell them."""

from collections.abc import Sequence

from vfsd.errors import ConfigError
from vfsd.options.table import SERVE_OPTIONS, Option


def o_spellings() -> dict[str, tuple[Option, str | bool | None]]:
    """Every word `-o` knows: the option, and the value it stands for (None: one follows after "=")."""
    known: dict[str, tuple[Option, str | bool | None]] = {}
    for option in SERVE_OPTIONS:
        for name in option.o_names:
            known[name] = (option, True if option.check is None else None)
            if option.check is None:
                known[f"no_{name}"] = (option, False)
        known.update({word: (option, value) for word, value in option.o_words.items()})
    return known


def split_o(text: str) -> list[str]:
    """The words of one `-o`: between commas, where two commas are one of the word itself."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]


def read_o(lists: Sequence[str]) -> dict[str, tuple[str, str | bool]]:
    """What `-o` gives, the last word for an option: by Option.key its spelling and value. ConfigError."""
    known = o_spellings()
    given: dict[str, tuple[str, str | bool]] = {}
    for word in (word for text in lists for word in split_o(text)):
        name, equals, value = word.partition("=")
        spelled = f"-o {name}"
        if name not in known:
            raise ConfigError(spelled, f"is unknown; use {', '.join(known)}")
        option, stands_for = known[name]
        if equals and stands_for is not None:
            raise ConfigError(spelled, f"takes no value; leave out {equals + value!r}")
        if not equals and stands_for is None:
            raise ConfigError(spelled, f"needs a value; write {name}={option.metavar}")
        given[option.key] = (spelled, value if stands_for is None else stands_for)
    return given
