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
    set_tap_queue,
    take_tap,
    up,
)
from rings.jit import compile_for

from . import netfront_tap_kernels as kernels
from .netfront import Netfront
from .netfront import warm as warm_vif
from .netfront_keys import Offer
from .netfront_queue import Queue
from .netfront_records import FRAME

__all__ = ["Tap", "warm"]

log = logging.getLogger(__name__)

_MOMENT = 0.005


class Tap:
    """A TAP in the network namespace of this thread, up, with the vif's address. It goes with close().

    It has a queue for each of the vif's, with a thread each. The vif may have fewer after a reconnect, or more: those
    that are not wanted are taken out of the TAP, whose flows would go by them and be lost, and their threads wait.
    """

    def __init__(self, vif: Netfront, name: str, *, mtu: int = 1500) -> None:
        """The vif is connected. PlatformError naming what cannot be had."""
        self.vif, self.name = vif, name
        self._fds: list[int] = []
        self._threads: list[threading.Thread] = []
        self._several = vif.most_queues > 1
        self._in = 0  # of the queues, those before this one are in the TAP
        self._change = threading.Condition()  # of that, and of the next
        self._ended = False
        self._offered = vif.offer  # what a queue that is opened is told
        try:
            self._have(len(vif.queues))
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
        self._begin()

    def _have(self, count: int) -> None:
        """So many queues are in the TAP. As many as can be had if one cannot."""
        while self._in > count:
            set_tap_queue(self._fds[self._in - 1], False)
            self._in -= 1
        while self._in < count:
            if self._in < len(self._fds):
                set_tap_queue(self._fds[self._in], True)
            else:
                self._fds.append(self._open(self._several))
            self._in += 1

    def _begin(self) -> None:
        """A thread for each queue that has none; those that wait for theirs look whether it is in the TAP."""
        with self._change:  # the first thread does so as well
            for index in range(len(self._threads), len(self._fds)):
                name = f"tap-{self.name}-{index}"
                self._threads.append(threading.Thread(target=self._carry, args=(index,), name=name, daemon=True))
                self._threads[-1].start()
            self._change.notify_all()

    def _follow(self) -> None:
        """There is a new connection: as many queues as that has. On the first queue's thread, which is in the TAP's
        namespace and holds that queue's locks, so that there is no other connection meanwhile."""
        self._offered = self.vif.offer
        try:
            self._have(len(self.vif.queues))
        except OSError as e:
            log.warning("TAP %s: %d of %d queues: %s", self.name, self._in, len(self.vif.queues), e)
        self._begin()

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

    def _carry(self, index: int) -> None:
        fd, buffers, frames = self._fds[index], np.zeros(kernels.BUFFERS, np.uint8), np.zeros(2, FRAME)
        watched: Queue | None = None
        offer = self._offered
        while not self._ended and not self.vif.failure:
            with self._change:
                # Not before: the epoll of a queue does not hear of a descriptor that is out of the TAP when it comes.
                self._change.wait_for(lambda: index < self._in or self._ended)
            result = 0
            for queue in self.vif.queues[index : index + 1]:  # in one go: they may become fewer at any time
                with queue.tx_lock, queue.rx_lock:
                    if not queue.active or self._ended:
                        continue
                    if index == 0:
                        self._follow()
                    if queue is not watched:
                        queue.watch(fd)
                        watched = queue
                    offer = self._offer_again(fd, offer)
                    result = kernels.pump(queue.at, fd, buffers.ctypes.data, frames.ctypes.data)
                if result < 0:
                    self.vif.violated(queue.violation())
            if result == 0 and not self._ended:
                time.sleep(_MOMENT)  # there is a new connection to be made

    def close(self) -> None:
        """Take the TAP away. The vif stays."""
        with self._change:
            self._ended = True
            self._change.notify_all()
        self.vif.on_carrier.remove(self._set_carrier)
        queues = list(self.vif.queues)  # a connection made meanwhile may have others
        for queue in queues:
            queue.interrupt()
        for thread in self._threads:  # the first may have begun others until it ended
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
