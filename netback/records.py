"""The network backend's records: what a packet turned out to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import records
from rings.jit import inline
from rings.netif import NR_SLOTS_MIN

MAX_SLOTS = NR_SLOTS_MIN
"""Requests of a packet, extras not counted; with more it is dropped."""
FATAL_SLOTS = 20
"""With more than so many the device is closed (`fatal_skb_slots` of Linux's netback)."""
MIN_SIZE = 14
"""Bytes of an Ethernet header; a packet with less is refused."""

# PACKET.verdict
P_SEND = 0  # its fragments are to be fetched and sent
P_CONTROL = 1  # a multicast address to add or to remove; there are no data
P_REFUSE = 2  # all its requests are answered with PACKET.status
P_FATAL = 3  # the guest breaks the protocol: its device is closed

# PACKET.fault of P_FATAL, see FAULTS
F_NO_EXTRA, F_EXTRA_TYPE, F_CUT, F_SLOTS, F_PAGE, F_GSO_SIZE, F_GSO_TYPE = range(1, 8)
FAULTS = {
    F_NO_EXTRA: "an extra is announced, and not there",
    F_EXTRA_TYPE: "an extra of a type that there is not",
    F_CUT: "a packet that goes on behind the last request",
    F_SLOTS: f"a packet of more than {FATAL_SLOTS} requests",
    F_PAGE: "a fragment that crosses the end of its page",
    F_GSO_SIZE: "a GSO packet with segments of size 0",
    F_GSO_TYPE: "a GSO type that there is not",
}

FRAGMENT = np.dtype([("gref", "u4"), ("offset", "u2"), ("length", "u2")], align=True)
"""Checked: `length` bytes, 1 to 4096, at `offset` in the page behind `gref`. Eight bytes."""

PACKET = np.dtype(
    [
        ("verdict", "i8"),
        ("status", "i8"),  # NETIF_RSP_* for its requests
        ("fault", "i8"),
        ("slots", "i8"),  # on the ring, extras and all
        ("extras", "i8"),  # ... those of extras: the ones behind the first
        ("size", "i8"),  # bytes of the packet
        ("flags", "i8"),  # NETTXF_* of its first request
        ("gso_type", "i8"),
        ("gso_size", "i8"),
        ("mcast", "i8"),  # EXTRA_MCAST_ADD or _DEL, 0 neither
        ("mcast_addr", "i8"),  # ... and the address, first byte lowest
        ("fragments", "i8"),
        ("fragment", FRAGMENT, (MAX_SLOTS,)),
    ],
    align=True,
)
FRAGMENT_AT: int = PACKET.fields["fragment"][1]  # type: ignore[index]


@inline
def packet_at(pa: int) -> Any:
    """The PACKET at an address."""
    return records(pa, 1, PACKET)[0]


@inline
def fragment_at(pa: int, k: int) -> Any:
    """Fragment k of the PACKET at an address."""
    return records(pa + FRAGMENT_AT + k * 8, 1, FRAGMENT)[0]


assert FRAGMENT.itemsize == 8
