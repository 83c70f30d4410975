"""The rules of --translate-uid and --translate-gid against a plain model."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import ConfigError
from vfsd.hostfs.ids.idmap import FORBID, ID_MAX, SHIFT, Range, parse_rules

FORMS = ("guest", "host", "squash-guest", "squash-host", "forbid-guest", "map")
Rule = tuple[str, int, int, int]  # type, from, to, count


def text_of(rule: Rule, separator: str = ":") -> str:
    kind, source, target, count = rule
    fields = [source, count] if kind == "forbid-guest" else [source, target, count]
    return separator.join([kind, *map(str, fields)])


def model(rules: list[Rule], ident: int, of_guest: bool) -> int | None:
    """What becomes of an id; None: it is forbidden."""
    for kind, source, target, count in rules:
        if kind == "map" and not of_guest:
            source, target = target, source
        elif of_guest != (kind in ("guest", "squash-guest", "forbid-guest", "map")):
            continue
        if source <= ident < source + count:
            if kind == "forbid-guest":
                return None
            return target if kind.startswith("squash") else target + ident - source
    return ident


def compiled(ranges: tuple[Range, ...], ident: int) -> int | None:
    for found in ranges:
        if found.first <= ident <= found.last:
            if found.how == FORBID:
                return None
            return found.to + (ident - found.first if found.how == SHIFT else 0)
    return ident


@given(
    rules=st.lists(
        st.tuples(st.sampled_from(FORMS), st.integers(0, 60), st.integers(0, 60), st.integers(1, 9)),
        max_size=5,
    ),
    separator=st.sampled_from(":/ .;"),
)
def test_rules_mean_what_the_model_says(rules: list[Rule], separator: str) -> None:
    try:
        found = parse_rules("--translate-uid", [text_of(rule, separator) for rule in rules])
    except ConfigError as problem:
        assert "of an earlier rule" in str(problem)
        return
    for ident in range(80):
        assert compiled(found.to_host, ident) == model(rules, ident, True)
        assert compiled(found.to_guest, ident) == model(rules, ident, False)
    for table in (found.to_host, found.to_guest):
        assert all(a.last < b.first for a, b in itertools.pairwise(table))


@pytest.mark.parametrize(
    ("rules", "number", "at", "says"),
    [
        ([""], 1, 1, "type ''"),
        (["gues:0:1:2"], 1, 1, "type 'gues'"),
        (["map"], 1, 4, "the guest id is missing"),
        (["map:0:1:1", "guest:5:6"], 2, 10, "the count is missing"),
        (["guest/1/2/x"], 1, 11, "'x' is no count"),
        (["guest:-1:2:3"], 1, 7, "'-1' is no guest id"),
        (["forbid-guest:0:1:1"], 1, 18, "is too much"),
        ([f"guest:{ID_MAX}:0:2"], 1, 7, "pass the last one"),
        ([f"map:0:{ID_MAX}:2"], 1, 7, "pass the last one"),
        (["map:0:10:5", "squash-guest:4:0:1"], 2, 1, "guest ids of an earlier rule"),
        (["map:0:10:5", "host:14:0:1"], 2, 1, "host ids of an earlier rule"),
    ],
)
def test_a_mistake_is_named_by_its_place(rules: list[str], number: int, at: int, says: str) -> None:
    with pytest.raises(ConfigError) as info:
        parse_rules("--translate-gid", rules)
    assert str(info.value).startswith(f"--translate-gid: rule {number}, character {at}: ")
    assert says in str(info.value)


def test_every_id_may_be_squashed() -> None:
    found = parse_rules("--translate-uid", ["SQUASH-GUEST:0:1000:4294967295"])
    assert found.to_host == (Range(0, ID_MAX, 1000, 1),)
