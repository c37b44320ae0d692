"""Slots from a guest -> a checked plan of one packet. Pure: no memory but its arguments, total over arbitrary bytes.

Every rule of netif.h that a frontend can break on its tx ring stands here and nowhere else. Works on private copies
only (XSA-39, XSA-155); nothing behind it looks at the guest's bytes again.

Follows Linux (drivers/net/xen-netback/netback.c: xenvif_tx_build_gops, xenvif_get_extras, xenvif_count_requests):

    an extra or a fragment that is announced and not there      the device is closed
    an extra of an unknown type                                 the device is closed
    a fragment that crosses the end of its page                 the device is closed
    more than FATAL_SLOTS requests                              the device is closed
    GSO with size 0, or of an unknown type                      the device is closed
    more than MAX_SLOTS requests                                ERROR for all of them
    fragments with more bytes than the packet                   ERROR for all of them (frames of 64 KiB and more, whose
                                                                size in 16 bits is too small, come so)
    less than an Ethernet header                                ERROR
    a fragment of no bytes                                      left out (XSA-448)
"""

from __future__ import annotations

from typing import Any

from rings.atomics import i64, load64, records
from rings.jit import inline, kernel
from rings.netif import (
    EXTRA_FLAG_MORE,
    EXTRA_GSO,
    EXTRA_HASH,
    EXTRA_MCAST_ADD,
    EXTRA_MCAST_DEL,
    EXTRA_NONE,
    GSO,
    GSO_TCPV4,
    GSO_TCPV6,
    MCAST,
    RSP_ERROR,
    RSP_OKAY,
    TX_ENTRY_SIZE,
    TX_REQUEST,
    TXF_extra_info,
    TXF_more_data,
    known_hash,
)

from .records import (
    F_CUT,
    F_EXTRA_TYPE,
    F_GSO_SIZE,
    F_GSO_TYPE,
    F_NO_EXTRA,
    F_PAGE,
    F_SLOTS,
    FATAL_SLOTS,
    MAX_SLOTS,
    MIN_SIZE,
    P_CONTROL,
    P_FATAL,
    P_REFUSE,
    P_SEND,
    fragment_at,
    move_fragment,
    packet_at,
)

_PAGE = 4096


@inline
def _tx(slots: int, k: int) -> Any:
    return records(slots + k * TX_ENTRY_SIZE, 1, TX_REQUEST)[0]


@inline
def _refuse(pa: int) -> None:
    packet = packet_at(pa)
    packet["verdict"], packet["status"] = P_REFUSE, RSP_ERROR


@kernel
def _fatal(pa: int, fault: int) -> None:
    packet = packet_at(pa)
    packet["verdict"], packet["status"], packet["fault"] = P_FATAL, RSP_ERROR, fault


@inline
def _note_gso(pa: int, at: int) -> None:
    packet = packet_at(pa)
    gso = records(at, 1, GSO)[0]
    packet["gso_type"], packet["gso_size"] = i64(gso["gso_type"]), i64(gso["size"])
    if packet["gso_size"] == 0:
        _fatal(pa, F_GSO_SIZE)
    elif packet["gso_type"] != GSO_TCPV4 and packet["gso_type"] != GSO_TCPV6:
        _fatal(pa, F_GSO_TYPE)


@inline
def _note_mcast(pa: int, at: int, kind: int) -> None:
    packet = packet_at(pa)
    addr = records(at, 1, MCAST)[0]["addr"]
    value = i64(0)
    for k in range(6):
        value |= i64(addr[k]) << (8 * k)
    packet["mcast"], packet["mcast_addr"] = kind, value


@inline
def _note_hash(pa: int, at: int) -> None:
    """What the sender says of its flow: a hint, so that one of no type or algorithm that there is says nothing."""
    known = known_hash(load64(at))
    if known != 0:
        packet_at(pa)["said"] = known


@kernel
def _take_extras(pa: int, slots: int, n: int) -> None:
    """The extras behind the first request. The last one of a type counts, as in Linux."""
    packet = packet_at(pa)
    more = True
    while more and packet["verdict"] != P_FATAL:
        if packet["slots"] == n:
            _fatal(pa, F_NO_EXTRA)
            return
        at = slots + packet["slots"] * TX_ENTRY_SIZE
        packet["slots"] += 1
        packet["extras"] += 1
        extra = records(at, 1, GSO)[0]  # type and flags are where they are in any extra
        kind = i64(extra["type"])
        more = extra["flags"] & EXTRA_FLAG_MORE != 0
        if kind == EXTRA_NONE or kind > EXTRA_HASH:
            _fatal(pa, F_EXTRA_TYPE)
        elif kind == EXTRA_GSO:
            _note_gso(pa, at)
        elif kind == EXTRA_MCAST_ADD or kind == EXTRA_MCAST_DEL:
            _note_mcast(pa, at, kind)
        elif kind == EXTRA_HASH:
            _note_hash(pa, at)


@inline
def _add_fragment(pa: int, gref: int, offset: int, length: int) -> None:
    packet = packet_at(pa)
    if length > 0:
        fragment = fragment_at(pa, packet["fragments"])
        fragment["gref"], fragment["offset"], fragment["length"] = gref, offset, length
        packet["fragments"] += 1


@kernel
def _take_fragments(pa: int, slots: int, n: int) -> int:
    """The requests behind the first; what they leave of the packet's bytes is in the first. -1 if it is over."""
    packet = packet_at(pa)
    left = packet["size"]
    count = i64(1)
    more = packet["flags"] & TXF_more_data != 0
    while more:
        if packet["slots"] == n:
            _fatal(pa, F_CUT)
            return -1
        if count == FATAL_SLOTS:
            _fatal(pa, F_SLOTS)
            return -1
        request = _tx(slots, packet["slots"])
        gref, offset, length = i64(request["gref"]), i64(request["offset"]), i64(request["size"])
        more = request["flags"] & TXF_more_data != 0
        packet["slots"] += 1
        count += 1
        if count > MAX_SLOTS or length > left:
            _refuse(pa)  # and go on to its end
        if packet["verdict"] == P_REFUSE:
            continue
        if offset + length > _PAGE:
            _fatal(pa, F_PAGE)
            return -1
        left -= length
        _add_fragment(pa, gref, offset, length)
    return left


@kernel
def _drop_first(pa: int) -> None:
    packet = packet_at(pa)
    packet["fragments"] -= 1
    for k in range(packet["fragments"]):
        move_fragment(pa, k, k + 1)


@kernel
def plan(pa: int, slots: int, n: int) -> int:
    """Plan the packet that begins with the first of `n` >= 1 private copies of TX_REQUEST at `slots`.

    Fills the PACKET at `pa`; how many slots it takes. Of one that is fatal nothing else counts.
    """
    packet = packet_at(pa)
    first = _tx(slots, 0)
    packet["verdict"], packet["status"], packet["fault"] = P_SEND, RSP_OKAY, 0
    packet["slots"], packet["extras"], packet["fragments"] = 1, 0, 0
    packet["size"], packet["flags"] = i64(first["size"]), i64(first["flags"])
    packet["gso_type"], packet["gso_size"], packet["mcast"], packet["mcast_addr"] = 0, 0, 0, 0
    packet["said"] = 0
    if packet["flags"] & TXF_extra_info != 0:
        _take_extras(pa, slots, n)
        if packet["verdict"] == P_FATAL:
            return packet["slots"]
    if packet["mcast"] != 0:
        packet["verdict"] = P_CONTROL
        return packet["slots"]
    # Its own fragment comes first, and is known last.
    gref, offset = i64(first["gref"]), i64(first["offset"])
    fragment = fragment_at(pa, 0)
    fragment["gref"], fragment["offset"], fragment["length"] = gref, offset, 0
    packet["fragments"] = 1
    left = _take_fragments(pa, slots, n)
    if packet["verdict"] != P_SEND:
        return packet["slots"]
    if packet["size"] < MIN_SIZE:
        _refuse(pa)
    elif offset + left > _PAGE:
        _fatal(pa, F_PAGE)
    elif left > 0:
        fragment["length"] = left
    else:
        _drop_first(pa)
    return packet["slots"]
