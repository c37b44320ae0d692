"""The hash of a flow as a guest has asked for it, and the queue that its packets come by. Pure kernels.

The Toeplitz hash is linear: what a byte adds depends on its value and its place alone. So a key becomes a table once,
when it is set, of what each value of each nibble adds, and a packet is two look-ups for each byte that is hashed
(Linux's netback has a cache of flows for the same end). A guest may set a key as often as it likes, so the table is
made of the key's windows, the 32 bits of it from each place on that a bit may have, and nothing is hashed for it.

netif.h: of the types that are asked for the maximal one counts. A packet of none of them has the hash 0, as in Linux
(xenvif_set_skb_hash), and so comes by the first entry of the mapping.
"""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, load8, records
from rings.jit import inline, kernel
from rings.netif import (
    HASH_ALGORITHM_NONE,
    HASH_IPV4,
    HASH_IPV4_TCP,
    HASH_IPV6,
    HASH_IPV6_TCP,
)

from .control_records import KEY_AT, MAPPING_AT, MOST_HASHED, MOST_KEY, MOST_MAPPING, NIBBLES_AT, current, hash_at
from .frame import flow_of
from .records import packet_at, port_at

NO_HASH = 0
"""A hash has its type with it, which is not 0."""
_U4 = np.dtype(np.uint32)
_TCP_CHECKSUM_AT = 16


@kernel
def make_table(ha: int) -> None:
    """Fill in HASH.nibbles for the key of a HASH."""
    nibbles = records(ha + NIBBLES_AT, 2 * MOST_HASHED * 16, _U4)
    for place in range(2 * MOST_HASHED):
        key = i64(0)  # the 40 bits of it that begin with the byte of the nibble
        for k in range(5):
            key = key << 8 | i64(load8(ha + KEY_AT + (place >> 1) + k))
        first = place * 16
        nibbles[first] = 0
        for bit in range(4):
            # Of the lowest bit the window begins three bits behind that of the highest.
            window = key >> (8 - (place & 1) * 4 - (3 - bit)) & 0xFFFFFFFF
            for value in range(1 << bit):
                nibbles[first + (1 << bit) + value] = i64(nibbles[first + value]) ^ window


@inline
def _add(ha: int, place: int, data: int, size: int) -> int:
    """What `size` bytes at `data` add to the hash as its bytes `place` on."""
    found = i64(0)
    nibbles = records(ha + NIBBLES_AT, 2 * MOST_HASHED * 16, _U4)
    for k in range(size):
        byte = i64(load8(data + k))
        at = (place + k) * 32
        found ^= i64(nibbles[at + (byte >> 4)]) ^ i64(nibbles[at + 16 + (byte & 15)])
    return found


@kernel
def flow_hash(ha: int, pa: int) -> int:
    """The hash of a packet whose headers were parsed: 32 bits, and its type (HASH_*) in those above; or NO_HASH."""
    packet = packet_at(pa)
    types = hash_at(ha)["types"]
    version = packet["l3"]
    if version == 0:
        return i64(NO_HASH)
    four = version == 4
    ip = packet["data"] + packet["ip"]
    start, size = (ip + 12, 8) if four else (ip + 8, 32)
    tcp = packet["l4"] != 0 and packet["csum_at"] - packet["l4"] == _TCP_CHECKSUM_AT
    kind = i64(HASH_IPV4_TCP if four else HASH_IPV6_TCP)
    if tcp and types & kind != 0:
        value = _add(ha, 0, start, size) ^ _add(ha, size, packet["data"] + packet["l4"], 4)
        return value | kind << 32
    kind = i64(HASH_IPV4 if four else HASH_IPV6)
    if types & kind != 0:
        return _add(ha, 0, start, size) | kind << 32
    return i64(NO_HASH)


@inline
def _spread(porta: int, pa: int, queues: int, shards: int) -> int:
    """The queue of a flow, by what its sender says of it or its headers: one that is in the shard where the packet came
    in, if there is such, so that it stays with one worker."""
    if queues == 1:
        return i64(0)
    said = packet_at(pa)["said"]
    flow = said & 0xFFFFFFFF if said != NO_HASH else i64(flow_of(pa))
    if shards <= 1:
        return flow % queues
    first = (packet_at(pa)["origin"] - port_at(porta)["home"]) % shards
    if first >= queues:
        return flow % queues
    return first + flow % ((queues - first + shards - 1) // shards) * shards


@kernel
def choose_queue(porta: int, pa: int, queues: int, shards: int) -> int:
    """Which of `queues` a packet goes to; PACKET.tell becomes what the guest is told of its hash, or NO_HASH.

    A guest that has asked for a hash is told it, or else what the sender has said. One that has not is told nothing,
    and its queue is that of the flow. The answer is the same in every shard of the switch: both ends of a link ask.
    """
    packet = packet_at(pa)
    packet["tell"] = NO_HASH
    hashes = port_at(porta)["hashes"]
    if hashes == 0:
        return _spread(porta, pa, queues, shards)
    ha = current(hashes)
    h = hash_at(ha)
    if h["algorithm"] == HASH_ALGORITHM_NONE:
        return _spread(porta, pa, queues, shards)
    packet["tell"] = packet["said"]
    if h["types"] == 0:
        return _spread(porta, pa, queues, shards)
    found = i64(flow_hash(ha, pa))
    value = i64(0)
    if found != NO_HASH:
        packet["tell"] = found
        value = found & 0xFFFFFFFF
    # Once: the control ring may be another worker's, which changes this one twice while we look at it. What is found
    # then is of one state or another, and no more than that.
    entries = i64(h["entries"])
    if entries <= 0 or entries > MOST_MAPPING:
        return value % queues
    # Held against the number of queues when it was set; this is for a table of another connection.
    return i64(records(ha + MAPPING_AT, MOST_MAPPING, _U4)[value % entries]) % queues


assert MOST_HASHED + 4 <= MOST_KEY, "the last window is in the key"
