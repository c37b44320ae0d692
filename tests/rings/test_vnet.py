"""struct virtio_net_hdr and the rings' words, each as the other."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rings.netif import GSO_TCPV4, GSO_TCPV6
from rings.vnet import (
    CSUM_BLANK,
    CSUM_NONE,
    CSUM_VALID,
    VNET_SIZE,
    complete,
    from_vnet,
    is_elsewhere,
    put_vnet,
)

HEADER = struct.Struct("=BBHHHH")
FRAME = np.dtype([("size", "i8"), ("csum", "i8"), ("gso_size", "i8"), ("gso_type", "i8")], align=True)
KINDS = {0: (0, 0), 1: (1448, GSO_TCPV4), 4: (1428, GSO_TCPV6), 0x81: (1448, GSO_TCPV4), 3: (0, 0),
         5: (0, 0), 0x85: (0, 0)}  # fmt: skip


def read(header: bytes, size: int) -> tuple[int, int, int, int]:
    raw, frame = np.frombuffer(header, np.uint8).copy(), np.zeros(1, FRAME)
    known = from_vnet(int(raw.ctypes.data), frame[0], size)
    assert known == (header[1] & 0x7F in (0, 1, 4)), "UDP's segments are nobody's"
    return tuple(int(frame[0][name]) for name in FRAME.names or ())  # type: ignore[return-value]


def ones(data: bytes) -> int:
    """The sum of RFC 1071 over 16-bit words, not complemented."""
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def completed(data: bytes, start: int, offset: int) -> bytes | None:
    """What becomes of a packet whose checksum is blank there; None if it cannot be."""
    raw = np.frombuffer(HEADER.pack(1, 0, 0, 0, start, offset), np.uint8).copy()
    packet = np.frombuffer(data, np.uint8).copy()
    done = complete(int(raw.ctypes.data), int(packet.ctypes.data), len(data))
    return packet.tobytes() if done else None


@given(st.binary(min_size=14, max_size=120), st.integers(0, 130), st.sampled_from([2, 4, 6, 16]))
def test_a_checksum_that_is_somewhere_is_completed(data: bytes, start: int, offset: int) -> None:
    """What stands there counts, and 0 is sent as ones (Linux, skb_checksum_help)."""
    at = start + offset
    got = completed(data, start, offset)
    assert (got is None) == (at + 2 > len(data))
    if got is not None:
        total = 0xFFFF ^ ones(data[start:])
        assert got == data[:at] + (total or 0xFFFF).to_bytes(2, "big") + data[at + 2 :]


def test_the_checksum_of_sctp() -> None:
    """RFC 9260, appendix A; and 123456789, as all that know a CRC check themselves."""
    packet = bytes(5) + b"\x12\x34\0\x50\1\2\3\4????" + b"chunks of it"
    blank = packet.replace(b"????", bytes(4))
    assert crc32c(b"123456789") == 0xE3069283
    assert completed(packet, 5, 8) == packet.replace(b"????", crc32c(blank[5:]).to_bytes(4, "little"))
    assert completed(packet[:16], 5, 8) is None


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def write(data: bytes, csum: int, gso: int) -> bytes | None:
    raw = np.zeros(VNET_SIZE, np.uint8)
    packet = np.frombuffer(data, np.uint8).copy()
    done = put_vnet(int(raw.ctypes.data), int(packet.ctypes.data), len(data), csum, gso)
    return raw.tobytes() if done else None


@given(st.integers(0, 255), st.sampled_from(sorted(KINDS)), st.integers(14, 65535))
def test_what_a_tap_says(flags: int, gso: int, size: int) -> None:
    """NEEDS_CSUM is 1, DATA_VALID 2; ECN changes nothing."""
    want, kind = KINDS[gso]
    csum = CSUM_BLANK if flags & 1 else CSUM_VALID if flags & 2 else CSUM_NONE
    assert read(HEADER.pack(flags, gso, 54, want or 1400, 34, 16), size) == (size, csum, want, kind)


def frame(version: int, protocol: int, tags: int) -> bytes:
    ethernet = bytes(12) + b"\x81\0\0\5" * tags + (b"\x08\0" if version == 4 else b"\x86\xdd")
    l4 = bytes(12) + b"\x50" + bytes(100) if protocol == 6 else bytes(113)
    if version == 4:
        return ethernet + b"\x45" + bytes(8) + bytes([protocol]) + bytes(10) + l4
    return ethernet + b"\x60" + bytes(5) + bytes([protocol]) + bytes(33) + l4


@given(st.sampled_from([4, 6]), st.sampled_from([6, 17]), st.integers(0, 2), st.sampled_from([0, 1448]))
def test_what_a_tap_is_told(version: int, protocol: int, tags: int, gso: int) -> None:
    data = frame(version, protocol, tags)
    l4 = 14 + 4 * tags + (20 if version == 4 else 40)
    assert write(data, CSUM_NONE, 0) == bytes(10)
    assert write(data, CSUM_VALID, 0) == HEADER.pack(2, 0, 0, 0, 0, 0)
    said = write(data, CSUM_BLANK, gso)
    offset = 16 if protocol == 6 else 6
    if gso and protocol == 17:
        assert said is None  # there are no such segments on a ring
    elif gso:
        assert not elsewhere(said, data)
        kind = 1 if version == 4 else 4
        assert said == HEADER.pack(1, kind, l4 + 20, gso, l4, offset)
        assert read(said, len(data)) == (len(data), CSUM_BLANK, gso, GSO_TCPV4 if version == 4 else GSO_TCPV6)
    else:
        assert said == HEADER.pack(1, 0, 0, 0, l4, offset)
        assert not elsewhere(said, data)
        for start, where in ((l4 + 2, offset), (l4, offset + 2), (l4 - 20, offset), (0, 0)):
            assert elsewhere(HEADER.pack(1, 0, 0, 0, start, where), data)


def elsewhere(header: bytes, data: bytes) -> bool:
    raw, packet = (np.frombuffer(some, np.uint8).copy() for some in (header, data))
    return bool(is_elsewhere(int(raw.ctypes.data), int(packet.ctypes.data), len(data)))


@given(st.binary(min_size=0, max_size=120), st.sampled_from([0, 1448]))
def test_anything(data: bytes, gso: int) -> None:
    """Of arbitrary bytes either nothing is said, or what lies within them."""
    said = write(data + bytes(1), CSUM_BLANK, gso)
    if said is not None:
        flags, _, _, _, start, offset = HEADER.unpack(said)
        assert flags == 1 and start >= 14 and start + offset + 2 <= len(data) + 1
