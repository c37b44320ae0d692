"""One handle on event channels: a descriptor of /dev/xen/evtchn, and the Python seam over the compiled one.

A port can only be notified through the descriptor that bound it, and all ports of a handle share that descriptor: a
worker waits for one, whatever the number of its guests.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke

from . import event_seam
from .devices import (
    EVTCHN,
    IOCTL_EVTCHN_BIND_INTERDOMAIN,
    IOCTL_EVTCHN_BIND_UNBOUND_PORT,
    IOCTL_EVTCHN_UNBIND,
    open_device,
)
from .event_seam import EVENT_CTX, PORTS_AT_ONCE

_event_deliver = invoke(event_seam.event_deliver)
_event_next = invoke(event_seam.event_next)
_event_notify = invoke(event_seam.event_notify)
_event_unmask = invoke(event_seam.event_unmask)


class XenEventChannel:
    """Ports of one descriptor. Implements platform.EventChannel."""

    def __init__(self) -> None:
        """Raises PlatformError if the device cannot be opened."""
        self.fd = open_device(EVTCHN)
        self._ports: set[int] = set()
        self._buffers = np.zeros((3, PORTS_AT_ONCE), np.uint32)
        self._record = np.zeros(1, EVENT_CTX)
        self._record["fd"], self._record["sent_at"] = self.fd, -1
        for name, buffer in zip(("taken", "later", "sent"), self._buffers):
            self._record[name] = buffer.ctypes.data
        self.ctx = int(self._record.ctypes.data)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    @property
    def shared_source(self) -> tuple[int, int]:
        """(fd, token) for all ports of the handle."""
        return self.fd, 0

    @property
    def shared_read(self) -> tuple[int, int]:
        """(address, bytes): where an io_uring may read what is pending to, for SEAM.event_deliver."""
        return self._buffers[0].ctypes.data, PORTS_AT_ONCE * 4

    def _ioctl(self, request: int, argument: bytes, what: str) -> int:
        try:
            # The local port is the call's result; a buffer that may be changed has Python give it back.
            return fcntl.ioctl(self.fd, request, bytearray(argument), True)
        except OSError as e:
            hint = {
                errno.ENOENT: "; there is no such port, or it does not wait for this domain",
                errno.EINVAL: "; there is no such port, or it does not wait for this domain",
                errno.ESRCH: "; there is no such domain",
                errno.ENOSPC: "; this domain has no event channel left: max_event_channels= in its xl configuration",
            }.get(e.errno or 0, "")
            raise PlatformError(f"event channel: {what}: {e.strerror}{hint}") from e

    def _bound(self, port: int) -> int:
        self._ports.add(port)
        return port

    def alloc_unbound(self, remote_domid: int) -> int:
        """A port that `remote_domid` may bind. Raises PlatformError."""
        what = f"a port for domain {remote_domid}"
        return self._bound(self._ioctl(IOCTL_EVTCHN_BIND_UNBOUND_PORT, struct.pack("=I", remote_domid), what))

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        """Bind a port that waits for us. It is pending at once: something may have been sent before.

        Raises PlatformError.
        """
        what = f"binding port {remote_port} of domain {remote_domid}"
        ends = struct.pack("=II", remote_domid, remote_port)
        return self._bound(self._ioctl(IOCTL_EVTCHN_BIND_INTERDOMAIN, ends, what))

    def _ours(self, port: int) -> int:
        if port not in self._ports:
            raise PlatformError(f"event channel port {port}: not a port of this handle")
        return port

    def unbind(self, port: int) -> None:
        """Close a port. Raises PlatformError for one that is not ours."""
        self._ports.remove(self._ours(port))
        self._ioctl(IOCTL_EVTCHN_UNBIND, struct.pack("=I", port), f"closing port {port}")

    def notify(self, port: int) -> None:
        """Signal the other end. PlatformError for a port that is not ours."""
        if _event_notify(self.ctx, self._ours(port)) < 0:
            raise PlatformError(f"event channel port {port}: cannot be notified")

    def source(self, port: int) -> tuple[int, int]:
        """(fd to poll, token for SEAM.event_deliver): the same for all ports of the handle.

        Edges are enough for a handle of one port, which comes again only when it has been let in. With several, one
        that comes while others are read makes none (drivers/xen/evtchn.c wakes when what is unread was nothing).
        """
        self._ours(port)
        return self.shared_source

    def pending(self) -> list[int]:
        """Take what is pending now: ports, each once."""
        ports: list[int] = []
        _event_deliver(self.ctx, 0)
        while (port := _event_next(self.ctx)) >= 0:
            ports.append(port)
        for port in ports:
            _event_unmask(self.ctx, port)
        return [port for port in ports if port in self._ports]

    def wait(self, timeout: float | None = None) -> list[int]:
        """pending(), after waiting for something for at most `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if ports := self.pending():
                return ports
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            self._poll.poll(None if left is None else left * 1000)

    def close(self) -> None:
        """Close all ports and the handle. Harmless a second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._record["fd"] = -1
            self._ports.clear()
