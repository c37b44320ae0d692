"""The xenstore client: the same one on the embedded Xen and on real Xen.

It speaks the socket protocol of docs/misc/xenstore.txt over any stream that carries it: xenstored's unix
socket, the embedded Xen's, or the kernel's /dev/xen/xenbus. Requests are synchronous; watch events that
arrive while a reply is awaited are queued and make `fileno()` readable, so a program may wait for it in its
own loop.
"""

from __future__ import annotations

import collections
import errno
import os
import random
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self, TypeVar

from . import xs_wire as wire
from .closing import Closing
from .xs_domains import DomainRequests
from .xs_wire import HEADER, PAYLOAD_MAX, XenStoreError

__all__ = ["XenStoreClient", "XenStoreError", "default_path"]

T = TypeVar("T")

_RECV = 65536
_LIST_TRIES = 100
_DEVICE_GONE = {errno.EBADF, errno.EIO, errno.ENODEV, errno.ENXIO, errno.EPIPE, errno.ECONNRESET}


def _path(operation: str, path: str) -> bytes:
    raw = path.encode()
    if not raw or b"\0" in raw:
        raise XenStoreError(errno.EINVAL, operation, path, "a path is not empty and has no NUL")
    return raw + b"\0"


class XenStoreClient(DomainRequests, Closing):
    """One connection to xenstore. Safe to share between threads; one request at a time is under way."""

    def __init__(self, sock: socket.socket | int, *, timeout: float = 30.0) -> None:
        """Takes over `sock`: a connected stream socket, or a descriptor of one or of /dev/xen/xenbus."""
        self._fd = sock if isinstance(sock, int) else sock.detach()
        self.timeout = timeout
        """Seconds to wait for a reply before the connection is given up."""
        self._lock = threading.RLock()
        self._turn = threading.RLock()  # taken before _lock, if at all
        self._buffer = bytearray()
        self._events: collections.deque[tuple[str, str]] = collections.deque()
        self._req_id = 0
        self._broken = ""
        self._is_device = stat.S_ISCHR(os.fstat(self._fd).st_mode)
        os.set_blocking(self._fd, False)
        self._poll_in = select.poll()
        self._poll_in.register(self._fd, select.POLLIN)
        # An event queued during a request leaves nothing to read on the socket: the eventfd stands for it.
        self._queued = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._fd, select.EPOLLIN)
        self._epoll.register(self._queued, select.EPOLLIN)

    @classmethod
    def connect(cls, path: str | Path, *, timeout: float = 30.0) -> Self:
        """Connects to a unix socket, or opens a xenbus character device. Raises XenStoreError(CONNECT)."""
        name = os.fspath(path)
        try:
            if stat.S_ISCHR(os.stat(name).st_mode):
                return cls(os.open(name, os.O_RDWR | os.O_CLOEXEC), timeout=timeout)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout)
                sock.connect(name)
            except BaseException:
                sock.close()
                raise
        except OSError as e:
            number = e.errno or (errno.ETIMEDOUT if isinstance(e, TimeoutError) else errno.EINVAL)
            detail = f"{e.strerror or e}; is xenstored (or the embedded Xen) running, and is this its socket?"
            raise XenStoreError(number, "CONNECT", name, detail) from e
        return cls(sock, timeout=timeout)

    def fileno(self) -> int:
        """Readable while there is an event to take with events(), or the connection is lost."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Drops the connection, and with it its watches and transactions. Harmless a second time."""
        with self._lock:
            if self._fd >= 0:
                self._epoll.close()
                os.close(self._queued)
                os.close(self._fd)
                self._fd = -1
                self._broken = self._broken or "the connection was closed by this program"

    def _lost(self, number: int, operation: str, path: str, why: str) -> XenStoreError:
        self._broken = self._broken or why
        return XenStoreError(number, operation, path, self._broken)

    def _gone(self, operation: str, path: str, e: OSError) -> XenStoreError:
        why = f"the connection to xenstored is lost ({e.strerror})"
        return self._lost(errno.ECONNRESET, operation, path, why)

    def _send(self, message: bytes, deadline: float, operation: str, path: str) -> None:
        view = memoryview(message)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    why = "xenstored takes no requests"
                    raise self._lost(errno.ETIMEDOUT, operation, path, why) from None
            except OSError as e:
                if self._is_device and e.errno not in _DEVICE_GONE:
                    # Linux answers WATCH itself, and a refusal (a quota) is what write(2) returns: the message is
                    # dropped whole, no reply comes, and the next one begins afresh (xenbus_dev_frontend.c).
                    raise XenStoreError(e.errno or errno.EINVAL, operation, path) from e
                lost = self._gone(operation, path, e)
                self._take_rest()
                raise lost from e

    def _take_rest(self) -> None:
        """Events that came before the connection was lost can still be had."""
        try:
            while data := os.read(self._fd, _RECV):
                self._buffer += data
        except OSError:
            pass
        try:
            while self._next("EVENTS", "") is not None:
                pass
        except XenStoreError:
            pass

    def _receive(self, operation: str, path: str) -> bool:
        """Takes in what is there; False if there is nothing yet."""
        try:
            data = os.read(self._fd, _RECV)
        except BlockingIOError:
            return False
        except OSError as e:
            raise self._gone(operation, path, e) from e
        if not data:
            raise self._lost(errno.ECONNRESET, operation, path, "xenstored closed the connection")
        self._buffer += data
        return True

    def _next(self, operation: str, path: str) -> wire.Message | None:
        """The next reply in the buffer, None if there is no whole one; events on the way are queued."""
        while True:
            try:
                found = wire.unpack(self._buffer)
            except wire.WireError as e:
                raise self._lost(errno.EPROTO, operation, path, f"not the xenstore protocol: {e}") from e
            if found is None:
                return None
            message, end = found
            del self._buffer[:end]
            if message.type != wire.XS_WATCH_EVENT:
                return message
            fields = wire.split(message.payload)
            if len(fields) < 2:
                raise self._lost(errno.EPROTO, operation, path, "a watch event without path and token")
            if not self._events:
                os.eventfd_write(self._queued, 1)
            self._events.append((fields[0].decode(errors="replace"), fields[1].decode(errors="replace")))

    def _talk(self, type_: int, payload: bytes, path: str = "", tx: int = 0) -> bytes:
        operation = wire.TYPE_NAMES[type_]
        if len(payload) > PAYLOAD_MAX:
            raise XenStoreError(errno.E2BIG, operation, path, f"{len(payload)} bytes, a message holds {PAYLOAD_MAX}")
        with self._lock:
            if self._broken:
                raise XenStoreError(errno.ECONNRESET, operation, path, self._broken)
            deadline = time.monotonic() + self.timeout
            self._req_id = req_id = (self._req_id + 1) & 0xFFFFFFFF
            self._send(HEADER.pack(type_, req_id, tx, len(payload)) + payload, deadline, operation, path)
            while (reply := self._next(operation, path)) is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._poll_in.poll(left * 1000):
                    # A late reply would be taken for the answer to the next request.
                    why = f"no reply within {self.timeout:g} s, the connection is given up"
                    raise self._lost(errno.ETIMEDOUT, operation, path, why)
                self._receive(operation, path)
            if reply.req_id != req_id or reply.type not in (type_, wire.XS_ERROR):
                raise self._lost(errno.EPROTO, operation, path, "a reply to something that was not asked")
            # An event behind the reply leaves nothing to read on the socket: it is queued now.
            if self._next(operation, path) is not None:
                raise self._lost(errno.EPROTO, operation, path, "two replies to one request")
        if reply.type == wire.XS_ERROR:
            raise XenStoreError(wire.error_number(reply.payload), operation, path)
        return reply.payload

    # Nodes

    def read(self, path: str, tx: int = 0) -> bytes | None:
        """The value of a node, None if there is no such node."""
        try:
            return self._talk(wire.XS_READ, _path("READ", path), path, tx)
        except XenStoreError as e:
            if e.errno == errno.ENOENT:
                return None
            raise

    def write(self, path: str, value: bytes | str | int, tx: int = 0) -> None:
        """Sets a value; the node and missing parents are created."""
        raw = value if isinstance(value, bytes) else str(value).encode()
        self._talk(wire.XS_WRITE, _path("WRITE", path) + raw, path, tx)

    def mkdir(self, path: str, tx: int = 0) -> None:
        """Makes sure that a node is there; its value stays if it is."""
        self._talk(wire.XS_MKDIR, _path("MKDIR", path), path, tx)

    def rm(self, path: str, tx: int = 0) -> None:
        """Removes a node and all below it. That it (or its parent) is not there is fine."""
        try:
            self._talk(wire.XS_RM, _path("RM", path), path, tx)
        except XenStoreError as e:
            if e.errno != errno.ENOENT:
                raise

    def ls(self, path: str, tx: int = 0) -> list[str] | None:
        """Names of a node's children, None if there is no such node; any number of them."""
        raw = _path("DIRECTORY", path)
        try:
            return [name.decode() for name in wire.split(self._talk(wire.XS_DIRECTORY, raw, path, tx))]
        except XenStoreError as e:
            if e.errno == errno.ENOENT:
                return None
            if e.errno != errno.E2BIG:
                raise
        return self._ls_parts(raw, path, tx)

    def _ls_parts(self, raw: bytes, path: str, tx: int) -> list[str] | None:
        for _ in range(_LIST_TRIES):
            data = b""
            generation: bytes | None = None
            while True:
                try:
                    reply = self._talk(wire.XS_DIRECTORY_PART, raw + b"%d\0" % len(data), path, tx)
                except XenStoreError as e:
                    if e.errno == errno.ENOENT:
                        return None
                    raise
                now, _, part = reply.partition(b"\0")
                if generation is not None and now != generation:
                    break  # the list changed between two parts: begin again
                generation = now
                if part == b"\0" or part.endswith(b"\0\0"):  # the empty string ends the list
                    return [name.decode() for name in wire.split(data + part[:-1])]
                if not part:
                    raise XenStoreError(errno.EPROTO, "DIRECTORY_PART", path, "an empty part of the list")
                data += part
        raise XenStoreError(errno.EAGAIN, "DIRECTORY_PART", path, "the list keeps changing while it is read")

    def get_perms(self, path: str, tx: int = 0) -> list[str]:
        """Permissions as "n0", "r5", ...: the first names the owner and what everybody else may do."""
        reply = self._talk(wire.XS_GET_PERMS, _path("GET_PERMS", path), path, tx)
        return [word.decode() for word in wire.split(reply)]

    def set_perms(self, path: str, perms: Sequence[str], tx: int = 0) -> None:
        """Replaces permissions: a letter of n, r, w, b and a domid each; see get_perms()."""
        payload = _path("SET_PERMS", path) + b"".join(p.encode() + b"\0" for p in perms)
        self._talk(wire.XS_SET_PERMS, payload, path, tx)

    # Watches

    def watch(self, path: str, token: str) -> None:
        """Reports changes at and below `path`, under `token`, in events(); once at once."""
        self._talk(wire.XS_WATCH, _path("WATCH", path) + token.encode() + b"\0", path)

    def unwatch(self, path: str, token: str) -> None:
        """Ends a watch. An event that was under way may still be delivered."""
        self._talk(wire.XS_UNWATCH, _path("UNWATCH", path) + token.encode() + b"\0", path)

    def events(self) -> list[tuple[str, str]]:
        """Takes the queued events, (path, token) each, without waiting."""
        with self._lock:
            if not self._broken:
                try:
                    while self._poll_in.poll(0) and self._receive("EVENTS", ""):
                        self._stray()
                    self._stray()
                except XenStoreError:
                    if not self._events:
                        raise
            elif not self._events:
                raise XenStoreError(errno.ECONNRESET, "EVENTS", "", self._broken)
            if self._events and self._fd >= 0:
                os.eventfd_read(self._queued)
            taken = list(self._events)
            self._events.clear()
        return taken

    def _stray(self) -> None:
        if self._next("EVENTS", "") is not None:
            raise self._lost(errno.EPROTO, "EVENTS", "", "a reply to something that was not asked")

    # Transactions

    def transaction_start(self) -> int:
        """A new transaction's id, for the `tx` of other requests."""
        return int(self._talk(wire.XS_TRANSACTION_START, b"\0").rstrip(b"\0"))

    def transaction_end(self, tx: int, commit: bool = True) -> None:
        """Commits or discards. XenStoreError(EAGAIN): somebody changed what it used; nothing was done."""
        self._talk(wire.XS_TRANSACTION_END, b"T\0" if commit else b"F\0", tx=tx)

    def transaction(self, fn: Callable[[int], T], *, tries: int = 64, wait: bool = True) -> T:
        """Runs fn(tx) in a transaction, commits, and returns what fn returned.

        Begins again after a conflict, `tries` times at most, then raises XenStoreError(EAGAIN); so fn may run
        more than once. Whatever fn raises discards the transaction and is passed on.

        Of those of several threads one is open at a time, as xenstored lets a domain other than dom0 have ten. With
        wait=False it is opened beside them: for one thread that must not wait for what a guest makes long.
        """
        for attempt in range(tries):
            if attempt:
                # Two sides that begin again in step would conflict again.
                time.sleep(random.uniform(0.0, min(0.05, 0.0005 * 2 ** min(attempt, 7))))
            with self._turn if wait else nullcontext():
                tx = self.transaction_start()
                try:
                    result = fn(tx)
                except BaseException:
                    if not self._broken:
                        self.transaction_end(tx, commit=False)
                    raise
                try:
                    self.transaction_end(tx)
                    return result
                except XenStoreError as e:
                    if e.errno != errno.EAGAIN:
                        raise
        raise XenStoreError(errno.EAGAIN, "TRANSACTION_END", "", f"{tries} tries, and each met a conflict")


def default_path(environ: Mapping[str, str] = os.environ) -> str:
    """Where libxenstore looks: $XENSTORED_PATH, the socket's usual place, the kernel's device."""
    named = environ.get("XENSTORED_PATH")
    if named:
        return named
    usual = os.path.join(environ.get("XENSTORED_RUNDIR", "/run/xenstored"), "socket")
    return usual if os.path.exists(usual) else "/dev/xen/xenbus"
