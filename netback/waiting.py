"""Packets that wait for a receiver's buffers: private copies, in WAIT_BYTES of memory that its rx ring has for them.

That is half a ring of pages, as Linux has it (XENVIF_RX_QUEUE_BYTES). First in, first out; each lies in one piece, as
the head of its PACKET and its bytes. Who finds no room is not kept (XSA-392). Pure: knows no ring.
"""

from __future__ import annotations

from typing import Any

from rings.atomics import copy_bytes, i64, records
from rings.jit import inline, kernel

from .records import FRAGMENT_AT, PACKET, RX_QUEUE, packet_at

WAIT_BYTES = 128 * 4096
_LINE = 64
HEAD_BYTES = (FRAGMENT_AT + _LINE - 1) & ~(_LINE - 1)


@inline
def rx_queue_at(qa: int) -> Any:
    """The RX_QUEUE at an address."""
    return records(qa, 1, RX_QUEUE)[0]


@inline
def _room_of(size: int) -> int:
    return HEAD_BYTES + ((size + _LINE - 1) & ~(_LINE - 1))


@inline
def copy_packet(there: int, pa: int, head: int) -> Any:
    """All that is known of a packet, to another place, and behind `head` bytes those of it that are private: the PACKET
    there. It is to have all of its bytes there: whoever asked has the others put behind them before it is looked at."""
    packet = packet_at(pa)
    copy_bytes(there, pa, FRAGMENT_AT)
    entry = packet_at(there)
    entry["data"] = there + head
    copy_bytes(entry["data"], packet["data"], min(packet["have"], packet["size"]))
    entry["have"], entry["want"], entry["fragments"] = packet["size"], packet["size"], 0
    entry["stage"], entry["retag"] = 0, 0
    return entry


@kernel
def keep(qa: int, pa: int, until: int) -> int:
    """Put a packet behind the last, as copy_packet() does: its address there; 0 if there is no room for it."""
    q = rx_queue_at(qa)
    size = i64(_room_of(packet_at(pa)["size"]))
    if q["count"] == 0:
        q["first"], q["free"], q["wrap"] = 0, 0, WAIT_BYTES
    at = q["free"]
    if q["count"] == 0 or at > q["first"]:
        if at + size > WAIT_BYTES:
            if size > q["first"]:
                return i64(0)
            q["wrap"] = at
            at = i64(0)
    elif at + size > q["first"]:
        return i64(0)
    kept = q["base"] + at
    copy_packet(kept, pa, HEAD_BYTES)["until"] = until
    q["free"] = at + size
    q["count"] += 1
    return kept


@inline
def first_of(qa: int) -> int:
    """The packet that has waited longest; q.count is not 0."""
    q = rx_queue_at(qa)
    return q["base"] + q["first"]


@inline
def following(qa: int, kept: int) -> int:
    """The one behind it, if there is one."""
    q = rx_queue_at(qa)
    at = kept - q["base"] + _room_of(packet_at(kept)["size"])
    return q["base"] + (0 if at == q["wrap"] else at)


@inline
def let_go(qa: int) -> None:
    """The first does not wait any more: its memory is free."""
    q = rx_queue_at(qa)
    q["first"] = following(qa, first_of(qa)) - q["base"]
    q["count"] -= 1
    if q["first"] == 0:
        q["wrap"] = WAIT_BYTES


assert PACKET.itemsize >= FRAGMENT_AT
