"""Event channel ports as the hypervisor knows them: who owns which, and which is bound to which.

The rules are those of xen/common/event_channel.c. A signal is not delivered here: the two ends of a channel share
a pair of eventfds, made when one of them first asks, and the receiving process does Xen's delivery into event
memory of its own. The pair stays with the channel until both ends are closed, so that a restarted backend that
binds the same remote port gets the same pair and the other end notices nothing.
"""

from __future__ import annotations

import errno
import heapq
import os
from dataclasses import dataclass, field

from .wire import EVTCHNSTAT_closed, EVTCHNSTAT_interdomain, EVTCHNSTAT_unbound


class PortError(Exception):
    """A refused event channel operation: a positive errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


@dataclass
class Channel:
    """What two ends share: eventfds[side] is the one that end `side` waits on."""

    eventfds: tuple[int, int] | None = None
    ends: int = 0

    def pair(self) -> tuple[int, int]:
        """The eventfds, made now if this is the first request. Raises PortError(EMFILE)."""
        if self.eventfds is None:
            try:
                one = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as e:
                raise PortError(e.errno or errno.EMFILE) from e
            try:
                self.eventfds = (one, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            except OSError as e:
                os.close(one)
                raise PortError(e.errno or errno.EMFILE) from e
        return self.eventfds

    def leave(self) -> None:
        """One end is closed; the last one takes the eventfds with it."""
        self.ends -= 1
        if self.ends == 0 and self.eventfds is not None:
            for fd in self.eventfds:
                os.close(fd)
            self.eventfds = None


@dataclass
class Port:
    """One port of a domain. `remote_port` is 0 while it is unbound."""

    handle: int
    remote_domid: int
    remote_port: int
    channel: Channel
    side: int


@dataclass
class PortTable:
    """The ports of one domain; 0 is never used."""

    domid: int
    ports: dict[int, Port] = field(default_factory=dict)
    _freed: list[int] = field(default_factory=list)
    _next: int = 1

    def _add(self, port: Port, limit: int) -> int:
        number = heapq.heappop(self._freed) if self._freed else self._next
        if number >= limit:
            if number != self._next:
                heapq.heappush(self._freed, number)
            raise PortError(errno.ENOSPC)
        self._next = max(self._next, number + 1)
        self.ports[number] = port
        port.channel.ends += 1
        return number

    def alloc_unbound(self, handle: int, remote_domid: int, limit: int) -> int:
        """EVTCHNOP_alloc_unbound: a port that `remote_domid` may bind. ENOSPC at the ABI's limit."""
        return self._add(Port(handle, remote_domid, 0, Channel(), 0), limit)

    def bind_interdomain(self, handle: int, remote: PortTable, remote_port: int, limit: int) -> int:
        """EVTCHNOP_bind_interdomain. EINVAL if the remote port is not unbound, or waits for another domain."""
        other = remote.ports.get(remote_port)
        if other is None or other.remote_port or other.remote_domid != self.domid:
            raise PortError(errno.EINVAL)
        number = self._add(Port(handle, remote.domid, remote_port, other.channel, 1 - other.side), limit)
        other.remote_port = number
        return number

    def owned(self, handle: int, number: int) -> Port:
        """A port of this handle. ENOENT if there is none, EPERM if it is another's."""
        port = self.ports.get(number)
        if port is None:
            raise PortError(errno.ENOENT)
        if port.handle != handle:
            raise PortError(errno.EPERM)
        return port

    def close(self, number: int, tables: dict[int, PortTable]) -> None:
        """EVTCHNOP_close: the other end, if there is one, is unbound again and waits for this domain."""
        port = self.ports.pop(number)
        heapq.heappush(self._freed, number)
        if port.remote_port:
            tables[port.remote_domid].ports[port.remote_port].remote_port = 0
        port.channel.leave()

    def close_all(self, tables: dict[int, PortTable], handle: int | None = None) -> None:
        """Close the ports of one handle, or all of them."""
        for number in [n for n, p in self.ports.items() if handle is None or p.handle == handle]:
            self.close(number, tables)

    def status(self, number: int) -> tuple[int, int, int]:
        """EVTCHNOP_status: (EVTCHNSTAT_*, remote domid, remote port)."""
        port = self.ports.get(number)
        if port is None:
            return EVTCHNSTAT_closed, 0, 0
        state = EVTCHNSTAT_interdomain if port.remote_port else EVTCHNSTAT_unbound
        return state, port.remote_domid, port.remote_port

    def eventfds(self, handle: int, number: int) -> tuple[int, int]:
        """(the eventfd to notify with, the eventfd to wait on) of a port of this handle."""
        port = self.owned(handle, number)
        pair = port.channel.pair()
        return pair[1 - port.side], pair[port.side]
