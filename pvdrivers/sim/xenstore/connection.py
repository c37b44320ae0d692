"""One client's connection: bytes in, requests carried out, bytes out.

What a client can do to others is bounded here: a message that breaks the protocol ends its own connection; a
guest that does not read its replies, or whose events others do not read yet, is not read from until that
changes; events for a guest beyond its memory quota are dropped (as C xenstored does), and a dom0 client that
lets its output grow beyond Quotas.dom0_output is disconnected.
"""

from __future__ import annotations

import collections
import errno
import logging
import selectors
import socket
from typing import TYPE_CHECKING

from ...xs_wire import HEADER, HEADER_SIZE, PAYLOAD_MAX, XS_ERROR, error_payload
from . import domains as dom
from . import operations as op
from .permissions import Refused
from .quota import Domain
from .transactions import Transaction
from .tree import View
from .watches import Watch, event

if TYPE_CHECKING:
    from .server import XenStoreServer

_log = logging.getLogger(__name__)
_READ = selectors.EVENT_READ
_WRITE = selectors.EVENT_WRITE
_RECV_GUEST = HEADER_SIZE + PAYLOAD_MAX  # bounds what one guest gets done before it is another's turn
_RECV_DOM0 = 16384
_DOM0_UNREAD = 1 << 20  # bytes of output with which a dom0 client's further requests wait
_SEND_AT_ONCE = 64  # messages

_NO_TX = 1  # the request's tx_id is ignored
_DOM0 = 2  # guests get EACCES

# Indexed by XS_* number.
_OPERATIONS = (
    (dom.control, _DOM0),
    (op.directory, 0),
    (op.read, 0),
    (op.get_perms, 0),
    (op.watch, _NO_TX),
    (op.unwatch, _NO_TX),
    (op.transaction_start, 0),
    (op.transaction_end, 0),
    (dom.introduce, _DOM0),
    (dom.release, _DOM0),
    (dom.get_domain_path, 0),
    (op.write, 0),
    (op.mkdir, 0),
    (op.rm, 0),
    (op.set_perms, 0),
    None,  # WATCH_EVENT and ERROR are only ever sent
    None,
    (dom.is_domain_introduced, _DOM0),
    (dom.resume, _DOM0),
    (dom.set_target, _DOM0),
    None,
    (op.reset_watches, 0),
    (op.directory_part, 0),
)

# A message that waits to be sent; for an event also the key that finds duplicates, and who caused it.
Outgoing = tuple[bytes, bytes | None, Domain | None]


class Connection:
    """A client of `domain`; registered with the server's selector, `ready` being the data of the key."""

    def __init__(self, server: XenStoreServer, sock: socket.socket | None, domain: Domain) -> None:
        """`sock` None: the hypervisor process itself, which calls the operations directly."""
        self.server = server
        self.domain = domain
        self.privileged = domain.domid == 0
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self.first_event: tuple[bytes, bytes] | None = None  # of a watch just set, due behind its reply
        self.closed = False
        self._prefix = b"/local/domain/%d/" % domain.domid
        self._next_tx = 1
        self._sock = sock
        self._in = b""
        self._out: collections.deque[Outgoing] = collections.deque()
        self._out_bytes = 0
        self._sent = 0  # bytes of _out[0] that are gone already
        self._pending_events: set[bytes] = set()
        self._mask = 0
        self._recv_size = _RECV_DOM0 if self.privileged else _RECV_GUEST
        if sock is not None:
            sock.setblocking(False)
            self._update()

    def absolute(self, raw: bytes) -> bytes:
        """A path as sent, relative to the domain's own directory unless it begins with / or @."""
        return raw if raw[:1] in (b"/", b"@") else self._prefix + raw

    # Transactions

    def start_transaction(self) -> int:
        """Raises Refused(ENOSPC) over quota."""
        if not self.privileged and len(self.transactions) > self.server.quotas.transactions:
            raise Refused(errno.ENOSPC)
        while self._next_tx in self.transactions or not self._next_tx:
            self._next_tx = (self._next_tx + 1) & 0xFFFFFFFF
        tx = self._next_tx
        self._next_tx = (tx + 1) & 0xFFFFFFFF
        self.transactions[tx] = Transaction(self.server.nodes, self.domain, self.server.quotas)
        self.domain.transactions += 1
        return tx

    def end_transaction(self, transaction: Transaction) -> None:
        for tx, known in self.transactions.items():
            if known is transaction:
                del self.transactions[tx]
                break
        transaction.close()
        self.domain.transactions -= 1

    def drop_transactions(self) -> None:
        for transaction in list(self.transactions.values()):
            self.end_transaction(transaction)

    # Input

    def ready(self, mask: int) -> None:
        """The socket may be read or written; what the loop calls."""
        if self.closed:  # by another connection's request, in the same turn of the loop
            return
        if mask & _READ and not self._receive():
            self.close()
        else:
            self.server.busy = True
            self.carry_on()
            self.server.busy = False
        if self.server.dirty:
            self.server.flush()

    def _receive(self) -> bool:
        assert self._sock is not None
        try:
            data = self._sock.recv(self._recv_size)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._in = self._in + data if self._in else data
        return bool(data)

    def carry_on(self) -> None:
        """Carries out requests that have arrived, sends what is to be sent, and sees what to wait for."""
        try:
            if self._out:
                self._flush()
            # Replies that could be sent at once make room for more requests of what has been received.
            while self._in and not self.closed:
                left = len(self._in)
                if not self._requests():
                    domid = self.domain.domid
                    _log.warning("xenstore: domain %d announced an oversized message; disconnected", domid)
                    self.close()
                if self._out and not self.closed:
                    self._flush()
                if len(self._in) == left:
                    break
            if not self.closed:
                self._update()
        except Exception:  # a fault of ours, met by this client's request: the others go on
            _log.exception("xenstore: a request of domain %d failed; disconnected", self.domain.domid)
            self.close()

    def _requests(self) -> bool:
        """False if the client broke the protocol."""
        data, at, end = self._in, 0, len(self._in)
        unpack, out, domain = HEADER.unpack_from, self._out, self.domain
        while end - at >= HEADER_SIZE:
            if self._must_wait():
                break
            type_, req_id, tx_id, length = unpack(data, at)
            if length > PAYLOAD_MAX:
                return False
            begin = at + HEADER_SIZE
            at_next = begin + length
            if at_next > end:
                break
            at = at_next
            try:
                reply = self.request(type_, tx_id, data[begin:at])
            except Refused as e:
                type_ = XS_ERROR
                reply = error_payload(e.errno)
            if self.closed:  # it released its own domain
                return True
            message = HEADER.pack(type_, req_id, tx_id, len(reply)) + reply
            out.append((message, None, None))
            self._charge(len(message))
            domain.outstanding += 1
            if self.first_event is not None:
                (path, token), self.first_event = self.first_event, None
                self.queue_event(event(path, token), None)
        self._in = data[at:] if at < end else b""
        return True

    def _must_wait(self) -> bool:
        """Whether no more requests are taken until somebody reads."""
        if self.privileged:
            return self._out_bytes > _DOM0_UNREAD
        return self.domain.must_wait(self.server.quotas)

    def request(self, type_: int, tx_id: int, payload: bytes) -> bytes:
        """Carries out one request; its reply's payload. Raises Refused."""
        operation = _OPERATIONS[type_] if type_ < len(_OPERATIONS) else None
        if operation is None:
            raise Refused(errno.ENOSYS)
        function, flags = operation
        if flags & _DOM0 and not self.privileged:
            raise Refused(errno.EACCES)
        view: View = self.server.nodes
        if tx_id and not flags & _NO_TX:
            transaction = self.transactions.get(tx_id)
            if transaction is None:
                raise Refused(errno.ENOENT)
            view = transaction
        return function(self, view, payload)

    # Output

    def queue_event(self, message: bytes, cause: Domain | None) -> None:
        """Queues a WATCH_EVENT; one that waits already is not queued again (special ones are)."""
        if self.closed or not message:
            return
        special = message[HEADER_SIZE : HEADER_SIZE + 1] == b"@"
        if message in self._pending_events and not special:
            return
        if not self.privileged:
            if self.domain.memory + len(message) > self.server.quotas.memory:
                return
        elif self._out_bytes + len(message) > self.server.quotas.dom0_output:
            _log.error("xenstore: a dom0 client does not read its events; disconnected")
            self.server.doomed.add(self)
            self.server.dirty.add(self)
            return
        self._pending_events.add(message)
        self._out.append((message, message, cause))
        self._charge(len(message))
        if cause is not None:
            cause.caused += 1
        self.server.dirty.add(self)

    def _charge(self, size: int) -> None:
        self._out_bytes += size
        self.domain.memory += size

    def _flush(self) -> None:
        """Sends what the socket takes."""
        out, sock = self._out, self._sock
        assert sock is not None
        while out:
            if len(out) == 1 and not self._sent:
                data = out[0][0]
            else:
                messages = [out[i][0] for i in range(min(len(out), _SEND_AT_ONCE))]
                data = b"".join(messages)[self._sent :]
            try:
                sent = sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._gone(sent)
            if sent < len(data):
                return

    def _gone(self, sent: int) -> None:
        """Forgets messages as far as they are sent."""
        out = self._out
        sent += self._sent
        while out and sent >= len(out[0][0]):
            message = out.popleft()
            sent -= len(message[0])
            self._forget(message)
        self._sent = sent

    def _forget(self, message: Outgoing) -> None:
        data, key, cause = message
        if key is None:
            self.domain.outstanding -= 1
        else:
            self._pending_events.discard(key)
            if cause is not None:
                cause.caused -= 1
                if cause.waiting:
                    self.server.wake(cause)
        self._charge(-len(data))
        if self.domain.waiting:
            self.server.wake(self.domain)

    def _update(self) -> None:
        """Registers for what can happen next."""
        waits = self._must_wait()
        if waits and not self.privileged:
            self.domain.waiting = True
        mask = (0 if waits else _READ) | (_WRITE if self._out else 0)
        if mask == self._mask:
            return
        assert self._sock is not None
        selector = self.server.selector
        if not self._mask:
            selector.register(self._sock, mask, self.ready)
        elif not mask:
            selector.unregister(self._sock)
        else:
            selector.modify(self._sock, mask, self.ready)
        self._mask = mask

    def reset(self) -> None:
        """As if newly connected: the domain was introduced again."""
        self.server.watches.remove_all(self)
        self.drop_transactions()

    def close(self) -> None:
        """Ends the connection; its watches and transactions are gone. Harmless a second time."""
        if self.closed:
            return
        self.closed = True
        if self._sock is not None:
            if self._mask:
                self.server.selector.unregister(self._sock)
            self._sock.close()
        self.reset()
        self._in = b""
        while self._out:
            self._forget(self._out.popleft())
        self._pending_events.clear()
        self.server.closed(self)
