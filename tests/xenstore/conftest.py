"""A store to test: stepped by hand (`stepped`), or served by a thread for the client (`served`)."""

from __future__ import annotations

import errno
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import xs_wire as wire
from pvdrivers.sim.xenstore import Quotas, XenStoreServer
from pvdrivers.xenstore import XenStoreClient


def heard(store: XenStoreClient, seconds: float) -> list[tuple[str, str]]:
    """The events of a client, as a loop takes them; [] if none comes in so many seconds."""
    deadline = time.monotonic() + seconds
    while not (events := store.events()) and (left := deadline - time.monotonic()) > 0:
        select.select([store.fileno()], [], [], left)
    return events


class Peer:
    """A raw client of a stepped store."""

    def __init__(self, store: Stepped, sock: socket.socket) -> None:
        self.store = store
        self.sock = sock
        self.events: list[tuple[bytes, bytes]] = []
        self.replies: list[wire.Message] = []
        self.gone = False
        self._buffer = b""
        sock.setblocking(False)

    def take(self) -> None:
        """Sorts what has arrived into replies and events."""
        while not self.gone:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self.gone = not data
            self._buffer += data
        while (found := wire.unpack(self._buffer)) is not None:
            message, end = found
            self._buffer = self._buffer[end:]
            if message.type == wire.XS_WATCH_EVENT:
                path, token = wire.split(message.payload)
                self.events.append((path, token))
            else:
                self.replies.append(message)

    def send(self, data: bytes) -> bool:
        """Sends bytes as they are; the store has its turn when the socket is full. False if it takes no more."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                if not self.store.step():
                    return False
            except (BrokenPipeError, ConnectionResetError):
                self.gone = True
                return False
        return True

    def ask(self, type_: int, *words: bytes, tx: int = 0) -> bytes | int:
        """The reply's payload, or the errno of an error. The last word of a WRITE goes without a NUL."""
        payload = wire.join(*words[:-1]) + words[-1] if type_ == wire.XS_WRITE else wire.join(*words)
        self.send(wire.pack(type_, 77, tx, payload))
        self.store.step()
        self.take()
        assert len(self.replies) == 1, (self.replies, self.gone)
        reply = self.replies.pop()
        assert (reply.req_id, reply.tx_id) == (77, tx)
        if reply.type == wire.XS_ERROR:
            return wire.error_number(reply.payload)
        assert reply.type == type_
        return reply.payload

    def read(self, path: bytes, tx: int = 0) -> bytes | int:
        return self.ask(wire.XS_READ, path, tx=tx)

    def write(self, path: bytes, value: bytes, tx: int = 0) -> bytes | int:
        return self.ask(wire.XS_WRITE, path, value, tx=tx)

    def begin(self) -> int:
        reply = self.ask(wire.XS_TRANSACTION_START, b"")
        assert isinstance(reply, bytes)
        return int(reply.rstrip(b"\0"))

    def end(self, tx: int, commit: bool = True) -> bytes | int:
        return self.ask(wire.XS_TRANSACTION_END, b"T" if commit else b"F", tx=tx)

    def heard(self) -> list[tuple[bytes, bytes]]:
        """Events since the last call."""
        self.store.step()
        self.take()
        events, self.events = self.events, []
        return events


class Stepped:
    """A server without a thread: it runs when it is told to."""

    def __init__(self, **options: Any) -> None:
        self.selector = selectors.DefaultSelector()
        self.server = XenStoreServer(self.selector, **options)
        self._socks: list[socket.socket] = []

    def step(self) -> bool:
        """Lets the server do all that it can do now; whether that was anything."""
        worked = False
        for _ in range(1000):
            ready = self.selector.select(0)
            if not ready:
                return worked
            for key, mask in ready:
                key.data(mask)
            worked = True
        raise AssertionError("the server is busy without end")

    def connect(self, domid: int = 0) -> Peer:
        """A new connection of a domain, which is introduced if it was not."""
        ours, theirs = socket.socketpair()
        self.server.introduce(domid)
        self.server.add_connection(theirs, domid)
        self._socks.append(ours)
        return Peer(self, ours)

    def guest(self, domid: int) -> Peer:
        """A connected guest with a directory of its own."""
        peer = self.connect(domid)
        self.server.tree.mkdir(f"/local/domain/{domid}")
        self.server.tree.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
        return peer

    def close(self) -> None:
        """Hypothesis uses one fixture for all examples, so those close what they opened. Twice is fine."""
        self.server.close()
        for sock in self._socks:
            sock.close()
        if self.selector.get_map() is None:
            return
        assert not self.selector.get_map(), "something was left registered"
        self.selector.close()


class Served:
    """A server in a thread, behind a socket file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.server = XenStoreServer(self.selector)
        self.server.listen(path)
        self._jobs: list[Callable[[], Any]] = []
        self._wake, self._woken = socket.socketpair()
        self.selector.register(self._woken, selectors.EVENT_READ, self._work)
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _work(self, _mask: int) -> None:
        for _ in self._woken.recv(100):
            self._jobs.pop(0)()

    def _run(self) -> None:
        while not self._stop:
            for key, mask in self.selector.select():
                key.data(mask)

    def call(self, job: Callable[[], Any]) -> Any:
        """Runs something in the server's thread."""
        done = threading.Event()
        result: list[Any] = []

        def work() -> None:
            try:
                result.append(job())
            finally:
                done.set()

        self._jobs.append(work)
        self._wake.send(b"x")
        assert done.wait(10)
        return result[0]

    def client(self) -> XenStoreClient:
        return XenStoreClient.connect(self.path, timeout=10)

    def guest(self, domid: int) -> XenStoreClient:
        ours, theirs = socket.socketpair()
        self.call(lambda: self.server.introduce(domid))
        self.call(lambda: self.server.add_connection(theirs, domid))
        return XenStoreClient(ours, timeout=10)

    def close(self) -> None:
        if self._thread.is_alive():

            def stop() -> None:
                self._stop = True
                self.server.close()

            self.call(stop)
            self._thread.join(10)
            self._wake.close()
            self._woken.close()
            self.selector.close()


@pytest.fixture
def stepped() -> Iterator[Stepped]:
    store = Stepped()
    yield store
    store.close()


@pytest.fixture
def new_store() -> Iterator[Callable[..., Stepped]]:
    """Makes stepped stores with options; they are closed and checked at the end."""
    stores: list[Stepped] = []

    def make(*, domain_exists: Callable[[int], bool] | None = None, **quotas: int) -> Stepped:
        stores.append(Stepped(quotas=Quotas(**quotas), domain_exists=domain_exists))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    store = Served(tmp_path / "s")
    yield store
    store.close()


@pytest.fixture
def refused() -> Callable[[str], int]:
    """errno by name, for comparing with Peer.ask()."""
    return lambda name: int(getattr(errno, name))
