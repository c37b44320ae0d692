"""netback.control against its naive twin: every status, any requests in any order, and packets in between."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netback.answers import ANSWERS, BYTES_AT
from netback.control_records import HASH, HASHES, KEY_AT, MOST_HASHED, MOST_KEY
from netback.extras import count_extras, put_extras
from netback.frame import parse
from netback.hashing import choose_queue, flow_hash, make_table
from netback.records import PACKET
from pvdrivers.worker.records import RING
from rings import netif
from rings.atomics import i64, store8, store32
from rings.jit import kernel
from rings.ring import RING_END, back_end
from tests.netback.control_bed import KEY, QUEUES, REQUESTS, Bed, grefs, hashing, ipv4, ipv6, mapping
from tests.netback.naive_control import ALL, INVALID, NOT_SUPPORTED, OKAY, OVERFLOW, Answer
from tests.rings.guard import Guarded
from tests.rings.headers import Require, toeplitz_by_c

# Every status of every type


def test_algorithm() -> None:
    bed = Bed()
    for algorithm in (netif.HASH_ALGORITHM_TOEPLITZ, netif.HASH_ALGORITHM_NONE):
        assert bed.ask(netif.CTRL_SET_HASH_ALGORITHM, algorithm) == (OKAY, 0)
    for algorithm in (2, 0x10000, 0xFFFFFFFF):
        assert bed.ask(netif.CTRL_SET_HASH_ALGORITHM, algorithm) == (INVALID, 0)


def test_types_want_an_algorithm_first() -> None:
    bed = Bed()
    assert bed.ask(netif.CTRL_GET_HASH_FLAGS) == (NOT_SUPPORTED, 0)
    assert bed.ask(netif.CTRL_SET_HASH_FLAGS, ALL) == (INVALID, 0)
    bed.ask(netif.CTRL_SET_HASH_ALGORITHM, netif.HASH_ALGORITHM_TOEPLITZ)
    assert bed.ask(netif.CTRL_GET_HASH_FLAGS) == (OKAY, ALL)
    for types in range(16):
        assert bed.ask(netif.CTRL_SET_HASH_FLAGS, types) == (OKAY, 0)
    for types in (16, 0x80000000, 0xFFFFFFFF):
        assert bed.ask(netif.CTRL_SET_HASH_FLAGS, types) == (INVALID, 0)


def test_key() -> None:
    bed = Bed()
    for size in (40, 1, 0, 39):
        assert bed.ask(netif.CTRL_SET_HASH_KEY, 9, size, page=KEY) == (OKAY, 0)
    for size in (41, 4096, 0xFFFFFFFF):
        assert bed.ask(netif.CTRL_SET_HASH_KEY, 9, size, page=KEY) == (OVERFLOW, 0)
    assert bed.ask(netif.CTRL_SET_HASH_KEY, 9, 16) == (INVALID, 0)
    assert bed.ask(netif.CTRL_SET_HASH_KEY, 9, 0) == (OKAY, 0), "no page is looked for"


def test_mapping() -> None:
    bed = Bed()
    assert bed.ask(netif.CTRL_GET_HASH_MAPPING_SIZE) == (OKAY, 128)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 1, 0, page=mapping(0)) == (INVALID, 0), "there is no table"
    for size in (129, 0xFFFFFFFF):
        assert bed.ask(netif.CTRL_SET_HASH_MAPPING_SIZE, size) == (INVALID, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING_SIZE, 128) == (OKAY, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 128, 0, page=mapping(*[2, 1, 0, 1] * 32)) == (OKAY, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 2, 126, page=mapping(0, 0)) == (OKAY, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 0, 128) == (OKAY, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 1, 5) == (INVALID, 0), "no such page"
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 129, 0, page=mapping(0)) == (OVERFLOW, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING_SIZE, 4) == (OKAY, 0)


def test_a_queue_that_there_is_not_leaves_all_as_it_was() -> None:
    bed = hashing(mapping=4)
    bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 4, 0, page=mapping(2, 1, 0, 2))
    for bad in (QUEUES, 0x80000000, 0xFFFFFFFF):
        assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 4, 0, page=mapping(0, 0, 0, bad)) == (INVALID, 0)
    assert bed.twin.mapping == [2, 1, 0, 2]


@pytest.mark.parametrize("offset", [1, 128, 0xFFFFFFFF, 0xFFFFFFFD, 0x80000000])
def test_xsa_270_a_mapping_beyond_its_table(offset: int) -> None:
    """CVE-2018-15471: offset and length were added, and the sum ran over."""
    bed = hashing(mapping=128)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 128, offset, page=mapping(*[1] * 128)) == (INVALID, 0)
    assert bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 0xFFFFFFFF, offset, page=mapping(1)) == (OVERFLOW, 0)


ADD, DEL = netif.CTRL_ADD_GREF_MAPPING, netif.CTRL_DEL_GREF_MAPPING


def test_grefs() -> None:
    bed = Bed(limit=4)
    for queue, want in ((0, (OKAY, 4)), (QUEUES - 1, (OKAY, 4)), (QUEUES, (INVALID, 0)), (0xFFFFFFFF, (INVALID, 0))):
        assert bed.ask(netif.CTRL_GET_GREF_MAPPING_SIZE, queue) == want
        assert bed.ask(ADD, queue, 9, 0) == (want[0], 0)
    assert bed.ask(ADD, 0, 9, 2, page=grefs(8, 9)) == (OKAY, 0)
    assert bed.ask(ADD, 0, 9, 1, page=grefs(8)) == (INVALID, 0), "there already"
    assert bed.ask(ADD, 0, 9, 2, page=grefs(10, 10)) == (INVALID, 0), "twice in a list"
    assert bed.ask(ADD, 0, 9, 2, page=grefs(10, 15)) == (INVALID, 0), "one cannot be mapped"
    assert bed.ask(ADD, 0, 9, 1, page=grefs(10, flags=2)) == (INVALID, 0), "a flag that there is not"
    assert bed.ask(ADD, 0, 9, 3, page=grefs(10, 11, 12)) == (INVALID, 0), "no room"
    assert bed.ask(ADD, 0, 9, 2, page=grefs(10, 11, flags=1)) == (OKAY, 0)
    assert bed.ask(ADD, 0, 9, 1) == bed.ask(DEL, 0, 9, 1) == (INVALID, 0), "no such page"
    assert bed.ask(DEL, 0, 9, 2, page=grefs(8, 9), writable=False) == (INVALID, 0), "it cannot be told"
    assert bed.ask(DEL, 0, 9, 4, page=grefs(8, 12, 11, 8)) == (OKAY, 2)
    assert bed.ask(DEL, 1, 9, 1, page=grefs(9)) == (OKAY, 0), "another queue's"
    for entries in (513, 0x20000000, 0xFFFFFFFF):
        assert bed.ask(ADD, 0, 9, entries, page=grefs(13)) == bed.ask(DEL, 0, 9, entries, page=b"") == (INVALID, 0)
    none = Bed(limit=0)
    assert none.ask(netif.CTRL_GET_GREF_MAPPING_SIZE, 0) == (OKAY, 0)
    assert none.ask(ADD, 0, 9, 1, page=grefs(8)) == none.ask(DEL, 0, 9, 1, page=grefs(8)) == (NOT_SUPPORTED, 0)


LISTS = st.lists(
    st.builds(struct.pack, st.just("<IHH"), st.integers(0, 79), st.sampled_from([0, 0, 0, 1, 1, 2]), st.just(9)),
    max_size=12,
).map(b"".join)  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from([ADD, ADD, DEL]), st.integers(0, 2), LISTS, st.booleans()), max_size=30),
    st.sampled_from([1, 5, 20]),
)
def test_any_lists_of_grefs(steps: list[Any], limit: int) -> None:
    """What is mapped is what the twin has, and every handle is given back once."""
    bed = Bed(2, limit)
    for kind, queue, page, writable in steps:
        bed.ask(kind, queue, 9, len(page) // 8, page=page, writable=writable)


@pytest.mark.parametrize("kind", [0, 11, 255, 0xFFFF])
def test_what_there_is_not(kind: int) -> None:
    assert Bed().ask(kind, 1, 2, 3) == (NOT_SUPPORTED, 0)


# The table of a key


@kernel
def _naive_table(ha: int, data: int, out: int) -> int:
    """What each value of each nibble adds, by the hash itself: 1152 of them. `data` is MOST_HASHED zeros."""
    for place in range(2 * MOST_HASHED):
        for value in range(16):
            store8(data + (place >> 1), np.uint8(value << 4 if place & 1 == 0 else value))
            found = netif.toeplitz(ha + KEY_AT, MOST_KEY, data, (place >> 1) + 1)
            store32(out + (place * 16 + value) * 4, np.uint32(found))
        store8(data + (place >> 1), np.uint8(0))
    return i64(0)


@kernel
def _make_tables(ha: int, count: int) -> int:
    for _ in range(count):
        make_table(ha)
    return i64(0)


def table_of(key: bytes) -> tuple[Guarded, np.ndarray]:
    """A HASH with its table made, and that of the twin."""
    made, naive, data = Guarded(HASH.itemsize), np.zeros(2 * MOST_HASHED * 16, np.uint32), np.zeros(MOST_HASHED, "u1")
    made.bytes.view(HASH)[0]["key"] = np.frombuffer(key, np.uint8)
    _naive_table(made.address, data.ctypes.data, naive.ctypes.data)
    _make_tables(made.address, 1)
    return made, naive


@given(st.binary(min_size=MOST_KEY, max_size=MOST_KEY))
@settings(max_examples=20)
def test_the_table_of_a_key(key: bytes) -> None:
    made, naive = table_of(key)
    made.check()
    assert (made.bytes.view(HASH)[0]["nibbles"] == naive).all()


@pytest.mark.jit_only("as long as it takes compiled")
def test_a_key_costs_its_worker_little() -> None:
    """A guest may set one as often as it likes, and its neighbours wait meanwhile: it is not hashed 1152 times."""
    made, naive = table_of(KEY)
    data = np.zeros(MOST_HASHED, np.uint8)

    def fastest(kernel: Any, *arguments: int) -> float:
        took = []
        for _ in range(20):
            began = time.perf_counter()
            kernel(*arguments)
            took.append(time.perf_counter() - began)
        return min(took)

    whole = fastest(_naive_table, made.address, data.ctypes.data, naive.ctypes.data)
    assert fastest(_make_tables, made.address, 4) < whole


# Packets


def test_the_published_vectors_of_rss() -> None:
    """Microsoft's, of both versions, through parser, tables and choice."""
    bed = hashing()
    for frame, plain, tcp in (
        (ipv4(), 0x323E8FC2, 0x51CCC178),
        (ipv4(options=bytes(8)), 0x323E8FC2, 0x51CCC178),
        (ipv6(), 0x2CC18CD5, 0x40207D3D),
    ):
        four = frame[12:14] == b"\x08\0"
        kinds = (netif.HASH_IPV4, netif.HASH_IPV4_TCP) if four else (netif.HASH_IPV6, netif.HASH_IPV6_TCP)
        bed.ask(netif.CTRL_SET_HASH_FLAGS, ALL)
        assert bed.send(frame) == (tcp % QUEUES, (kinds[1], tcp)), "the maximal type"
        bed.ask(netif.CTRL_SET_HASH_FLAGS, kinds[0])
        assert bed.send(frame) == (plain % QUEUES, (kinds[0], plain))
        bed.ask(netif.CTRL_SET_HASH_FLAGS, ALL & ~(kinds[0] | kinds[1]))
        assert bed.send(frame) == (0, None)


def test_every_hash_is_that_of_the_header(tmp_path: Path, require_program: Require, require_package: Require) -> None:
    """XEN_NETIF_DEFINE_TOEPLITZ, compiled, is the oracle: keys of each size, and flows of each type."""
    gcc = require_program("gcc", "gcc")
    require_package("/usr/include/xen/io/netif.h", "libxen-dev")
    rng = np.random.default_rng(1)
    bed = hashing()
    cases, got = [], []
    for size in (0, 1, 3, 16, 39, 40) * 5:
        key = rng.bytes(size)
        bed.ask(netif.CTRL_SET_HASH_KEY, 9, size, page=key)
        for protocol in (6, 17):
            addresses, ports = rng.bytes(32), rng.bytes(4)
            for frame, at, n in ((ipv4(protocol, ports=ports), 26, 8), (ipv6(protocol, ports=ports), 22, 32)):
                frame = frame[:at] + addresses[:n] + frame[at + n :]
                cases.append((key, addresses[:n] + (ports if protocol == 6 else b"")))
                got.append(bed.send(frame)[1])
    values = toeplitz_by_c(cases, tmp_path, gcc)
    assert [told[1] for told in got if told is not None] == values


def test_what_is_no_tcp_is_hashed_by_its_addresses() -> None:
    bed = hashing()
    for frame in (ipv4(17), ipv4(fragment=0x2000), ipv4(fragment=99), ipv4(1)):
        assert bed.send(frame)[1] == (netif.HASH_IPV4, 0x323E8FC2)
    assert bed.send(ipv6(17))[1] == (netif.HASH_IPV6, 0x2CC18CD5)
    assert bed.send(bytes(12) + b"\x08\x06" + bytes(46)) == (0, None)
    bed.ask(netif.CTRL_SET_HASH_FLAGS, netif.HASH_IPV4_TCP)
    assert bed.send(ipv4(17)) == (0, None)


def test_without_a_key_every_hash_is_zero() -> None:
    bed = hashing()
    bed.ask(netif.CTRL_SET_HASH_KEY, 0, 0)
    assert bed.send(ipv4()) == (0, (netif.HASH_IPV4_TCP, 0))


def test_the_mapping_steers() -> None:
    bed = hashing(mapping=128)
    bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 128, 0, page=mapping(*[1] * 128))
    assert bed.send(ipv4())[0] == 1
    bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 1, 0x51CCC178 % 128, page=mapping(2))
    assert bed.send(ipv4())[0] == 2
    assert bed.send(bytes(60))[0] == 1, "who has no hash, has the first entry"


def test_what_a_sender_says_of_its_flow_is_passed_on() -> None:
    said = (netif.HASH_IPV6_TCP, 0xFEDCBA98)
    bed = Bed()
    assert bed.send(ipv4(), said) == (0xFEDCBA98 % QUEUES, None), "not to who has not asked for hashes"
    bed.ask(netif.CTRL_SET_HASH_ALGORITHM, netif.HASH_ALGORITHM_TOEPLITZ)
    assert bed.send(ipv4(), said) == (0xFEDCBA98 % QUEUES, said)
    bed.ask(netif.CTRL_SET_HASH_FLAGS, netif.HASH_IPV4)
    bed.ask(netif.CTRL_SET_HASH_KEY, 9, 40, page=KEY)
    assert bed.send(ipv4(), said)[1] == (netif.HASH_IPV4, 0x323E8FC2), "its own comes first"
    assert bed.send(ipv6(), said) == (0, said)


def test_a_vif_with_fewer_queues_than_its_table_was_made_for() -> None:
    """A file of another connection is not taken; if it were, no ring would be chosen that is not there."""
    bed = hashing(mapping=4)
    bed.ask(netif.CTRL_SET_HASH_MAPPING, 9, 4, 0, page=mapping(2, 2, 2, 2))
    packet = np.zeros(1, PACKET)
    assert 0 <= choose_queue(bed.port.ctypes.data, packet.ctypes.data, 1, 1) < 1


FRAMES = st.one_of(
    st.binary(min_size=14, max_size=128),
    st.builds(ipv4, st.sampled_from([1, 6, 17]), ports=st.binary(min_size=4, max_size=4)),
    st.builds(ipv6, st.sampled_from([6, 17, 58]), ports=st.binary(min_size=4, max_size=4)),
)
SAID = st.none() | st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 0xFFFFFFFF))


@given(st.lists(st.tuples(REQUESTS, FRAMES, SAID), max_size=25), st.integers(1, 4), st.booleans())
def test_any_requests(steps: list[Any], queues: int, prepared: bool) -> None:
    bed = Bed(queues)
    if prepared:
        bed.ask(netif.CTRL_SET_HASH_ALGORITHM, netif.HASH_ALGORITHM_TOEPLITZ)
        bed.ask(netif.CTRL_SET_HASH_FLAGS, ALL)
        bed.ask(netif.CTRL_SET_HASH_MAPPING_SIZE, 128)
    for (kind, a, b, c, page), frame, said in steps:
        bed.ask(kind, a, b, c, page=page)
        bed.send(frame, said)


# What the guest is told


@given(st.booleans(), SAID, st.integers(0, 2048))
def test_extras_are_in_order_and_the_last_one_says_so(gso: bool, tell: Answer | None, headroom: int) -> None:
    end, packet, ring = np.zeros(1, RING_END), np.zeros(1, PACKET), np.zeros(1, RING)
    page, answers = Guarded(64 + 8 * 4), Guarded(ANSWERS.itemsize)
    back_end(end.ctypes.data, page.address, 4, 8)
    ring[0]["end"], ring[0]["journal"] = end.ctypes.data, answers.address
    ring[0]["nr_ents"], ring[0]["entry_size"] = 4, 8
    if gso:
        packet[0]["gso_size"], packet[0]["gso_type"] = 1448, netif.GSO_TCPV4
    if tell:
        packet[0]["tell"] = tell[0] << 32 | tell[1]
    want = []
    if gso:
        want.append(struct.pack("<BBHBBH", netif.EXTRA_GSO, 1, 1448, netif.GSO_TCPV4, 0, 0))
    if tell:
        want.append(struct.pack("<BBBBI", netif.EXTRA_HASH, 1, tell[0].bit_length() - 1, 1, tell[1]))
    if headroom:
        want.append(struct.pack("<BBH4x", netif.EXTRA_XDP, 1, headroom))
    count = count_extras(packet.ctypes.data, headroom)
    assert count == len(want)
    if count:
        want[-1] = want[-1][:1] + b"\0" + want[-1][2:]
        put_extras(ring.ctypes.data, packet.ctypes.data, headroom)
    answers.check()
    assert end[0]["cons"] == end[0]["prod_pvt"] == count
    assert answers.bytes[BYTES_AT : BYTES_AT + 32].tobytes() == b"".join(want).ljust(32, b"\0")
    assert not page.bytes[64:].any()  # nothing is in the ring before it is certain that it will be published


def test_a_hash_is_of_the_bytes_that_are_there() -> None:
    """The first 128 alone are private: headers that end behind them are none, whatever stands there."""
    bed = hashing()
    packet = np.zeros(1, PACKET)
    frame = ipv4()[:34]
    data = Guarded(len(frame)).fill(frame)
    packet[0]["data"], packet[0]["have"] = data.address, len(frame)
    parse(packet.ctypes.data)
    all = bed.hashes.bytes.view(HASHES)
    ha = bed.hashes.address + 8 + int(all[0]["which"]) * HASHES["hash"].base.itemsize
    assert flow_hash(ha, packet.ctypes.data) == netif.HASH_IPV4 << 32 | 0x323E8FC2
