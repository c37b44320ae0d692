"""The requests of one connection: read by one thread, answered by another, in whatever order they are done.

The thread that takes completions of the disk only puts them into a queue here, so a client that does not read its
answers holds up nobody but itself.
"""

from __future__ import annotations

import errno
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from . import wire
from .negotiation import Disk, Gone, receive, receive_into

__all__ = ["Connection"]

_MOST_REQUESTS = 256  # in flight
_MOST_BYTES = 4 * wire.MAX_REQUEST  # in flight
_ZEROES = 1 << 20  # written at once
_SMALL = 16384
_zeroes = bytes(_ZEROES)


class Connection:
    """One client and its disk, after the handshake."""

    def __init__(self, sock: socket.socket, disk: Disk) -> None:
        self._sock = sock
        self._disk = disk
        self._replies: queue.SimpleQueue[tuple[bytes, Any] | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._requests = 0
        self._bytes = 0

    def serve(self) -> None:
        """Until the client leaves. Raises Gone unless it says good-bye; either way nothing is in flight any more."""
        writer = threading.Thread(target=self._write, name="nbd-replies", daemon=True)
        writer.start()
        try:
            while self._next():
                pass
        finally:
            with self._room:
                self._room.wait_for(lambda: not self._requests)
            self._replies.put(None)
            writer.join()

    def _next(self) -> bool:
        """One request; False if it is the client's last."""
        head = wire.REQUEST.unpack(receive(self._sock, wire.REQUEST.size))
        magic, flags, command, cookie, offset, length = head
        if magic != wire.REQUEST_MAGIC:
            raise Gone(f"request with magic {magic:#x}")
        if command == wire.CMD_DISC:
            return False
        moves = command in (wire.CMD_READ, wire.CMD_WRITE)
        if command == wire.CMD_WRITE and length > wire.MAX_REQUEST:
            raise Gone(f"a write of {length} bytes")  # all of which would have to be received first
        size = length if moves and length <= wire.MAX_REQUEST else 0
        with self._room:
            self._room.wait_for(lambda: self._requests < _MOST_REQUESTS and self._bytes + size <= _MOST_BYTES)
            self._requests += 1
            self._bytes += size
        buffer = bytearray(size)

        def reply(error: int) -> None:
            data = buffer if command == wire.CMD_READ and not error else b""
            self._replies.put((wire.simple_reply(cookie, error), data))
            with self._room:
                self._requests -= 1
                self._bytes -= size
                self._room.notify_all()

        if command == wire.CMD_WRITE:
            try:
                receive_into(self._sock, memoryview(buffer))
            except Gone:
                reply(errno.EIO)
                raise
        error = self._refusal(command, flags, offset, length)
        if error:
            reply(error)
            return True
        self._do(command, bool(flags & wire.CMD_FLAG_FUA), offset, length, buffer, reply)
        return True

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        """An errno if a request makes no sense, else 0."""
        disk = self._disk
        if flags & ~(wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE):
            return errno.EINVAL
        if command == wire.CMD_FLUSH:
            return 0
        if command not in (wire.CMD_READ, wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
            return errno.EINVAL
        if command != wire.CMD_READ and disk.readonly:
            return errno.EPERM
        if offset > disk.size or length > disk.size - offset:
            return errno.EINVAL if command in (wire.CMD_READ, wire.CMD_TRIM) else errno.ENOSPC
        if (offset | length) % disk.block_size:
            return errno.EINVAL
        if command == wire.CMD_READ and length > wire.MAX_REQUEST:
            return errno.EOVERFLOW
        return 0

    def _do(
        self, command: int, fua: bool, offset: int, length: int, buffer: bytearray, reply: Callable[[int], None]
    ) -> None:
        if command == wire.CMD_READ:
            self._submit(("read", offset, length, buffer), reply)
        elif command == wire.CMD_FLUSH:
            self._submit(("flush",), reply)
        else:
            done = self._stable(reply) if fua else reply
            if command == wire.CMD_WRITE:
                self._submit(("write", offset, length, buffer), done)
            elif command == wire.CMD_TRIM:
                # A hint. A backend that has withdrawn the feature does no harm.
                self._submit(("discard", offset, length), lambda error: done(0 if error == wire.EOPNOTSUPP else error))
            else:
                self._write_zeroes(offset, length, done)

    def _stable(self, reply: Callable[[int], None]) -> Callable[[int], None]:
        """FUA, which the block protocol of Xen has not: flush after it."""
        return lambda error: reply(error) if error else self._submit(("flush",), reply)

    def _write_zeroes(self, offset: int, length: int, done: Callable[[int], None]) -> None:
        """By writing them, a piece at a time, here: what a discard leaves behind need not be zeroes."""
        try:
            for at in range(offset, offset + length, _ZEROES):
                self._disk.submit("write", at, min(_ZEROES, offset + length - at), _zeroes).result()
        except OSError as error:
            done(error.errno or errno.EIO)
        except ValueError:
            done(errno.EINVAL)
        else:
            done(0)

    def _submit(self, operation: tuple[Any, ...], done: Callable[[int], None]) -> None:
        """Start something on the disk; `done` is called with 0 or an errno, here or on the disk's own thread."""

        def completed(future: Future[int]) -> None:
            error = future.exception()
            done((getattr(error, "errno", 0) or errno.EIO) if error else 0)

        try:
            future = self._disk.submit(*operation)
        except ValueError:
            done(errno.EINVAL)
        except OSError as error:
            done(error.errno or errno.EIO)
        else:
            future.add_done_callback(completed)

    def _write(self) -> None:
        """Send replies. After the first failure they are dropped: the reader finds out by itself."""
        alive = True
        while (item := self._replies.get()) is not None:
            if not alive:
                continue
            head, data = item
            try:
                if len(data) <= _SMALL:
                    self._sock.sendall(head + data)  # one copy costs less than another system call
                else:
                    self._sock.sendall(head)
                    self._sock.sendall(data)
            except OSError:
                alive = False
                self._hang_up()

    def _hang_up(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
