"""netback.request against its naive twin: any bytes, chains that are nearly legal, and each attack that has a name."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.records import (
    F_CUT,
    F_EXTRA_TYPE,
    F_GSO_SIZE,
    F_GSO_TYPE,
    F_NO_EXTRA,
    F_PAGE,
    F_SLOTS,
    FATAL_SLOTS,
    MAX_SLOTS,
    P_CONTROL,
    P_FATAL,
    P_REFUSE,
    P_SEND,
    PACKET,
)
from netback.request import plan
from rings.netif import (
    EXTRA_FLAG_MORE,
    EXTRA_GSO,
    EXTRA_HASH,
    EXTRA_MCAST_ADD,
    EXTRA_MCAST_DEL,
    GSO_TCPV4,
    GSO_TCPV6,
    HASH_ALGORITHM_TOEPLITZ,
    HASH_IPV4_TCP,
    RSP_ERROR,
    RSP_OKAY,
    TXF_csum_blank,
    TXF_extra_info,
    TXF_more_data,
)
from tests.netback import naive
from tests.netback.naive import Packet
from tests.rings.guard import Guarded, guarded


def planned(data: bytes) -> Packet:
    """The kernel's plan, with an inaccessible page behind all that it works on; held against the twin's."""
    slots, memory = guarded(data), Guarded(PACKET.itemsize)
    memory.bytes[:] = 0xEE  # of a packet before it
    taken = plan(memory.address, slots.address, len(data) // 12)
    slots.check()
    memory.check()
    row = memory.bytes.view(PACKET)[0]
    got = Packet(int(row["verdict"]), int(row["fault"]), int(row["slots"]), int(row["extras"]), int(row["size"]),
                 int(row["flags"]))  # fmt: skip
    got.gso = (int(row["gso_type"]), int(row["gso_size"]))
    got.mcast = (int(row["mcast"]), int(row["mcast_addr"]).to_bytes(6, "little"))
    got.said = (int(row["said"]) >> 32, int(row["said"]) & 0xFFFFFFFF) if row["said"] else None
    if got.verdict == P_SEND:
        got.fragments = [tuple(map(int, one))[:3] for one in row["fragment"][: row["fragments"]]]
    want = naive.plan(data)
    if got.verdict == P_FATAL:
        assert (want.verdict, want.fault) == (P_FATAL, got.fault)
    else:
        assert got == want
        assert taken == got.slots <= len(data) // 12
    assert row["status"] == (RSP_OKAY if got.verdict in (P_SEND, P_CONTROL) else RSP_ERROR)
    return got


def tx(gref: int, size: int, flags: int = 0, offset: int = 0, id: int = 0) -> bytes:
    return struct.pack("<IHHHH", gref, offset, flags, id, size)


def gso(size: int = 1448, kind: int = GSO_TCPV4, more: bool = False) -> bytes:
    return struct.pack("<BBHBBH4x", EXTRA_GSO, EXTRA_FLAG_MORE * more, size, kind, 0, 0)


def mcast(addr: bytes, kind: int = EXTRA_MCAST_ADD, more: bool = False) -> bytes:
    return struct.pack("<BB6s4x", kind, EXTRA_FLAG_MORE * more, addr)


def hash_extra(kind: int, value: int, algorithm: int = HASH_ALGORITHM_TOEPLITZ, more: bool = False) -> bytes:
    return struct.pack("<BBBBI4x", EXTRA_HASH, EXTRA_FLAG_MORE * more, kind, algorithm, value)


def chain(sizes: Sequence[int], *, total: int | None = None, flags: int = 0, extras: bytes = b"") -> bytes:
    """A packet of so many fragments, its extras behind the first."""
    last = len(sizes) - 1
    total = sum(sizes) if total is None else total
    requests = [tx(k + 1, size, TXF_more_data * (k < last)) for k, size in enumerate([total, *sizes[1:]])]
    head = struct.unpack("<IHHHH", requests[0])
    requests[0] = tx(1, head[4], head[2] | flags | TXF_extra_info * bool(extras))
    return requests[0] + extras + b"".join(requests[1:])


# FreeBSD's catalogue (sys/dev/xen/netback/netback_unit_tests.c): xnb_ring2pkt_*


def test_one_request() -> None:
    packet = planned(chain([60], flags=TXF_csum_blank))
    assert (packet.verdict, packet.slots, packet.flags) == (P_SEND, 1, TXF_csum_blank)
    assert packet.fragments == [(1, 0, 60)]


def test_two_requests() -> None:
    assert planned(chain([1000, 500])).fragments == [(1, 0, 1000), (2, 0, 500)]


def test_three_requests_and_what_follows_is_not_its() -> None:
    packet = planned(chain([100, 4096, 7]) + chain([60]))
    assert (packet.slots, packet.size) == (3, 4203)
    assert packet.fragments == [(1, 0, 100), (2, 0, 4096), (3, 0, 7)]


def test_one_request_and_an_extra() -> None:
    packet = planned(chain([4000], extras=gso()))
    assert (packet.slots, packet.extras, packet.gso) == (2, 1, (GSO_TCPV4, 1448))


def test_two_requests_and_extras_between_them() -> None:
    extra = hash_extra(HASH_IPV4_TCP.bit_length() - 1, int.from_bytes(b"hash", "little"))
    packet = planned(chain([4096, 4096], extras=gso(1428, GSO_TCPV6, more=True) + extra))
    assert packet.said == (HASH_IPV4_TCP, int.from_bytes(b"hash", "little"))
    assert (packet.slots, packet.extras, packet.gso) == (4, 2, (GSO_TCPV6, 1428))
    assert [gref for gref, _, _ in packet.fragments] == [1, 2]


def test_as_many_requests_as_must_be_taken() -> None:
    packet = planned(chain([3000] * MAX_SLOTS))
    assert (packet.verdict, len(packet.fragments)) == (P_SEND, MAX_SLOTS)


def test_a_partial_packet_closes_the_device() -> None:
    """Every frontend pushes whole packets; waiting for the rest would be an attack on us."""
    assert planned(chain([1000, 500])[:12]).fault == F_CUT
    assert planned(chain([1000], extras=gso())[:12]).fault == F_NO_EXTRA


# What else must be there


@pytest.mark.parametrize("kind", [EXTRA_MCAST_ADD, EXTRA_MCAST_DEL])
def test_a_multicast_address(kind: int) -> None:
    packet = planned(chain([0], extras=mcast(b"\x01\x00\x5e\x00\x00\xfb", kind)))
    assert (packet.verdict, packet.mcast) == (P_CONTROL, (kind, b"\x01\x00\x5e\x00\x00\xfb"))


def test_more_than_must_be_taken_is_refused_and_far_more_is_fatal() -> None:
    packet = planned(chain([3000] * (MAX_SLOTS + 1)) + chain([60]))
    assert (packet.verdict, packet.slots) == (P_REFUSE, MAX_SLOTS + 1), "all of it is answered, and nothing behind it"
    assert planned(chain([3000] * FATAL_SLOTS)).verdict == P_REFUSE
    assert planned(chain([3000] * (FATAL_SLOTS + 1))).fault == F_SLOTS


def test_a_frame_of_64_kib_whose_size_has_overflowed_is_refused() -> None:
    packet = planned(chain([4096] * 17, total=4096 * 17 & 0xFFFF))
    assert (packet.verdict, packet.slots) == (P_REFUSE, 17)


@pytest.mark.parametrize("size", [0, 1, 13])
def test_less_than_an_ethernet_header_is_refused(size: int) -> None:
    assert planned(chain([size])).verdict == P_REFUSE


# Security history


def test_xsa_432_the_most_slots_and_the_fewest_bytes() -> None:
    """CVE-2023-34319: headers in many slots, of a byte or none each."""
    packet = planned(chain([0, *[1] * 14, 0, 0, 0]))
    assert (packet.verdict, packet.fragments) == (P_SEND, [(k, 0, 1) for k in range(2, 16)])


def test_xsa_448_fragments_of_no_bytes_are_left_out() -> None:
    """CVE-2023-46838."""
    packet = planned(chain([60, 0, 0, 40, 0]))
    assert packet.fragments == [(1, 0, 60), (4, 0, 40)]
    assert packet.slots == 5
    assert planned(chain([0, 60])).fragments == [(2, 0, 60)]


def test_xsa_423_headers_split_over_slots_keep_their_order() -> None:
    """CVE-2022-3643."""
    packet = planned(chain([1] * 17 + [1000]))
    assert [length for _, _, length in packet.fragments] == [1] * 17 + [1000]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (tx(1, 100, offset=4000), F_PAGE),
        (tx(1, 200, TXF_more_data) + tx(2, 100, offset=4095), F_PAGE),
        (tx(1, 100, TXF_extra_info) + bytes(12), F_EXTRA_TYPE),
        (tx(1, 100, TXF_extra_info) + bytes([5]) + bytes(11), F_EXTRA_TYPE),
        (tx(1, 100, TXF_extra_info) + gso(0), F_GSO_SIZE),
        (tx(1, 100, TXF_extra_info) + gso(100, 0), F_GSO_TYPE),
        (tx(1, 100, TXF_extra_info) + gso(100, 3), F_GSO_TYPE),
        (tx(1, 100, TXF_extra_info) + gso(more=True), F_NO_EXTRA),
    ],
)
def test_what_closes_the_device(data: bytes, fault: int) -> None:
    assert planned(data).fault == fault


# Everything else


@given(st.binary(min_size=1, max_size=23 * 12))
def test_any_bytes(data: bytes) -> None:
    planned(data.ljust(-(-len(data) // 12) * 12, b"\0"))


SIZES = st.one_of(st.integers(0, 20), st.integers(0, 4096), st.integers(0, 0xFFFF))
EXTRAS = st.lists(
    st.one_of(
        st.builds(gso, st.integers(0, 2000), st.integers(0, 3), st.booleans()),
        st.builds(mcast, st.binary(min_size=6, max_size=6), st.sampled_from([2, 3]), st.booleans()),
        st.builds(hash_extra, st.integers(0, 5), st.integers(0, (1 << 32) - 1), st.integers(0, 2), st.booleans()),
    ),
    max_size=4,
)


@given(st.lists(SIZES, min_size=1, max_size=22), st.none() | SIZES, EXTRAS, st.integers(0, 23))
def test_chains_that_are_nearly_legal(sizes: list[int], total: int | None, extras: list[bytes], cut: int) -> None:
    total = min(sum(sizes), 0xFFFF) if total is None else total
    data = chain(sizes, total=total, extras=b"".join(extras)) + chain([60])
    planned(data[: 12 * max(1, len(data) // 12 - cut)])
