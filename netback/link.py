"""Packets on their way from one worker of a switch to another: a ring of bytes for each two of them, each way.

One producer, one consumer, no lock. A packet lies in one piece, as in `waiting`: the head of its PACKET and its bytes,
which are a copy of ours. Positions run freely, in bytes. What each side writes has cache lines of its own:

    producer    written     private: behind the last packet that was put; it has not been published yet
                published   release, pairs with the acquire in `collect`: who sees it sees the packets before it
    consumer    taken       private: behind the last packet that was taken
                freed       release, pairs with the acquire in `_has_room`: who sees it may write over what was before

A shard has one INBOX for all links to it, and the consumer sleeps and wakes by that as by a ring of a guest
(`final_check` of rings.ring): `rung` counts what was published to it, and `event` is the count that it wants to be
woken by. Since several producers count, that is done by one atomic addition for what a pass has put, and not for each
packet.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.syscalls import eventfd_add
from rings.atomics import (
    copy_bytes,
    fetch_add32,
    full_barrier,
    i64,
    load_acquire32,
    load_acquire64,
    load_once32,
    records,
    store_release64,
)
from rings.jit import inline, kernel
from rings.ring import RING_END

from .records import FRAGMENT_AT, HEADROOM, MAX_SHARDS, PACKET, packet_at
from .waiting import copy_packet

LINK_BYTES, WIRE_BYTES = 1 << 21, 1 << 18
"""Bytes of packets that are on their way from one worker to another, of a switch and of a wire, which each vif may
have; resident only once they were used."""
_LINE = 64
HEAD_BYTES = ((FRAGMENT_AT + _LINE - 1) & ~(_LINE - 1)) + HEADROOM
"""Before the bytes of a packet: what is known of it, and room for a tag and for what a TAP is told."""
_SKIP = -1
"""PACKET.verdict where no packet lies: the next one is at the beginning."""

LINK = np.dtype(
    [
        ("data", "i8"),  # address of `size` bytes
        ("size", "i8"),  # a power of two
        ("inbox", "i8"),  # address of the INBOX of the shard that it leads to
        ("pad0", "i8", (5,)),
        ("written", "i8"),
        ("known", "i8"),  # `freed` when it was looked at last
        ("pad1", "i8", (6,)),
        ("published", "i8"),
        ("pad2", "i8", (7,)),
        ("freed", "i8"),
        ("taken", "i8"),
        ("pad3", "i8", (6,)),
    ],
    align=True,
)
PUBLISHED_AT: int = LINK.fields["published"][1]  # type: ignore[index]
FREED_AT: int = LINK.fields["freed"][1]  # type: ignore[index]

INBOX = np.dtype(
    [
        ("rung", "u4"),  # shared: what was published to any of its links, counted; written by all producers
        ("pad0", "u4", (15,)),
        ("event", "u4"),  # shared: when to be woken; the consumer's
        ("pad1", "u4", (15,)),
        ("fd", "i8"),  # an eventfd
        ("turn", "i8"),  # the link that is looked at first
        ("links", "i8", (MAX_SHARDS,)),  # addresses of LINKs, 0 from itself
    ],
    align=True,
)
EVENT_AT: int = INBOX.fields["event"][1]  # type: ignore[index]


@inline
def link_at(at: int) -> Any:
    """The LINK at an address."""
    return records(at, 1, LINK)[0]


@inline
def inbox_at(at: int) -> Any:
    """The INBOX at an address."""
    return records(at, 1, INBOX)[0]


@inline
def _room_of(size: int) -> int:
    return HEAD_BYTES + ((size + _LINE - 1) & ~(_LINE - 1))


@inline
def _has_room(la: int, more: int) -> bool:
    link = link_at(la)
    if link["size"] - (link["written"] - link["known"]) >= more:
        return True
    # Acquire: the consumer has read what it gives back.
    link["known"] = load_acquire64(la + FREED_AT)
    return link["size"] - (link["written"] - link["known"]) >= more


@kernel
def put(la: int, pa: int) -> int:
    """Put a packet behind the last, as copy_packet() does: its address there; 0 if there is no room. It is published
    when all of its bytes are there."""
    link = link_at(la)
    need = i64(_room_of(packet_at(pa)["size"]))
    at = link["written"] & (link["size"] - 1)
    left = link["size"] - at
    if not _has_room(la, need if need <= left else left + need):
        return i64(0)
    if need > left:
        packet_at(link["data"] + at)["verdict"] = _SKIP
        link["written"] += left
        at = i64(0)
    link["written"] += need
    there = link["data"] + at
    copy_packet(there, pa, HEAD_BYTES)
    return there


@kernel
def publish(la: int) -> bool:
    """Have the consumer see what was put, all of whose bytes are there. False if nothing was."""
    link = link_at(la)
    if link["written"] == link["published"]:
        return False
    store_release64(la + PUBLISHED_AT, link["written"])
    return True


@kernel
def ring(ia: int) -> bool:
    """Tell an inbox that something was published to a link of it. True if its worker asked to be woken by that."""
    # Of those that ring at the same time each has a number of its own, so one of them wakes.
    rung = (i64(fetch_add32(ia, np.uint32(1))) + 1) & 0xFFFFFFFF  # INBOX.rung is the first field
    # The consumer sees `rung` before we look at its event. Pairs with the barrier in rings.ring.final_check.
    full_barrier()
    return rung == i64(load_once32(ia + EVENT_AT))


@kernel
def send(la: int) -> None:
    """Publish, and wake who sleeps."""
    if publish(la) and ring(link_at(la)["inbox"]):
        eventfd_add(inbox_at(link_at(la)["inbox"])["fd"], 1)


@inline
def heard(ia: int, end: int) -> None:
    """The consumer is about to look at all links: what rings from now on is news again. `end` is a RING_END, by which
    the loop of its worker looks for such news, and asks to be woken."""
    e = records(end, 1, RING_END)[0]
    # Acquire: before the links, for what is published to one is counted after.
    e["cons"] = load_acquire32(ia)
    e["prod_pvt"] = e["cons"]


@kernel
def collect(la: int, packets: int, n: int, most: int) -> int:
    """Take packets of a link as PACKET n and following of an array, up to `most` of them; how many are there now. Their
    bytes stay where they are until let_go()."""
    link = link_at(la)
    # Acquire: who sees how far it goes sees the packets.
    end = load_acquire64(la + PUBLISHED_AT)
    while link["taken"] != end and n < most:
        at = link["data"] + (link["taken"] & (link["size"] - 1))
        if packet_at(at)["verdict"] == _SKIP:
            link["taken"] += link["size"] - (link["taken"] & (link["size"] - 1))
            continue
        copy_bytes(packets + n * _PACKET_SIZE, at, FRAGMENT_AT)
        link["taken"] += _room_of(packet_at(at)["size"])
        n += 1
    return n


@inline
def has_more(la: int) -> bool:
    """Whether collect() has left something."""
    return link_at(la)["taken"] != load_acquire64(la + PUBLISHED_AT)


@inline
def let_go(la: int) -> None:
    """What was taken is not looked at any more: the producer may have its memory."""
    link = link_at(la)
    if link["freed"] != link["taken"]:
        store_release64(la + FREED_AT, link["taken"])


_PACKET_SIZE = PACKET.itemsize
assert LINK.itemsize % _LINE == 0 and PUBLISHED_AT % _LINE == 0 and FREED_AT % _LINE == 0
assert INBOX.fields is not None and INBOX.fields["rung"][1] == 0
