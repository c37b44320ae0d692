"""The NBD server: a unix socket, and a pair of threads for each client."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from pvdrivers.errors import ConfigError, DeviceBusyError

from .connection import Connection
from .negotiation import Disk, Gone, negotiate

__all__ = ["Disk", "NbdServer"]

_log = logging.getLogger(__name__)
_HANDSHAKE = 30.0  # seconds that a client has for it
_MOST_CLIENTS = 64


class NbdServer:
    """Exports disks by name; the first is also the default. Starts at once, ends with close()."""

    def __init__(self, path: Path, exports: Mapping[str, Disk]) -> None:
        """Raises ConfigError for a path that cannot be bound, DeviceBusyError if another server listens there."""
        self.path = path
        self._exports = dict(exports)
        self._clients: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._sock = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more clients, let what is in flight end, and hang up. Removes the socket."""
        self._closing = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept()
        except OSError:
            pass
        self._thread.join()
        self._sock.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            clients, threads = list(self._clients), list(self._threads)
        for client in clients:
            try:
                client.shutdown(socket.SHUT_RD)  # what has been asked is still answered
            except OSError:
                pass
        for thread in threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._sock.accept()
            except OSError:
                if self._closing:
                    return
                continue
            with self._lock:
                if len(self._clients) >= _MOST_CLIENTS:
                    client.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(client,), name="nbd-client", daemon=True)
                self._clients.add(client)
                self._threads.add(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            client.settimeout(_HANDSHAKE)
            disk = negotiate(client, self._exports)
            client.settimeout(None)
            if disk is not None:
                Connection(client, disk).serve()
        except Gone as why:
            _log.debug("NBD client: %s", why)
        finally:
            with self._lock:
                self._clients.discard(client)
                self._threads.discard(threading.current_thread())
            client.close()


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(os.fspath(path))
        sock.listen(16)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"NBD socket {path}: {reason}; choose another path, of at most 107 bytes") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    """A socket that nobody listens on is left over from a server that was killed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(
                f"NBD socket {path}: there is a file that is no socket; remove it, or choose another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise DeviceBusyError(f"NBD socket {path}: another server listens there")
