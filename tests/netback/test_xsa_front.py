"""Classes of the security list that are about the frontend: our netfront, and a backend that is not to be trusted.

The backend of a vif on `null:` sends nothing by itself, so what it does here is done by the test in its place, in the
pages that the two share, and by the grants of its domain. Where events are what it is about, the backend is the test's
altogether. XSA-403 is in test_xsa.py.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pvdrivers import sim
from pvdrivers.frontends import netfront_tap
from pvdrivers.frontends.netfront import Frame, Netfront
from pvdrivers.frontends.netfront_keys import Wishes
from pvdrivers.frontends.netfront_records import SLOTS
from pvdrivers.sim import toolstack
from pvdrivers.xenbus import XenbusState
from rings import netif

from .conftest import Guest, until
from .pipe_tap import PipeTap
from .test_hostile import talk

pytestmark = pytest.mark.jit_only("a real daemon serves")
_PAGE = 4096
MORE, EXTRA = netif.RXF_more_data, netif.RXF_extra_info


def page_at(guest: Guest, gref: int) -> int:
    """Where a page that is granted stands in the guest."""
    queue = guest.vif.queues[0]
    k = queue._keep["grefs"].tolist().index(gref)
    pages = int(queue.record[0]["tx_pages" if k < SLOTS else "rx_pages"])
    return pages + k % SLOTS * _PAGE


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("which", ["sent from", "received into"])
def test_xsa_396_a_page_that_the_backend_keeps_is_used_for_nothing_else(net: Any, which: str) -> None:
    """CVE-2022-23036 to -23042: access was said to be ended, and the page was used again while it was mapped."""
    # Else the daemon has them mapped, and who maps a page of a guest is one process.
    a, b = net.guest(wishes=Wishes(staging=False)), net.guest()
    sent, received = a.vif.queues[0].grefs()
    gref = (sent if which == "sent from" else received)[0]
    kept = net.dom0.grants.map(a.domain.domid, [gref], readonly=which == "sent from")
    try:
        own = page_at(a, gref)
        ctypes.memmove(own, b"what the backend may see".ljust(64), 64)
        net.dom0.store.write(f"{a.backend}/state", 5)
        until(lambda: a.vif.connections == 2 and a.vif.state == XenbusState.Connected)
        # Not one grant is said to be over that is not, and none of what was allocated with it is free.
        assert a.vif.stats()["stuck_grants"] == 1
        assert not a.platform.pages.end(gref)
        now = [int(a.vif.queues[0].record[0][name]) for name in ("tx_pages", "rx_pages")]
        assert all(not at <= own < at + SLOTS * _PAGE for at in now), "its new rings stand somewhere else"
        secret = b"only for the other guest"
        for _ in range(2 * SLOTS):
            a.vif.send(a.frame(b, secret))
            assert b.vif.receive(5) == a.frame(b, secret)
            b.vif.send(b.frame(a, secret))
            assert a.vif.receive(5) == b.frame(a, secret)
        spare = [a.platform.pages.alloc(1) for _ in range(32)]
        for pages in spare:
            ctypes.memmove(pages.address, secret.ljust(64), 64)
        assert ctypes.string_at(kept.address, 24) == b"what the backend may see"
        for pages in spare:
            pages.free()
    finally:
        kept.unmap()
    net.dom0.store.write(f"{a.backend}/state", 5)
    until(lambda: a.vif.connections == 3 and a.vif.state == XenbusState.Connected)
    assert a.vif.stats()["stuck_grants"] == 0
    talk(a, b)


class Backend:
    """What stands in for the backend of a guest on `null:`: it puts responses on the rx ring."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.queue = guest.vif.queues[0]
        self._slots = int(self.queue._keep["rx_end"][0]["slots"])
        self._ring = self._slots & ~(_PAGE - 1)

    def word(self, at: int) -> ctypes.c_uint32:
        """req_prod 0, req_event 4, rsp_prod 8, rsp_event 12 (ring.h)."""
        return ctypes.c_uint32.from_address(self._ring + at)

    def answer(self, *responses: tuple[int, int, int, bytes] | bytes) -> None:
        """(offset, flags, status, what stands in the page), or an extra."""
        prod = self.word(8)
        at = prod.value
        for one in responses:
            k = at & (SLOTS - 1)
            raw = one
            if not isinstance(raw, bytes):
                offset, flags, status, data = raw
                ctypes.memmove(int(self.queue.record[0]["rx_pages"]) + k * _PAGE + offset, data, len(data))
                raw = struct.pack("<HHHh", k, offset, flags, status)
            ctypes.memmove(self._slots + k * 8, raw.ljust(8, b"\0"), 8)
            at += 1
        prod.value = at
        self.queue.wake()

    def buffers(self) -> list[int]:
        """The grefs of what is posted."""
        found = []
        for k in range(self.word(8).value, self.word(0).value):
            id, _, gref = struct.unpack("<HHI", ctypes.string_at(self._slots + (k & (SLOTS - 1)) * 8, 8))
            assert id == k & (SLOTS - 1)
            found.append(gref)
        return found


XDP = b"\x05\0" + (64).to_bytes(2, "little")
BAD = {
    "an error in its first page": [(0, MORE | EXTRA, -1, b""), XDP, (0, 0, 64 + 100, bytes(64) + b"x" * 100)],
    "an error in its last page": [(0, MORE | EXTRA, 64 + 100, b"x" * 164), XDP, (0, 0, -1, b"")],
    "an error in each page": [(0, MORE | EXTRA, -1, b""), XDP, (0, MORE, -1, b""), (0, 0, -2, b"")],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_xsa_405_of_a_packet_that_is_dropped_nothing_is_used_again(net: Any, bad: list[Any]) -> None:
    """CVE-2022-33743: with XDP's headroom netfront went on with buffers that it had freed. Here each page is the
    backend's again once, and the packet behind has its own bytes, whatever became of the one before."""
    a = net.guest("null:")
    backend = Backend(a)
    every = sorted(backend.buffers())
    assert len(set(every)) == SLOTS
    good = a.frame(a, b"good" * 20)
    for n in range(1, 2 * SLOTS // 5):
        backend.answer(*bad, (0, EXTRA, 64 + len(good), bytes(64) + good), XDP)
        assert a.vif.receive(5) == good
        assert sorted(backend.buffers()) == every
        assert a.vif.stats()["rx_errors"] == n
    backend.answer((0, 0, len(good), good))
    assert a.vif.receive(5) == good, "and no headroom is left over from one that had some"
    assert a.vif.stats()["received"] == n + 1
    assert not a.vif.failure


def test_xsa_465_the_backend_is_gone_before_a_connection_is_made_again(net: Any) -> None:
    """CVE-2024-53240: after a resume netfront has no queues until its backend is there again. It never is, and all
    that may be asked of an interface is asked of it meanwhile; then it is removed."""
    a, b = net.guest(), net.guest()
    waiting = []

    def wait_for_a_packet() -> None:
        try:
            a.vif.receive(20)
        except OSError as e:
            waiting.append(e)

    thread = threading.Thread(target=wait_for_a_packet)
    thread.start()
    net.daemon.kill()
    try:
        for state in (XenbusState.Closed, XenbusState.Initialising, XenbusState.Closing):
            net.dom0.store.write(f"{a.backend}/state", int(state))
            until(lambda: a.vif.state != XenbusState.Connected)
            for ask in (lambda: a.vif.send(a.frame(b, b"x"), timeout=0.1), lambda: a.vif.receive(0.1),
                        lambda: a.vif.set_headroom(64, 0.1), lambda: a.vif.set_hash(bytes(40), timeout=0.1),
                        lambda: a.vif.groups.join(b"\1\0\x5e\0\0\1")):  # fmt: skip
                with pytest.raises(OSError):  # of which a TimeoutError is one
                    ask()
            assert a.vif.stats()["stuck_grants"] == 0
        net.dom0.store.rm(a.backend)
        a.vif.close()
        thread.join(20)
        assert not thread.is_alive() and len(waiting) == 1
        a.vif.close()
    finally:
        net.daemon.start()
    until(lambda: heard(b, net.guest()))


def heard(a: Guest, b: Guest) -> bool:
    a.vif.send(a.frame(b, b"still here"))
    try:
        return bool(b.vif.receive(0.2) == a.frame(b, b"still here"))
    except TimeoutError:
        return False


class Rogue:
    """A backend by hand, of a kind that the daemon does not serve: it is connected, and answers nothing."""

    def __init__(self, net: Any) -> None:
        self.net, mac = net, "00:16:3e:00:ff:01"
        self.domain = toolstack.create_domain(net.dom0, memory_mib=16)
        self.platform = sim.open(net.run_dir, self.domain.domid, self.domain.token)
        self.path = toolstack.attach(net.dom0.store, "pvnet", self.domain.domid, 0, be={"mac": mac}, fe={"mac": mac})
        self.vif = Netfront(self.platform, 0)
        self.events = net.dom0.open_events()
        self.vif.start()
        read = net.dom0.store.read
        for key in (netif.KEY_RX_COPY, netif.KEY_SPLIT_EVENTS, netif.KEY_SG):
            net.dom0.store.write(f"{self.path}/{key}", 1)
        net.dom0.store.write(f"{self.path}/state", 2)
        front = f"/local/domain/{self.domain.domid}/device/vif/0"
        until(lambda: read(f"{front}/state") == b"4")
        names = (netif.KEY_EVENT_CHANNEL_TX, netif.KEY_EVENT_CHANNEL_RX)
        self.ports = [self.events.bind_interdomain(self.domain.domid, int(read(f"{front}/{name}"))) for name in names]
        net.dom0.store.write(f"{self.path}/state", 4)
        self.vif.connect(10)

    def end(self) -> None:
        self.vif.close()
        self.platform.close()
        self.events.close()
        toolstack.clean(self.net.dom0.store, self.domain.domid, self.domain.uuid)


def test_xsa_391_a_storm_of_events(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2021-28711 to -28713: a backend that sends events without end held up all of the guest. Here whoever waits
    looks again each time and sleeps on, keeps to his time, and others do not notice; who does not wait is not woken."""
    monkeypatch.setattr(netfront_tap, "set_tap_offload", lambda fd, offload: None)
    rogue, a, b = Rogue(net), net.guest(), net.guest()
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            for _ in range(100):
                for port in rogue.ports:
                    rogue.events.notify(port)
            time.sleep(0.0005)

    def takes(call: Callable[[], Any]) -> float:
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            call()
        return time.monotonic() - begun

    frame = b"\xff" * 6 + rogue.vif.mac + b"\x88\xb5"
    thread = threading.Thread(target=storm)
    thread.start()
    try:
        before = rogue.vif.stats()["wakeups"]
        for _ in range(20):
            talk(a, b)
        assert rogue.vif.stats()["wakeups"] == before
        assert takes(lambda: rogue.vif.receive(0.5)) < 5
        assert rogue.vif.stats()["wakeups"] > before, "it was a storm"
        assert takes(lambda: rogue.vif.send_all([Frame(frame)] * (SLOTS + 1), timeout=0.5)) < 5
        tap = PipeTap(rogue.vif)
        for _ in range(20):
            talk(a, b)
        begun = time.monotonic()
        tap.close()
        assert time.monotonic() - begun < 5, "a pump comes out of it when it is told"
        assert not rogue.vif.failure
        begun = time.monotonic()
        rogue.vif.close(1)
        assert time.monotonic() - begun < 15
    finally:
        over.set()
        thread.join()
        rogue.end()
    talk(a, b)
