"""What a guest is told of a packet besides its bytes: slots of their own behind its first one (netif.h, "Extra Info").

In the order of their types, as Linux has them. XDP is Linux's only (include/xen/interface/io/netif.h).
"""

from __future__ import annotations

from pvdrivers.worker.marks import ring_at
from rings.atomics import i64, records, store64
from rings.jit import inline, kernel
from rings.netif import (
    EXTRA_FLAG_MORE,
    EXTRA_GSO,
    EXTRA_XDP,
    hash_extra,
)
from rings.ring import RING_END

from .answers import answer_at
from .records import packet_at


@inline
def count_extras(pa: int, headroom: int) -> int:
    """How many slots it takes to say it; `headroom` 0 is not said."""
    packet = packet_at(pa)
    return i64(packet["gso_size"] != 0) + i64(packet["tell"] != 0) + i64(headroom != 0)


@inline
def _put(ra: int, extra: int, left: int) -> int:
    """One slot, which takes the place of a response; the page behind it stays as it is. How many come behind it."""
    e = records(ring_at(ra)["end"], 1, RING_END)[0]
    store64(answer_at(ra, e["cons"]), extra | (EXTRA_FLAG_MORE << 8 if left > 1 else 0))
    e["cons"] = (e["cons"] + 1) & 0xFFFFFFFF
    e["prod_pvt"] = e["cons"]
    return left - 1


@kernel
def put_extras(ra: int, pa: int, headroom: int) -> None:
    """Put them into the next slots of the receiver, of which it was seen that they are there."""
    packet = packet_at(pa)
    left = count_extras(pa, headroom)
    if packet["gso_size"] != 0:
        left = _put(ra, EXTRA_GSO | packet["gso_size"] << 16 | packet["gso_type"] << 32, left)
    if packet["tell"] != 0:
        left = _put(ra, hash_extra(packet["tell"]), left)
    if headroom != 0:
        _put(ra, EXTRA_XDP | headroom << 16, left)
