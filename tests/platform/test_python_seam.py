"""What GrantTable, GuestPages, EventChannel and XenStore promise, on every platform."""

from __future__ import annotations

import ctypes
import time

import pytest

from pvdrivers.errors import PlatformError
from tests.platform.conftest import ON_XEN, Bed, assert_held

PAGE = 4096
NO_GREF = 0x00FF_FFF0


def put(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def get(address: int, n: int) -> bytes:
    return ctypes.string_at(address, n)


def test_pages_are_zeroed_and_side_by_side(bed: Bed) -> None:
    pages = bed.front.pages.alloc(5)
    assert pages.address % PAGE == 0
    assert len(pages.frames) == 5
    assert get(pages.address, 5 * PAGE) == bytes(5 * PAGE)
    pages.free()


def test_freed_pages_come_back_zeroed(bed: Bed) -> None:
    for _ in range(3):
        pages = bed.front.pages.alloc(2)
        assert get(pages.address, 2 * PAGE) == bytes(2 * PAGE)
        put(pages.address, b"x" * 2 * PAGE)
        pages.free()


def test_a_mapped_page_is_the_same_page(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    gref = bed.front.pages.grant(pages.frames[0], bed.back.domid)
    with bed.back.grants.map(bed.front.domid, [gref]) as mapping:
        put(pages.address + 100, b"from the front")
        assert get(mapping.address + 100, 14) == b"from the front"
        put(mapping.address + 200, b"from the back")
        assert get(pages.address + 200, 13) == b"from the back"
    assert bed.front.pages.end(gref)


def test_pages_are_mapped_side_by_side_in_the_order_given(bed: Bed) -> None:
    pages = bed.front.pages.alloc(4)
    for i in range(4):
        put(pages.address + i * PAGE, bytes([65 + i]) * PAGE)
    grefs = [bed.front.pages.grant(frame, bed.back.domid) for frame in pages.frames]
    order = [2, 0, 3, 1]
    with bed.back.grants.map(bed.front.domid, [grefs[i] for i in order]) as mapping:
        assert mapping.pages == 4
        assert get(mapping.address, 4 * PAGE) == b"".join(bytes([65 + i]) * PAGE for i in order)


def test_a_grant_cannot_end_while_it_is_mapped(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    gref = bed.front.pages.grant(pages.frames[0], bed.back.domid)
    mapping = bed.back.grants.map(bed.front.domid, [gref])
    assert_held(bed, gref)
    put(mapping.address, b"still there")
    mapping.unmap()
    assert bed.front.pages.end(gref)
    with pytest.raises(PlatformError, match=str(gref)):
        bed.back.grants.map(bed.front.domid, [gref])


def test_a_page_mapped_twice_ends_with_the_second(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    gref = bed.front.pages.grant(pages.frames[0], bed.back.domid)
    one = bed.back.grants.map(bed.front.domid, [gref])
    two = bed.back.grants.map(bed.front.domid, [gref], readonly=True)
    one.unmap()
    assert_held(bed, gref)
    two.unmap()
    assert bed.front.pages.end(gref)


def test_unmap_is_once_only(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    mapping = bed.back.grants.map(bed.front.domid, [bed.front.pages.grant(pages.frames[0], bed.back.domid)])
    mapping.unmap()
    with pytest.raises(PlatformError):
        mapping.unmap()


def test_read_only(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    put(pages.address, b"look")
    gref = bed.front.pages.grant(pages.frames[0], bed.back.domid, readonly=True)
    with bed.back.grants.map(bed.front.domid, [gref], readonly=True) as mapping:
        assert get(mapping.address, 4) == b"look"
    with pytest.raises(PlatformError, match=str(gref)):
        bed.back.grants.map(bed.front.domid, [gref])
    assert bed.front.pages.end(gref)


def test_all_or_nothing(bed: Bed) -> None:
    pages = bed.front.pages.alloc(2)
    grefs = [bed.front.pages.grant(frame, bed.back.domid) for frame in pages.frames]
    with pytest.raises(PlatformError, match=str(NO_GREF)):
        bed.back.grants.map(bed.front.domid, [grefs[0], NO_GREF, grefs[1]])
    assert all(bed.front.pages.end(gref) for gref in grefs)


def test_a_grant_of_another_domain_does_not_let_us_in(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    gref = bed.front.pages.grant(pages.frames[0], bed.back.domid + 17)
    with pytest.raises(PlatformError, match=str(gref)):
        bed.back.grants.map(bed.front.domid, [gref])


def test_grefs_are_used_again(bed: Bed) -> None:
    pages = bed.front.pages.alloc(1)
    seen = set()
    for _ in range(1000):
        gref = bed.front.pages.grant(pages.frames[0], bed.back.domid)
        seen.add(gref)
        assert bed.front.pages.end(gref)
    assert len(seen) < 1000


def test_events_go_both_ways(bed: Bed) -> None:
    front, back = bed.front.open_events(), bed.back.open_events()
    theirs = front.alloc_unbound(bed.back.domid)
    ours = back.bind_interdomain(bed.front.domid, theirs)
    assert back.wait(5) == [ours]  # binding leaves the local end pending, so that nothing sent before is lost
    front.notify(theirs)
    assert back.wait(5) == [ours]
    back.notify(ours)
    assert front.wait(5) == [theirs]
    front.close()
    back.close()


def test_events_coalesce(bed: Bed) -> None:
    front, back = bed.front.open_events(), bed.back.open_events()
    port = front.alloc_unbound(bed.back.domid)
    ours = back.bind_interdomain(bed.front.domid, port)
    back.wait(5)
    for _ in range(100):
        front.notify(port)
    assert back.wait(5) == [ours]
    assert back.pending() in ([], [ours])  # what came after the first was delivered
    assert back.pending() == []
    front.close()
    back.close()


def test_each_port_has_its_own_events(bed: Bed) -> None:
    front, back = bed.front.open_events(), bed.back.open_events()
    ports = [front.alloc_unbound(bed.back.domid) for _ in range(70)]
    ours = [back.bind_interdomain(bed.front.domid, port) for port in ports]
    assert sorted(back.pending()) == sorted(ours)
    for i in (0, 33, 69):
        front.notify(ports[i])
    seen: list[int] = []
    while len(seen) < 3 and (came := back.wait(5)):
        seen += came  # Xen takes them to several processors, and so they may come one after the other
    assert sorted(seen) == sorted(ours[i] for i in (0, 33, 69))
    front.close()
    back.close()


def test_waiting_ends(bed: Bed) -> None:
    events = bed.front.open_events()
    events.alloc_unbound(bed.back.domid)
    events.pending()
    before = time.monotonic()
    assert events.wait(0.05) == []
    assert time.monotonic() - before < 5
    events.close()


def test_a_port_is_bound_once_and_only_by_whom_it_waits_for(bed: Bed) -> None:
    front, back = bed.front.open_events(), bed.back.open_events()
    port = front.alloc_unbound(bed.back.domid)
    back.bind_interdomain(bed.front.domid, port)
    with pytest.raises(PlatformError):
        back.bind_interdomain(bed.front.domid, port)
    with pytest.raises(PlatformError):
        back.bind_interdomain(bed.front.domid, front.alloc_unbound(bed.back.domid + 17))
    front.close()
    back.close()


def test_after_unbind_the_same_port_can_be_bound_again(bed: Bed) -> None:
    front, back = bed.front.open_events(), bed.back.open_events()
    port = front.alloc_unbound(bed.back.domid)
    for _ in range(3):
        ours = back.bind_interdomain(bed.front.domid, port)
        assert back.wait(5) == [ours]
        front.notify(port)
        assert back.wait(5) == [ours]
        back.notify(ours)
        assert front.wait(5) == [port]
        back.unbind(ours)
    front.close()
    back.close()


def test_a_port_of_another_handle_cannot_be_used(bed: Bed) -> None:
    one, two = bed.front.open_events(), bed.front.open_events()
    port = one.alloc_unbound(bed.back.domid)
    with pytest.raises(PlatformError):
        two.notify(port)
    with pytest.raises(PlatformError):
        two.unbind(port)
    one.close()
    two.close()


def test_a_domain_has_one_uuid(bed: Bed) -> None:
    uuid = bed.back.domain_uuid(bed.front.domid)
    assert uuid
    assert bed.back.domain_uuid(bed.front.domid) == uuid
    assert bed.back.domain_uuid(0x7FEF) == ""


def test_the_store_is_there(bed: Bed) -> None:
    path = f"/local/domain/{bed.back.domid}/backend/test"
    bed.back.store.write(path, "1")
    assert bed.back.store.read(path) == b"1"
    bed.back.store.rm(path)


def test_real_xen_is_among_the_platforms() -> None:
    if not ON_XEN:
        pytest.skip("the contract was not tested on Xen: no /dev/xen/gntdev")
