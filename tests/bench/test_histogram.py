"""Latencies are counted as numpy would count them, to the width of a bucket."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vfsd_bench import _measure
from vfsd_bench.histogram import Histogram, bounds

DURATIONS = st.lists(st.integers(0, 2**63) | st.integers(0, 100_000), min_size=1, max_size=300)
WIDTH = 1 / 64  # of a bucket, by its smallest value


@given(DURATIONS, st.sampled_from([0.1, 1, 50, 90, 99, 99.9, 100]))
def test_percentiles_are_those_of_numpy(values: list[int], q: float) -> None:
    found = Histogram.from_values(values).percentile(q)
    exact = float(np.percentile(np.array(values, dtype=np.uint64), q, method="inverted_cdf"))
    assert abs(found - exact) <= exact * WIDTH + 1


@given(DURATIONS)
def test_number_sum_and_extremes_are_exact(values: list[int]) -> None:
    found = Histogram.from_values(values)
    assert (found.n, found.smallest, found.largest) == (len(values), min(values), max(values))
    assert found.total == sum(values) % 2**64


@given(DURATIONS, DURATIONS)
def test_adding_is_counting_both(some: list[int], others: list[int]) -> None:
    found = Histogram.from_values(some)
    found.add(Histogram.from_values(others))
    both = Histogram.from_values(some + others)
    assert found.counts == both.counts
    assert (found.n, found.smallest, found.largest) == (both.n, both.smallest, both.largest)


@given(st.integers(0, 2**64 - 1))
def test_a_value_lies_within_its_bucket(value: int) -> None:
    counts = Histogram.from_values([value]).counts
    low, high = bounds(next(index for index, n in enumerate(counts) if n))
    assert low <= value < high


def test_nothing_has_no_percentiles() -> None:
    empty = Histogram()
    empty.add(Histogram())
    assert (empty.n, empty.percentile(99), empty.mean) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bits", [0, 1, 2, 5, 8, 13])
def test_a_scattered_order_has_each_block_once(bits: int) -> None:
    found = [_measure.block_at(i, bits) for i in range(1 << bits)]
    assert sorted(found) == list(range(1 << bits))
    assert [_measure.block_at(i + (1 << bits), bits) for i in range(1 << bits)] == found


def test_contents_show_what_is_not_as_it_was_written() -> None:
    data = bytearray(4 * _measure.PAGE)
    _measure.fill(data, 7, 100)
    assert _measure.first_wrong(data, 7, 100) == -1
    assert _measure.first_wrong(data, 8, 100) == 0, "another run's"
    assert _measure.first_wrong(data, 7, 101) == 0, "another page's"
    data[3 * _measure.PAGE + 1234] ^= 1
    assert _measure.first_wrong(data, 7, 100) == 3 * _measure.PAGE
    assert _measure.tags_wrong(data, 7, 100) == -1, "only the ends are looked at"
    data[2 * _measure.PAGE - 1] ^= 1
    assert _measure.tags_wrong(data, 7, 100) == _measure.PAGE
