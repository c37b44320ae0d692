"""What the functions of SEAM promise, on every platform: called by address, in batches, a status for each."""

from __future__ import annotations

import ctypes
import select
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pvdrivers.platform import (
    OP_BETWEEN,
    OP_READONLY,
    OP_TO_GUEST,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_okay,
    granted,
)
from tests.platform.conftest import Bed, assert_held, own_grant, seam_call

PAGE = 4096
EBUSY = 16
NO_GREF = 0x00FF_FFF0


class Ends:
    """A bed with the seams of both ends."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.front_events, self.back_events = bed.front.open_events(), bed.back.open_events()
        self.front, self.back = bed.front.seam(self.front_events), bed.back.seam(self.back_events)
        self.pages: Any = bed.front.pages.alloc(8)
        self.grefs = [bed.front.pages.grant(f, bed.back.domid) for f in self.pages.frames]
        bed.back.prepare(bed.front.domid)

    def run(self, name: str, ops: np.ndarray) -> int:
        return seam_call(self.back, name, ops.ctypes.data, len(ops))


@pytest.fixture
def ends(bed: Bed) -> Iterator[Ends]:
    ends = Ends(bed)
    yield ends
    ends.front_events.close()
    ends.back_events.close()


def test_map_and_unmap(ends: Ends) -> None:
    ops = ends.bed.ops(ends.grefs)
    for i in range(8):
        ctypes.memset(ends.pages.address + i * PAGE, 65 + i, PAGE)
    for _ in range(3):
        assert ends.run("grant_map", ops) == 0
        assert (ops["status"] == GNTST_okay).all()
        for i in range(8):
            assert ctypes.string_at(int(ops["address"][i]), PAGE) == bytes([65 + i]) * PAGE
            assert_held(ends.bed, ends.grefs[i])
        assert ends.run("grant_unmap", ops) == 0
    assert all(ends.bed.front.pages.end(gref) for gref in ends.grefs)


def test_what_the_mapper_writes_the_granter_reads(ends: Ends) -> None:
    ops = ends.bed.ops(ends.grefs[:1])
    assert ends.run("grant_map", ops) == 0
    ctypes.memmove(int(ops["address"][0]) + 7, b"hello", 5)
    assert ctypes.string_at(ends.pages.address + 7, 5) == b"hello"
    ends.run("grant_unmap", ops)


def test_each_operation_has_its_own_status(ends: Ends) -> None:
    other = own_grant(ends.bed, ends.bed.back.domid + 17)
    ops = ends.bed.ops([ends.grefs[0], NO_GREF, ends.grefs[1], other])
    assert ends.run("grant_map", ops) == 2
    assert [int(s) == GNTST_okay for s in ops["status"]] == [True, False, True, False]
    assert ends.run("grant_unmap", ops) == 2  # the two that were not mapped
    assert [int(s) == GNTST_okay for s in ops["status"]] == [True, False, True, False]


def test_unmapped_twice_is_an_error(ends: Ends) -> None:
    ops = ends.bed.ops(ends.grefs[:1])
    assert ends.run("grant_map", ops) == 0
    again = ops.copy()
    assert ends.run("grant_unmap", ops) == 0
    assert ends.run("grant_unmap", ops) == 1
    assert ends.run("grant_unmap", again) == 1


def test_nonsense_handles(ends: Ends) -> None:
    tag = 0x5A << 48
    for handle in (0, -1, 1, 1 << 62, -(1 << 63), tag, tag | 0xFFFF_FFFF, tag | (0x7FFF << 33)):
        assert ends.run("grant_unmap", ends.bed.ops([0], handle=handle)) == 1


def test_read_only_grant(ends: Ends) -> None:
    gref = own_grant(ends.bed, ends.bed.back.domid, readonly=True)
    assert ends.run("grant_map", ends.bed.ops([gref])) == 1
    ops = ends.bed.ops([gref], flags=OP_READONLY)
    assert ends.run("grant_map", ops) == 0
    assert ends.run("grant_unmap", ops) == 0
    assert ends.bed.front.pages.end(gref)


def test_a_domain_that_is_not_there(ends: Ends) -> None:
    for domid in (0x7FEF, 0x7FFF, 0x8000, 0xFFFF):
        ops = ends.bed.ops([ends.grefs[0]], domid=domid)
        assert ends.run("grant_map", ops) == 1
        assert ops["status"][0] == GNTST_bad_domain


def test_copy(ends: Ends) -> None:
    local = ctypes.create_string_buffer(b"0123456789" * 10, 100)
    to = ends.bed.ops(ends.grefs[:2], address=ctypes.addressof(local), offset=[5, 4000], length=[100, 96],
                      flags=OP_TO_GUEST)  # fmt: skip
    assert ends.run("grant_copy", to) == 0
    assert ctypes.string_at(ends.pages.address + 5, 100) == local.raw
    assert ctypes.string_at(ends.pages.address + PAGE + 4000, 96) == local.raw[:96]
    back = ctypes.create_string_buffer(100)
    out = ends.bed.ops(ends.grefs[:1], address=ctypes.addressof(back), offset=5, length=100)
    assert ends.run("grant_copy", out) == 0
    assert back.raw == local.raw
    assert all(ends.bed.front.pages.end(gref) for gref in ends.grefs)


def test_a_copy_stays_within_the_page(ends: Ends) -> None:
    local = ctypes.create_string_buffer(2 * PAGE)
    for offset, length in ((1, PAGE), (PAGE, 1), (0xFFFF, 0xFFFF), (0, PAGE + 1)):
        ops = ends.bed.ops(ends.grefs[:1], address=ctypes.addressof(local), offset=offset, length=length)
        assert ends.run("grant_copy", ops) == 1
        assert ops["status"][0] == GNTST_bad_copy_arg
    assert ends.run("grant_copy", ends.bed.ops(ends.grefs[:1], address=ctypes.addressof(local), length=PAGE)) == 0


def test_a_copy_into_a_read_only_page_is_refused(ends: Ends) -> None:
    gref = own_grant(ends.bed, ends.bed.back.domid, readonly=True)
    local = ctypes.create_string_buffer(16)
    ops = ends.bed.ops([gref], address=ctypes.addressof(local), length=16, flags=OP_TO_GUEST)
    assert ends.run("grant_copy", ops) == 1
    ops["flags"] = 0
    assert ends.run("grant_copy", ops) == 0
    assert ends.bed.front.pages.end(gref)


@pytest.mark.parametrize("to_guest", [0, OP_TO_GUEST])
def test_a_copy_from_one_granted_page_into_another(ends: Ends, to_guest: int) -> None:
    text = bytes(range(256)) * 8
    own, other = ends.pages.address, ends.pages.address + PAGE
    source, target = (other + 100, own + 2048) if to_guest else (own + 2048, other + 100)
    ctypes.memset(own, 0x11, 2 * PAGE)
    ctypes.memmove(source, text, 2048)
    there = granted(ends.grefs[1], 100, ends.bed.front.domid)
    ops = ends.bed.ops(ends.grefs[:1], address=there, offset=2048, length=2048, flags=OP_BETWEEN | to_guest)
    assert ends.run("grant_copy", ops) == 0
    assert ops["status"][0] == GNTST_okay
    assert ctypes.string_at(target, 2048) == text
    assert ctypes.string_at(target - 100, 100) == bytes([0x11]) * 100
    assert all(ends.bed.front.pages.end(gref) for gref in ends.grefs)


def test_a_copy_between_pages_needs_both_grants(ends: Ends) -> None:
    """Either end may be one that is not there, or that cannot be written; the others of the batch are copied."""
    front, back = ends.bed.front.domid, ends.bed.back.domid
    readonly = own_grant(ends.bed, back, readonly=True)
    cases = [
        (ends.grefs[0], granted(ends.grefs[1], 0, front), 0, True),
        (ends.grefs[0], granted(NO_GREF, 0, front), 0, False),
        (NO_GREF, granted(ends.grefs[1], 0, front), 0, False),
        (ends.grefs[0], granted(readonly, 0, front), 0, False),
        (ends.grefs[0], granted(readonly, 0, front), OP_TO_GUEST, True),
        (readonly, granted(ends.grefs[0], 0, front), OP_TO_GUEST, False),
        (readonly, granted(ends.grefs[0], 0, front), 0, True),
        (ends.grefs[0], granted(ends.grefs[1], 0, 0x7FEF), 0, False),
        (ends.grefs[0], granted(ends.grefs[1], PAGE - 15, front), 0, False),
        (ends.grefs[0], granted(ends.grefs[1], PAGE - 16, front), 0, True),
    ]
    ops = ends.bed.ops([gref for gref, *_ in cases], length=16)
    ops["address"] = [other for _, other, *_ in cases]
    ops["flags"] = [OP_BETWEEN | to for *_, to, _ in cases]
    assert ends.run("grant_copy", ops) == sum(not good for *_, good in cases)
    assert [int(s) == GNTST_okay for s in ops["status"]] == [good for *_, good in cases]
    assert all(ends.bed.front.pages.end(gref) for gref in [*ends.grefs, readonly])


def test_offered_grants(ends: Ends) -> None:
    if not ends.bed.front.pages.dynamic:
        assert ends.front["offer_grant"][0] == 0
        pytest.skip("this platform grants pages once and for all")
    gref = ends.bed.front.pages.reserve(1)[0]
    frame, to = ends.pages.frames[3], ends.bed.back.domid
    ops = ends.bed.ops([gref])
    assert ends.run("grant_map", ops) == 1
    for _ in range(3):
        assert seam_call(ends.front, "offer_grant", gref, frame, to) == 0
        assert ends.run("grant_map", ops) == 0
        assert seam_call(ends.front, "offer_end", gref) == -EBUSY
        assert ends.run("grant_unmap", ops) == 0
        assert seam_call(ends.front, "offer_end", gref) == 0
        assert ends.run("grant_map", ops) == 1
    assert seam_call(ends.front, "offer_grant", gref, frame, to | 1 << 16) == 0
    assert ends.run("grant_map", ops) == 1
    assert ends.run("grant_map", ends.bed.ops([gref], flags=OP_READONLY)) == 0
    assert seam_call(ends.front, "offer_grant", 1 << 30, frame, to) < 0
    assert seam_call(ends.front, "offer_grant", gref, 1 << 30, to) < 0


def connected(ends: Ends) -> tuple[int, int]:
    port = ends.front_events.alloc_unbound(ends.bed.back.domid)
    return port, ends.back_events.bind_interdomain(ends.bed.front.domid, port)


class Waiter:
    """A worker's way of waiting: edge-triggered on the sources, then deliver and next."""

    def __init__(self, seam: np.ndarray, events: Any, ports: list[int]) -> None:
        self.seam = seam
        self.tokens = {}
        self.epoll = select.epoll()
        for port in ports:
            fd, token = events.source(port)
            self.tokens[fd] = token
            self.epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def taken(self, timeout: float) -> list[int]:
        for fd, _ in self.epoll.poll(timeout):
            assert seam_call(self.seam, "event_deliver", self.tokens[fd]) >= 0
        ports = []
        while (port := seam_call(self.seam, "event_next")) >= 0:
            ports.append(port)
        return ports


def test_an_event_is_masked_until_it_is_unmasked(ends: Ends) -> None:
    theirs, ours = connected(ends)
    waiter = Waiter(ends.back, ends.back_events, [ours])
    assert waiter.taken(5) == [ours]
    assert seam_call(ends.front, "event_notify", theirs) == 0
    assert waiter.taken(0.05) == []
    assert seam_call(ends.back, "event_unmask", ours) == 0
    assert waiter.taken(5) == [ours]  # what came while it was masked is not lost
    seam_call(ends.back, "event_unmask", ours)
    assert waiter.taken(0.05) == []
    assert seam_call(ends.front, "event_notify", theirs) == 0
    assert waiter.taken(5) == [ours]
    waiter.epoll.close()


def test_many_notifications_are_an_event_or_two(ends: Ends) -> None:
    theirs, ours = connected(ends)
    waiter = Waiter(ends.back, ends.back_events, [ours])
    waiter.taken(5)
    seam_call(ends.back, "event_unmask", ours)
    for _ in range(1000):
        assert seam_call(ends.front, "event_notify", theirs) == 0
    assert waiter.taken(5) == [ours]
    seam_call(ends.back, "event_unmask", ours)
    # Xen delivers the first at once, and all that come while it is masked are one more.
    if waiter.taken(0.05) == [ours]:
        seam_call(ends.back, "event_unmask", ours)
    assert waiter.taken(0.05) == []
    waiter.epoll.close()


def test_a_port_of_somebody_else_cannot_be_notified(ends: Ends) -> None:
    for port in (0, -1, 77, 1 << 20, 1 << 40, -(1 << 40)):
        assert seam_call(ends.front, "event_notify", port) < 0
