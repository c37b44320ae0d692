"""A TAP of the guest's own kernel behind a vif: what the kernel sends by it goes over the ring, and the other way.

In a network namespace of its own a guest process has so a whole network stack, with ping, iperf3 and tcpdump:

    ip netns add guest1
    ip netns exec guest1 pvdrivers guest --net switch:lan,tap=eth0
    ip -n guest1 addr add 10.0.0.1/24 dev eth0
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import threading
import time

import numpy as np

from pvdrivers.errors import PlatformError
from rings.jit import compile_for

from . import netfront_tap_kernels as kernels
from .netfront import Netfront
from .netfront import warm as warm_vif
from .netfront_records import FRAME

__all__ = ["Tap", "warm"]

log = logging.getLogger(__name__)

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8
_TUNSETCARRIER = 0x400454E2
_SIOCSIFHWADDR, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU = 0x8924, 0x8913, 0x8914, 0x8922
_IFF_UP, _ARPHRD_ETHER = 0x1, 1
_MOMENT = 0.005


class Tap:
    """A TAP in the network namespace of this thread, up, with the vif's address. It goes with close()."""

    def __init__(self, vif: Netfront, name: str, *, mtu: int = 1500) -> None:
        """The vif is connected. A queue of the TAP for each of its own. PlatformError naming what cannot be had."""
        self.vif, self.name = vif, name
        self._fds: list[int] = []
        self._threads: list[threading.Thread] = []
        self._ended = False
        try:
            for _ in vif.queues:
                self._fds.append(self._open(len(vif.queues) > 1))
            self._set_up(mtu)
        except OSError as e:
            for fd in self._fds:
                os.close(fd)
            text = f"TAP {name}: {e.strerror}"
            if e.errno in (errno.EPERM, errno.EACCES):
                text += "; it takes CAP_NET_ADMIN and /dev/net/tun"
            raise PlatformError(text) from e
        vif.on_carrier.append(self._set_carrier)
        self._set_carrier(vif.carrier)
        for index, fd in enumerate(self._fds):
            thread = threading.Thread(target=self._carry, args=(index, fd), name=f"tap-{name}-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _open(self, several: bool) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))
            offer, most = self.vif.offer, 0
            most |= _TUN_F_CSUM
            most |= _TUN_F_TSO4 | _TUN_F_TSO_ECN if offer.sg and offer.gso4 else 0
            most |= _TUN_F_TSO6 if offer.sg and offer.gso6 and offer.csum6 else 0
            fcntl.ioctl(fd, _TUNSETOFFLOAD, most)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _set_up(self, mtu: int) -> None:
        name = self.name.encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCSIFHWADDR, struct.pack("16sH6s16x", name, _ARPHRD_ETHER, self.vif.mac))
            fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si20x", name, mtu))
            (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s24x", name)), 16)
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))

    def _set_carrier(self, up: bool) -> None:
        """As the backend has it, so that the guest's kernel sees it: Linux 5.0 and later."""
        for fd in self._fds[:1]:
            try:
                fcntl.ioctl(fd, _TUNSETCARRIER, struct.pack("i", up))
            except OSError as e:
                log.debug("TAP %s: no carrier can be set: %s", self.name, e)

    def _carry(self, index: int, fd: int) -> None:
        buffers, frames = np.zeros(2 * kernels.ROOM, np.uint8), np.zeros(2, FRAME)
        registered = False
        while not self._ended and not self.vif.failure and index < len(self.vif.queues):
            queue = self.vif.queues[index]
            if not registered:
                queue.watch(fd)
                registered = True
            result = 0
            with queue.tx_lock, queue.rx_lock:
                if queue.active and not self._ended:
                    result = kernels.pump(queue.at, fd, buffers.ctypes.data, frames.ctypes.data)
            if result < 0:
                self.vif.violated(queue.violation())
            elif not self._ended:
                time.sleep(_MOMENT)  # there is a new connection to be made

    def close(self) -> None:
        """Take the TAP away. The vif stays."""
        self._ended = True
        self.vif.on_carrier.remove(self._set_carrier)
        for queue in self.vif.queues:
            queue.interrupt()
        for thread in self._threads:
            thread.join()
        for queue in self.vif.queues:
            queue.go_on()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def warm() -> None:
    """Compile all that a vif with a TAP needs."""
    warm_vif()
    for name, arguments in kernels.ARGUMENTS.items():
        compile_for(getattr(kernels, name), arguments)
