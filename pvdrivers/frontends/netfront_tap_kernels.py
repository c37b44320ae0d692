"""Packets between the rings of a vif and a TAP of the guest's kernel, both ways, in one loop without Python.

The TAP says of each packet what the ring says of it: struct virtio_net_hdr (rings.vnet).
"""

from __future__ import annotations

from pvdrivers.iovec import IOVEC_SIZE, put_iovec
from pvdrivers.syscalls import read, readv, write
from rings.atomics import copy_bytes, i64, load32, load_acquire64
from rings.frame import ETHERNET
from rings.jit import kernel
from rings.ring import room
from rings.vnet import CSUM_BLANK, CSUM_NONE, VNET_SIZE, complete, from_vnet, is_elsewhere, put_vnet

from .netfront_kernels import arm, frame_at, kick, queue_at, reap, receive_all, start, wait
from .netfront_records import BUFFER, FRAME, MOST_BYTES, NO_ROOM, RX, TOO_BIG, TX

HEADER = VNET_SIZE
AT = 16
"""Where a packet stands in its buffer; the header is just before it."""
ROOM = AT + BUFFER + 48
"""Bytes of a buffer."""
_PAGE = 4096
_PAGES = -(-MOST_BYTES // _PAGE)
_FRAME_SIZE = FRAME.itemsize
BUFFERS = 2 * ROOM + (1 + _PAGES) * IOVEC_SIZE
"""Bytes of all that pump() wants: two buffers, and an IOVEC for a header and for each page of a packet."""
_BATCH = 64
_SLEEP_MS = 1000


@kernel
def _read(qa: int, fd: int, buffer: int, pieces: int) -> int:
    """Read a packet, with its header before `buffer` + AT: into the pages that start() takes next, if there are enough
    for any, or else into the buffer. Bytes of it, and 1 << 32 more if they are in pages; 0 or below: there is none."""
    q = queue_at(qa)
    if q["sg"] == 0 or q["free_n"] < _PAGES or room(q["tx_end"]) <= _PAGES:
        return i64(read(fd, buffer + AT - HEADER, BUFFER + HEADER)) - HEADER
    put_iovec(pieces, 0, buffer + AT - HEADER, HEADER)
    for k in range(_PAGES):
        page = i64(load32(q["free"] + (q["free_n"] - 1 - k) * 4))
        put_iovec(pieces, 1 + k, q["tx_pages"] + page * _PAGE, _PAGE)
    size = i64(readv(fd, pieces, 1 + _PAGES)) - HEADER
    return size | 1 << 32 if size > 0 else size


@kernel
def _look_for_checksum(qa: int, buffer: int, data: int, fa: int) -> int:
    """A packet with a blank checksum, which is at `data`, or with 0 in the pages: where it is when it may go. If the
    checksum is not where the backend would look for it, it is completed here; -1: it cannot be."""
    q, frame = queue_at(qa), frame_at(fa)
    size = frame["size"]
    first = data if data != 0 else q["tx_pages"] + i64(load32(q["free"] + (q["free_n"] - 1) * 4)) * _PAGE
    have = size if data != 0 else min(size, _PAGE)
    if have < ETHERNET or not is_elsewhere(buffer + AT - HEADER, first, have):
        return data
    if frame["gso_size"] != 0:
        return i64(-1)
    if data == 0:
        data = buffer + AT
        for k in range((size + _PAGE - 1) // _PAGE):
            page = i64(load32(q["free"] + (q["free_n"] - 1 - k) * 4))
            copy_bytes(data + k * _PAGE, q["tx_pages"] + page * _PAGE, min(size - k * _PAGE, _PAGE))
    frame["csum"] = CSUM_NONE
    return data if complete(buffer + AT - HEADER, data, size) else i64(-1)


@kernel
def _send(qa: int, fd: int, buffer: int, pieces: int, fa: int, waiting: int) -> int:
    """From the TAP to the ring: a packet that found no room stays in the buffer. How many went, as 2n + whether one
    waits; -1 for a violation."""
    if reap(qa) < 0:
        return i64(-1)
    n = i64(0)
    while n < _BATCH:
        data = buffer + AT
        if waiting == 0:
            size = i64(_read(qa, fd, buffer, pieces))
            if size <= 0:
                break
            data = data if size >> 32 == 0 else i64(0)
            if not from_vnet(buffer + AT - HEADER, frame_at(fa), size & 0xFFFFFFFF):
                queue_at(qa)["tx_dropped"] += 1
                n += 1
                continue
            frame_at(fa)["hash_type"] = 0
            if frame_at(fa)["csum"] == CSUM_BLANK:
                data = i64(_look_for_checksum(qa, buffer, data, fa))
        said = i64(start(qa, data, fa)) if data >= 0 else i64(TOO_BIG)
        waiting = i64(1) if said == NO_ROOM else i64(0)
        if waiting != 0:
            break
        if said == TOO_BIG:
            queue_at(qa)["tx_dropped"] += 1
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
        frame = frame_at(fa)
        if put_vnet(buffer + AT - HEADER, buffer + AT, frame["size"], frame["csum"], frame["gso_size"]):
            write(fd, buffer + AT - HEADER, frame["size"] + HEADER)
        n += 1
    return n


@kernel
def pump(qa: int, fd: int, buffers: int, frames: int) -> int:
    """Carry packets until the queue is stopped or a signal came (0), or the backend breaks the protocol (-1).

    `fd` does not block and is on the queue's epoll. `buffers` are BUFFERS bytes, `frames` two FRAMEs.
    """
    waiting = i64(0)
    there = buffers + ROOM
    frame = frames + _FRAME_SIZE
    while load_acquire64(qa) == 0:
        sent = _send(qa, fd, buffers, buffers + 2 * ROOM, frames, waiting)
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
