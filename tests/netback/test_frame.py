"""What a frame's headers say, against a naive reading of them; the checksum, against RFC 1071 written out."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.frame import fill_checksum, flow_of, ones_sum, parse
from netback.records import PACKET
from rings.vnet import CSUM_VALID


def parsed(frame: bytes, have: int | None = None) -> np.void:
    data = np.frombuffer(frame + bytes(64), np.uint8).copy()
    packet = np.zeros(1, PACKET)
    packet[0]["data"], packet[0]["have"] = data.ctypes.data, len(frame) if have is None else have
    packet[0]["size"] = len(frame)
    parse(packet.ctypes.data)
    assert flow_of(packet.ctypes.data) == packet[0]["hash"]
    row: np.void = packet[0]
    return row


def naive(frame: bytes) -> tuple[int, int, int]:
    """(l3, l4, csum_at)"""
    at = 12
    for _ in range(2):
        if frame[at : at + 2] in (b"\x81\x00", b"\x88\xa8") and len(frame) >= at + 6:
            at += 4
    kind, at = frame[at : at + 2], at + 2
    rest = frame[at:]
    if kind == b"\x08\x00" and len(rest) >= 20:
        length = (rest[0] & 15) * 4
        if rest[0] >> 4 != 4 or length < 20 or len(rest) < length:
            return 0, 0, 0
        if int.from_bytes(rest[6:8], "big") & 0x3FFF:
            return 4, 0, 0
        return (4, *transport(frame, rest[9], at + length))
    if kind == b"\x86\xdd" and len(rest) >= 40:
        if rest[0] >> 4 != 6:
            return 0, 0, 0
        following, at = rest[6], at + 40
        for _ in range(6):
            if following not in (0, 43, 60):
                break
            if len(frame) < at + 8:
                return 6, 0, 0
            following, at = frame[at], at + (frame[at + 1] + 1) * 8
        return (6, *transport(frame, following, at))
    return 0, 0, 0


def transport(frame: bytes, protocol: int, at: int) -> tuple[int, int]:
    if protocol == 6 and len(frame) >= at + 20:
        return at, at + 16
    if protocol == 17 and len(frame) >= at + 8:
        return at, at + 6
    return 0, 0


KINDS = st.sampled_from(
    [b"\x08\x00", b"\x86\xdd", b"\x81\x00\0\1\x08\x00", b"\x88\xa8\0\1\x81\x00\0\2\x86\xdd", b"\x08\x06"]
)
IPV4 = st.builds(
    lambda first, frag, protocol, rest: bytes([first, 0, 0, 0, 0, 0, frag >> 8, frag & 255, 64, protocol]) + rest,
    st.sampled_from([0x45, 0x46, 0x4F, 0x44, 0x65]), st.sampled_from([0, 0x4000, 0x2000, 1]),
    st.sampled_from([6, 17, 1]), st.binary(max_size=90),
)  # fmt: skip
IPV6 = st.builds(
    lambda first, following, addresses, rest: bytes([first, 0, 0, 0, 0, 0, following, 64]) + addresses + rest,
    st.sampled_from([0x60, 0x45]), st.sampled_from([6, 17, 0, 43, 60, 44]), st.binary(min_size=32, max_size=32),
    st.binary(max_size=60) | st.lists(st.sampled_from([0, 6, 17, 60]), max_size=60).map(bytes),
)  # fmt: skip


@given(st.binary(min_size=12, max_size=12), KINDS, IPV4 | IPV6 | st.binary(max_size=60))
def test_headers(addresses: bytes, kind: bytes, rest: bytes) -> None:
    frame = addresses + kind + rest
    row = parsed(frame)
    assert (int(row["l3"]), int(row["l4"]), int(row["csum_at"])) == naive(frame)
    assert int(row["dst"]) == int.from_bytes(addresses[:6], "little")
    assert int(row["src"]) == int.from_bytes(addresses[6:], "little")
    assert 0 <= int(row["hash"]) < 1 << 32


def test_headers_that_are_not_all_there_are_none() -> None:
    """XSA-423: whatever part of the headers is private, nothing behind it is looked at."""
    frame = bytes(12) + b"\x08\x00" + bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6]) + bytes(10) + bytes(20)
    for have in range(14, len(frame)):
        assert int(parsed(frame, have)["l4"]) == 0
    assert int(parsed(frame)["l4"]) == 34


def test_flows_differ() -> None:
    head = bytes(12) + b"\x08\x00" + bytes([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2])
    hashes = {int(parsed(head + port.to_bytes(2, "big") + bytes(6))["hash"]) for port in range(1000)}
    assert len(hashes) > 990
    spread = [sum(h % 4 == q for h in hashes) for q in range(4)]
    assert min(spread) > 150


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
def test_the_sum(data: bytes, start: int) -> None:
    raw = np.frombuffer(data + bytes(8), np.uint8).copy()
    total = start + sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "little") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert int(ones_sum(raw.ctypes.data, len(data), start)) == total


@pytest.mark.parametrize("size", [8, 9, 10, 11, 63, 1472])
@pytest.mark.parametrize("zero", [False, True])
def test_a_blank_checksum_is_completed(size: int, zero: bool) -> None:
    """The receiver's test: all words and the pseudo-header add up to ones. A sum of 0 is sent as ones (RFC 768)."""

    def add(*parts: bytes) -> int:
        data = b"".join(parts)
        total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return total

    addresses = os.urandom(8)
    pseudo = addresses + bytes([0, 17]) + size.to_bytes(2, "big")
    payload = bytearray(os.urandom(size - 8))
    ports = os.urandom(4)
    if zero and size >= 10:  # have the words add up to ones
        payload[0:2] = bytes(2)
        rest = add(pseudo, pseudo[:0], ports, size.to_bytes(2, "big"), bytes(payload))
        payload[0:2] = (0xFFFF - rest).to_bytes(2, "big")
    ip = bytes([0x45, 0]) + (20 + size).to_bytes(2, "big") + bytes([0, 0, 0, 0, 64, 17, 0, 0]) + addresses
    frame = (
        bytes(12) + b"\x08\x00" + ip + ports + size.to_bytes(2, "big") + add(pseudo).to_bytes(2, "big") + bytes(payload)
    )
    data = np.frombuffer(frame, np.uint8).copy()
    packet = np.zeros(1, PACKET)
    packet[0]["data"], packet[0]["have"], packet[0]["size"] = data.ctypes.data, len(frame), len(frame)
    parse(packet.ctypes.data)
    fill_checksum(packet.ctypes.data)
    assert int(packet[0]["csum"]) == CSUM_VALID
    after = data.tobytes()
    assert after[:40] + after[42:] == frame[:40] + frame[42:]
    assert add(pseudo, after[34:]) == 0xFFFF
    assert after[40:42] != b"\0\0"
    if zero and size >= 10:
        assert after[40:42] == b"\xff\xff"
