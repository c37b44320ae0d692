"""A packet for the guest behind a port: whole, or cut into its segments where that one takes no such.

Only what is cut is copied to private memory as a whole, and each segment then goes as a packet of its own. As many as
the receiver has room for: the others are lost, as they are behind any switch whose next hop is full.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.worker.marks import ring_at, stats_at
from rings.atomics import copy_bytes, i64
from rings.frame import headers
from rings.jit import inline, kernel
from rings.vnet import CSUM_BLANK, CSUM_VALID

from .cut import count_segments, header_size, put_segment
from .deliver import flush, pages_of, takes_blank, to_guest
from .mtu import fits
from .multicast import wants
from .records import (
    ACCEPTS_SG,
    CUT_BYTES,
    FRAGMENT_AT,
    N_CUT,
    N_DOWN,
    N_FILTERED,
    N_TOO_LARGE,
    N_UNSUPPORTED,
    packet_at,
    port_at,
    switch_at,
)

_LINE = 64


@inline
def takes_whole(packet: Any, accepts: int, headroom: int) -> bool:
    """Whether a receiver takes a packet with all of its segments. What is of one segment is not asked about here."""
    if packet["gso_size"] == 0:
        return True
    if accepts & (8 << packet["gso_type"]) == 0 or not takes_blank(packet, accepts):
        return False
    return pages_of(packet, headroom) == 1 or accepts & ACCEPTS_SG != 0


@inline
def _count(ra: int, kind: int) -> None:
    stats_at(ring_at(ra)["stats"])["kinds"][kind] += 1


@kernel
def _cut(wa: int, swa: int, pa: int, porta: int, ra: int) -> None:
    """Send the segments of a packet, if all its bytes are private. They go by one queue, as it would."""
    sw = switch_at(swa)
    packet = packet_at(pa)
    data, size, gso_size = packet["data"], packet["size"], packet["gso_size"]
    found = headers(data, packet["have"])
    header = header_size(data, packet["have"], found, packet["gso_type"])
    # Not all bytes are private where the receiver has asked for more headroom since its wishes were noted.
    if header == 0 or packet["have"] < size:
        _count(ra, N_UNSUPPORTED)
        return
    blank = takes_blank(packet, port_at(porta)["accepts"])
    # All that is known of the packet, of its segments too; but for where their bytes are.
    copy_bytes(sw["parcel"], pa, FRAGMENT_AT)
    parcel = packet_at(sw["parcel"])
    parcel["gso_size"], parcel["gso_type"], parcel["fragments"] = 0, 0, 0
    parcel["csum"] = CSUM_BLANK if blank else CSUM_VALID
    sent = i64(1)
    k = i64(0)
    while k < count_segments(size, header, gso_size) and sent != 0:
        if sw["cut_at"] + min(header + gso_size, size) > CUT_BYTES:
            flush(wa, swa)
        out = sw["cuts"] + sw["cut_at"]
        n = i64(put_segment(out, data, size, found, header, gso_size, k, 1 if blank else 0))
        parcel["data"], parcel["size"], parcel["have"] = out, n, n
        sent = i64(to_guest(wa, swa, sw["parcel"], ra))
        sw["cut_at"] = out - sw["cuts"] + ((n + _LINE - 1) & ~(_LINE - 1))  # behind it, even if that has flushed
        k += 1
    _count(ra, N_CUT)


@kernel
def may_leave(pa: int, porta: int, stats: int) -> bool:
    """Whether a packet is sent on that comes from the vif behind a port; if not, it is counted there."""
    if port_at(porta)["down"] != 0:
        stats_at(stats)["kinds"][N_DOWN] += 1
        return False
    if not fits(pa, porta):
        stats_at(stats)["kinds"][N_TOO_LARGE] += 1
        return False
    return True


@kernel
def to_vif(wa: int, swa: int, pa: int, porta: int, ra: int) -> None:
    """Have the guest behind a port get a packet by an rx ring of its, as it can take it."""
    if port_at(porta)["down"] != 0:
        _count(ra, N_DOWN)
    elif not wants(porta, packet_at(pa)["dst"]):
        _count(ra, N_FILTERED)
    elif not fits(pa, porta):
        _count(ra, N_TOO_LARGE)
    elif takes_whole(packet_at(pa), port_at(porta)["accepts"], port_at(porta)["headroom"]):
        to_guest(wa, swa, pa, ra)
    else:
        _cut(wa, swa, pa, porta, ra)
