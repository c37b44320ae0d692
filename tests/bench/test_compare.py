"""What is made of pairs of runs."""

from __future__ import annotations

import math
import random

import pytest

from pvdrivers.bench.compare import Comparison, paired, table


def test_the_ratio_is_taken_within_the_pair() -> None:
    # The machine became ten times slower half-way; ours was always a tenth faster.
    theirs = [100.0] * 11 + [10.0] * 10
    assert paired([1.1 * t for t in theirs], theirs) == Comparison(*(pytest.approx(1.1),) * 3, 21)


@pytest.mark.parametrize(("n", "cut"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (21, 5), (31, 9)])
def test_the_interval_is_that_of_the_order_statistics(n: int, cut: int) -> None:
    ratios = [float(i + 1) for i in range(n)]
    shuffled = random.Random(n).sample(ratios, n)
    found = paired(shuffled, [1.0] * n)
    assert (found.median, found.low, found.high, found.n) == ((n + 1) / 2, 1.0 + cut, float(n - cut), n)
    inside = 1 - 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n
    narrower = 1 - 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n
    assert n < 6 or inside >= 0.95 > narrower


def test_a_target_is_missed_when_all_of_the_interval_is_below() -> None:
    assert Comparison(0.97, 0.93, 1.0, 21).meets(1.0)
    assert not Comparison(0.97, 0.93, 0.99, 21).meets(1.0)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_what_is_no_pair(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="not pairs"):
        paired(ours, theirs)


def test_table() -> None:
    rows = [{"a": "x", "b": 1_234_567.0, "c": True}, {"a": "longer", "b": 0.5, "c": None}]
    assert table(rows, {"a": "A", "b": "rate", "c": "met"}).splitlines() == [
        "A       rate    met",
        "-------------------",
        "x       1.23 M  yes",
        "longer  0.50    -",
    ]
