"""The groups that a vif listens to (netif.h, multicast control): asked for on its tx ring, in each connection."""

from __future__ import annotations

import errno
import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from rings import netif

from . import netfront_groups_kernels
from . import netfront_kernels as kernels
from .netfront_records import NO_ANSWER, TX

if TYPE_CHECKING:
    from .netfront import Netfront

log = logging.getLogger(__name__)

__all__ = ["Groups"]

_SLICE_MS = 50


class Groups:
    """What a vif gets of what is sent to groups. `joined` is what the backend has said yes to."""

    def __init__(self, vif: Netfront) -> None:
        self._vif = vif
        self._lock = threading.Lock()
        self.joined: set[bytes] = set()

    def filter(self, on: bool) -> None:
        """Get only what has been joined, or everything. OSError(EOPNOTSUPP): the backend has no filter to switch."""
        vif = self._vif
        if not vif.offer.multicast:
            raise OSError(errno.EOPNOTSUPP, f"vif {vif.name}: its backend filters no multicast")
        vif.wishes = replace(vif.wishes, multicast=on)
        vif.platform.store.write(f"{vif.path}/{netif.KEY_REQUEST_MCAST}", int(on))

    def join(self, group: bytes, *, timeout: float = 5.0) -> None:
        """Listen to a group's address of 6 bytes. OSError(ENOSPC): the backend takes no more, or no such address."""
        self._amend(netif.EXTRA_MCAST_ADD, group, timeout)
        self.joined.add(group)

    def leave(self, group: bytes, *, timeout: float = 5.0) -> None:
        """Listen to it no more; nothing if it was not joined."""
        self._amend(netif.EXTRA_MCAST_DEL, group, timeout)
        self.joined.discard(group)

    def join_again(self) -> None:
        """A backend that has just connected knows of none: have it know them."""
        for group in sorted(self.joined):
            try:
                self._amend(netif.EXTRA_MCAST_ADD, group, 1.0)
            except OSError as error:
                log.warning("vif %s: group %s is not joined again: %s", self._vif.name, group.hex(":"), error)

    def _amend(self, kind: int, group: bytes, timeout: float) -> None:
        vif = self._vif
        if len(group) != 6:
            raise OSError(errno.EINVAL, f"vif {vif.name}: {group.hex()} is no address of six bytes")
        deadline = time.monotonic() + timeout
        late = TimeoutError(errno.ETIMEDOUT, f"vif {vif.name}: no answer about group {group.hex(':')}")
        if not self._lock.acquire(timeout=max(timeout, 0)):  # there is one answer at a time
            raise late
        try:
            answer = self._asked(kind, group, deadline)
        finally:
            self._lock.release()
        if answer == NO_ANSWER:
            raise late
        if answer != netif.RSP_OKAY:
            raise OSError(errno.ENOSPC, f"vif {vif.name}: the backend does not add group {group.hex(':')}")

    def _asked(self, kind: int, group: bytes, deadline: float) -> int:
        vif = self._vif
        queue = vif._queue(0)
        put = 0
        while True:
            queue.interrupt()  # a TAP's pump has its locks for as long as it is let
            try:
                with queue.tx_lock:
                    if not queue.active:
                        raise OSError(errno.EIO, f"vif {vif.name}: not connected")
                    # The answer, or before ours is asked for that to an earlier one, which came too late.
                    out = int(queue.record[0]["amended"]) >= 0
                    violated = out and kernels.reap(queue.at) < 0
                    if put == 0 and int(queue.record[0]["amended"]) < 0:
                        put = int(netfront_groups_kernels.amend(queue.at, kind, int.from_bytes(group, "little")))
                        violated = put < 0
                    answer = int(queue.record[0]["answer"]) if put == 1 else NO_ANSWER
                    waits = not violated and answer == NO_ANSWER and kernels.arm(queue.at, TX) == 0
            finally:
                queue.go_on()
            if violated:
                vif.violated(queue.violation())
                raise OSError(errno.EIO, vif.failure)
            if answer != NO_ANSWER or time.monotonic() > deadline:
                return answer
            if waits:
                queue.wait(_SLICE_MS)
