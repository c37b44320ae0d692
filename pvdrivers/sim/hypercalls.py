"""What the hypervisor does for each hypercall: one function for each operation of wire.py."""

from __future__ import annotations

import errno
import hmac
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import wire
from .domains import Domain, DomainError
from .ports import PortError

if TYPE_CHECKING:
    from .hypervisor import Hypervisor

_MOST_HANDLES_OF_A_GUEST = 256


class Connection:
    """A client; once it has said hello, a handle of a domain."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.handle = 0
        self.domain: Domain | None = None
        self.limit = wire.PORTS_2L
        self.foreign: set[int] = set()
        self.closed = False


@dataclass
class Answer:
    """What goes back. Descriptors in `passed_on` are closed here once they are sent."""

    status: int = 0
    values: list[int] = field(default_factory=list)
    tail: bytes = b""
    fds: list[int] = field(default_factory=list)
    passed_on: list[int] = field(default_factory=list)


class Refusal(Exception):
    """The answer is -errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def answer(xen: Hypervisor, client: Connection, request: bytes) -> Answer:
    """Carry out one request, whatever its bytes are."""
    try:
        if not wire.REQUEST.size <= len(request) <= wire.LARGEST_REQUEST:
            raise Refusal(errno.EMSGSIZE)
        op, *args = wire.REQUEST.unpack_from(request)
        if op == wire.HELLO:
            return _hello(xen, client, args, request[wire.REQUEST.size :])
        if client.domain is None:
            raise Refusal(errno.EPERM)
        if op not in _OPERATIONS:
            raise Refusal(errno.ENOSYS)
        return _OPERATIONS[op](xen, client, client.domain, args)
    except (Refusal, PortError, DomainError) as refused:
        return Answer(-refused.errno)


def _hello(xen: Hypervisor, client: Connection, args: list[int], token: bytes) -> Answer:
    version, domid, flags, limit, *_ = args
    if client.domain is not None:
        raise Refusal(errno.EISCONN)
    if version != wire.VERSION:
        raise Refusal(errno.EPROTONOSUPPORT)
    if limit not in (wire.PORTS_2L, wire.PORTS_FIFO) or flags & ~(wire.WANT_MEMORY | wire.WANT_STORE):
        raise Refusal(errno.EINVAL)
    xen.bury_the_dead()
    domain = xen.domains.get(domid)
    if domain is None:
        raise Refusal(errno.ESRCH)
    if domid and not hmac.compare_digest(token, domain.token):
        raise Refusal(errno.EACCES)
    if domid and len(domain.handles) >= _MOST_HANDLES_OF_A_GUEST:
        raise Refusal(errno.EUSERS)
    if xen.next_handle > wire.MOST_HANDLES:
        raise Refusal(errno.ENOSPC)
    result = Answer()
    if flags & wire.WANT_MEMORY:
        result.fds += [domain.memory_fd, domain.grants_fd]
    if flags & wire.WANT_STORE:
        ours, theirs = socket.socketpair()
        result.passed_on.append(theirs.detach())
        result.fds += result.passed_on
        if not domain.introduced:
            xen.store.introduce(domid)
            domain.introduced = True
        xen.store.add_connection(ours, domid)
    client.domain, client.limit, client.handle = domain, limit, xen.next_handle
    xen.next_handle += 1
    domain.handles.add(client.handle)
    result.values = [client.handle, domain.pages, domain.grants, limit]
    return result


def _create_domain(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    _privileged(caller)
    pages, grants = args[0], args[1] or wire.DEFAULT_GRANTS
    if pages > xen.pages_left:
        raise Refusal(errno.ENOMEM)
    if xen.next_domid >= wire.DOMID_FIRST_RESERVED:  # a domid is not used twice: nobody can mean an older one
        raise Refusal(errno.ENOSPC)
    domain = Domain(xen.next_domid, pages, grants)
    xen.next_domid += 1
    xen.pages_left -= pages
    xen.add(domain)
    return Answer(0, [domain.domid], domain.token + domain.uuid.encode())


def _destroy_domain(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    _privileged(caller)
    if args[0] == 0:
        raise Refusal(errno.EINVAL)
    xen.destroy(_existing(xen, args[0]))
    return Answer()


def _list_domains(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    _privileged(caller)
    room = (wire.LARGEST_REPLY - wire.REPLY.size) // wire.DOMAIN_RECORD.size
    found = sorted((d for d in xen.everybody() if d.domid >= args[0]), key=lambda d: d.domid)[:room]
    tail = b"".join(
        wire.DOMAIN_RECORD.pack(d.domid, _flags(d), d.pages, len(d.handles), d.uuid.encode()) for d in found
    )
    return Answer(0, [len(found)], tail)


def _domain_info(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    domain = caller if args[0] == wire.DOMID_SELF else _existing(xen, args[0])
    return Answer(0, [domain.pages, domain.grants, _flags(domain)], domain.uuid.encode())


def _foreign(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    domain = _existing(xen, args[0])
    # A domain that is not dom0 gets the memory of one that has granted it something, all of it: what keeps it
    # to the granted pages is its own library. Between guests that must not trust each other use real Xen.
    if caller.domid and not domain.names(caller.domid):
        raise Refusal(errno.EACCES)
    client.foreign.add(domain.domid)
    return Answer(0, [domain.pages, domain.grants], b"", [domain.memory_fd, domain.grants_fd, domain.active_fd])


def _claim_frames(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    return _claimed(caller.claim_frames(client.handle, args[0]))


def _claim_grefs(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    return _claimed(caller.claim_grefs(client.handle, args[0]))


def _claimed(first: int) -> Answer:
    if first < 0:
        raise Refusal(errno.ENOSPC)
    return Answer(0, [first])


def _alloc_unbound(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    remote = caller.domid if args[0] == wire.DOMID_SELF else args[0]
    if remote >= wire.DOMID_FIRST_RESERVED:
        raise Refusal(errno.ESRCH)
    return Answer(0, [caller.ports.alloc_unbound(client.handle, remote, client.limit)])


def _bind_interdomain(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    remote = caller if args[0] == wire.DOMID_SELF else _existing(xen, args[0])
    return Answer(0, [caller.ports.bind_interdomain(client.handle, remote.ports, args[1], client.limit)])


def _close(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    caller.ports.owned(client.handle, args[0])
    caller.ports.close(args[0], xen.port_tables)
    return Answer()


def _status(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    domain = caller if args[0] == wire.DOMID_SELF else _existing(xen, args[0])
    if domain is not caller:
        _privileged(caller)
    return Answer(0, list(domain.ports.status(args[1])))


def _eventfds(xen: Hypervisor, client: Connection, caller: Domain, args: list[int]) -> Answer:
    return Answer(0, [], b"", list(caller.ports.eventfds(client.handle, args[0])))


def _privileged(caller: Domain) -> None:
    if caller.domid:
        raise Refusal(errno.EPERM)


def _existing(xen: Hypervisor, domid: int) -> Domain:
    domain = xen.domains.get(domid)
    if domain is None:
        raise Refusal(errno.ESRCH)
    return domain


def _flags(domain: Domain) -> int:
    return wire.DOMAIN_DYING if domain.dying else 0


_OPERATIONS: dict[int, Callable[[Hypervisor, Connection, Domain, list[int]], Answer]] = {
    wire.CREATE_DOMAIN: _create_domain,
    wire.DESTROY_DOMAIN: _destroy_domain,
    wire.LIST_DOMAINS: _list_domains,
    wire.DOMAIN_INFO: _domain_info,
    wire.FOREIGN: _foreign,
    wire.CLAIM_FRAMES: _claim_frames,
    wire.CLAIM_GREFS: _claim_grefs,
    wire.EVTCHN_ALLOC_UNBOUND: _alloc_unbound,
    wire.EVTCHN_BIND_INTERDOMAIN: _bind_interdomain,
    wire.EVTCHN_CLOSE: _close,
    wire.EVTCHN_STATUS: _status,
    wire.EVTCHN_FDS: _eventfds,
}
