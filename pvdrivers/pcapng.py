"""Blocks of a pcapng file (draft-ietf-opsawg-pcapng), as bytes. Pure."""

from __future__ import annotations

import struct
from typing import Final

ETHERNET: Final = 1
INBOUND, OUTBOUND = 1, 2
"""epb_flags, the two lowest bits."""
_COMMENT, _END = 1, 0


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _block(kind: int, body: bytes, options: bytes = b"") -> bytes:
    if options:
        options += struct.pack("<HH", _END, 0)
    size = 12 + len(body) + len(options)
    return struct.pack("<II", kind, size) + body + options + struct.pack("<I", size)


def section(application: str) -> bytes:
    """What a file begins with: in our byte order, of a length that is not told."""
    return _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1), _option(4, application.encode()))


def interface(name: str, description: str, snap: int) -> bytes:
    """An interface, which is counted from 0 on by its place in the file; times are in nanoseconds."""
    options = _option(2, name.encode()) + _option(3, description.encode()) + _option(9, b"\x09")
    return _block(1, struct.pack("<HHI", ETHERNET, 0, snap), options)


def packet(interface: int, time: int, data: bytes, size: int, *, flags: int, queue: int, comment: str = "") -> bytes:
    """A packet of `size` bytes, of which these were captured. `time`: nanoseconds since the epoch."""
    body = struct.pack("<IIIII", interface, time >> 32, time & 0xFFFFFFFF, len(data), size) + _padded(data)
    options = _option(2, struct.pack("<I", flags)) + _option(6, struct.pack("<I", queue))
    if comment:
        options = _option(_COMMENT, comment.encode()) + options
    return _block(6, body, options)


def statistics(interface: int, start: int, end: int, received: int, dropped: int) -> bytes:
    """What became of an interface's packets: all that there were, and those that are not in the file."""

    def stamp(time: int) -> bytes:
        return struct.pack("<II", time >> 32, time & 0xFFFFFFFF)

    options = _option(2, stamp(start)) + _option(3, stamp(end))
    options += _option(4, struct.pack("<Q", received)) + _option(5, struct.pack("<Q", dropped))
    return _block(5, struct.pack("<I", interface) + stamp(end), options)
