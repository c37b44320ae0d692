"""One handle on event channels: its event memory, its eventfds, and the Python seam over the compiled one."""

from __future__ import annotations

import os
import select
import time

import numpy as np

from pvdrivers import windows
from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke

from . import event_kernels as k
from . import event_seam, wire
from .hypercall import Hypercalls

_EVENTS_AT_ONCE = 512

_event_deliver = invoke(event_seam.event_deliver)
_event_forget = invoke(event_seam.event_forget)
_event_mask = invoke(event_seam.event_mask)
_event_next = invoke(event_seam.event_next)
_event_notify = invoke(event_seam.event_notify)
_event_unmask = invoke(event_seam.event_unmask)


class EventMemory:
    """The words of the ABI for one handle, and the context of the compiled functions over them."""

    def __init__(self, limit: int, abi: int) -> None:
        """`limit` ports of ABI_2L or ABI_FIFO."""
        self.limit = limit
        self.fifo = abi == k.ABI_FIFO
        sizes = {
            "ports": limit * 4, "sources": limit * 4, "shared": k.SHARED_INFO_SIZE, "words": limit * 4,
            "control": k.CONTROL_SIZE, "tails": 64, "priorities": limit, "queues": limit, "heads": 64,
        }  # fmt: skip
        # Pages that are not touched cost nothing: most programs have a handful of ports.
        self._size = sum(-(-size // 64) * 64 for size in sizes.values())
        self._memory = at = windows.zeros(self._size)
        self.record = np.zeros(1, k.EVENT_CTX)
        for name, size in sizes.items():
            self.record[name] = at
            at += -(-size // 64) * 64
        self.record["abi"], self.record["limit"] = abi, limit
        self.ctx = int(self.record.ctypes.data)
        self.notify_fds, self.wait_fds = self._table("ports", "u4"), self._table("sources", "u4")
        self.priorities = self._table("priorities", "u1")

    def _table(self, name: str, kind: str) -> np.ndarray:
        return windows.view(int(self.record[name][0]), self.limit, kind)

    def close(self) -> None:
        """Unmap it all. Harmless a second time."""
        if self._memory:
            windows.unmap(self._memory, self._size)
            self._memory = 0


class SimEventChannel:
    """Ports of one handle (a connection of its own). Implements platform.EventChannel."""

    def __init__(self, hypercalls: Hypercalls, abi: str) -> None:
        """`hypercalls` is owned from here on; `abi` is "2l" or "fifo"."""
        self._xen = hypercalls
        self._fds: dict[int, tuple[int, int]] = {}  # port -> (to notify, to wait)
        self._epoll: select.epoll | None = None
        self.memory = EventMemory(hypercalls.limit, k.ABI_FIFO if abi == "fifo" else k.ABI_2L)
        self.ctx = self.memory.ctx

    def _opened(self, port: int) -> int:
        try:
            notify, wait = self._xen.call(wire.EVTCHN_FDS, port).fds
        except PlatformError:
            self._xen.call(wire.EVTCHN_CLOSE, port)
            raise
        self._fds[port] = notify, wait
        self.memory.priorities[port] = k.FIFO_PRIORITY_DEFAULT
        self.memory.wait_fds[port] = wait + 1
        self.memory.notify_fds[port] = notify + 1
        if self._epoll is not None:
            self._epoll.register(wait, select.EPOLLIN | select.EPOLLET)
        return port

    def alloc_unbound(self, remote_domid: int) -> int:
        """A port that `remote_domid` may bind. Raises PlatformError."""
        return self._opened(self._xen.call(wire.EVTCHN_ALLOC_UNBOUND, remote_domid).values[0])

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int:
        """Bind a port that waits for us. It is pending at once, as on Xen: something may have been sent before."""
        port = self._opened(self._xen.call(wire.EVTCHN_BIND_INTERDOMAIN, remote_domid, remote_port).values[0])
        os.eventfd_write(self._fds[port][1], 1)
        return port

    def unbind(self, port: int) -> None:
        """Close a port. Whoever waits on its fd by other means must have stopped."""
        if port not in self._fds:
            raise PlatformError(f"event channel port {port}: not a port of this handle")
        notify, wait = self._fds.pop(port)
        self.memory.wait_fds[port] = self.memory.notify_fds[port] = 0
        if self._epoll is not None:
            self._epoll.unregister(wait)
        try:
            self._xen.call(wire.EVTCHN_CLOSE, port)
        finally:
            os.close(notify)
            os.close(wait)
            _event_forget(self.ctx, port, 0, 0)

    def status(self, port: int) -> tuple[int, int, int]:
        """(EVTCHNSTAT_*, remote domid, remote port): whether somebody is bound to the other end."""
        state, domid, remote = self._xen.call(wire.EVTCHN_STATUS, wire.DOMID_SELF, port).values[:3]
        return state, domid, remote

    def set_priority(self, port: int, priority: int) -> None:
        """EVTCHNOP_set_priority, 0 (first) to 15, from the next time on that it is linked. FIFO only."""
        if not self.memory.fifo or not 0 <= priority < k.FIFO_QUEUES or port not in self._fds:
            raise PlatformError(f"port {port}, priority {priority}: priorities are 0 to 15, of ports of the FIFO ABI")
        self.memory.priorities[port] = priority

    def notify(self, port: int) -> None:
        """Signal the other end. Without one, nothing happens. PlatformError for a port that is not ours."""
        if _event_notify(self.ctx, port, 0, 0) < 0:
            raise PlatformError(f"event channel port {port}: not a port of this handle")

    def mask(self, port: int) -> None:
        """No delivery of a port until unmask()."""
        _event_mask(self.ctx, self._ours(port), 0, 0)

    def unmask(self, port: int) -> None:
        """Delivery again, at once if it is pending."""
        _event_unmask(self.ctx, self._ours(port), 0, 0)

    def _ours(self, port: int) -> int:
        if port not in self._fds:
            raise PlatformError(f"event channel port {port}: not a port of this handle")
        return port

    def source(self, port: int) -> tuple[int, int]:
        """(fd to poll edge-triggered and never to read, token for SEAM.event_deliver)."""
        return self._fds[self._ours(port)][1], port

    def _poll(self, seconds: float) -> bool:
        """Deliver what has been signalled; True if there may be more."""
        if self._epoll is None:
            self._epoll = select.epoll()
            for _, wait in self._fds.values():
                self._epoll.register(wait, select.EPOLLIN | select.EPOLLET)
        found = self._epoll.poll(seconds, _EVENTS_AT_ONCE)
        ports = {wait: port for port, (_, wait) in self._fds.items()} if found else {}
        for fd, _ in found:
            if fd in ports:
                _event_deliver(self.ctx, ports[fd], 0, 0)
        return len(found) == _EVENTS_AT_ONCE

    def _take(self) -> list[int]:
        ports: list[int] = []
        while (port := int(_event_next(self.ctx, 0, 0, 0))) >= 0:
            ports.append(port)
        for port in ports:
            _event_unmask(self.ctx, port, 0, 0)
        return [port for port in ports if port in self._fds]

    def pending(self) -> list[int]:
        """Deliver and take what is pending now: ports, each once, in the order of the ABI."""
        for _ in range(self.memory.limit // _EVENTS_AT_ONCE):
            if not self._poll(0):
                break
        return self._take()

    def wait(self, timeout: float | None = None) -> list[int]:
        """pending(), after waiting for something for at most `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if ports := self.pending():
                return ports
            left = -1.0 if deadline is None else deadline - time.monotonic()
            if deadline is not None and left <= 0:
                return []
            self._poll(left)

    def close(self) -> None:
        """Close all ports and the handle. Harmless a second time."""
        self._xen.close()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        for fds in self._fds.values():
            for fd in fds:
                os.close(fd)
        self._fds.clear()
        self.memory.close()


def ports_of(abi: str) -> int:
    """How many ports an ABI has. Raises PlatformError for one that is neither "2l" nor "fifo"."""
    if abi not in ("2l", "fifo"):
        raise PlatformError(f"event channel ABI {abi!r}: there are two, 2l and fifo")
    return wire.PORTS_FIFO if abi == "fifo" else wire.PORTS_2L
