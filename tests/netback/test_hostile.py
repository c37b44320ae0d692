"""A guest that lies to the network backend: its own packets or its own vif end, and its neighbours lose nothing."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from pvdrivers.errors import PvError
from pvdrivers.frontends import netfront_kernels as kernels
from rings import netif
from rings.ring import RING_END

from .conftest import WORKERS, Guest, until

pytestmark = pytest.mark.jit_only("a real daemon serves")
NO_GREF = 0x7FFFFFF
EVTCHNSTAT_UNBOUND = 1
Slot = tuple[int, int, int, int, int]  # gref, offset, flags, id, size


def talk(a: Guest, b: Guest) -> None:
    """Two that have nothing to do with it still hear each other."""
    a.vif.send(a.frame(b, b"still here"))
    assert b.vif.receive(5) == a.frame(b, b"still here")


def logged(guest: Guest) -> str:
    """What the daemon's log has of a vif. In xenstore it stands only until netfront has connected anew."""
    return "".join(line for line in guest.net.daemon.log.read_text().splitlines() if f"{guest.name}:" in line)


def put(guest: Guest, *slots: Slot | bytes, ahead: int = 0) -> None:
    """Write requests, or extras, onto the guest's tx ring as they are; the producer may run ahead of them."""
    queue = guest.vif.queues[0]
    end: Any = queue._keep["tx_end"]
    assert end.dtype == RING_END
    page = int(end[0]["slots"])
    for one in slots:
        raw = one
        if not isinstance(raw, bytes):
            row = np.zeros(1, netif.TX_REQUEST)
            row[0] = raw
            raw = row.tobytes()
        ctypes.memmove(page + (int(end[0]["prod_pvt"]) & 255) * 12, raw.ljust(12, b"\0"), 12)
        end[0]["prod_pvt"] += 1
    end[0]["prod_pvt"] += ahead
    kernels.kick(queue.at)
    guest.vif.queues[0]._events.notify(int(queue.record[0]["tx_port"]))  # type: ignore[union-attr]


def page_of(guest: Guest, data: bytes) -> tuple[int, int]:
    """A tx page with this in it: its gref and its id. Taken from netfront, which has it in flight then."""
    queue = guest.vif.queues[0]
    q = queue.record[0]
    q["free_n"] -= 1
    page = int(queue._keep["free"][int(q["free_n"])])
    queue._keep["in_flight"][page] = 1
    ctypes.memmove(int(q["tx_pages"]) + page * 4096, data, len(data))
    return int(queue._keep["grefs"][page]), page


@pytest.mark.parametrize(
    ("name", "slots", "text"),
    [
        ("an extra that is not there", [(1, 0, netif.TXF_extra_info, 0, 60)], "an extra is announced"),
        ("an unknown extra", [(1, 0, netif.TXF_extra_info, 0, 60), b"\x09\0"], "an extra of a type"),
        ("a packet that is cut", [(1, 0, netif.TXF_more_data, 0, 60)], "goes on behind the last"),
        ("more slots than any", [(1, 0, netif.TXF_more_data, 0, 9 if k else 6000) for k in range(22)], "20 requests"),
        ("XSA-39: beyond its page", [(1, 4090, 0, 0, 60)], "crosses the end of its page"),
        ("GSO of no size", [(1, 0, netif.TXF_extra_info, 0, 60), b"\x01\0\0\0\x01"], "segments of size 0"),
        ("GSO of no type", [(1, 0, netif.TXF_extra_info, 0, 60), b"\x01\0\x64\0\x07"], "a GSO type"),
    ],
)  # fmt: skip
def test_what_no_honest_guest_writes_closes_its_vif(net: Any, name: str, slots: list[Any], text: str) -> None:
    liar, a, b = net.guest(), net.guest(), net.guest()
    put(liar, *slots)
    until(lambda: text in logged(liar))
    talk(a, b)


def test_a_producer_that_cannot_be(net: Any) -> None:
    """XSA-39: bogus indices."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    put(liar, ahead=1000)
    until(lambda: "producer index" in logged(liar))
    talk(a, b)


def test_grants_that_are_not_there(net: Any) -> None:
    """XSA-362, -367: an operation of a batch fails; its packet does, and the others of the batch do not."""
    liar, b = net.guest(), net.guest()
    head = liar.frame(b, b"h" * 2000)
    good, good_id = page_of(liar, head)
    put(
        liar,
        (NO_GREF, 0, 0, 0xFFFE, 60),  # not even its first bytes
        (good, 0, netif.TXF_more_data, good_id, len(head) + 100),  # its second page
        (NO_GREF, 0, 0, 0xFFFD, 100),
    )
    until(lambda: liar.counted("refused") == 2)
    with pytest.raises(TimeoutError):
        b.vif.receive(0.1)
    # Its buffers came back, and say so; of a packet that would have come from another worker it never hears.
    assert b.vif.stats()["rx_errors"] == int(WORKERS == "1")
    queue = liar.vif.queues[0]
    queue._keep["in_flight"][:] = 1  # two of those ids were never netfront's
    fresh, fresh_id = page_of(liar, liar.frame(b, b"better"))
    put(liar, (fresh, 0, 0, fresh_id, len(liar.frame(b, b"better"))))
    assert b.vif.receive(5) == liar.frame(b, b"better")


def test_a_receiver_whose_pages_are_not_there(net: Any) -> None:
    a, b = net.guest(), net.guest()
    queue = b.vif.queues[0]
    queue._keep["grefs"][256:] = NO_GREF  # what it posts from now on
    for _ in range(300):
        a.vif.send(a.frame(b, bytes(5000)))
        try:
            while True:
                b.vif.receive_all(64, 0.001)
        except TimeoutError:
            pass
    until(lambda: b.counted("failed") > 0)
    assert a.vif.stats()["tx_errors"] == 0  # it is not the sender's fault
    assert a.counted("refused") == 0


def test_headers_in_many_slots_and_many_slots_of_little(net: Any) -> None:
    """XSA-423, XSA-432, XSA-448: a packet in 18 slots of a few bytes, some of none."""
    a, b = net.guest(), net.guest()
    frame = a.frame(b, bytes(range(40)))
    pieces = [frame[k : k + 4] for k in range(0, len(frame), 4)] + [b""] * 4
    assert len(pieces) == 18
    slots = []
    for k, piece in enumerate(pieces):
        gref, id = page_of(a, piece)
        more = netif.TXF_more_data if k < 17 else 0
        slots.append((gref, 0, more, id, len(frame) if k == 0 else len(piece)))
    put(a, *slots)
    assert b.vif.receive(5) == frame
    talk(a, b)


def test_keys_that_are_refused(net: Any) -> None:
    """Among them no queues at all, which Linux's netback took until 2026."""
    for key, value, text in (
        (netif.KEY_NUM_QUEUES, "0", "not from 1 to 8"),
        (netif.KEY_NUM_QUEUES, "9", "not from 1 to 8"),
        (netif.KEY_REQUEST_RX_COPY, "0", "is not 1: packets are copied"),
        (netif.KEY_TX_RING_REF, "x", "not a number"),
    ):
        guest = net.guest(connect=False)
        path = f"/local/domain/{guest.domain.domid}/device/vif/0"
        until(lambda g=guest: net.dom0.store.read(f"{g.backend}/state") == b"2")
        keys = {netif.KEY_REQUEST_RX_COPY: "1", netif.KEY_TX_RING_REF: "8", netif.KEY_RX_RING_REF: "9"}
        for name, what in {**keys, netif.KEY_EVENT_CHANNEL: "1", key: value, "state": "4"}.items():
            guest.platform.store.write(f"{path}/{name}", what)
        until(lambda g=guest, t=text: t in g.said())


@pytest.mark.parametrize("what", ["a page", "a port"])
def test_a_connection_that_fails_in_the_middle_leaves_nothing(net: Any, what: str) -> None:
    """XSA-362, -367: map failures in the middle. Of two queues the last page, or the last port, is not there."""
    guest = net.guest(connect=False)
    until(lambda: net.dom0.store.read(f"{guest.backend}/state") == b"2")
    pages, events = guest.platform.pages, guest.platform.open_events()
    rings = pages.alloc(4)
    grefs = [pages.grant(frame, 0) for frame in rings.frames]
    ports = [events.alloc_unbound(0) for _ in range(2)]
    said = [*grefs[:3], NO_GREF if what == "a page" else grefs[3]]
    named = [ports[0], 4000 if what == "a port" else ports[1]]
    path = f"/local/domain/{guest.domain.domid}/device/vif/0"
    keys = {netif.KEY_REQUEST_RX_COPY: 1, netif.KEY_NUM_QUEUES: 2}
    for q in range(2):
        keys[f"queue-{q}/{netif.KEY_TX_RING_REF}"], keys[f"queue-{q}/{netif.KEY_RX_RING_REF}"] = said[2 * q : 2 * q + 2]
        keys[f"queue-{q}/{netif.KEY_EVENT_CHANNEL}"] = named[q]
    for name, value in {**keys, "state": 4}.items():
        guest.platform.store.write(f"{path}/{name}", value)
    try:
        until(guest.said)
        assert ("4000" if what == "a port" else str(NO_GREF)) in guest.said()
        # It is tried again, now and then: for a moment it may have some of it.
        until(lambda: events.status(ports[0])[0] == EVTCHNSTAT_UNBOUND)
        guest.platform.store.write(f"{path}/state", 6)
        for gref in grefs:
            until(lambda g=gref: pages.end(g))
        assert [events.status(port)[0] for port in ports] == [EVTCHNSTAT_UNBOUND] * 2
    finally:
        events.close()
    talk(net.guest(), net.guest())


def test_what_the_toolstack_may_get_wrong(net: Any) -> None:
    first = net.guest()
    for bridge, mac, text in (
        ("pvtnone0", None, "bridge pvtnone0 is not there"),
        ("switch:a b", None, "letters, digits"),
        ("switch:", first.mac, "is that of vif-"),
    ):
        guest = net.guest(bridge, mac=mac, connect=False)
        guest.vif.start()
        until(lambda g=guest, t=text: t in g.said())
        with pytest.raises(PvError):
            guest.vif.connect(0.01)
    talk(first, net.guest())
