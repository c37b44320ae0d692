"""A guest that lies on its control ring: an answer, or the end of its vif, and its neighbours lose nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers.frontends import netfront_control_kernels as kernels
from pvdrivers.frontends.netfront import Frame
from pvdrivers.frontends.netfront_control import ControlRing
from rings import netif
from rings.ring import RING_END

from .conftest import WORKERS, Guest, until
from .control_bed import KEY, REQUESTS, mapping
from .naive_control import INVALID, OVERFLOW, Vif
from .test_control_ring import came, flow
from .test_hostile import NO_GREF, logged, talk

pytestmark = pytest.mark.jit_only("a real daemon serves")


def control(guest: Guest) -> ControlRing:
    assert guest.vif.control is not None
    return guest.vif.control


def put(guest: Guest, *requests: tuple[int, int, int, int, int], ahead: int = 0) -> None:
    """Write requests (id, type, words) onto the ring as they are; the producer may run ahead of them."""
    ring = control(guest)
    row = np.zeros(1, netif.CTRL_REQUEST)
    end: Any = ring._end
    assert end.dtype == RING_END
    for id, kind, *words in requests:
        row[0] = id, kind, words
        ctypes.memmove(int(end[0]["slots"]) + (int(end[0]["prod_pvt"]) & 127) * 16, row.ctypes.data, 16)
        end[0]["prod_pvt"] += 1
    if ahead:
        end[0]["prod_pvt"] += ahead
    ctypes.c_uint32.from_address(int(end[0]["prod"])).value = int(end[0]["prod_pvt"]) & 0xFFFFFFFF
    ring._events.notify(ring._port)  # type: ignore[union-attr]


def answers(guest: Guest, count: int) -> list[tuple[int, int, int, int]]:
    """The next responses: id, type, status, data."""
    ring, got = control(guest), []

    def one() -> bool:
        while len(got) < count and kernels.answer(ring._end.ctypes.data, ring._response.ctypes.data) == 1:
            got.append(tuple(map(int, ring._response[0])))
        return len(got) == count

    until(one)
    return got


def test_requests_of_any_kind(net: Any) -> None:
    """Garbage over the ring of a real daemon, each answered as the naive twin has it."""
    liar, a, b = net.guest(queues=3), net.guest(), net.guest()
    ring, twin = control(liar), Vif(3)

    @given(REQUESTS, st.booleans())
    @settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
    def one(request: Any, granted: bool) -> None:
        kind, gref, x, y, page = request
        if page is not None and granted:
            ctypes.memset(ring._pages.address + 4096, 0, 4096)  # type: ignore[union-attr]
            ctypes.memmove(ring._pages.address + 4096, page, len(page))  # type: ignore[union-attr]
        by_page = kind in (netif.CTRL_SET_HASH_KEY, netif.CTRL_SET_HASH_MAPPING)
        has = page is not None and granted
        if by_page:
            gref = ring._grefs[1] if has else NO_GREF
        elif kind in (8, 9, 10):
            return  # test_staging's
        put(liar, (kind & 0xFF, kind, gref, x, y))
        status, data = twin.request(kind, (gref, x, y), page.ljust(4096, b"\0") if has else None)
        assert answers(liar, 1) == [(kind & 0xFF, kind, status, data)]

    one()
    talk(a, b)


def test_a_producer_that_cannot_be(net: Any) -> None:
    liar, a, b = net.guest(), net.guest(), net.guest()
    put(liar, ahead=129)
    until(lambda: "producer index" in logged(liar))
    talk(a, b)


def test_a_full_ring_is_served_a_few_at_a_time(net: Any) -> None:
    """Each fetches a page; whoever else is there does not wait for all of them."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    gref = control(liar)._grefs[1]
    for _ in range(5):
        put(liar, *((k, netif.CTRL_SET_HASH_KEY, gref, 40, 0) for k in range(128)))
        talk(a, b)
        assert [answer[0] for answer in answers(liar, 128)] == list(range(128))


def stopped(pid: int) -> bool:
    """Whether all threads of a process are."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@pytest.mark.skipif(WORKERS != "1", reason="both are to have one worker")
def test_what_a_neighbour_waits_for_meanwhile(net: Any) -> None:
    """192 packets are six visits. All of them and all requests are there when the daemon looks, and each packet is told
    its hash, which says how many keys had been set by then: no more than one a visit."""
    liar, a = net.guest(), net.guest()
    liar.vif.set_hash(KEY)
    ctypes.memmove(control(liar)._pages.address + 4096, KEY, len(KEY))  # type: ignore[union-attr]
    ip = bytes([0x60, 0, 0, 0, 0, 60, 6, 64]) + bytes(range(0xA1, 0xC1)) + b"ports" + bytes(55)
    frame = Frame(liar.mac + a.mac + b"\x86\xdd" + ip)
    hashes = [Vif(1, types=15, key=KEY[:size]).hash(6, ip, ip[40:44]) for size in (40, *range(1, 40))]
    assert len(set(hashes)) == 40
    os.kill(net.daemon.popen.pid, signal.SIGSTOP)
    try:
        until(lambda: stopped(net.daemon.popen.pid))
        put(liar, *((k, netif.CTRL_SET_HASH_KEY, control(liar)._grefs[1], k, 0) for k in range(1, 40)))
        a.vif.send_all([frame] * 192, timeout=5)
    finally:
        os.kill(net.daemon.popen.pid, signal.SIGCONT)
    came: list[Frame] = []
    while len(came) < 192:
        came += liar.vif.receive_all(64, 5)
    assert [answer[2] for answer in answers(liar, 39)] == [0] * 39
    assert hashes.index((came[-1].hash_type, came[-1].hash)) <= 10


def test_pages_that_are_not_there(net: Any) -> None:
    liar = net.guest(queues=2)
    liar.vif.set_hash(KEY, mapping=[1])
    for gref in (NO_GREF, 0, 0xFFFFFFFF):
        put(liar, (1, netif.CTRL_SET_HASH_KEY, gref, 40, 0), (2, netif.CTRL_SET_HASH_MAPPING, gref, 1, 0))
        assert [answer[2] for answer in answers(liar, 2)] == [INVALID, INVALID]
    a = net.guest()
    a.vif.send(flow(a, liar, 1))
    assert [(queue, frame.hash_type) for queue, frame in came(liar)] == [(1, netif.HASH_IPV4_TCP)]


def test_xsa_270_a_mapping_beyond_its_table(net: Any) -> None:
    """CVE-2018-15471, over the ring."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    liar.vif.set_hash(KEY, mapping=[0] * 128)
    gref = control(liar)._grefs[1]
    for entries, offset, status in (
        (128, 1, INVALID), (2, 0xFFFFFFFF, INVALID), (1, 128, INVALID), (0xFFFFFFFF, 1, OVERFLOW), (1024, 0, OVERFLOW),
        (64, 0xFFFFFFC0, INVALID),
    ):  # fmt: skip
        put(liar, (1, netif.CTRL_SET_HASH_MAPPING, gref, entries, offset))
        assert answers(liar, 1)[0][2] == status
    talk(a, b)


def test_xsa_155_what_is_checked_is_what_is_used(net: Any) -> None:
    """A mapping that changes while it is being set: no queue is ever chosen that there is not."""
    liar, a = net.guest(queues=2), net.guest()
    liar.vif.set_hash(KEY, mapping=[0] * 128)
    ring = control(liar)
    page = ring._pages.address + 4096  # type: ignore[union-attr]
    stop = threading.Event()

    def rewrite() -> None:
        good, bad = mapping(*[1] * 128), mapping(*[0xFFFFFFF0] * 128)
        while not stop.is_set():
            ctypes.memmove(page, bad, 512)
            ctypes.memmove(page, good, 512)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for n in range(200):
            put(liar, (n, netif.CTRL_SET_HASH_MAPPING, ring._grefs[1], 128, 0))
            assert answers(liar, 1)[0][2] in (0, INVALID)
            a.vif.send(flow(a, liar, n))
            came(liar, 0)
    finally:
        stop.set()
        thread.join()
    before = liar.counted("received")
    a.vif.send(flow(a, liar, 1))
    until(lambda: liar.counted("received") == before + 1)


def test_a_storm_on_its_event_channel(net: Any) -> None:
    """XSA-332: it is named and let in ten times a second, and still gets its answers; packets go on."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    ring = control(liar)
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            ring._events.notify(ring._port)  # type: ignore[union-attr]

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        until(lambda: "events with nothing behind them" in logged(liar), 20)
        talk(a, b)
        liar.vif.set_hash(KEY)
        began = time.monotonic()
        talk(a, b)
        assert time.monotonic() - began < 2
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({netif.KEY_CTRL_RING_REF: "@tx"}, "two rings name the same page"),
        ({netif.KEY_CTRL_RING_REF: "@rx"}, "two rings name the same page"),
        ({netif.KEY_EVENT_CHANNEL_CTRL: "@port"}, "the same event channel"),
        ({netif.KEY_CTRL_RING_REF: "x"}, "not a number"),
        ({netif.KEY_CTRL_RING_REF: None}, "ctrl-ring-ref is missing"),
        ({netif.KEY_EVENT_CHANNEL_CTRL: None}, "event-channel-ctrl is missing"),
        ({netif.KEY_CTRL_RING_REF: str(NO_GREF)}, str(NO_GREF)),
        ({netif.KEY_EVENT_CHANNEL_CTRL: "4000"}, "4000"),
    ],
)
def test_keys_that_are_refused(net: Any, change: dict[str, str | None], text: str) -> None:
    """Among them a control ring in the page of another ring."""
    a, b, liar = net.guest(), net.guest(), net.guest(connect=False)
    path = f"/local/domain/{liar.domain.domid}/device/vif/0"
    until(lambda: net.dom0.store.read(f"{liar.backend}/state") == b"2")
    pages, events = liar.platform.pages.alloc(3), liar.platform.open_events()
    grefs = [liar.platform.pages.grant(frame, 0) for frame in pages.frames]
    ports = [events.alloc_unbound(0) for _ in range(2)]
    names = {"@tx": grefs[0], "@rx": grefs[1], "@port": ports[0]}
    keys: dict[str, Any] = {
        netif.KEY_REQUEST_RX_COPY: 1, netif.KEY_TX_RING_REF: grefs[0], netif.KEY_RX_RING_REF: grefs[1],
        netif.KEY_EVENT_CHANNEL: ports[0], netif.KEY_CTRL_RING_REF: grefs[2], netif.KEY_EVENT_CHANNEL_CTRL: ports[1],
    }  # fmt: skip
    for key, value in change.items():
        keys[key] = names.get(value, value) if value is not None else None
    for key, value in {**keys, "state": 4}.items():
        if value is not None:
            liar.platform.store.write(f"{path}/{key}", value)
    until(lambda: text in liar.said())
    talk(a, b)
    events.close()


def test_indices_that_no_ring_can_have(net: Any) -> None:
    a, b, liar = net.guest(), net.guest(), net.guest(connect=False)
    path = f"/local/domain/{liar.domain.domid}/device/vif/0"
    until(lambda: net.dom0.store.read(f"{liar.backend}/state") == b"2")
    pages, events = liar.platform.pages.alloc(3), liar.platform.open_events()
    ctypes.c_uint32.from_address(pages.address + 2 * 4096).value = 129  # req_prod, with rsp_prod 0
    grefs = [liar.platform.pages.grant(frame, 0) for frame in pages.frames]
    ports = [events.alloc_unbound(0) for _ in range(2)]
    for key, value in {
        netif.KEY_REQUEST_RX_COPY: 1, netif.KEY_TX_RING_REF: grefs[0], netif.KEY_RX_RING_REF: grefs[1],
        netif.KEY_EVENT_CHANNEL: ports[0], netif.KEY_CTRL_RING_REF: grefs[2], netif.KEY_EVENT_CHANNEL_CTRL: ports[1],
        "state": 4,
    }.items():  # fmt: skip
        liar.platform.store.write(f"{path}/{key}", value)
    until(lambda: "control ring: indices" in logged(liar))
    talk(a, b)
    events.close()
