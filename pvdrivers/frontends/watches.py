"""One thread that shares out the watch events of a store connection, which several devices of a guest use."""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections.abc import Callable

from pvdrivers.platform import XenStore

__all__ = ["Watches"]


class Watches:
    """Calls back when something at or below a path changes. Callbacks run on this thread, and are to be short.

    It takes all events of the connection: whoever else watches on it has to do so through here.
    """

    def __init__(self, store: XenStore) -> None:
        self._store = store
        self._callbacks: dict[str, tuple[str, Callable[[], None]]] = {}
        self._tokens = itertools.count()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="xenstore-watches", daemon=True)
        self._ended = False
        self._thread.start()

    def add(self, path: str, callback: Callable[[], None]) -> str:
        """Watch `path`; the first call comes at once. Returns what remove() wants."""
        token = f"w{next(self._tokens)}"
        with self._lock:
            self._callbacks[token] = (path, callback)
        self._store.watch(path, token)
        return token

    def remove(self, token: str) -> None:
        """No more calls after the one that may be under way. Harmless a second time, or without a connection."""
        with self._lock:
            path, _ = self._callbacks.pop(token, ("", None))
        if path:
            try:
                self._store.unwatch(path, token)
            except OSError:
                pass  # the connection is gone, and the watch with it

    def close(self) -> None:
        """End the thread; the connection stays."""
        if not self._ended:
            self._ended = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._store.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._ended:
            poll.poll()
            if self._ended:
                return
            try:
                events = self._store.events()
            except OSError:
                events = []
                self._ended = True
            # A storm of changes is one call for each watch.
            tokens = set(self._callbacks) if self._ended else {token for _, token in events}
            for token in tokens:
                with self._lock:
                    _, callback = self._callbacks.get(token, ("", None))
                if callback is not None:
                    callback()
