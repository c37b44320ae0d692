"""The ring: shape, attaching, hostile producers, copies that stay inside their buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings import ring
from rings.blkif import ENTRY_SIZE, RESPONSE_SIZE_64
from rings.ring import CORRUPT, HEADER_SIZE, PAGE_SIZE, RING_END
from tests.rings import naive
from tests.rings.ends import STARTS, WRAP, Ring
from tests.rings.guard import Guarded, guarded

INDEX = st.one_of(st.sampled_from(STARTS), st.integers(0, WRAP - 1))


@given(st.integers(0, 70_000), st.integers(1, 300))
def test_entries_are_rounded_down_to_a_power_of_two(size: int, entry_size: int) -> None:
    assert ring.ring_entries(size, entry_size) == naive.entries(size, entry_size)


@pytest.mark.parametrize("abi", [32, 64])
@pytest.mark.parametrize("pages", [1, 2, 4, 8, 16])
def test_a_full_ring_of_every_size(pages: int, abi: int) -> None:
    size = ENTRY_SIZE[abi]
    r = Ring(ring.ring_entries(PAGE_SIZE * pages, size), size, start=2**32 - 3)
    assert r.nr_ents == 32 * pages
    assert HEADER_SIZE + r.nr_ents * size <= PAGE_SIZE * pages
    messages = np.random.default_rng(pages).integers(0, 256, (r.nr_ents, size), np.uint8)
    for lap in range(3):
        assert ring.room(r.f) == r.nr_ents
        for message in messages:
            ring.put(r.f, message.ctypes.data)
        assert ring.room(r.f) == 0 == ring.available(r.b), "not yet pushed"
        assert ring.push(r.f) == (lap == 0), "only the first was asked for"
        out = Guarded(r.nr_ents * size)
        assert ring.take(r.b, out.address, size, 1 << 20) == r.nr_ents
        assert (out.bytes.reshape(-1, size) == messages).all()
        assert ring.room(r.b) == r.nr_ents == ring.unanswered(r.b) == ring.unanswered(r.f)
        ring.advance_prod(r.b, r.nr_ents)
        ring.push_quiet(r.b)
        assert ring.room(r.b) == 0 == ring.unanswered(r.b)
        assert ring.available(r.f) == r.nr_ents
        ring.advance(r.f, r.nr_ents)
    r.memory.check()
    assert (r.front["notify_sent"][0], r.front["notify_saved"][0]) == (1, 2)


def test_format_writes_what_the_header_says_and_no_more() -> None:
    memory = Guarded(HEADER_SIZE + 8).fill(b"\xff" * (HEADER_SIZE + 8))
    ring.format_page(memory.address)
    memory.check()
    assert memory.bytes.tobytes() == bytes([0] * 4 + [1, 0, 0, 0] + [0] * 4 + [1, 0, 0, 0] + [0] * 48 + [255] * 8)


@given(INDEX, st.integers(0, 12), st.sampled_from([1, 2, 8]))
def test_attach_to_a_live_ring(rsp_prod: int, waiting: int, nr_ents: int) -> None:
    r = Ring(nr_ents, 16)
    r.indices = ((rsp_prod + waiting) % WRAP, 0, rsp_prod, 0)
    back, front = np.zeros(1, RING_END), np.zeros(1, RING_END)
    status = 0 if waiting <= nr_ents else CORRUPT
    assert ring.back_end(back.ctypes.data, r.sring, nr_ents, 16) == status
    assert ring.front_end(front.ctypes.data, r.sring, nr_ents, 16) == status
    assert back["prod_pvt"][0] == back["cons"][0] == front["cons"][0] == rsp_prod
    assert front["prod_pvt"][0] == (rsp_prod + waiting) % WRAP
    if status == 0:
        assert ring.available(back.ctypes.data) == waiting
        assert ring.unanswered(front.ctypes.data) == waiting == nr_ents - ring.room(front.ctypes.data)
        for taken in range(waiting + 1):  # as a journal would have it
            back["cons"] = (rsp_prod + taken) % WRAP
            assert ring.available(back.ctypes.data) == waiting - taken
            assert ring.room(back.ctypes.data) == taken
    else:
        assert ring.available(back.ctypes.data) == CORRUPT


@pytest.mark.parametrize("nr_ents", [0, -1, 3, 33, 1 << 31, -(1 << 63)])
def test_attach_refuses_sizes_that_are_no_power_of_two(nr_ents: int) -> None:
    r = Ring(1, 16)
    assert ring.back_end(r.b, r.sring, nr_ents, 16) == CORRUPT
    assert ring.front_end(r.f, r.sring, nr_ents, 16) == CORRUPT
    assert ring.back_end(r.b, r.sring, 1, 0) == CORRUPT


@st.composite
def ends(draw: st.DrawFn) -> dict[str, Any]:
    """An end in any state, and a producer of its peer near the window of the legal, or anywhere."""
    back = draw(st.booleans())
    nr_ents = draw(st.sampled_from([1, 2, 4, 32]))
    cons = draw(INDEX)
    unanswered = draw(st.integers(0, nr_ents))
    prod_pvt = (cons - unanswered if back else cons + unanswered) % WRAP
    most = nr_ents - unanswered if back else unanswered
    near = st.sampled_from([-2, -1, 0, 1, most - 1, most, most + 1, most + 2, nr_ents, nr_ents + 1, 2 * nr_ents])
    ahead = draw(st.one_of(near, st.sampled_from([2**31 - 1, 2**31, 2**31 + 1]), st.integers(0, WRAP - 1)))
    return {
        "back": back,
        "nr_ents": nr_ents,
        "cons": cons,
        "prod_pvt": prod_pvt,
        "prod": (cons + ahead) % WRAP,
    }


@given(ends())
def test_corrupt_exactly_when_no_honest_peer_can_have_written_it(state: dict[str, Any]) -> None:
    r = Ring(state["nr_ents"], 16)
    back, cons, prod_pvt, prod = state["back"], state["cons"], state["prod_pvt"], state["prod"]
    end, record = (r.b, r.back) if back else (r.f, r.front)
    record["cons"], record["prod_pvt"], record["pushed"] = cons, prod_pvt, prod_pvt
    r.poke(**{"req_prod" if back else "rsp_prod": prod})
    before = r.memory.bytes.tobytes()
    waiting = (prod - cons) % WRAP
    good = naive.legal(prod, cons, prod_pvt, r.nr_ents, back=back)
    assert ring.available(end) == (waiting if good else CORRUPT)
    if not good:
        assert ring.final_check(end) == CORRUPT
        assert ring.take(end, 0, 16, 99) == CORRUPT
        assert record["cons"][0] == cons
        assert r.memory.bytes.tobytes() == before, "a dead ring is left alone"
        return
    out = Guarded(16 * waiting)
    assert ring.take(end, out.address, 16, 99) == waiting
    assert record["cons"][0] == prod
    assert ring.final_check(end) == 0
    assert r.indices[1 if back else 3] == (prod + 1) % WRAP


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 9), INDEX)
def test_take_copies_stride_or_entry_whichever_is_less(stride: int, n: int, limit: int, start: int) -> None:
    r = Ring(16, 20, start)
    n = min(n, 16)
    for i in range(n):
        message = guarded(bytes([i + 1] * 20))
        ring.put(r.f, message.address)
    ring.push(r.f)
    taken = min(n, limit)
    out = Guarded(max(0, (taken - 1) * stride + min(stride, 20)) if taken else 0)
    assert ring.take(r.b, out.address, stride, limit) == taken
    out.check()
    expected = bytearray(len(out.bytes))
    for i in range(taken):
        part = min(stride, 20)
        expected[i * stride : i * stride + part] = bytes([i + 1] * part)
    assert out.bytes.tobytes() == bytes(expected)
    assert ring.available(r.b) == n - taken


def test_single_messages() -> None:
    r = Ring(2, 20, start=2**32 - 1)
    first, second = guarded(bytes(range(20))), guarded(b"\xaa" * 20)
    ring.put(r.f, first.address)
    ring.put(r.f, second.address)
    assert ring.push(r.f)
    out = Guarded(20)
    ring.copy_message(r.b, int(r.back["cons"][0]) + 1, out.address)
    assert out.bytes.tobytes() == b"\xaa" * 20
    ring.copy_message(r.b, int(r.back["cons"][0]), out.address)
    assert out.bytes.tobytes() == bytes(range(20))
    ring.advance(r.b, 2)
    assert r.back["cons"][0] == 1
    assert ring.slot(r.b, 2**32 - 1) == r.sring + HEADER_SIZE + 20 == ring.slot(r.b, 1)
    out.check()
    r.memory.check()


def test_a_peer_that_rewrites_our_own_index_changes_nothing_for_us() -> None:
    r = Ring(4, 20)
    message = Guarded(20)
    ring.put(r.f, message.address)
    assert ring.push(r.f)
    r.poke(req_prod=77)
    ring.put(r.f, message.address)
    assert not ring.push(r.f), "counted from what we know, not from what the page says"
    assert r.indices[0] == 2
    assert ring.room(r.f) == 2


@pytest.mark.parametrize("start", STARTS)
def test_at_most_one_notification_for_each_time_that_was_asked(start: int) -> None:
    r = Ring(4, RESPONSE_SIZE_64, start)
    out, asked = Guarded(64), 1  # the page is formatted with both events set
    for i in range(50):
        ring.advance_prod(r.f, 1 + i % 3)
        ring.push(r.f)
        while ring.take(r.b, out.address, 16, 4):
            pass
        if i % 4 == 0:
            assert ring.final_check(r.b) == 0
            assert ring.final_check(r.b) == 0, "asking twice is asking once"
            asked += 1
        ring.advance_prod(r.b, ring.room(r.b))
        ring.push_quiet(r.b)
        ring.advance(r.f, ring.available(r.f))
    assert r.front["notify_sent"][0] == asked - (i % 4 == 0)
    assert r.front["notify_sent"][0] + r.front["notify_saved"][0] == 50
