"""in_range and page_span against integers without end, where the edges are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings.bounds import in_page, in_range, page_span
from tests.rings import naive

EDGES = [0, 1, 7, 8, 4095, 4096, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 8, 2**64 - 1]
U64 = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from(EDGES), st.integers(0, 64), st.integers(2**64 - 64, 2**64 - 1)
)
LIMIT = st.one_of(st.integers(0, 2**63 - 1), st.integers(0, 64), st.just(2**63 - 1))


@given(U64, U64, LIMIT)
def test_in_range_of_guest_numbers(start: int, count: int, limit: int) -> None:
    want = naive.in_range(start, count, limit)
    assert bool(in_range(np.uint64(start), np.uint64(count), np.int64(limit))) == want
    # The same numbers after a trip through int64, where 2**63 and more are negative.
    wrapped = [n - 2**64 if n >= 2**63 else n for n in (start, count)]
    assert bool(in_range(np.int64(wrapped[0]), np.int64(wrapped[1]), np.int64(limit))) == want
    assert bool(in_range(np.uint64(start), np.int64(wrapped[1]), np.int64(limit))) == want


@pytest.mark.parametrize("limit", [0, 1, 8, 2**63 - 1])
@pytest.mark.parametrize("past", [0, 1, 2])
def test_in_range_at_its_end(limit: int, past: int) -> None:
    for count in (0, 1, 8):
        start = limit - count + past
        assert bool(in_range(np.uint64(max(start, 0)), np.uint64(count), limit)) == naive.in_range(
            max(start, 0), count, limit
        )


@given(U64, U64)
def test_in_page(offset: int, nbytes: int) -> None:
    assert bool(in_page(np.uint64(offset), np.uint64(nbytes))) == naive.in_range(offset, nbytes, 4096)


@given(st.integers(0, 3 * 4096), st.integers(0, 5 * 4096))
def test_page_span(offset: int, nbytes: int) -> None:
    assert page_span(offset, nbytes) == naive.page_span(offset, nbytes)
