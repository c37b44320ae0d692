"""The hypervisor process: it makes domains, hands out descriptors and ports, and cleans up after the dead.

Single-threaded, in a selectors loop that it shares with the xenstore server. Nothing a client sends can raise
here: a request gets an answer with an errno, a client that does not read its answers is dropped.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import select
import selectors
import socket
import stat
from pathlib import Path

from pvdrivers.errors import PlatformError

from . import wire
from .domains import Domain
from .hypercalls import Answer, Connection, answer
from .ports import PortTable
from .xenstore import XenStoreServer

_log = logging.getLogger(__name__)
_HANGUP = select.POLLHUP | select.POLLRDHUP | select.POLLERR



class Hypervisor:
    """The embedded Xen of one run directory."""

    def __init__(self, run_dir: Path, *, memory_mib: int | None = None) -> None:
        """Raises PlatformError when the directory is not ours alone or another sim has it."""
        self.run_dir = run_dir
        _own_directory(run_dir)
        self._lock = _exclusive(run_dir / wire.LOCK)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // wire.PAGE
        self.pages_left = total if memory_mib is None else memory_mib * 256
        self.selector = selectors.DefaultSelector()
        self.domains: dict[int, Domain] = {}
        self.store = XenStoreServer(self.selector, domain_exists=self.domains.__contains__)
        self._dying: list[Domain] = []
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._hangups = select.poll()
        self.next_domid = 1
        self.next_handle = 1
        self.port_tables: dict[int, PortTable] = {}
        self._stopped = False
        # The signals of Python wake the selector by this pair.
        self._wake, waker = socket.socketpair()
        self._waker = waker
        for end in (self._wake, waker):
            end.setblocking(False)
        self.selector.register(self._wake, selectors.EVENT_READ, lambda mask: None)
        self.add(Domain(0, wire.DOM0_PAGES, wire.DEFAULT_GRANTS))
        self.domains[0].introduced = True
        self._listener = _listen(run_dir / wire.SOCKET)
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._accepting = True
        self.store.listen(run_dir / wire.STORE)
        for key, value in (("name", "Domain-0"), ("domid", "0")):  # as xen-init-dom0 does
            self.store.tree.write(f"/local/domain/0/{key}", value)

    # The loop

    def run(self) -> None:
        """Serve until stop() is called."""
        while not self._stopped:
            for key, mask in self.selector.select():
                key.data(mask)

    def stop(self) -> None:
        """End run(); may be called by a signal handler."""
        self._stopped = True
        try:
            self._waker.send(b"x")
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Drop everybody and remove the sockets."""
        self._listener.close()
        (self.run_dir / wire.SOCKET).unlink(missing_ok=True)
        for connection in list(self._connections.values()):
            connection.sock.close()
        self.store.close()
        for domain in self.everybody():
            domain.close()
        self.selector.close()
        self._wake.close()
        self._waker.close()
        os.close(self._lock)

    def _accept(self, mask: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as e:
            # Out of descriptors: the client waits in the backlog until somebody else has gone.
            _log.error("hypervisor: cannot accept a client: %s", e)
            self.selector.unregister(self._listener)
            self._accepting = False
            return
        sock.setblocking(False)
        connection = Connection(sock)
        self._connections[sock.fileno()] = connection
        self._hangups.register(sock.fileno(), _HANGUP)
        self.selector.register(sock, selectors.EVENT_READ, lambda mask: self._readable(connection))

    def _readable(self, connection: Connection) -> None:
        if connection.closed:
            return
        try:
            request = connection.sock.recv(wire.LARGEST_REQUEST + 1)
        except BlockingIOError:
            return
        except OSError:
            request = b""
        if not request:
            self.drop(connection)
            return
        self._send(connection, answer(self, connection, request))

    def _send(self, connection: Connection, result: Answer) -> None:
        try:
            if not connection.closed:
                message = wire.REPLY.pack(result.status, *result.values, *[0] * (7 - len(result.values)))
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", result.fds))]
                connection.sock.sendmsg([message + result.tail], rights if result.fds else [])
        except OSError:  # it does not read its answers, or is gone
            self.drop(connection)
        finally:
            for fd in result.passed_on:
                os.close(fd)

    def bury_the_dead(self) -> None:
        """Whoever has hung up by now is cleaned up now: a restarted backend finds its grefs and ports free."""
        for fd, _ in self._hangups.poll(0):
            if fd in self._connections:
                self.drop(self._connections[fd])

    # Coming and going

    def drop(self, connection: Connection) -> None:
        """A client is gone: undo what it had."""
        if connection.closed:
            return
        connection.closed = True
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._hangups.unregister(fd)
        self.selector.unregister(connection.sock)
        connection.sock.close()
        if not self._accepting:
            self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._accepting = True
        domain = connection.domain
        if domain is None:
            return
        for domid in connection.foreign:
            foreign = self.domains.get(domid)
            if foreign is not None:
                foreign.release_pins([connection.handle])
        for dead in self._dying:
            dead.release_pins([connection.handle])
        domain.ports.close_all(self.port_tables, connection.handle)
        domain.leave(connection.handle)
        if domain.domid and not domain.handles and not domain.dying:
            self.destroy(domain)
        self._dying = [d for d in self._dying if not self._gone(d)]

    def everybody(self) -> list[Domain]:
        """All domains, with those that are dying."""
        return [*self.domains.values(), *self._dying]

    def add(self, domain: Domain) -> None:
        """A new domain exists."""
        self.domains[domain.domid] = domain
        self.port_tables[domain.domid] = domain.ports

    def destroy(self, domain: Domain) -> None:
        """End a guest: its handles, its ports, its place in the store. Its memory stays while others map it."""
        domain.dying = True
        for connection in [c for c in self._connections.values() if c.domain is domain]:
            self.drop(connection)
        domain.ports.close_all(self.port_tables)
        del self.domains[domain.domid], self.port_tables[domain.domid]
        self.pages_left += domain.pages
        self.store.release(domain.domid)
        if not self._gone(domain):
            self._dying.append(domain)

    def _gone(self, domain: Domain) -> bool:
        if domain.mapped:
            return False
        domain.close()
        return True



def _own_directory(path: Path) -> None:
    """Make the run directory, or make sure that nobody else can put a socket into it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        st = os.stat(path)
    except OSError as e:
        raise PlatformError(f"run directory {path}: {e.strerror}") from e
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o022:
        raise PlatformError(
            f"run directory {path}: owner {st.st_uid}, mode {stat.S_IMODE(st.st_mode):04o}; it must belong to user"
            f" {os.geteuid()} and be writable by nobody else: chmod 700 it, or name another with --run-dir"
        )


def _exclusive(path: Path) -> int:
    """Lock the run directory for the life of this process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise PlatformError(
            f"run directory {path.parent}: an embedded Xen is running on it already; stop it, or name another"
            " with --run-dir"
        ) from e
    return fd


def _listen(path: Path) -> socket.socket:
    """The hypercall socket; one that a dead sim left behind is replaced (we hold the lock)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        os.chmod(path, 0o600)
        listener.listen(1024)
    except OSError as e:
        listener.close()
        raise PlatformError(f"hypercall socket {path}: {e.strerror or e}; a socket's path has at most 107 bytes") from e
    listener.setblocking(False)
    return listener
