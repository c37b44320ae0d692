"""The store's server: who is connected, which domains there are, and what happens when one comes or goes.

Single-threaded, inside somebody else's selectors loop: every key that it registers has a callable as its
data, which the owner of the loop calls with the mask.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Callable

from .connection import Connection
from .direct import DirectStore
from .listener import Listener, XenStoreServerError
from .operations import remove_subtree
from .permissions import IGNORE, Perms, Refused
from .quota import Domain, Quotas
from .tree import Tree
from .watches import INTRODUCE, RELEASE, Watches

__all__ = ["XenStoreServer", "XenStoreServerError"]

_ACCEPT_AT_ONCE = 16


class XenStoreServer:
    """One store. `tree` is its direct interface for the process that it runs in."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        quotas: Quotas | None = None,
        domain_exists: Callable[[int], bool] | None = None,
    ) -> None:
        """`domain_exists` says whether Xen knows a domain; without it every domid is believed."""
        self.selector = selector
        self.quotas = quotas or Quotas()
        self.domain_exists = domain_exists
        self.nodes = Tree()
        self.watches = Watches(self.nodes)
        self.domains: dict[int, Domain] = {0: Domain(0)}
        self.dirty: set[Connection] = set()  # has something to do because of others
        self.doomed: set[Connection] = set()  # to be closed when the request under way is done
        self._connections: set[Connection] = set()
        self._listeners: list[Listener] = []
        self.busy = False  # a request is under way: what it leads to for others comes behind it
        self._self = Connection(self, None, self.domains[0])
        self.tree = DirectStore(self._self)

    # Connections

    def listen(self, path: str | os.PathLike[str]) -> None:
        """Accepts clients, all of them dom0, at a unix socket. Raises XenStoreServerError, OSError."""
        listener = Listener(path)
        self._listeners.append(listener)
        self.selector.register(listener.sock, selectors.EVENT_READ, lambda _mask: self._accept(listener))

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            sock = listener.accept()
            if sock is None:
                return
            self._connections.add(Connection(self, sock, self.domains[0]))

    def add_connection(self, sock: socket.socket, domid: int) -> None:
        """Serves a connected stream socket of a domain that somebody has authenticated.

        Raises XenStoreServerError(ENOENT) when the domain has not been introduced.
        """
        domain = self.domains.get(domid)
        if domain is None:
            raise XenStoreServerError(errno.ENOENT, f"domain {domid} has not been introduced to xenstore")
        self._connections.add(Connection(self, sock, domain))

    def closed(self, conn: Connection) -> None:
        """A connection has ended."""
        self._connections.discard(conn)
        self.dirty.discard(conn)

    def flush(self) -> None:
        """Sends what requests have queued for others, and does what that makes possible or necessary."""
        if self.busy:
            return
        self.busy = True
        try:
            while self.dirty or self.doomed:
                while self.doomed:
                    self.doomed.pop().close()
                if self.dirty:
                    conn = self.dirty.pop()
                    if not conn.closed:
                        conn.carry_on()
        finally:
            self.busy = False

    def wake(self, domain: Domain) -> None:
        """What a guest waits for has been read: it goes on as soon as it is within its quotas."""
        if not domain.must_wait(self.quotas):
            domain.waiting = False
            for conn in self._connections:
                if conn.domain is domain:
                    self.dirty.add(conn)

    # Domains

    def introduce(self, domid: int) -> None:
        """From now on the domain may connect. A second time resets its watches and transactions."""
        if domid in self.domains:
            for conn in self._connections:
                if conn.domain.domid == domid and domid:
                    conn.reset()
            return
        self.domains[domid] = Domain(domid)
        self.watches.fire_special(INTRODUCE, domid)
        self.flush()

    def release(self, domid: int) -> None:
        """The domain is gone: so are its connections, what it owns, and its part in others' permissions.

        Works for a domid that was never introduced, too: nodes may have been made for it. Raises ValueError
        for dom0.
        """
        if domid == 0:
            raise ValueError("dom0 cannot be released")
        known = self.domains.pop(domid, None)
        for conn in list(self._connections):
            if conn.domain.domid == domid:
                conn.close()
            else:
                conn.domain.domids.discard(domid)
                for transaction in conn.transactions.values():
                    transaction.domain_gone(domid)
        for path in self.nodes.forget_domain(domid):
            remove_subtree(self._self, self.nodes, path)
        self.watches.forget_domain(domid)
        if known is not None:
            self.watches.fire_special(RELEASE, domid)
        self.flush()

    def existing_only(self, perms: Perms) -> Perms:
        """Permissions without effect for domains that do not exist; Refused(ENOENT) for such an owner."""
        exists = self.domain_exists
        if exists is None:
            return perms
        if perms[0][0] and not exists(perms[0][0]):
            raise Refused(errno.ENOENT)
        return tuple((d, bits if not d or exists(d) else bits | IGNORE) for d, bits in perms)

    def close(self) -> None:
        """Ends all connections and removes the sockets. Harmless a second time."""
        for listener in self._listeners:
            self.selector.unregister(listener.sock)
            listener.close()
        self._listeners.clear()
        for conn in list(self._connections):
            conn.close()
