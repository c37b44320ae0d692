"""FreeBSD's catalogue of netback ring tests (sys/dev/xen/netback/netback_unit_tests.c, 53 of them), on our rings.

    theirs                              ours
    ring2pkt        empty               test_nothing_is_taken_from_an_empty_ring
                    1req 2req 3req extra partial                       tests/netback/test_request.py
                    wraps               test_a_packet_that_wraps
    txpkt2rsp       emptypkt            test_nothing_is_taken_from_an_empty_ring
                    1req extra long invalid error                      test_answers_to_what_a_guest_sends
                    wraps               test_a_packet_that_wraps
    pkt2mbufc       short 1cluster largecluster 2cluster               test_bytes_of_a_guest
    txpkt2gnttab    short 2req 2cluster test_bytes_of_a_guest
    update_mbufc    short 2req 2cluster test_bytes_of_a_guest
    pkt2mbufc       empty               test_a_packet_of_nothing
    txpkt2gnttab    empty               test_a_packet_of_nothing
    pkt2mbufc       csum                test_flags_of_a_guest
    mbufc2pkt       short 1cluster long extra                          test_slots_for_a_guest
    rxpkt2gnttab    short 2req          test_slots_for_a_guest
    rxpkt2rsp       short extra 2slots  test_slots_for_a_guest
    mbufc2pkt       empty               test_a_packet_of_nothing
    rxpkt2gnttab    empty               test_a_packet_of_nothing
    rxpkt2rsp       empty               test_a_packet_of_nothing
    mbufc2pkt       2short              test_two_short_ones_share_a_slot_of_the_receiver
    rxpkt2rsp       2short              test_two_short_ones_share_a_slot_of_the_receiver
    rxpkt2rsp       copyerror           test_a_copy_that_fails
    mbufc2pkt       nospace             test_no_space
    add_mbuf_cksum  arp icmp            test_what_has_no_checksum_of_ours_is_let_alone
                    tcp tcp_swcksum udp test_checksums_are_filled_in
    sscanf          hhd hhu lld llu hhn tests/device (numbers out of the store), tests/netback/test_live.py
"""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront import CSUM_BLANK, CSUM_NONE, CSUM_VALID, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings import netif

from .conftest import Guest, until
from .packets import ones, tcp
from .test_cut import TYPES
from .test_hostile import NO_GREF, page_of, put
from .test_switch import nothing_came, udp

pytestmark = pytest.mark.jit_only("a real daemon serves")
MORE, EXTRA = netif.TXF_more_data, netif.TXF_extra_info


def page(guest: Guest, ring: str) -> memoryview:
    """The page of a ring, from its indices on."""
    import ctypes

    at = int(guest.vif.queues[0]._keep[ring][0]["slots"]) - 64
    return memoryview((ctypes.c_ubyte * 4096).from_address(at)).cast("B")


def produced(guest: Guest, ring: str) -> int:
    return int(struct.unpack_from("<I", page(guest, ring), 8)[0])


def answers(guest: Guest, first: int, n: int) -> list[tuple[int, int]]:
    """(id, status) of n responses on its tx ring, from the first-th on."""
    until(lambda: produced(guest, "tx_end") >= first + n)
    assert produced(guest, "tx_end") == first + n
    return [struct.unpack_from("<Hh", page(guest, "tx_end"), 64 + (first + k) % 256 * 12) for k in range(n)]  # type: ignore[misc]


def slots(guest: Guest, n: int) -> list[tuple[int, int, int]]:
    """(offset, flags, status) of the first n responses on its rx ring; of an extra its 8 bytes, as they come."""
    until(lambda: produced(guest, "rx_end") >= n)
    assert produced(guest, "rx_end") == n
    return [struct.unpack_from("<2xHHh", page(guest, "rx_end"), 64 + k * 8) for k in range(n)]  # type: ignore[misc]


def pieces(
    guest: Guest, frame: bytes, sizes: list[int], *, flags: int = 0, extras: int = 0, ids: int = 0
) -> list[Any]:
    """Requests for a frame in pieces of these sizes, each at an odd place of its page, with ids from `ids` on."""
    out: list[Any] = []
    at = 0
    for k, size in enumerate(sizes):
        piece = frame[at : at + size]
        at += size
        offset = min(4096 - size, 13 * (k + 1))
        gref, _ = page_of(guest, bytes(offset) + piece)
        mine = (flags if k == 0 else 0) | (MORE if k < len(sizes) - 1 else 0)
        out.append((gref, offset, mine, ids + k, len(frame) if k == 0 else size))
        if k == 0 and extras:
            out[0] = (gref, offset, mine | EXTRA, ids, len(frame))
            for e in range(extras):
                last = e == extras - 1
                out.append(struct.pack("<BBBBI", netif.EXTRA_HASH, 0 if last else netif.EXTRA_FLAG_MORE, 0, 1, 7))
    return out


def test_nothing_is_taken_from_an_empty_ring(net: Any) -> None:
    a = net.guest()
    a.vif.queues[0]._events.notify(int(a.vif.queues[0].record[0]["tx_port"]))
    nothing_came(a)
    assert produced(a, "tx_end") == produced(a, "rx_end") == 0
    assert a.counted("sent") == a.counted("refused") == 0


@pytest.mark.parametrize(
    ("name", "sizes", "extras", "statuses"),
    [
        ("1req", [60], 0, [0]),
        ("extra", [60], 1, [0, 1]),
        ("extras between fragments", [60, 70], 2, [0, 1, 1, 0]),
        ("long", [4000] * 16, 0, [0] * 16),
        ("as many as must be taken", [100] * 18, 1, [0, 1] + [0] * 17),
        ("invalid: too small", [13], 0, [-1]),
        ("invalid: too many", [100] * 19, 0, [-1] * 19),
    ],
)
def test_answers_to_what_a_guest_sends(net: Any, name: str, sizes: list[int], extras: int, statuses: list[int]) -> None:
    """One a slot, in order, with its id; extras are answered with NULL."""
    a, b = net.guest(), net.guest()
    frame = a.frame(b, os.urandom(max(0, sum(sizes) - 14)))[: sum(sizes)]
    requests = pieces(a, frame, sizes, extras=extras, ids=1000)
    put(a, *requests)
    got = answers(a, 0, len(requests))
    assert [status for _, status in got] == statuses
    assert [id for id, status in got if status != netif.RSP_NULL] == [1000 + k for k in range(len(sizes))]
    if statuses[0] == 0:
        assert b.vif.receive(5) == frame
    else:
        nothing_came(b)


def test_an_answer_of_error(net: Any) -> None:
    """txpkt2rsp_error: a page that cannot be had; all of its packet has an error, and its neighbours have none."""
    a, b = net.guest(), net.guest()
    frame = a.frame(b, os.urandom(500))
    good = pieces(a, frame, [514], ids=1)
    bad = pieces(a, frame, [14, 500], ids=10)
    bad[1] = (NO_GREF, *bad[1][1:])
    put(a, *good, *bad, *pieces(a, frame, [514], ids=20))
    assert answers(a, 0, 4) == [(1, 0), (10, -1), (11, -1), (20, 0)]
    assert [b.vif.receive(5) for _ in range(2)] == [frame, frame]


def test_a_packet_that_wraps(net: Any) -> None:
    """Round the end of both rings: requests, extras and answers."""
    a, b = net.guest(), net.guest()
    for _ in range(250):
        a.vif.send(a.frame(b))
        b.vif.receive(5)
    until(lambda: a.counted("sent") == 250)
    frame = a.frame(b, os.urandom(18 * 1000))
    requests = pieces(a, frame, [14] + [1000] * 17 + [1000], extras=1, ids=2000)[:19]
    frame = frame[: 14 + 17 * 1000]
    requests[0] = (*requests[0][:4], len(frame))
    requests[-1] = (requests[-1][0], requests[-1][1], 0, *requests[-1][3:])
    put(a, *requests)
    assert [status for _, status in answers(a, 250, 19)] == [0, 1] + [0] * 17
    assert b.vif.receive(5) == frame
    for size in (50000, 4096):  # and the rx ring
        for _ in range(20):
            b.vif.send(b.frame(a, bytes([size & 255]) * (size - 14)))
            assert a.vif.receive(5) == b.frame(a, bytes([size & 255]) * (size - 14))


@pytest.mark.parametrize(
    "sizes",
    [[14], [60], [127, 1], [128, 60], [129, 4000], [4096], [4096, 1], [4096, 4096], [1] * 17 + [1000], [14, 0, 60],
     [0, 90], [4096] * 15],
)  # fmt: skip
def test_bytes_of_a_guest(net: Any, sizes: list[int]) -> None:
    """Each from its page and its offset, wherever the first 128 end."""
    a, b = net.guest(), net.guest()
    frame = a.frame(b, os.urandom(sum(sizes) - 14))
    put(a, *pieces(a, frame, sizes))
    assert b.vif.receive(5) == frame


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0]])
def test_a_packet_of_nothing(net: Any, sizes: list[int]) -> None:
    """Not a byte of it is copied, no slot of a receiver's is taken, and its requests are answered."""
    a, b = (net.guest(wishes=Wishes(staging=False)) for _ in range(2))
    put(a, *pieces(a, b"", sizes, ids=5))
    assert answers(a, 0, len(sizes)) == [(5 + k, -1) for k in range(len(sizes))]
    assert a.counted("refused") == 1 and a.counted("sent") == b.counted("received") == 0
    counted = {d["device"]: d["queues"] for d in snapshot(net.run_dir)}
    for guest in (a, b):
        assert sum(q["grants_copied"] + q["persistent_hits"] for q in counted[guest.name]) == 0
    assert produced(b, "rx_end") == 0
    put(a, *pieces(a, a.frame(b), [14], ids=9))
    assert b.vif.receive(5) == a.frame(b)


@pytest.mark.parametrize(
    ("flags", "csum"),
    [
        (0, CSUM_NONE),
        (netif.TXF_data_validated, CSUM_VALID),
        (netif.TXF_csum_blank, CSUM_BLANK),
        (netif.TXF_csum_blank | netif.TXF_data_validated, CSUM_BLANK),
    ],
)
def test_flags_of_a_guest(net: Any, flags: int, csum: int) -> None:
    """They have other numbers on the rx ring."""
    a, b = net.guest(), net.guest()
    frame = tcp(4, b"x" * 100, macs=b.mac + a.mac)
    put(a, *pieces(a, frame, [len(frame)], flags=flags))
    assert b.vif.receive_all(1, 5) == [Frame(frame, csum)]


BLANK, VALID, RMORE, REXTRA = netif.RXF_csum_blank, netif.RXF_data_validated, netif.RXF_more_data, netif.RXF_extra_info


@pytest.mark.parametrize(
    ("name", "size", "gso", "wanted"),
    [
        ("short", 60, 0, [(0, 0, 60)]),
        ("1cluster", 4096, 0, [(0, 0, 4096)]),
        ("2slots", 4097, 0, [(0, RMORE, 4096), (0, 0, 1)]),
        ("long", 20000, 0, [(0, RMORE, 4096)] * 4 + [(0, 0, 20000 - 4 * 4096)]),
        ("extra", 6000, 1448, [(0, BLANK | VALID | RMORE | REXTRA, 4096), None, (0, 0, 6000 - 4096)]),
        ("extra, one page", 3000, 1448, [(0, BLANK | VALID | REXTRA, 3000), None]),
    ],
)
def test_slots_for_a_guest(net: Any, name: str, size: int, gso: int, wanted: list[Any]) -> None:
    a, b = net.guest(), net.guest()
    assert produced(b, "rx_end") == 0
    frame = tcp(4, bytes(size - 54), macs=b.mac + a.mac)
    a.vif.send_all([Frame(frame, CSUM_BLANK if gso else CSUM_NONE, gso, TYPES[4] if gso else 0)])
    got = slots(b, len(wanted))
    assert [one for one, want in zip(got, wanted) if want] == [want for want in wanted if want]
    if gso:
        raw = bytes(page(b, "rx_end")[64 + 8 : 64 + 16])
        assert raw == struct.pack("<BBHBBH", netif.EXTRA_GSO, 0, gso, TYPES[4], 0, 0)


def test_two_short_ones_share_a_slot_of_the_receiver(net: Any) -> None:
    """mbufc2pkt_2short, rxpkt2rsp_2short: fragments of the sender are not slots of the receiver."""
    a, b = net.guest(), net.guest()
    put(a, *pieces(a, a.frame(b, os.urandom(286)), [100, 200]))
    assert slots(b, 1) == [(0, 0, 300)]


def test_a_copy_that_fails(net: Any) -> None:
    """rxpkt2rsp_copyerror: all slots of that packet say ERROR."""
    a, b = net.guest(), net.guest(connect=False)
    b.vif.connect(20)
    queue = b.vif.queues[0]
    at = int(queue._keep["rx_end"][0]["slots"])
    import ctypes

    ctypes.c_uint32.from_address(at + 8 + 4).value = NO_GREF  # the second buffer that it has posted
    a.vif.send(a.frame(b, bytes(5000)))
    assert [status for _, _, status in slots(b, 2)] == [netif.RSP_ERROR] * 2
    assert b.counted("failed") == 1 and a.vif.stats()["tx_errors"] == 0


def test_no_space(net: Any) -> None:
    """mbufc2pkt_nospace: not a slot is taken of a ring that has not all that a packet needs."""
    a, b = net.guest(), net.guest()
    for _ in range(17):
        a.vif.send(a.frame(b, bytes(15 * 4096 - 14)))
    a.vif.send(a.frame(b, bytes(5000)))
    until(lambda: a.counted("sent") == 18)
    until(lambda: produced(b, "rx_end") >= 255)  # which is a moment later
    assert produced(b, "rx_end") == 255


@pytest.mark.parametrize("kind", ["arp", "icmp"])
def test_what_has_no_checksum_of_ours_is_let_alone(net: Any, kind: str) -> None:
    a, b = net.guest(), net.guest(wishes=Wishes(csum4=False, csum6=False))
    ip = bytes([0x45, 0, 0, 48, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]) + os.urandom(28)
    frame = a.frame(b, os.urandom(46) if kind == "arp" else ip, 0x806 if kind == "arp" else 0x800)
    a.vif.send(frame)
    assert b.vif.receive_all(1, 5) == [Frame(frame, CSUM_NONE)]
    a.vif.send(frame, csum=CSUM_BLANK)  # and nobody knows where it would be
    until(lambda: b.counted("not accepted") == 1)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 50, 1447, 8000])
def test_checksums_are_filled_in(net: Any, version: int, size: int) -> None:
    """Of TCP and UDP; one that is complete already stays (tcp_swcksum)."""
    a, b = net.guest(), net.guest(wishes=Wishes(csum4=False, csum6=False))
    payload, macs = os.urandom(size), b.mac + a.mac
    blank, complete = (tcp(version, payload, macs=macs, blank=which) for which in (True, False))
    a.vif.send(blank, csum=CSUM_BLANK)
    assert b.vif.receive_all(1, 5) == [Frame(complete, CSUM_VALID)]
    a.vif.send(complete)
    assert b.vif.receive_all(1, 5) == [Frame(complete, CSUM_NONE)]
    if version == 4:
        blank, complete = (a.frame(b, one, 0x800) for one in udp(payload))
        a.vif.send(blank, csum=CSUM_BLANK)
        assert b.vif.receive_all(1, 5) == [Frame(complete, CSUM_VALID)]
        words = complete[26:34] + b"\0\x11" + complete[38:40] + complete[34:]
        assert ones(words) == 0xFFFF
