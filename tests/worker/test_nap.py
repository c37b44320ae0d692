"""When a worker naps, and for how long; and what it takes for the time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pvdrivers.syscalls import cycle_counter
from pvdrivers.worker import nap
from pvdrivers.worker.records import RING, RING_ACTIVE, WORKER
from rings import ring as ringlib
from rings.jit import kernel

LONGEST = 200_000
SLOTS = 32


@kernel
def depth_of(ra: int) -> int:
    return nap.depth(ra)


@kernel
def count_cycles() -> int:
    return cycle_counter()


class Bed:
    """A worker's record with one active ring, whose guest we are."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.worker, self.ring = np.zeros(1, WORKER), np.zeros(1, RING)
        self.end, self.page = np.zeros(1, ringlib.RING_END), np.zeros(1024, np.uint32)
        ringlib.format_page(self.page.ctypes.data)
        assert ringlib.back_end(self.end.ctypes.data, self.page.ctypes.data, SLOTS, 112) != ringlib.CORRUPT
        w, r = self.worker[0], self.ring[0]
        w["nap_ns"] = longest
        w["active_head"] = self.ring.ctypes.data
        r["state"], r["end"], r["nr_ents"] = RING_ACTIVE, self.end.ctypes.data, SLOTS
        self.wa, self.ra = int(self.worker.ctypes.data), int(self.ring.ctypes.data)

    def guest(self, req_prod: int, consumed: int) -> None:
        """It has put so many requests, and consumed so many responses."""
        self.page[0] = req_prod & 0xFFFFFFFF
        self.page[3] = (consumed + 1) & 0xFFFFFFFF

    def pass_of(self, taken: int, ns: int) -> int:
        """A pass that took `taken` requests, `ns` after the last; how long to nap."""
        self.worker[0]["taken"] += taken
        self.worker[0]["now"] += ns
        return int(nap.nap_length(self.wa))


@pytest.mark.parametrize("first", [0, 1000, 2**32 - 5])
def test_depth_is_what_the_guest_keeps_going(first: int) -> None:
    bed = Bed()
    for going in (0, 1, 7, SLOTS):
        bed.guest(first + going, first)
        assert depth_of(bed.ra) == going
    bed.guest(first + SLOTS + 1, first)  # a lie, or an index from before the guest had looked at its responses
    assert depth_of(bed.ra) == 0


def test_a_deep_queue_is_waited_for_half_at_the_rate_of_its_guest() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    for _ in range(100):
        length = bed.pass_of(4, 4 * 5_000)
    assert length == pytest.approx(SLOTS // 2 * 5_000, rel=0.05)


def test_it_is_never_waited_for_longer_than_allowed() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    for _ in range(100):
        length = bed.pass_of(1, LONGEST // 3)
        assert length <= LONGEST
    assert length == LONGEST


def test_a_guest_too_slow_for_two_is_not_waited_for() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    for _ in range(100):
        length = bed.pass_of(1, 10**9)
    assert length == 0


def test_a_short_nap_is_none() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    for _ in range(100):
        length = bed.pass_of(16, 16 * 100)
    assert length == 0


def test_few_requests_do_not_wait() -> None:
    bed = Bed()
    bed.guest(nap.DEEP - 1, 0)
    for _ in range(10):
        assert bed.pass_of(1, 50_000) == 0


def test_rings_that_cannot_be_served_are_not_waited_for() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    bed.ring[0]["blocked"] = 1
    assert bed.pass_of(1, 50_000) == 0


def test_without_a_longest_nap_there_is_none() -> None:
    bed = Bed(0)
    bed.guest(SLOTS, 0)
    assert bed.pass_of(1, 50_000) == 0


def test_the_time_by_the_counter_is_the_time() -> None:
    bed = Bed()
    w = bed.worker[0]
    assert abs(nap.now_ns(bed.wa) - time.monotonic_ns()) < 10**9
    before, began = time.monotonic_ns(), count_cycles()
    time.sleep(0.02)
    after, ended = time.monotonic_ns(), count_cycles()
    w["cycle_scale"] = ((after - before) << 20) // (ended - began)
    w["cycle_limit"] = (ended - began) // 2
    last = 0
    for _ in range(2000):
        w["now"] = now = nap.now_ns(bed.wa)
        assert now >= last
        assert abs(now - time.monotonic_ns()) < 10**9
        last = now
