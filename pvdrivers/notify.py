"""Telling the service manager how we are: the protocol of sd_notify(3), which is one datagram for each message."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

log = logging.getLogger("pvdrivers.host")

_SEND_SECONDS = 5.0
"""How long to wait for a manager that is busy, with what it must know."""
_SPARE_SECONDS = 0.05
"""... and with what will be said again."""
_EXTEND_EVERY, _EXTEND_BY, _EXTEND_AT_MOST = 5.0, 30.0, 1200.0


class Notifier:
    """The manager's socket, if there is one. Nothing here raises: we can do without a manager."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        # An abstract address is written with an @ where it has a NUL.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self.watchdog_seconds = self._watchdog(environ)
        """How long the manager waits for a sign of life; None: it does not wait for any."""

    def _watchdog(self, environ: Mapping[str, str]) -> float | None:
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        if not self._address or not usec.isdigit() or int(usec) == 0 or pid not in ("", str(os.getpid())):
            return None
        return int(usec) / 1e6

    def send(self, *lines: str, seconds: float = _SEND_SECONDS) -> None:
        """One message: VARIABLE=value lines. Waits so many `seconds` for a manager that takes nothing in."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(seconds)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as e:
            log.debug("the service manager at %r: %s", self._address, e)

    def ready(self, status: str) -> None:
        """Started, or done with reloading."""
        self.send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self.send(f"STATUS={text}", seconds=_SPARE_SECONDS)

    def reloading(self) -> None:
        """ready() will follow."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self.send("STOPPING=1", "STATUS=handing over")

    def main_pid(self, pid: int) -> None:
        """Another process is the service from now on."""
        self.send(f"MAINPID={pid}")

    def alive(self) -> None:
        """A sign of life."""
        self.send("WATCHDOG=1", seconds=_SPARE_SECONDS)

    @contextmanager
    def patience(self, status: str) -> Iterator[None]:
        """While this lasts the manager is asked not to give up: a first start compiles for a minute, or many."""
        over = threading.Event()

        def ask() -> None:
            end = time.monotonic() + _EXTEND_AT_MOST
            while time.monotonic() < end:
                self.send(f"EXTEND_TIMEOUT_USEC={int(_EXTEND_BY * 1e6)}", f"STATUS={status}")
                if over.wait(_EXTEND_EVERY):
                    return

        if not self._address:
            yield
            return
        thread = threading.Thread(target=ask, name="patience", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
