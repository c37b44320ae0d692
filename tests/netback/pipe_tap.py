"""A TAP without a kernel behind it: the test writes what the guest's would have sent, and reads what it would get."""

from __future__ import annotations

import socket
import struct

from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_tap import Tap, warm

HEADER = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""


class PipeTap(Tap):
    """It has one queue. `there` is the kernel's end."""

    def __init__(self, vif: Netfront) -> None:
        warm()  # else the pump compiles, with the queue's locks
        super().__init__(vif, "pipe0")

    def _open(self, several: bool) -> int:
        assert not several
        here, self.there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        self.there.settimeout(5)
        self._offer(here.fileno(), self._offered)
        return here.detach()

    def _set_up(self, mtu: int) -> None:
        pass

    def send(self, frame: bytes, *header: int) -> None:
        """The kernel sends a frame, of which it says this."""
        self.there.send(HEADER.pack(*header or (0, 0, 0, 0, 0, 0)) + frame)

    def receive(self) -> bytes:
        """What comes next."""
        return self.there.recv(1 << 17)[HEADER.size :]

    def close(self) -> None:
        super().close()
        self.there.close()
