"""Segmentation by the backend: the kernels against a naive twin, and guests that take no segments by a real daemon."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.cut import count_segments, header_size, make_blank, put_segment
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_NONE, CSUM_VALID, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings.frame import headers
from rings.netif import GSO_TCPV4, GSO_TCPV6

from .conftest import until
from .packets import ACK, CWR, FIN, PSH, cut, pseudo, tcp

TYPES = {4: GSO_TCPV4, 6: GSO_TCPV6}


def segments(frame: bytes, gso_type: int, gso_size: int, *, blank: bool) -> list[bytes]:
    """By the kernels."""
    data = np.frombuffer(frame + bytes(64), np.uint8).copy()
    at, size = int(data.ctypes.data), len(frame)
    found = int(headers(at, size))
    header = int(header_size(at, size, found, gso_type))
    if header == 0:
        return []
    out = np.full(header + gso_size + 64, 0xEE, np.uint8)
    frames = []
    for k in range(int(count_segments(size, header, gso_size))):
        n = int(put_segment(out.ctypes.data, at, size, found, header, gso_size, k, int(blank)))
        assert (out[n : n + 8] == 0xEE).all() or n < header + gso_size
        frames.append(out[:n].tobytes())
    assert data.tobytes()[:size] == frame  # it may have other receivers
    return frames


OPTIONS = st.integers(0, 10).map(lambda n: bytes([1]) * (4 * n))


@given(
    st.sampled_from([4, 6]), st.binary(max_size=300), st.integers(1, 400), st.integers(0, 255), OPTIONS, OPTIONS,
    st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF),
)  # fmt: skip
def test_each_segment_is_what_its_sender_would_have_sent(
    version: int, payload: bytes, gso_size: int, flags: int, options: bytes, ip_options: bytes, tags: int,
    extension: bool, blank: bool, seq: int, ident: int,
) -> None:  # fmt: skip
    same: dict[str, Any] = {"options": options, "ip_options": ip_options, "tags": tags, "extension": extension}
    frame = tcp(version, payload, flags=flags, seq=seq, ident=ident, **same)
    got = segments(frame, TYPES[version], gso_size, blank=blank)
    assert got == cut(version, payload, gso_size, flags=flags, seq=seq, ident=ident, blank=blank, **same)


@given(st.binary(min_size=14, max_size=200), st.sampled_from([1, 2]), st.integers(1, 100))
def test_whatever_bytes_are_cut_nothing_breaks(frame: bytes, gso_type: int, gso_size: int) -> None:
    got = segments(frame, gso_type, gso_size, blank=False)
    if got:
        header = len(frame) - sum(len(one) for one in got)  # of one, and of all but one
        assert all(len(one) <= len(frame) for one in got), header


@pytest.mark.parametrize(
    ("frame", "gso_type"),
    [
        (tcp(4, b"x" * 99), GSO_TCPV6),
        (tcp(6, b"x" * 99), GSO_TCPV4),
        (tcp(4, b"")[:14] + bytes([0x45]) + bytes(8) + bytes([17]) + bytes(40), GSO_TCPV4),  # UDP
        (tcp(4, b"")[:46] + bytes([0x40]) + tcp(4, b"")[47:], GSO_TCPV4),  # a TCP header of 16 bytes
        (tcp(4, b"")[:46] + bytes([0xF0]) + tcp(4, b"")[47:], GSO_TCPV4),  # ... of more than there is
        (bytes(64), GSO_TCPV4),
    ],
)
def test_what_is_no_tcp_of_its_type_is_not_cut(frame: bytes, gso_type: int) -> None:
    assert segments(frame, gso_type, 50, blank=True) == []


def test_a_length_is_not_needed_in_what_a_sender_left_blank() -> None:
    """Some guests have the sum of addresses and protocol alone there: it is made anew."""
    whole = bytearray(tcp(4, bytes(3000)))
    whole[50:52] = b"\xbe\xef"
    assert segments(bytes(whole), GSO_TCPV4, 1448, blank=False) == cut(4, bytes(3000), 1448, blank=False)


@given(st.sampled_from([4, 6]), st.booleans(), st.binary(max_size=200), st.integers(0, 2), st.integers(0, 0xFFFF))
def test_a_checksum_is_made_blank(version: int, is_udp: bool, payload: bytes, tags: int, before: int) -> None:
    frame = bytearray(tcp(version, payload, tags=tags))
    l4 = 14 + 4 * tags + (20 if version == 4 else 40)
    at = l4 + (6 if is_udp else 16)
    if is_udp:
        frame[14 + 4 * tags + (9 if version == 4 else 6)] = 17
    addresses = bytes(frame[l4 - 8 : l4] if version == 4 else frame[l4 - 32 : l4])
    frame[at : at + 2] = pseudo(addresses, len(frame) - l4, 17 if is_udp else 6).to_bytes(2, "big")
    data = np.frombuffer(bytes(frame), np.uint8).copy()
    data[at], data[at + 1] = before >> 8, before & 255
    address = int(data.ctypes.data)
    make_blank(address, len(data), int(headers(address, len(data))))
    assert data.tobytes() == frame


def receive(guest: Any, n: int) -> list[Frame]:
    got: list[Frame] = []
    while len(got) < n:
        got += guest.vif.receive_all(64, 5)
    return got


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("wishes", "blank"),
    [
        (Wishes(gso=False), True),
        (Wishes(gso=False, csum4=False, csum6=False), False),
        (Wishes(csum4=False, csum6=False), False),  # segments, but no checksums: that cannot be had at once
        (Wishes(sg=False), True),
        (Wishes(sg=False, gso=False, csum4=False, csum6=False, split=False), False),
    ],
)
def test_a_guest_that_takes_no_segments_gets_them_one_by_one(
    net: Any, version: int, wishes: Wishes, blank: bool
) -> None:
    a, b = net.guest(), net.guest(wishes=wishes)
    for size, gso_size in ((60000, 1448), (3000, 1448), (1000, 1448), (64000, 4000), (65400, 600)):
        payload = os.urandom(size)
        same: dict[str, Any] = {"macs": b.mac + a.mac, "flags": ACK | PSH | FIN | CWR, "options": bytes([1]) * 12}
        a.vif.send_all([Frame(tcp(version, payload, **same), CSUM_BLANK, gso_size, TYPES[version])])
        wanted = cut(version, payload, gso_size, blank=blank, **same)
        assert [f.data for f in receive(b, len(wanted))] == wanted
    a.vif.send_all([Frame(tcp(version, payload, **same), CSUM_BLANK, 9000, TYPES[version])])
    wanted = cut(version, payload, 9000, blank=blank, **same)
    if wishes.sg:
        got = receive(b, len(wanted))
        assert {f.csum for f in got} == {CSUM_BLANK if blank else CSUM_VALID}
        assert [f.data for f in got] == wanted
    else:
        until(lambda: b.counted("not accepted") == 1)  # not even a segment of it fits into a page
    assert b.counted("cut") == 6


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("version", [4, 6])
def test_segments_without_a_blank_checksum_get_one(net: Any, version: int) -> None:
    """Some guests do not say that it is blank, and have anything there (Linux: checksum_setup)."""
    a, b = net.guest(), net.guest()
    payload = os.urandom(5000)
    wanted = tcp(version, payload, macs=b.mac + a.mac)
    said = bytearray(wanted)
    at = 14 + (20 if version == 4 else 40) + 16
    said[at : at + 2] = bytes(byte ^ 0x5A for byte in wanted[at : at + 2])
    a.vif.send_all([Frame(bytes(said), CSUM_NONE, 1448, TYPES[version]), Frame(a.frame(b))])
    assert b.vif.receive_all(1, 5) == [Frame(wanted, CSUM_BLANK, 1448, TYPES[version])]
    assert b.vif.receive(5) == a.frame(b)
    a.vif.send_all([Frame(bytes(said), CSUM_BLANK, 1448, TYPES[version])])
    assert b.vif.receive_all(1, 5) == [Frame(bytes(said), CSUM_BLANK, 1448, TYPES[version])], "who says so is believed"


@pytest.mark.jit_only("a real daemon serves")
def test_to_everybody_each_as_it_can_take_it(net: Any) -> None:
    a, whole, parts, full = (
        net.guest(), net.guest(), net.guest(wishes=Wishes(gso=False)), net.guest(wishes=Wishes(gso=False, csum4=False)),
    )  # fmt: skip
    payload = os.urandom(9000)
    macs = b"\xff" * 6 + a.mac
    frame = Frame(tcp(4, payload, macs=macs), CSUM_BLANK, 1000, GSO_TCPV4)
    a.vif.send_all([frame])
    assert whole.vif.receive_all(1, 5) == [frame]
    assert [f.data for f in receive(parts, 9)] == cut(4, payload, 1000, macs=macs)
    assert [f.data for f in receive(full, 9)] == cut(4, payload, 1000, macs=macs, blank=False)


@pytest.mark.jit_only("a real daemon serves")
def test_segments_of_nearly_nothing_are_as_many_as_there_is_room_for(net: Any) -> None:
    """A sender asks for 60,000 segments of one byte: it gets what any flood gets, and its neighbours lose nothing."""
    a, b, c = net.guest(), net.guest(wishes=Wishes(gso=False)), net.guest()
    for _ in range(20):
        a.vif.send_all([Frame(tcp(4, bytes(60000), macs=b.mac + a.mac), CSUM_BLANK, 1, GSO_TCPV4)])
    until(lambda: a.counted("sent") == 20)
    a.vif.send(a.frame(c, b"still here"))
    assert c.vif.receive(5) == a.frame(c, b"still here")
    assert receive(b, 256)[255].data == tcp(4, b"\0", macs=b.mac + a.mac, seq=0xFFFFF000 + 255, ident=0xFFFE + 255)
