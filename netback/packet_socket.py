"""A packet socket on an interface of this host, packet(7): all that the interface hears, and what it is to send.

What the host itself sends by that interface is not heard, nor does the host hear what is sent here: to talk to the
host, too, a vif wants a TAP, or a bridge.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import partial

import numpy as np

from pvdrivers.errors import PlatformError

from .links import in_namespace, take_interface
from .port import PortSpec
from .port_socket import CONTROL_AT, IOV_AT, SOCKET_MESSAGE

_SOL_PACKET = 263
_ADD_MEMBERSHIP, _AUXDATA, _VNET_HDR, _FANOUT, _IGNORE_OUTGOING = 1, 8, 15, 18, 23
_MR_PROMISC = 1
_FANOUT_HASH, _FANOUT_UNIQUEID = 0, 0x2000
_ETH_P_ALL = 0x0003
_RECEIVE_BYTES = 4 << 20


class PacketSocket:
    """Sockets on one interface, a queue each."""

    def __init__(self, spec: PortSpec, mtu: int, *, strict: bool = True) -> None:
        """PlatformError if there is no such interface, or no permission; ConfigError if `mtu` does not fit it, and that
        is asked for."""
        self.spec, self.what = spec, f"packet socket on {spec.name}"
        self._sockets: list[socket.socket] = []
        self.messages: list[np.ndarray] = []
        """SOCKET_MESSAGE of each queue."""
        self._index = in_namespace(spec.netns, partial(take_interface, self.what, spec.name, mtu if strict else 0))
        self._group = 0
        try:
            self._add()  # permission is asked for now
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> list[int]:
        """Their descriptors."""
        return [s.fileno() for s in self._sockets]

    def _add(self) -> None:
        try:
            in_namespace(self.spec.netns, self._open)
        except OSError as e:
            text = f"{self.what}: {e.strerror}"
            if e.errno in (errno.EPERM, errno.EACCES):
                text += "; it takes CAP_NET_RAW"
            raise PlatformError(text) from e

    def _open(self) -> None:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        self._sockets.append(sock)  # bound to no protocol yet: it hears nothing
        message = np.zeros(1, SOCKET_MESSAGE)
        at, row = int(message.ctypes.data), message[0]
        row["iov"], row["n_iov"], row["control"] = at + IOV_AT, 1, at + CONTROL_AT
        self.messages.append(message)
        for option in (_VNET_HDR, _AUXDATA, _IGNORE_OUTGOING):
            sock.setsockopt(_SOL_PACKET, option, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        membership = struct.pack("iHH8s", self._index, _MR_PROMISC, 0, b"")
        sock.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, membership)

    def is_there(self) -> bool:
        """Whether the interface is the one that it was: one that went and came back has another number."""
        try:
            return self._index == in_namespace(self.spec.netns, partial(socket.if_nametoindex, self.spec.name))
        except (OSError, PlatformError):
            return False

    def open_queues(self, count: int, accepts: int) -> list[int]:
        """Have so many sockets, which share what comes by its flow. Their descriptors, non-blocking."""
        while len(self._sockets) < count:
            self._add()
        try:
            for sock in self._sockets:
                sock.bind((self.spec.name, _ETH_P_ALL))
                if count > 1:
                    self._join_group(sock)
        except OSError as e:
            raise PlatformError(f"{self.what}: {e.strerror}") from e
        return self.fds

    def _join_group(self, sock: socket.socket) -> None:
        kind = _FANOUT_HASH << 16
        if self._group == 0:
            sock.setsockopt(_SOL_PACKET, _FANOUT, (_FANOUT_HASH | _FANOUT_UNIQUEID) << 16)
            self._group = sock.getsockopt(_SOL_PACKET, _FANOUT) & 0xFFFF
        else:
            sock.setsockopt(_SOL_PACKET, _FANOUT, kind | self._group)

    def fit(self, mtu: int) -> None:
        """The interface is not ours to change: ConfigError if it has less."""
        in_namespace(self.spec.netns, partial(take_interface, self.what, self.spec.name, mtu))

    def close_queues(self) -> None:
        """Hear nothing more, and begin with fresh ones the next time."""
        self.close()
        self._group = 0

    def close(self, *, delete: bool = False) -> None:
        """Let go. Harmless a second time."""
        for sock in self._sockets:
            sock.close()
        self._sockets, self.messages = [], []


