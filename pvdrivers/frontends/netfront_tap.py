"""A TAP of the guest's own kernel behind a vif: what the kernel sends by it goes over the ring, and the other way.

In a network namespace of its own a guest process has so a whole network stack, with ping, iperf3 and tcpdump:

    ip netns add guest1
    ip netns exec guest1 pvdrivers guest --net switch:lan,tap=eth0
    ip -n guest1 addr add 10.0.0.1/24 dev eth0
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.interfaces import (
    TSO4,
    TSO6,
    TSO_ECN,
    TUN_CSUM,
    open_tun,
    set_hardware_address,
    set_mtu,
    set_tap_carrier,
    set_tap_offload,
    take_tap,
    up,
)
from rings.jit import compile_for

from . import netfront_tap_kernels as kernels
from .netfront import Netfront
from .netfront import warm as warm_vif
from .netfront_keys import Offer
from .netfront_records import FRAME

__all__ = ["Tap", "warm"]

log = logging.getLogger(__name__)

_MOMENT = 0.005


class Tap:
    """A TAP in the network namespace of this thread, up, with the vif's address. It goes with close()."""

    def __init__(self, vif: Netfront, name: str, *, mtu: int = 1500) -> None:
        """The vif is connected. A queue of the TAP for each of its own. PlatformError naming what cannot be had."""
        self.vif, self.name = vif, name
        self._fds: list[int] = []
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._offered = vif.offer
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
        fd = open_tun()
        try:
            take_tap(fd, self.name, several=several)
            self._offer(fd, self._offered)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _offer(self, fd: int, offer: Offer) -> None:
        """Have the kernel leave to the backend what that takes: a blank checksum for IPv4 and for IPv6, or for neither;
        segments only with it."""
        most = TUN_CSUM if offer.csum4 and offer.csum6 else 0
        if most and offer.sg:
            most |= (TSO4 | TSO_ECN if offer.gso4 else 0) | (TSO6 if offer.gso6 else 0)
        set_tap_offload(fd, most)

    def _offer_again(self, fd: int, before: Offer) -> Offer:
        """Another backend may take less; what it takes now."""
        offer = self.vif.offer
        if offer != before:
            try:
                self._offer(fd, offer)
            except OSError as e:
                log.warning("TAP %s: what its backend takes cannot be set: %s", self.name, e)
        return offer

    def _set_up(self, mtu: int) -> None:
        set_hardware_address(self.name, self.vif.mac)
        set_mtu(self.name, mtu)
        up(self.name)

    def _set_carrier(self, on: bool) -> None:
        """As the backend has it, so that the guest's kernel sees it: Linux 5.0 and later."""
        for fd in self._fds[:1]:
            try:
                set_tap_carrier(fd, on)
            except OSError as e:
                log.debug("TAP %s: no carrier can be set: %s", self.name, e)

    def _carry(self, index: int, fd: int) -> None:
        buffers, frames = np.zeros(kernels.BUFFERS, np.uint8), np.zeros(2, FRAME)
        registered, offer = False, self._offered
        while not self._ended and not self.vif.failure and index < len(self.vif.queues):
            queue = self.vif.queues[index]
            if not registered:
                queue.watch(fd)
                registered = True
            result = 0
            with queue.tx_lock, queue.rx_lock:
                if queue.active and not self._ended:
                    offer = self._offer_again(fd, offer)
                    result = kernels.pump(queue.at, fd, buffers.ctypes.data, frames.ctypes.data)
            if result < 0:
                self.vif.violated(queue.violation())
            elif not self._ended:
                time.sleep(_MOMENT)  # there is a new connection to be made

    def close(self) -> None:
        """Take the TAP away. The vif stays."""
        self._ended = True
        self.vif.on_carrier.remove(self._set_carrier)
        queues = list(self.vif.queues)  # a connection made meanwhile may have others
        for queue in queues:
            queue.interrupt()
        for thread in self._threads:
            thread.join()
        for queue in queues:
            queue.go_on()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def warm() -> None:
    """Compile all that a vif with a TAP needs."""
    warm_vif()
    for name, arguments in kernels.ARGUMENTS.items():
        compile_for(getattr(kernels, name), arguments)
