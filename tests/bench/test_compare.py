"""The statistics of pairs, and the plain table."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.bench import compare

RATES = st.lists(st.tuples(st.floats(1.0, 1e9), st.floats(1.0, 1e9)), min_size=1, max_size=40)


@given(RATES)
def test_the_median_lies_in_the_interval_and_that_in_the_range(pairs: list[tuple[float, float]]) -> None:
    ratios = [a / b for a, b in pairs]
    found = compare.paired([a for a, _ in pairs], [b for _, b in pairs])
    assert found.n == len(pairs)
    assert found.median == statistics.median(ratios)
    assert min(ratios) <= found.low <= found.median <= found.high <= max(ratios)


@pytest.mark.parametrize(("n", "left_off"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (21, 5)])
def test_the_interval_leaves_off_what_tables_of_the_sign_test_say(n: int, left_off: int) -> None:
    values = [float(i) for i in range(1, n + 1)]
    found = compare.paired(values, [1.0] * n)
    assert (found.low, found.high) == (values[left_off], values[-1 - left_off])


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    rounds, held = 2000, 0
    for _ in range(rounds):
        ratios = [draw.lognormvariate(0.0, 0.3) for _ in range(9)]  # the true median is 1
        found = compare.paired(ratios, [1.0] * 9)
        held += found.low <= 1.0 <= found.high
    assert held / rounds > 0.94


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_what_are_no_pairs_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="not pairs"):
        compare.paired(ours, theirs)


def test_a_target_is_missed_when_the_whole_interval_is_below_it() -> None:
    found = compare.Comparison(0.9, 0.8, 1.0, 9)
    assert found.meets(1.0)
    assert not found.meets(1.01)
    assert str(found) == "0.90 [0.80, 1.00]"


def test_a_table_is_aligned_and_shows_large_numbers_short() -> None:
    shown = compare.table([{"a": 1234567.0, "b": None}, {"a": "x", "b": True}], {"a": "first", "b": "second"})
    assert shown.splitlines() == ["first   second", "--------------", "1.23 M  -", "x       yes"]
