"""What is larger than an MTU: the kernel against a naive twin, and packets of many segments by a real daemon."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.live import ETHERNET
from netback.mtu import fits
from netback.records import HEAD, PACKET
from netback.switch import Port
from pvdrivers.frontends.netfront import CSUM_BLANK, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings.netif import GSO_TCPV4, GSO_TCPV6

from .conftest import until
from .packets import cut, tcp
from .test_switch import nothing_came

OPTIONS = st.integers(0, 10).map(lambda n: bytes([1]) * (4 * n))
MTUS = st.integers(68, 400) | st.just(0)


def verdict(frame: bytes, mtu: int, gso_size: int = 0, gso_type: int = 0, have: int | None = None) -> bool:
    """By the kernel."""
    data = np.frombuffer(frame + bytes(8), np.uint8).copy()
    packet, port = np.zeros(1, PACKET), Port("test")
    row = packet[0]
    row["data"], row["size"], row["have"] = data.ctypes.data, len(frame), len(frame) if have is None else have
    row["gso_size"], row["gso_type"] = gso_size, gso_type
    port.record[0]["most"] = mtu + ETHERNET if mtu else 0
    return bool(fits(packet.ctypes.data, port.address))


def naive(frame: bytes, mtu: int) -> bool:
    """Of one packet."""
    size, at = len(frame) - 14, 12
    while at < 20 and frame[at : at + 2] in (b"\x81\0", b"\x88\xa8"):
        size, at = size - 4, at + 4
    return mtu == 0 or size <= mtu


@given(
    st.sampled_from([4, 6]), st.integers(0, 1500), st.integers(1, 400), OPTIONS, OPTIONS, st.integers(0, 2),
    st.booleans(), MTUS,
)  # fmt: skip
def test_a_packet_fits_if_each_of_its_segments_does(
    version: int, nbytes: int, gso_size: int, options: bytes, ip_options: bytes, tags: int, extension: bool, mtu: int
) -> None:
    same: dict[str, Any] = {"options": options, "ip_options": ip_options, "tags": tags, "extension": extension}
    frame = tcp(version, bytes(nbytes), **same)
    want = all(naive(one, mtu) for one in cut(version, bytes(nbytes), gso_size, **same))
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    # An IPv4 packet with 40 bytes of options in both headers and two tags: 142 bytes, and HEAD is 128.
    headers = len(frame) - nbytes
    got = verdict(frame, mtu, gso_size, kind, min(len(frame), HEAD))
    assert got == want or (headers > HEAD and got), "what is not known of the headers does not count"
    assert verdict(frame, mtu) == naive(frame, mtu)


@given(st.binary(min_size=14, max_size=600), st.integers(0, 600), st.sampled_from([1, 2]), MTUS)
def test_any_bytes_have_an_answer(frame: bytes, gso_size: int, gso_type: int, mtu: int) -> None:
    got = verdict(frame, mtu, gso_size, gso_type)
    if naive(frame, mtu) or gso_size == 0:
        assert got == naive(frame, mtu)
    elif gso_size > mtu + 8:
        assert not got, "whatever its headers are"


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(gso=False)], ids=["takes segments", "takes none"])
def test_segments_that_are_larger_than_the_mtu(net: Any, wishes: Wishes) -> None:
    """CVE-2018-1000026 was of this kind: a NIC was given segments that its MTU does not allow. By who sends as by who
    receives, whole or cut; and it may be that only one of the two is what they are too large for."""
    a, b, c = net.guest(), net.guest(be={"mtu": 1500}, wishes=wishes), net.guest()
    for version, kind, most in ((4, GSO_TCPV4, 1460), (6, GSO_TCPV6, 1440)):
        good = Frame(tcp(version, bytes(4000), macs=b.mac + a.mac), CSUM_BLANK, most, kind)
        bad = Frame(good.data, CSUM_BLANK, most + 1, kind)
        before = b.counted("too large")
        a.vif.send_all([bad, good])
        first = b.vif.receive_all(1, 5)[0]
        assert (first.gso_size, len(first.data)) == ((most, len(good.data)) if wishes.gso else (0, 1514))
        until(lambda n=before: b.counted("too large") == n + 1)
        while wishes.gso is False and len(b.vif.receive(5)) == 1514:
            pass
        back = tcp(version, bytes(4000), macs=c.mac + b.mac)
        b.vif.send_all([Frame(back, CSUM_BLANK, most + 1, kind), Frame(back, CSUM_BLANK, most, kind)])
        assert c.vif.receive_all(1, 5)[0].gso_size == most
        until(lambda n=before: b.counted("too large") == n + 2)
        nothing_came(b, c)
    assert a.counted("too large") == c.counted("too large") == 0
