"""What comes by a descriptor, and what its header says of the checksum: for which a ring has no words but one."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from netback.port_in import _read_some
from netback.records import BATCH, N_REFUSED, N_SENT, PACKET, STRIDE, SWITCH
from pvdrivers.stats import STATS
from pvdrivers.worker.records import RING
from rings.netif import GSO_TCPV4
from rings.vnet import CSUM_BLANK, CSUM_NONE, CSUM_VALID

from .packets import ones, tcp

HEADER = struct.Struct("=BBHHHH")
NEEDS, VALID = 1, 2


def inner(payload: bytes, *, macs: bytes = bytes(12)) -> tuple[bytes, bytes, int]:
    """A TCP packet in VXLAN with its checksum blank, the same with it complete, and where its TCP begins."""
    inside, complete = (tcp(4, payload, blank=blank) for blank in (True, False))
    size = 28 + 8 + len(inside)
    ip = bytes([0x45, 0]) + size.to_bytes(2, "big") + bytes([0, 0, 0, 0, 64, 17])
    ip += (ones(ip, bytes([10, 0, 0, 1, 10, 0, 0, 2])) ^ 0xFFFF).to_bytes(2, "big") + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    udp = b"\xc0\0\x12\xb5" + (size - 20).to_bytes(2, "big") + bytes(2)
    outside = macs + b"\x08\0" + ip + udp + bytes([8, 0, 0, 0, 0, 0, 7, 0])
    return outside + inside, outside + complete, len(outside) + 34


class Port:
    """A queue of a port, and the end of whoever is behind it."""

    def __init__(self) -> None:
        here, self.there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        self._here = here
        self.ring, self.stats = np.zeros(1, RING), np.zeros(1, STATS)
        self.switch, self.packets = np.zeros(1, SWITCH), np.zeros(BATCH, PACKET)
        self._data = np.zeros(4 * STRIDE, np.uint8)
        self.ring[0]["event_fd"], self.ring[0]["stats"] = here.fileno(), self.stats.ctypes.data
        self.switch[0]["packets"], self.switch[0]["data"] = self.packets.ctypes.data, self._data.ctypes.data

    def close(self) -> None:
        self._here.close()
        self.there.close()

    def take(self, frame: bytes, *header: int) -> tuple[Any, bytes] | None:
        """What becomes of it: its PACKET and its bytes; None if it is refused."""
        self.there.send(HEADER.pack(*header) + frame)
        kinds = self.stats[0]["kinds"]
        before = kinds.copy()
        n = int(_read_some(self.ring.ctypes.data, self.switch.ctypes.data, 2)) & 0xFFFFFFFF
        assert (kinds[N_SENT] - before[N_SENT], kinds[N_REFUSED] - before[N_REFUSED]) == (n, 1 - n)
        if n == 0:
            return None
        row = self.packets[0]
        at = int(row["data"]) - int(self._data.ctypes.data)
        return row, self._data[at : at + int(row["size"])].tobytes()


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


@pytest.mark.parametrize("size", [0, 1, 100, 1447])
def test_a_blank_checksum_of_a_packet_within_another(port: Port, size: int) -> None:
    """A receiver would write it into the outer header."""
    blank, complete, start = inner(os.urandom(size))
    got = port.take(blank, NEEDS, 0, 0, 0, start, 16)
    assert got is not None and got[1] == complete
    assert got[0]["csum"] == CSUM_NONE, "of the outer one nothing is known"


def test_a_blank_checksum_of_sctp(port: Port) -> None:
    ip = tcp(4, b"")[:23] + bytes([132]) + tcp(4, b"")[24:34]
    got = port.take(ip + bytes(12) + b"chunk", NEEDS, 0, 0, 0, 34, 8)
    assert got is not None and got[0]["csum"] == CSUM_NONE
    assert got[1][:42] == ip + bytes(8) and got[1][42:46] != bytes(4) and got[1][46:] == b"chunk"


def test_what_stays_as_it_is(port: Port) -> None:
    for version, kind in ((4, 1), (6, 4)):
        frame = tcp(version, bytes(2000))
        l4 = 34 if version == 4 else 54
        for header, csum, gso in (
            ((NEEDS, 0, 0, 0, l4, 16), CSUM_BLANK, 0),
            ((NEEDS, kind, l4 + 20, 1000, l4, 16), CSUM_BLANK, 1000),
            ((NEEDS, kind | 0x80, l4 + 20, 1000, l4, 16), CSUM_BLANK, 1000),  # ECN
            ((VALID, 0, 0, 0, 0, 0), CSUM_VALID, 0),
            ((0, 0, 0, 0, 0, 0), CSUM_NONE, 0),
        ):
            got = port.take(frame, *header)
            assert got is not None and got[1] == frame
            assert (int(got[0]["csum"]), int(got[0]["gso_size"])) == (csum, gso)
            assert not gso or (int(got[0]["gso_type"]) == GSO_TCPV4) == (version == 4)


@pytest.mark.parametrize(
    ("what", "header"),
    [
        ("segments of UDP", (NEEDS, 5, 42, 1000, 34, 6)),
        ("a datagram to be fragmented", (NEEDS, 3, 42, 1000, 34, 6)),
        ("segments with ECN of UDP", (NEEDS, 0x85, 42, 1000, 34, 6)),
        ("segments of another packet", (NEEDS, 1, 54, 1000, 84, 16)),
        ("a checksum beyond the end", (NEEDS, 0, 0, 0, 2034, 19)),
        ("one of SCTP beyond the end", (NEEDS, 0, 0, 0, 2034, 8)),
    ],
)
def test_what_no_ring_can_say_is_refused(port: Port, what: str, header: tuple[int, ...]) -> None:
    frame = tcp(4, bytes(1990))
    assert len(frame) == 2044
    assert port.take(frame, *header) is None, what
