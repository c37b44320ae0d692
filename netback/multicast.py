"""Which groups a guest listens to (netif.h, "feature-multicast-control"), and what it gets of what is sent to groups.

As Linux (xenvif_mcast_add, _del, _match): the list may be amended whether it is used or not; broadcast is no group;
over MOST_GROUPS addresses an ERROR. A group that is in the list already is in it once.

Queues of several workers may amend it: one at a time, and who finds another at it comes again. They read it whenever
they like, and may miss an address, or see it twice, that is being put in or out just then.
"""

from __future__ import annotations

from typing import Any

from rings.atomics import compare_exchange64, i64, records, store_release64
from rings.jit import inline, kernel
from rings.netif import EXTRA_MCAST_ADD, RSP_ERROR, RSP_OKAY

from .records import AMENDING_AT, GROUPS, MOST_GROUPS, port_at

BROADCAST = 0xFFFFFFFFFFFF
BUSY = 2
"""No answer: another worker is at the list."""


@inline
def _groups_at(porta: int) -> Any:
    return records(port_at(porta)["groups"], 1, GROUPS)[0]


@inline
def _then_count(porta: int, count: int) -> None:
    """After what is in the list: whoever comes after a process that died in between finds a list."""
    store_release64(port_at(porta)["groups"], count)  # GROUPS.count, the first field; see groups.keep_groups


@kernel
def _find(porta: int, mac: int) -> int:
    groups = _groups_at(porta)
    for k in range(min(groups["count"], MOST_GROUPS)):
        if groups["listed"][k] == mac:
            return i64(k)
    return i64(-1)


@kernel
def _amend(porta: int, kind: int, mac: int) -> int:
    groups = _groups_at(porta)
    k = i64(_find(porta, mac))
    if kind == EXTRA_MCAST_ADD:
        if mac & 1 == 0 or (k < 0 and groups["count"] == MOST_GROUPS):
            return i64(RSP_ERROR)
        if k < 0:
            groups["listed"][groups["count"]] = mac
            _then_count(porta, groups["count"] + 1)
    elif k >= 0:
        groups["listed"][k] = groups["listed"][groups["count"] - 1]
        _then_count(porta, groups["count"] - 1)
    return i64(RSP_OKAY)


@kernel
def amend(porta: int, kind: int, mac: int) -> int:
    """Put a group into the list of a port, or out of it: what the guest is answered, RSP_*; or BUSY."""
    if compare_exchange64(porta + AMENDING_AT, 0, 1) != 0:
        return i64(BUSY)
    status = i64(_amend(porta, kind, mac))
    # Pairs with the exchange: who is at the list next sees it as it is now.
    store_release64(porta + AMENDING_AT, i64(0))
    return status


@inline
def wants(porta: int, dst: int) -> bool:
    """Whether the guest behind a port is to get a packet to this address."""
    if dst & 1 == 0 or port_at(porta)["filters"] == 0 or dst == BROADCAST:
        return True
    return _find(porta, dst) >= 0
