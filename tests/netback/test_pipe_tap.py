"""netfront's TAP: what it leaves to the backend, what it loses, and that others get at its queue all the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pvdrivers.frontends import netfront_keys as keys
from pvdrivers.frontends import netfront_tap
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_NONE, Frame, Netfront
from pvdrivers.frontends.netfront_keys import Offer, Wishes
from pvdrivers.interfaces import TSO4, TSO6, TSO_ECN, TUN_CSUM
from rings.netif import GSO_TCPV4, KEY_NO_CSUM, KEY_RX_COPY

from .conftest import Guest, until
from .packets import tcp
from .pipe_tap import PipeTap
from .test_port_in import inner

A, B = b"\x01\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"
daemon_serves = pytest.mark.jit_only("a real daemon serves")
SEGMENTS = {"sg": True, "gso4": True, "gso6": True}


@pytest.fixture
def offloads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What TAPs were told that their reader takes."""
    told: list[int] = []
    monkeypatch.setattr(netfront_tap, "set_tap_offload", lambda fd, offload: told.append(offload))
    return told


@contextmanager
def tap_of(vif: Netfront) -> Iterator[PipeTap]:
    tap = PipeTap(vif)
    try:
        yield tap
    finally:
        tap.close()


@pytest.mark.parametrize(
    ("offer", "most"),
    [
        (Offer(csum6=True, **SEGMENTS), TUN_CSUM | TSO4 | TSO6 | TSO_ECN),
        (Offer(csum6=True, sg=True, gso4=True), TUN_CSUM | TSO4 | TSO_ECN),
        (Offer(csum6=True, gso4=True, gso6=True), TUN_CSUM),
        (Offer(csum6=False, **SEGMENTS), 0),
        (Offer(csum4=False, csum6=True, **SEGMENTS), 0),
    ],
)
def test_a_tap_leaves_to_the_backend_what_that_takes(offer: Offer, most: int, offloads: list[int]) -> None:
    """The kernel knows one kind of blank checksum, and segments only with it."""
    netfront_tap.Tap._offer(netfront_tap.Tap.__new__(netfront_tap.Tap), 0, offer)
    assert offloads == [most]


def test_a_backend_that_takes_no_blank_checksum() -> None:
    there = {KEY_RX_COPY: b"1"}
    assert keys.read_offer(there.get).csum4
    there[KEY_NO_CSUM] = b"1"
    assert not keys.read_offer(there.get).csum4


@daemon_serves
def test_groups_are_joined_while_a_tap_carries_the_queue(net: Any, offloads: list[int]) -> None:
    """Whose pump has the queue's locks; and with a new connection, before anybody hears that it is there."""
    a, b = net.guest(), net.guest(wishes=Wishes(multicast=True))
    with tap_of(b.vif) as tap:
        for amend, group in ((b.vif.groups.join, A), (b.vif.groups.join, B), (b.vif.groups.leave, B)):
            thread = threading.Thread(target=amend, args=(group,), kwargs={"timeout": 5}, daemon=True)
            thread.start()
            thread.join(10)
            assert not thread.is_alive(), "it waits for the pump, which does not end"
        assert b.vif.groups.joined == {A}
        a.vif.send(a.frame(A))
        assert tap.receive() == a.frame(A)
        net.dom0.store.write(f"{b.backend}/state", 5)
        until(lambda: b.vif.connections == 2 and b.vif.state == 4)
        until(lambda: _carries(a, b, tap))
        a.vif.send(a.frame(B))
        a.vif.send(a.frame(A, b"again"))
        while (frame := tap.receive()) == a.frame(b, b"there"):
            pass  # one that came late
        assert frame == a.frame(A, b"again")
        tap.send(b.frame(a, b"and out"))
        assert a.vif.receive(5) == b.frame(a, b"and out")
    b.vif.groups.leave(A, timeout=5)
    assert int(b.vif.queues[0].record[0]["stop"]) == 0


def _carries(a: Guest, b: Guest, tap: PipeTap) -> bool:
    a.vif.send(a.frame(b, b"there"))
    tap.there.settimeout(0.2)
    try:
        return tap.receive() == a.frame(b, b"there")
    except TimeoutError:
        return False
    finally:
        tap.there.settimeout(5)


@daemon_serves
def test_another_backend_takes_less(net: Any, offloads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = net.guest(), net.guest()
    with tap_of(b.vif) as tap:
        everything = TUN_CSUM | TSO4 | TSO6 | TSO_ECN
        assert offloads == [everything]
        real = keys.read_offer
        monkeypatch.setattr(keys, "read_offer", lambda read: replace(real(read), sg=False, csum6=False))
        net.dom0.store.write(f"{b.backend}/state", 5)
        until(lambda: b.vif.connections == 2 and b.vif.state == 4)
        until(lambda: offloads == [everything, 0])
        # What the kernel has made before it knew cannot be carried, and is counted.
        tap.send(b.frame(a, bytes(5000)))
        tap.send(b.frame(a, b"goes"))
        assert a.vif.receive(5) == b.frame(a, b"goes")
        assert b.vif.stats()["tx_dropped"] == 1


@daemon_serves
@pytest.mark.parametrize("sg", [True, False])
def test_a_blank_checksum_of_a_packet_within_another(net: Any, offloads: list[int], sg: bool) -> None:
    """On the ring nothing says where it is, so it is completed, in the pages or in the buffer."""
    a, b = net.guest(), net.guest()
    with tap_of(b.vif) as tap:
        if not sg:
            b.vif.queues[0].record[0]["sg"] = 0
        for size in (0, 1, 3000):
            blank, complete, start = inner(os.urandom(size), macs=a.mac + b.mac)
            tap.send(blank, 1, 0, 0, 0, start, 16)
            assert a.vif.receive_all(1, 5) == [Frame(complete, CSUM_NONE)]
        whole = tcp(4, bytes(3000), macs=a.mac + b.mac)
        tap.send(whole, 1, 1, 54, 1000, 34, 16)
        assert a.vif.receive_all(1, 5) == [Frame(whole, CSUM_BLANK, 1000, GSO_TCPV4)]
        before = b.vif.stats()["tx_dropped"]
        tap.send(whole, 1, 5, 42, 1000, 34, 6)  # segments of UDP
        tap.send(whole, 1, 1, 54, 1000, 40, 16)  # segments of another packet
        tap.send(whole[:60], 1, 0, 0, 0, 60, 16)  # beyond its end
        tap.send(b.frame(a, b"goes on"))
        assert a.vif.receive(5) == b.frame(a, b"goes on")
        assert b.vif.stats()["tx_dropped"] == before + 3
