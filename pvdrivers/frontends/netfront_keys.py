"""What the two ends of a vif say to each other in xenstore: pure, parsed and checked. netif.h's long comments.

Of a backend nothing is believed: a value that no honest backend would write is a ValueError that names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rings import netif

__all__ = [
    "Offer", "Ring", "Wishes", "frontend_keys", "is_negotiated", "read_carrier", "read_mac", "read_mtu", "read_offer",
]  # fmt: skip

Read = Callable[[str], bytes | None]
"""Reads a key of a directory; None if it is not there."""


@dataclass(frozen=True)
class Offer:
    """What a backend publishes before InitWait."""

    queues: int = 1
    sg: bool = False
    gso4: bool = False
    gso6: bool = False
    csum4: bool = True
    csum6: bool = False
    split: bool = False
    control: bool = False
    headroom: bool = False
    multicast: bool = False
    """... with a filter that may be switched on and off at any time."""


@dataclass(frozen=True)
class Wishes:
    """What a frontend takes: packets of many pages, of many segments, and with checksums that are to be completed.

    And what it makes use of: an event channel for each ring, a control ring, pages that stay mapped in the backend.
    `notify`: it says so when it posts buffers. `multicast`: of what is sent to groups only what it has joined.
    """

    sg: bool = True
    gso: bool = True
    csum4: bool = True
    csum6: bool = True
    split: bool = True
    control: bool = True
    staging: bool = True
    notify: bool = True
    multicast: bool = False


@dataclass(frozen=True)
class Ring:
    """Where the two rings of a queue are."""

    tx_gref: int
    rx_gref: int
    tx_port: int
    rx_port: int


def _number(read: Read, key: str, default: int, most: int) -> int:
    raw = read(key)
    if raw is None:
        return default
    text = raw.decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 10) or int(text) > most:
        raise ValueError(f"key {key} is {text[:32]!r}, not a number from 0 to {most}")
    return int(text)


def read_offer(read: Read) -> Offer:
    """Parse the keys of InitWait. Raises ValueError."""

    def switch(key: str) -> bool:
        return _number(read, key, 0, (1 << 32) - 1) != 0

    if not switch(netif.KEY_RX_COPY):
        raise ValueError(f"key {netif.KEY_RX_COPY} is not 1: it would flip pages, which nobody does any more")
    return Offer(
        queues=max(1, _number(read, netif.KEY_MAX_QUEUES, 1, 1 << 16)),
        sg=switch(netif.KEY_SG),
        gso4=switch(netif.KEY_GSO_TCPV4),
        gso6=switch(netif.KEY_GSO_TCPV6),
        csum4=not switch(netif.KEY_NO_CSUM),
        csum6=switch(netif.KEY_IPV6_CSUM),
        split=switch(netif.KEY_SPLIT_EVENTS),
        control=switch(netif.KEY_CTRL_RING),
        headroom=switch(netif.KEY_XDP_HEADROOM),
        multicast=switch(netif.KEY_MCAST) and switch(netif.KEY_DYNAMIC_MCAST),
    )


def read_mtu(read: Read) -> int:
    """What the toolstack says of the largest packet, 1500 if it says nothing. Raises ValueError."""
    return max(68, _number(read, "mtu", 1500, 65521))


def read_carrier(read: Read) -> bool:
    """Whether the backend passes packets; it does if it does not say. Raises ValueError."""
    return _number(read, netif.KEY_CARRIER, 1, 1) != 0


def read_mac(read: Read) -> bytes:
    """The address that the toolstack has given it. Raises ValueError."""
    text = (read("mac") or b"").decode(errors="replace").strip()
    parts = text.split(":")
    try:
        if len(parts) != 6 or any(len(part) != 2 for part in parts):
            raise ValueError
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise ValueError(f"key mac is {text[:32]!r}, no address of six bytes") from None


def frontend_keys(
    rings: Sequence[Ring], wishes: Wishes, control: tuple[int, int] | None = None, headroom: int = 0
) -> dict[str, str]:
    """What a frontend writes. With one queue the keys are flat, with more there are none at the top.

    `control` is the control ring's gref and port, `headroom` what is to be free before each packet.
    """
    keys = {
        netif.KEY_REQUEST_RX_COPY: "1",
        netif.KEY_RX_NOTIFY: str(int(wishes.notify)),
        netif.KEY_REQUEST_MCAST: str(int(wishes.multicast)),
        netif.KEY_SG: str(int(wishes.sg)),
        netif.KEY_GSO_TCPV4: str(int(wishes.gso)),
        netif.KEY_GSO_TCPV6: str(int(wishes.gso)),
        netif.KEY_IPV6_CSUM: str(int(wishes.csum6)),
    }
    if not wishes.csum4:
        keys[netif.KEY_NO_CSUM] = "1"
    if headroom:
        keys[netif.KEY_REQUEST_XDP_HEADROOM] = str(headroom)
    if control is not None:
        keys[netif.KEY_CTRL_RING_REF], keys[netif.KEY_EVENT_CHANNEL_CTRL] = map(str, control)
    if len(rings) > 1:
        keys[netif.KEY_NUM_QUEUES] = str(len(rings))
    for i, ring in enumerate(rings):
        at = f"queue-{i}/" if len(rings) > 1 else ""
        keys[at + netif.KEY_TX_RING_REF] = str(ring.tx_gref)
        keys[at + netif.KEY_RX_RING_REF] = str(ring.rx_gref)
        if ring.tx_port == ring.rx_port:
            keys[at + netif.KEY_EVENT_CHANNEL] = str(ring.tx_port)
        else:
            keys[at + netif.KEY_EVENT_CHANNEL_TX] = str(ring.tx_port)
            keys[at + netif.KEY_EVENT_CHANNEL_RX] = str(ring.rx_port)
    return keys


def is_negotiated(key: str) -> bool:
    """Whether a key in a frontend's directory is left over from an earlier connection, and has to go."""
    return key.startswith(("queue-", "event-channel", "feature-")) or key in (
        netif.KEY_NUM_QUEUES,
        netif.KEY_TX_RING_REF,
        netif.KEY_RX_RING_REF,
        netif.KEY_REQUEST_RX_COPY,
        netif.KEY_CTRL_RING_REF,
        netif.KEY_REQUEST_XDP_HEADROOM,
    )
