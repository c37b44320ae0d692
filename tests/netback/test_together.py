"""What waits, and what is cut, where there are also headroom, hashes, staged pages, VLANs and captures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_VALID, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings.netif import GSO_TCPV4, HASH_IPV4

from .conftest import Guest, until
from .control_bed import KEY
from .packets import cut, tcp
from .test_capture import Capture, packets
from .test_switch import nothing_came
from .test_vlan import tagged
from .test_waiting import fill

pytestmark = pytest.mark.jit_only("a real daemon serves")
WISHES = [Wishes(), Wishes(staging=False)]


def take(guest: Guest, count: int) -> list[Frame]:
    got: list[Frame] = []
    while len(got) < count:
        got += guest.vif.receive_all(count - len(got), 10)
    return got


@pytest.mark.parametrize("ours", WISHES)
@pytest.mark.parametrize("theirs", WISHES)
def test_what_waits_is_as_the_receiver_wants_it(net: Any, ours: Wishes, theirs: Wishes) -> None:
    """With its headroom in each page, and the extras; whichever end has its pages mapped here."""
    a, b = net.guest(wishes=ours), net.guest(wishes=theirs)
    b.vif.set_headroom(256)
    b.vif.set_hash(KEY)
    full = fill(a, b)  # sixteen pages now, and a slot that says so
    until(lambda: b.counted("received") == 15)
    frames = [
        Frame(a.frame(b, bytes(k) * 300, 0x800), CSUM_BLANK, 1448, GSO_TCPV4, HASH_IPV4, 0x01020304 + k)
        for k in range(20)
    ]
    a.vif.send_all(frames)
    until(lambda: a.counted("sent") == 37)
    assert b.counted("received") == 15
    assert take(b, 37) == [Frame(full)] * 17 + frames
    assert b.counted("dropped") == b.counted("expired") == 0


def test_what_waits_and_then_finds_more_headroom(net: Any) -> None:
    a, b = net.guest(), net.guest()
    full = fill(a, b)
    waits = [a.frame(b, os.urandom(size)) for size in (4000, 9000, 20000)]
    for frame in waits:
        a.vif.send(frame)
    until(lambda: a.counted("sent") == 20)
    b.vif.set_headroom(2048)
    assert [frame.data for frame in take(b, 20)] == [full] * 17 + waits


@pytest.mark.parametrize(("be", "passed"), [({}, 20), ({"rx_drain_timeout_msecs": 100}, 17)])
def test_a_capture_has_what_was_delivered(net: Any, tmp_path: Path, be: dict[str, int], passed: int) -> None:
    """What waits is in it when it has waited, and never if it is given up."""
    a, b = net.guest(), net.guest(be=be)
    capture = Capture(b, tmp_path / "b.pcapng", "--snaplen", "64")
    full = fill(a, b, 3)
    until(lambda: b.counted("expired") == 20 - passed)
    assert [frame.data for frame in take(b, passed)] == [full] * passed
    nothing_came(b)
    assert f"{passed} packets, 0 lost" in capture.end()
    assert [(data, size) for _, data, size, _ in packets(capture.out)] == [(full[:64], len(full))] * passed


def test_segments_for_a_trunk(net: Any) -> None:
    """Whole for a guest in the VLAN; for a trunk cut, with a tag, and complete; some at once, and some later."""
    a, b = net.guest("switch:t;vlan=5"), net.guest("switch:t;vlan=5")
    trunk = net.guest("switch:t;trunk")
    everybody = b"\xff" * 6
    payload = os.urandom(20_000)
    whole = tcp(4, payload, macs=everybody + a.mac)
    segments = cut(4, payload, 1448, macs=everybody + a.mac, tags=1, blank=False)
    assert segments[0][12:16] == b"\x81\0\0\5"
    full = a.frame(everybody, os.urandom(4096 * 15 - 14))
    for before in (0, 18):
        for _ in range(before):
            a.vif.send(full)
            assert b.vif.receive(5) == full
        a.vif.send_all([Frame(whole, CSUM_BLANK, 1448, GSO_TCPV4)])
        assert b.vif.receive_all(1, 5) == [Frame(whole, CSUM_BLANK, 1448, GSO_TCPV4)]
        got = take(trunk, before + len(segments))
        assert [frame.data for frame in got] == [tagged(full, 5)] * before + segments
        assert {frame.csum for frame in got[before:]} == {CSUM_VALID}
    assert trunk.counted("cut") == 2
