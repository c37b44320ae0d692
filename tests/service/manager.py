"""What stands in for the service manager: the socket that sd_notify(3) writes to."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Manager:
    """A listener at a path, or at an abstract address (@name). Messages are kept with the time of their arrival."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self._sock.settimeout(0.1)
        self.messages: list[tuple[float, dict[str, str]]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop:
            try:
                data = self._sock.recv(65536)
            except TimeoutError:
                continue
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            self.messages.append((time.monotonic(), fields))

    def take(self, timeout: float = 0.05) -> None:
        """Let this time pass."""
        time.sleep(timeout)

    def until(self, wanted: Callable[[dict[str, str]], bool], timeout: float = 120.0) -> dict[str, str]:
        """The first message that is wanted, from the first that came."""
        end, seen = time.monotonic() + timeout, 0
        while True:
            for _, fields in self.messages[seen:]:
                if wanted(fields):
                    return fields
            seen = len(self.messages)
            assert time.monotonic() < end, self.messages[-10:]
            self.take()

    def heard(self, name: str) -> list[float]:
        """When messages with this variable came."""
        return [at for at, fields in self.messages if name in fields]

    def gives_signs(self, period: float) -> bool:
        """Whether signs of life come in time for four periods: in one of three tries, on a machine with other work."""
        for _ in range(3):
            self.forget()
            self.take(4 * period)
            given = self.heard("WATCHDOG")
            if len(given) >= 5 and max(b - a for a, b in itertools.pairwise(given)) < period:
                return True
        return False

    def forget(self) -> None:
        """What has come so far does not matter."""
        self.take(0.01)
        self.messages.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join()
        self._sock.close()
