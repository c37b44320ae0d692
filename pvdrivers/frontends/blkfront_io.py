"""Requests as callers say them, and their cutting into pieces that one request on a ring can carry. Pure."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rings import blkif

from .blkfront_records import IO
from .memory import GuestBuffer

__all__ = ["OPERATIONS", "Io", "Pending", "cut", "most_bytes"]

_PAGE = 4096
OPERATIONS = {
    "read": blkif.OP_READ,
    "write": blkif.OP_WRITE,
    "barrier": blkif.OP_WRITE_BARRIER,
    "flush": blkif.OP_FLUSH_DISKCACHE,
    "discard": blkif.OP_DISCARD,
}
CARRY_DATA = (blkif.OP_READ, blkif.OP_WRITE, blkif.OP_WRITE_BARRIER)


@dataclass
class Io:
    """One operation on a disk. `offset` and `length` are bytes, and multiples of the disk's sector size.

    The data is `length` bytes of `buffer` from `buffer_offset` on: anything with the buffer protocol (writable for
    a read), or a GuestBuffer, which is not copied when the backend is trusted and grants are not persistent. Until
    the operation has completed the buffer belongs to it.
    """

    op: str  # read, write, barrier, flush or discard
    offset: int = 0
    length: int = 0
    buffer: Any = None
    buffer_offset: int = 0
    secure: bool = False  # discard: make the data unreadable


@dataclass
class Pending:
    """An Io under way: how many of its pieces are, and the first error."""

    io: Io
    future: Future[int]
    pieces: int = 0
    status: int = 0
    keep: Any = field(default=None, repr=False)


def most_bytes(max_segments: int, sector_size: int, misaligned: int = 0) -> int:
    """Bytes that one request carries, from `misaligned` bytes into a page; a multiple of `sector_size`."""
    return (max_segments * _PAGE - misaligned) // sector_size * sector_size


def locate(io: Io) -> tuple[int, int, Any]:
    """(address, address of frame numbers or 0, what has to be kept alive) of an Io's data. Raises ValueError."""
    end = io.buffer_offset + io.length
    if isinstance(io.buffer, GuestBuffer):
        if io.buffer_offset < 0 or end > io.buffer.nbytes:
            raise ValueError(f"bytes {io.buffer_offset} to {end} of a buffer of {io.buffer.nbytes}")
        return io.buffer.address + io.buffer_offset, io.buffer.frames_at(io.buffer_offset), io.buffer
    array = np.frombuffer(io.buffer, np.uint8)
    if io.buffer_offset < 0 or end > len(array):
        raise ValueError(f"bytes {io.buffer_offset} to {end} of a buffer of {len(array)}")
    if io.op == "read" and not array.flags.writeable:
        raise ValueError("the buffer of a read is not writable")
    return int(array.ctypes.data) + io.buffer_offset, 0, array


def records_of(io: Io, tag: int) -> tuple[NDArray[Any], Any]:
    """An Io as one IO record, however long, and what has to be kept alive until it is done."""
    record = np.zeros(1, IO)
    keep = None
    r = record[0]
    r["op"], r["tag"] = OPERATIONS[io.op], tag
    r["sector"], r["sectors"] = io.offset // 512, io.length // 512
    r["flags"] = blkif.DISCARD_SECURE if io.secure else 0
    if io.length and r["op"] in CARRY_DATA:
        r["address"], r["frames"], keep = locate(io)
    return record, keep


def cut(ios: NDArray[Any], max_segments: int, sector_size: int, bounce: bool) -> NDArray[Any]:
    """Cut each record with data into as many as it takes; all others stay as they are, in order."""
    parts = []
    for i in range(len(ios)):
        io = ios[i : i + 1]
        r = io[0]
        nbytes = int(r["sectors"]) * 512
        if int(r["op"]) not in CARRY_DATA or not nbytes:
            parts.append(io)
            continue
        address, frames = int(r["address"]), int(r["frames"])
        in_place = not bounce and frames != 0 and address % 512 == 0
        at = 0
        starts = []
        while at < nbytes:
            starts.append(at)
            at += most_bytes(max_segments, sector_size, (address + at) % _PAGE if in_place else 0)
        offsets = np.array(starts, np.int64)
        pieces = np.repeat(io, len(starts))
        pieces["sector"] += offsets // 512
        pieces["sectors"] = np.diff(np.append(offsets, nbytes)) // 512
        pieces["address"] += offsets
        if frames:
            pieces["frames"] = frames + ((address % _PAGE + offsets) // _PAGE) * 8
        parts.append(pieces)
    return np.concatenate(parts) if parts else ios
