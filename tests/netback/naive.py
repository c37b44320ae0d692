"""What a tx chain means, said once more in plain Python: the twin of netback.request."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from netback import records
from rings import netif

TX = struct.Struct("<IHHHH")


@dataclass
class Packet:
    """As netback.records.PACKET."""

    verdict: int = records.P_SEND
    fault: int = 0
    slots: int = 1
    extras: int = 0
    size: int = 0
    flags: int = 0
    gso: tuple[int, int] = (0, 0)
    mcast: tuple[int, bytes] = (0, bytes(6))
    said: tuple[int, int] | None = None
    fragments: list[tuple[int, int, int]] = field(default_factory=list)


class Fatal(Exception):
    """The device is to be closed."""


def plan(data: bytes) -> Packet:
    """The packet that begins with the first 12 bytes."""
    slots = [data[k : k + 12] for k in range(0, len(data), 12)]
    packet = Packet()
    try:
        _plan(packet, slots)
    except Fatal as e:
        packet.verdict, packet.fault = records.P_FATAL, e.args[0]
    return packet


def _plan(packet: Packet, slots: list[bytes]) -> None:
    gref, offset, packet.flags, _, packet.size = TX.unpack(slots[0])
    if packet.flags & netif.TXF_extra_info:
        _extras(packet, slots)
    if packet.mcast[0]:
        packet.verdict = records.P_CONTROL
        return
    chain = [(gref, offset, packet.size)]
    more = packet.flags & netif.TXF_more_data
    left = packet.size
    refused = False
    while more:
        if packet.slots == len(slots):
            raise Fatal(records.F_CUT)
        if len(chain) == records.FATAL_SLOTS:
            raise Fatal(records.F_SLOTS)
        gref, offset, flags, _, size = TX.unpack(slots[packet.slots])
        packet.slots += 1
        more = flags & netif.TXF_more_data
        chain.append((gref, offset, size))
        refused = refused or len(chain) > records.MAX_SLOTS or size > left
        if not refused:
            if offset + size > 4096:
                raise Fatal(records.F_PAGE)
            left -= size
    if refused or packet.size < records.MIN_SIZE:
        packet.verdict = records.P_REFUSE
        return
    chain[0] = (*chain[0][:2], left)
    if chain[0][1] + left > 4096:
        raise Fatal(records.F_PAGE)
    packet.fragments = [one for one in chain if one[2] > 0]


def _extras(packet: Packet, slots: list[bytes]) -> None:
    more = True
    while more:
        if packet.slots == len(slots):
            raise Fatal(records.F_NO_EXTRA)
        extra = slots[packet.slots]
        packet.slots += 1
        packet.extras += 1
        more = bool(extra[1] & netif.EXTRA_FLAG_MORE)
        match extra[0]:
            case netif.EXTRA_GSO:
                size, kind = struct.unpack_from("<HB", extra, 2)
                if size == 0:
                    raise Fatal(records.F_GSO_SIZE)
                if kind not in (netif.GSO_TCPV4, netif.GSO_TCPV6):
                    raise Fatal(records.F_GSO_TYPE)
                packet.gso = (kind, size)
            case netif.EXTRA_MCAST_ADD | netif.EXTRA_MCAST_DEL:
                packet.mcast = (extra[0], extra[2:8])
            case netif.EXTRA_HASH:
                kind, algorithm, value = struct.unpack_from("<BBI", extra, 2)
                if kind < 4 and algorithm == netif.HASH_ALGORITHM_TOEPLITZ:
                    packet.said = (1 << kind, value)
            case _:
                raise Fatal(records.F_EXTRA_TYPE)
