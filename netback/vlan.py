"""VLANs in a switch: which one a packet is in, who may have it, and its tag. Pure kernels.

    port            untagged packets are of      tagged packets
    of no VLAN      no VLAN                      of no VLAN: the tag is not looked at
    vlan=N          N                            dropped
    trunk           no VLAN                      of the VLAN that they say, if the trunk has it; else dropped

To a trunk a packet of a VLAN goes with a tag, to a port of that VLAN without. One of no VLAN never goes to a trunk with
a tag that its sender has put in: there it would be of a VLAN. A tag goes in or out of the first bytes, which are
private; the others are copied as they would be without (IEEE 802.1Q, 9.6: 0x8100, three bits of priority, one that is
not used here, twelve of VLAN).
"""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, load16, load32, store16, store32
from rings.frame import ETHERNET
from rings.jit import inline, kernel

from .records import fragment_at, move_fragment, packet_at, port_at

TAG = 4
# As they lie in memory.
_8021Q, _8021AD = 0x0081, 0xA888


@inline
def has_tag(data: int) -> bool:
    """Whether a packet has one, of either kind."""
    kind = i64(load16(data + 12))
    return kind == _8021Q or kind == _8021AD


@inline
def has_vlan(porta: int, vlan: int) -> bool:
    """Whether a port is a trunk, and this one of its VLANs. No other has any."""
    return i64(port_at(porta)["allowed"][vlan >> 5 & 127]) >> (vlan & 31) & 1 != 0


@kernel
def classify(pa: int, porta: int) -> bool:
    """Fill in vlan, tagged and retag of a packet that has come by a port. False: it is to be dropped."""
    packet, port = packet_at(pa), port_at(porta)
    packet["vlan"], packet["tagged"], packet["retag"] = port["vlan"], 0, 0
    if port["trunk"] == 0:
        return port["vlan"] == 0 or not has_tag(packet["data"])
    if not has_tag(packet["data"]):
        return True
    if i64(load16(packet["data"] + 12)) != _8021Q or packet["have"] < ETHERNET + TAG:
        return False
    tci = i64(load16(packet["data"] + 14))
    vlan = (tci & 0x0F) << 8 | tci >> 8
    packet["vlan"], packet["tagged"] = vlan, 1
    return vlan != 0 and has_vlan(porta, vlan)


@kernel
def admits(pa: int, porta: int) -> bool:
    """Whether a port may have a packet."""
    packet, port = packet_at(pa), port_at(porta)
    if port["trunk"] == 0:
        return port["vlan"] == packet["vlan"]
    if packet["vlan"] == 0:
        return not has_tag(packet["data"])
    return has_vlan(porta, packet["vlan"])


@inline
def suits(pa: int, porta: int) -> bool:
    """Whether a port that may have a packet wants it with, or without, a tag, as it is now."""
    packet = packet_at(pa)
    wants = i64(1) if port_at(porta)["trunk"] != 0 and packet["vlan"] != 0 else i64(0)
    return wants == packet["tagged"]


@kernel
def _skip(pa: int, nbytes: int) -> None:
    """The fragments without their first bytes, which are private: they only count where the others begin."""
    packet = packet_at(pa)
    while nbytes > 0 and packet["fragments"] > 0:
        first = fragment_at(pa, 0)
        n = min(nbytes, i64(first["length"]))
        first["offset"], first["length"] = i64(first["offset"]) + n, i64(first["length"]) - n
        nbytes -= n
        if first["length"] == 0:
            packet["fragments"] -= 1
            for k in range(packet["fragments"]):
                move_fragment(pa, k, k + 1)


@kernel
def _lead(pa: int, nbytes: int) -> None:
    """... or with so many more before them, that nobody copies from there."""
    packet = packet_at(pa)
    if packet["fragments"] == 0:
        return
    for k in range(packet["fragments"], 0, -1):
        move_fragment(pa, k, k - 1)
    first = fragment_at(pa, 0)
    first["gref"], first["offset"], first["length"], first["page"] = 0, 0, nbytes, 0
    packet["fragments"] += 1


@kernel
def retag(pa: int) -> None:
    """Put the tag of a packet's VLAN in, or take it out; a second time is back again. The last packet of it has been
    copied, as its addresses move."""
    packet = packet_at(pa)
    data = packet["data"]
    delta = i64(-TAG if packet["tagged"] != 0 else TAG)
    low, middle, high = i64(load32(data)), i64(load32(data + 4)), i64(load32(data + 8))
    data -= delta
    store32(data, np.uint32(low))
    store32(data + 4, np.uint32(middle))
    store32(data + 8, np.uint32(high))
    packet["data"] = data
    packet["size"], packet["have"], packet["want"] = (
        packet["size"] + delta,
        packet["have"] + delta,
        packet["want"] + delta,
    )
    packet["ip"] += delta if packet["l3"] != 0 else 0
    if packet["l4"] != 0:
        packet["l4"], packet["csum_at"] = packet["l4"] + delta, packet["csum_at"] + delta
    if packet["tagged"] != 0:
        _skip(pa, TAG)
        packet["tagged"] = 0
        return
    vlan = packet["vlan"]
    store16(data + 12, np.uint16(_8021Q))
    store16(data + 14, np.uint16(vlan >> 8 | (vlan & 0xFF) << 8))
    _lead(pa, TAG)
    packet["tagged"] = 1
