"""When a worker naps, and for how long; and what it takes for the time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pvdrivers.syscalls import cycle_counter
from pvdrivers.worker import nap
from pvdrivers.worker.records import RING, RING_ACTIVE, WORKER
from rings import ring as ringlib
from rings.jit import kernel
from tests.restart.bed import Bed as Restart

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
        r["inflight"] = 1
        self.wa, self.ra = int(self.worker.ctypes.data), int(self.ring.ctypes.data)

    def guest(self, req_prod: int, consumed: int, answered: int | None = None) -> None:
        """It has put so many requests, and consumed so many responses; all but one were answered, or `answered`."""
        self.page[0] = req_prod & 0xFFFFFFFF
        self.page[3] = (consumed + 1) & 0xFFFFFFFF
        self.end[0]["pushed"] = (req_prod - 1 if answered is None else answered) & 0xFFFFFFFF

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
    assert length == pytest.approx((SLOTS - 1) / 2 * 5_000, rel=0.05)


def test_with_nothing_in_flight_nobody_is_waited_for() -> None:
    """The guest may wait for us as well: for answers, which it has, before it puts more."""
    bed = Bed()
    bed.guest(SLOTS, 0)
    bed.pass_of(1, LONGEST // 4)
    for _ in range(10):
        assert bed.pass_of(4, 4 * 5_000) > 0
        bed.ring[0]["inflight"] = 0
        assert bed.pass_of(4, 4 * 5_000) == 0
        bed.ring[0]["inflight"] = 1


def test_a_guest_that_can_put_no_more_is_not_waited_for() -> None:
    bed = Bed()
    bed.guest(SLOTS, 0)
    bed.pass_of(1, LONGEST // 4)
    for _ in range(10):
        bed.guest(SLOTS, 0)
        assert bed.pass_of(4, 4 * 5_000) > 0
        bed.guest(SLOTS, 0, answered=0)
        assert bed.pass_of(4, 4 * 5_000) == 0
    bed.guest(SLOTS // 2, 0)  # it does with less from now on
    for _ in range(30):
        bed.pass_of(4, 4 * 5_000)
    bed.guest(SLOTS // 2, 0, answered=0)
    assert bed.pass_of(4, 4 * 5_000) == 0


def test_a_nap_that_ends_with_all_on_the_ring_was_too_long() -> None:
    """Sixteen requests in a nap say nothing of the guest's rate, if sixteen are all it puts before it waits."""
    bed = Bed()
    bed.guest(SLOTS, 0)
    length = bed.pass_of(1, LONGEST // 3)
    assert length == LONGEST
    naps = 0
    while length > 0:
        bed.guest(SLOTS, 0, answered=0)
        bed.pass_of(SLOTS, length)
        bed.guest(SLOTS, 0)
        shorter = bed.pass_of(0, 0)
        assert shorter < length or length == LONGEST
        length, naps = shorter, naps + 1
    assert naps < 40


def test_a_guest_that_waits_for_its_batch_is_not_held_up(tmp_path: Path) -> None:
    """Reads of 24 requests, the next when all of the last are answered, beside a nap of a second at the most."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with Restart(tmp_path / "run", "--coalesce", "1000000") as bed:
        bed.serve()
        disk = bed.disk(f"{image},indirect=0", memory_mib=16)
        disk.read(0, 1 << 20)
        began = time.monotonic()
        for _ in range(20):
            disk.read(0, 1 << 20)
        assert time.monotonic() - began < 3


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


def test_how_fast_the_counter_goes_is_measured_again_and_again() -> None:
    """Who was interrupted in the first measurement has it wrong until the next reading of the clock."""
    bed = Bed()
    w = bed.worker[0]
    before, began = time.monotonic_ns(), count_cycles()
    time.sleep(0.02)
    after, ended = time.monotonic_ns(), count_cycles()
    right = ((after - before) << 20) // (ended - began)
    w["cycle_scale"], w["cycle_limit"] = right * 3, (ended - began) // 4
    for _ in range(2):
        w["now"] = nap.now_ns(bed.wa)
        time.sleep(0.02)
    nap.now_ns(bed.wa)
    assert 0.5 < w["cycle_scale"] / right < 2
