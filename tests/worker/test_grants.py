"""acquire and release: every page that was had is let go of once, and a page that cannot be had fails its request."""

from __future__ import annotations

import pytest

from pvdrivers.platform import GNTST_no_device_space, GNTST_no_space
from pvdrivers.worker import grants
from pvdrivers.worker.records import POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT
from tests.worker.bed import BAD_GNTREF, PAGE, Bed, Segment, purge, try_to_map


def whole(*grefs: int) -> list[Segment]:
    return [(g, 0, PAGE) for g in grefs]


@pytest.mark.parametrize("policy", [POLICY_MAP, POLICY_PERSISTENT, POLICY_COPY])
def test_one_bad_page_fails_its_request_alone(policy: int) -> None:
    bed = Bed(policy, bounce=512)
    bed.refused[4] = BAD_GNTREF
    for slot, segments in enumerate([whole(0, 1), whole(3, 4, 5), whole(2), []]):
        assert bed.prepare(slot, segments, to_guest=False)
    bed.acquire([0, 1, 2, 3])
    assert [int(r["failed"]) for r in bed.reqs[:4]] == [0, BAD_GNTREF, 0, 0]
    assert int(bed.stats[0]["map_failures"]) == 1
    for slot in range(4):
        bed.release(slot)
    assert bed.mapped.sum() == (5 if policy == POLICY_PERSISTENT else 0)
    bed.check()


def test_neighbours_are_one_iovec() -> None:
    bed = Bed(POLICY_MAP)
    bed.prepare(0, [*whole(1, 2), (3, 0, 512), (5, 512, 512), (5, 1024, 3072), (6, 0, 1024), (2, 0, 4096)], False)
    bed.acquire([0])
    at = bed.pages.ctypes.data
    assert bed.iovecs(0) == [(at + PAGE, 2 * PAGE + 512), (at + 5 * PAGE + 512, 3584 + 1024), (at + 2 * PAGE, PAGE)]
    bed.release(0)
    bed.check()


def test_more_pages_than_a_batch_holds() -> None:
    bed = Bed(POLICY_MAP, max_ops=8)
    for slot, n in enumerate([5, 3, 1, 8, 7, 2]):
        bed.prepare(slot, whole(*range(n)), to_guest=True)
    bed.acquire([0, 1, 2, 3, 4, 5])
    assert bed.counts[0]["maps"] == 26
    assert (bed.calls(), int(bed.counts[0]["largest"])) == ({"map": 5, "unmap": 0, "copy": 0}, 8)
    bed.release(3, 0, 5, 1, 4, 2)
    assert bed.calls()["unmap"] == 4
    assert not bed.mapped.any()
    bed.check()


def test_pages_of_a_write_are_mapped_readonly() -> None:
    bed = Bed(POLICY_MAP)
    bed.prepare(0, whole(0), to_guest=True)
    bed.prepare(1, whole(1), to_guest=False)
    bed.acquire([0, 1])
    assert bed.readonly[:2].tolist() == [0, 1]
    bed.release(0)
    bed.release(1)


def test_the_same_page_twice_in_one_pass() -> None:
    """Both are mapped, one is kept; the other goes with its request."""
    bed = Bed(POLICY_PERSISTENT)
    bed.prepare(0, whole(3, 3), to_guest=True)
    bed.prepare(1, whole(3), to_guest=False)
    bed.acquire([0, 1])
    assert bed.mapped[3] == 3 and bed.cached() == {3: 1}
    bed.release(1)
    assert bed.mapped[3] == 2
    bed.release(0)
    assert bed.mapped[3] == 1 and bed.cached() == {3: 0}
    bed.prepare(0, whole(3, 3), to_guest=True)
    bed.acquire([0])
    assert bed.mapped[3] == 1 and bed.cached() == {3: 2} and int(bed.stats[0]["persistent_hits"]) == 2
    bed.release(0)
    bed.check()


def test_pages_that_were_not_used_for_a_minute_go() -> None:
    bed = Bed(POLICY_PERSISTENT)
    for gref, now in ((0, 1), (1, 30_000_000_000)):
        bed.worker[0]["now"] = now
        bed.prepare(0, whole(gref), to_guest=True)
        bed.acquire([0])
        bed.release(0)
    for now, left in ((59_000_000_000, {0, 1}), (60_500_000_000, {1}), (60_600_000_000, {1}), (91_000_000_000, set())):
        bed.worker[0]["now"] = now
        purge(bed.wa, bed.ra)
        assert set(bed.cached()) == left
    assert not bed.mapped.any()
    bed.check()


def test_who_waits_for_bounce_pages_is_woken_by_a_release() -> None:
    bed = Bed(POLICY_COPY, bounce=8)
    assert bed.prepare(0, whole(0), to_guest=True)
    bed.acquire([0])
    assert not bed.prepare(1, whole(0), to_guest=True)
    bed.worker[0]["starved"], bed.ring[0]["blocked"] = 1, 1
    bed.release(0)
    assert (int(bed.worker[0]["ready_head"]), int(bed.worker[0]["starved"])) == (bed.ra, 0)
    assert bed.prepare(1, whole(0), to_guest=True)


def test_a_page_named_twice_makes_no_other_go() -> None:
    """Room for two, one is kept, and the next request names one more, twice."""
    bed = Bed(POLICY_PERSISTENT, bound=2)
    for segments in ([(0, 0, PAGE)], [(1, 0, PAGE), (1, 0, PAGE)]):
        bed.prepare(0, segments, True)
        bed.acquire([0])
        bed.release(0)
    assert set(bed.cached()) == {0, 1} and bed.stats[0]["persistent_held"] == 2
    bed.check()


@pytest.mark.parametrize("policy", [POLICY_MAP, POLICY_PERSISTENT])
@pytest.mark.parametrize("status", [GNTST_no_space, GNTST_no_device_space])
def test_no_room_in_xen(policy: int, status: int) -> None:
    """Two of three requests are carried by bounce pages; for the third there are none."""
    bed = Bed(policy, bounce=5)
    bed.counts[0]["room"], bed.counts[0]["no_room_status"] = 1, status
    for slot, (segments, to_guest) in enumerate([(whole(0, 1), True), (whole(2, 3), False), (whole(4, 5), True)]):
        assert bed.prepare(slot, segments, to_guest)
    bed.acquire([0, 1, 2])
    assert bed.reqs["failed"][:3].tolist() == [0, 0, status]
    assert bed.reqs["bounced"][:3].tolist() == [2, 2, 0]
    assert not bed.mapped.any(), "what was mapped is given back"
    stats, ring = bed.stats[0], bed.ring[0]
    assert (int(stats["fallbacks"]), int(stats["map_failures"])) == (2, 1)
    assert bed.calls() == {"map": 1, "unmap": 1, "copy": 1}
    assert (int(ring["policy"]), int(ring["limit"]), bed.alerts()) == (POLICY_COPY, status, 1)
    bed.release(0, 1, 2)
    assert bed.worker[0]["bounce_n"] == 5
    bed.check()


def test_with_room_again_it_is_mapped_again() -> None:
    """After a minute, then ever more rarely, and only with bounce pages to spare; each way is told once."""
    bed = Bed(POLICY_MAP, bounce=grants.SPARE + 2)
    ring, w = bed.ring[0], bed.worker[0]

    def mapped(seconds: int) -> bool:
        w["now"] += seconds * 10**9
        try_to_map(bed.wa, bed.ra)
        assert bed.prepare(0, whole(0, 1), True)
        bed.acquire([0])
        there = bool(bed.mapped.any())
        assert bed.reqs["failed"][0] == 0 and there == (bed.reqs["bounced"][0] == 0)
        assert bed.stats[0]["copying"] == (not there)
        bed.release(0)
        return there

    bed.counts[0]["room"] = 0
    assert not mapped(0) and bed.alerts() == 1
    wait, fallbacks = 60, 1
    for _ in range(10):
        assert not mapped(wait - 1) and bed.stats[0]["fallbacks"] == fallbacks
        assert not mapped(2) and bed.stats[0]["fallbacks"] == fallbacks + 1
        wait, fallbacks = min(2 * wait, 3600), fallbacks + 1
    assert bed.alerts() == 0
    bed.counts[0]["room"] = 100
    assert not mapped(wait - 1)
    w["bounce_n"] -= 3
    assert not mapped(2)
    w["bounce_n"] += 3
    assert mapped(0) and ring["limit"] == 0 and bed.alerts() == 1
    assert mapped(0) and bed.alerts() == 0
    bed.check()


def test_a_cache_goes_when_there_is_no_room() -> None:
    """At once, but for pages in use, and these with the last request that uses them."""
    bed = Bed(POLICY_PERSISTENT, bounce=64)
    bed.prepare(0, whole(0, 1), to_guest=True)
    bed.prepare(1, whole(1, 2), to_guest=True)
    bed.acquire([0, 1])
    bed.release(1)
    bed.counts[0]["room"] = 3
    bed.prepare(2, whole(4), to_guest=False)
    bed.acquire([2])
    assert bed.cached() == {1: 1, 0: 1} and int(bed.stats[0]["persistent_held"]) == 2
    assert bed.iovecs(0) == [(bed.pages.ctypes.data, 2 * PAGE)], "it goes on with what it has"
    bed.release(2, 0)
    assert bed.cached() == {} and not bed.mapped.any() and int(bed.stats[0]["persistent_held"]) == 0
    bed.check()
