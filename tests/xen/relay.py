"""A unix socket before xenstored's, whose connections a test can cut."""

from __future__ import annotations

import selectors
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

XENSTORED = "/run/xenstored/socket"


class Relay:
    """Passes everything on, both ways, by a thread. A context manager; `path` is what to connect to."""

    def __init__(self, path: Path, to: str = XENSTORED) -> None:
        self.path, self._to = path, to
        self.cuts = 0
        self._refusing = threading.Event()
        self._cut = threading.Event()
        self._end = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)

    def cut(self) -> None:
        """Close all connections; none is made until join()."""
        self._refusing.set()
        self._cut.set()
        while self._cut.is_set():
            threading.Event().wait(0.01)

    def join(self) -> None:
        """Connections are made again."""
        self._refusing.clear()

    def _run(self) -> None:
        while not self._end.is_set():
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._pairs:
                    self._pass_on(key.fileobj)
            if self._cut.is_set():
                for one in list(self._pairs):
                    self._close(one)
                self.cuts += 1
                self._cut.clear()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._refusing.is_set():
            near.close()
            return
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._to)
        for one, other in ((near, far), (far, near)):
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(65536)
            self._pairs[one].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(one)

    def _close(self, one: socket.socket) -> None:
        for end in (one, self._pairs.get(one)):
            if end is not None and self._pairs.pop(end, None) is not None:
                self._selector.unregister(end)
                end.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for one in [*self._pairs, self._listener]:
            one.close()
        self.path.unlink()
