"""Packets between the rings of a vif and a TAP of the guest's kernel, both ways, in one loop without Python.

The TAP says of each packet what the ring says of it: struct virtio_net_hdr (Linux, include/uapi/linux/virtio_net.h).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.syscalls import read, write
from rings.atomics import i64, load8, load_acquire64, records, zero_bytes
from rings.frame import ETHERNET, checksum_at, headers, l4_at, version_of
from rings.jit import inline, kernel
from rings.netif import GSO_TCPV4, GSO_TCPV6

from .netfront_kernels import arm, frame_at, kick, reap, receive_all, start, wait
from .netfront_records import BUFFER, CSUM_BLANK, CSUM_NONE, CSUM_VALID, FRAME, NO_ROOM, RX, TX

VNET_HEADER = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "u2"),
        ("gso_size", "u2"),
        ("csum_start", "u2"),
        ("csum_offset", "u2"),
    ]
)
"""struct virtio_net_hdr, as a TAP has it: 10 bytes, in the order of the machine."""
HEADER = VNET_HEADER.itemsize
AT = 16
"""Where a packet stands in its buffer; the header is just before it."""
ROOM = AT + BUFFER + 48
"""Bytes of a buffer."""
_FRAME_SIZE = FRAME.itemsize
_NEEDS_CSUM, _DATA_VALID = 1, 2
_GSO_TCPV4, _GSO_TCPV6, _GSO_ECN = 1, 4, 0x80
_BATCH = 64
_SLEEP_MS = 1000


@inline
def _header(at: int) -> Any:
    return records(at, 1, VNET_HEADER)[0]


@inline
def _from_header(at: int, fa: int, size: int) -> None:
    header, frame = _header(at), frame_at(fa)
    flags, gso = i64(header["flags"]), i64(header["gso_type"]) & ~_GSO_ECN
    frame["size"], frame["csum"], frame["hash_type"] = size, CSUM_NONE, 0
    if flags & _NEEDS_CSUM != 0:
        frame["csum"] = CSUM_BLANK
    elif flags & _DATA_VALID != 0:
        frame["csum"] = CSUM_VALID
    frame["gso_size"], frame["gso_type"] = 0, 0
    if gso == _GSO_TCPV4 or gso == _GSO_TCPV6:
        frame["gso_size"] = i64(header["gso_size"])
        frame["gso_type"] = GSO_TCPV4 if gso == _GSO_TCPV4 else GSO_TCPV6


@kernel
def _to_header(at: int, fa: int, data: int) -> bool:
    """False for a packet that the kernel could make nothing of: a blank checksum, and no TCP or UDP to be seen."""
    header, frame = _header(at), frame_at(fa)
    zero_bytes(at, HEADER)
    if frame["csum"] == CSUM_VALID:
        header["flags"] = _DATA_VALID
    if frame["csum"] != CSUM_BLANK:
        return True
    found = headers(data, min(frame["size"], 0xFFFF)) if frame["size"] >= ETHERNET else i64(0)
    l4 = l4_at(found)
    if l4 == 0:
        return False
    header["flags"] = _NEEDS_CSUM
    header["csum_start"], header["csum_offset"] = l4, checksum_at(found) - l4
    if frame["gso_size"] != 0:
        header["gso_type"] = _GSO_TCPV4 if version_of(found) == 4 else _GSO_TCPV6
        header["gso_size"] = frame["gso_size"]
        header["hdr_len"] = l4 + (i64(load8(data + l4 + 12)) >> 4) * 4
        return checksum_at(found) - l4 == 16  # TCP
    return True


@kernel
def _send(qa: int, fd: int, buffer: int, fa: int, waiting: int) -> int:
    """From the TAP to the ring: a packet that found no room stays in the buffer. How many went, as 2n + whether one
    waits; -1 for a violation."""
    if reap(qa) < 0:
        return i64(-1)
    n = i64(0)
    while n < _BATCH:
        if waiting == 0:
            size = read(fd, buffer + AT - HEADER, BUFFER + HEADER) - HEADER
            if size <= 0:
                break
            _from_header(buffer + AT - HEADER, fa, size)
        waiting = i64(1) if start(qa, buffer + AT, fa) == NO_ROOM else i64(0)
        if waiting != 0:
            break
        n += 1
    if n > 0:
        kick(qa)
    return 2 * n + waiting


@kernel
def _receive(qa: int, fd: int, buffer: int, fa: int) -> int:
    """From the ring to the TAP; what that does not take is lost. How many came, -1 for a violation."""
    n = i64(0)
    while n < _BATCH:
        got = receive_all(qa, buffer + AT, fa, 1)
        if got < 0:
            return i64(-1)
        if got == 0:
            break
        if _to_header(buffer + AT - HEADER, fa, buffer + AT):
            write(fd, buffer + AT - HEADER, frame_at(fa)["size"] + HEADER)
        n += 1
    return n


@kernel
def pump(qa: int, fd: int, buffers: int, frames: int) -> int:
    """Carry packets until the queue is stopped or a signal came (0), or the backend breaks the protocol (-1).

    `fd` does not block and is on the queue's epoll. `buffers` are two of ROOM bytes, `frames` two FRAMEs.
    """
    waiting = i64(0)
    there = buffers + ROOM
    frame = frames + _FRAME_SIZE
    while load_acquire64(qa) == 0:
        sent = _send(qa, fd, buffers, frames, waiting)
        if sent < 0:
            return i64(-1)
        waiting = sent & 1
        got = _receive(qa, fd, there, frame)
        if got < 0:
            return i64(-1)
        if sent >> 1 != 0 or got != 0:
            continue
        n = arm(qa, RX | TX if waiting != 0 else RX)
        if n < 0:
            return i64(-1)
        if n == 0 and wait(qa, _SLEEP_MS) < 0:
            return i64(0)
    return i64(0)


ARGUMENTS = {"pump": "(int64, int64, int64, int64)"}
"""What Python calls, and with what, for warm()."""
