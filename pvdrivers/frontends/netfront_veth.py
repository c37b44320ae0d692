"""A veth of the guest's own kernel behind a vif, for where there is no /dev/net/tun.

One end is the guest's interface; the other is read and written as raw packets (AF_PACKET with virtio's header,
packet(7)), by the loop that carries a TAP's.
"""

from __future__ import annotations

import os
import socket

from .netfront import Netfront
from .netfront_keys import Offer
from .netfront_tap import Tap

__all__ = ["Veth"]

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 3


class Veth(Tap):
    """`inner` is the end that is ours; the other, `name`, has been made the guest's. Both go with the namespace."""

    def __init__(self, vif: Netfront, name: str, inner: str) -> None:
        """The vif is connected and has one queue; both ends are up. PlatformError naming what cannot be had."""
        self._inner = inner
        super().__init__(vif, name)

    def _open(self, several: bool) -> int:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            sock.bind((self._inner, _ETH_P_ALL))
            return os.dup(sock.fileno())

    def _offer(self, fd: int, offer: Offer) -> None:
        """It has what it has."""

    def _set_up(self, mtu: int) -> None:
        """Whoever made the pair has done so."""
