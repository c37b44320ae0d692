"""/dev/xen/xenbus without Xen: a terminal is a character device, too, and carries the protocol to the embedded store.

What Linux's device does otherwise than a socket is done to the client's write(2): a WATCH that xenstored refuses
is the error of that call, and there is no reply (drivers/xen/xenbus/xenbus_dev_frontend.c, xenbus_write_watch).
"""

from __future__ import annotations

import os
import socket
import threading
import tty
from contextlib import ExitStack
from typing import Any

import pytest

from pvdrivers import xs_wire as wire
from pvdrivers.xenstore import XenStoreClient


class XenbusDevice:
    """A domain's device, opened by connect(); each client may have so many watches."""

    def __init__(self, served: Any, domid: int, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watches = 1 << 30
        self.refusal = 0
        """The errno of the watch that is one too many."""
        self._served, self._domid, self._stack = served, domid, stack
        self._counts: dict[int, int] = {}
        self._write = os.write
        monkeypatch.setattr(os, "write", self._as_linux)

    def _as_linux(self, fd: int, data: Any) -> int:
        if fd in self._counts:
            kind = wire.HEADER.unpack(bytes(data[: wire.HEADER.size]))[0]
            if kind == wire.XS_WATCH and self._counts[fd] >= self.watches:
                raise OSError(self.refusal, os.strerror(self.refusal))
            self._counts[fd] += (kind == wire.XS_WATCH) - (kind == wire.XS_UNWATCH)
        return self._write(fd, data)

    def connect(self) -> XenStoreClient:
        """Open it."""
        ours, theirs = socket.socketpair()
        self._served.call(lambda: self._served.server.introduce(self._domid))
        self._served.call(lambda: self._served.server.add_connection(theirs, self._domid))
        master, slave = os.openpty()
        tty.setraw(slave)
        threads = [
            threading.Thread(target=self._carry, args=(lambda: os.read(master, 65536), ours.sendall, ours)),
            threading.Thread(target=self._carry, args=(lambda: ours.recv(65536), self._put(master), ours)),
        ]
        for thread in threads:
            thread.start()
        self._counts[slave] = 0
        client = XenStoreClient(slave, timeout=10)

        def close() -> None:
            self._counts.pop(slave, None)
            client.close()
            for thread in threads:
                thread.join(10)
            ours.close()
            os.close(master)

        self._stack.callback(close)
        return client

    def _put(self, master: int) -> Any:
        def put(data: bytes) -> None:
            while data:
                data = data[self._write(master, data) :]

        return put

    @staticmethod
    def _carry(take: Any, put: Any, sock: socket.socket) -> None:
        try:
            while data := take():
                put(data)
        except OSError:  # EIO: the other end of the terminal is closed
            pass
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
