"""Captures of what devices carry, asked for by `pvdrivers capture` at a daemon's socket.

    capture -> daemon   {"do": "capture", "device": "vif-D-V", "bytes": of the ring, "snap": of a packet}
    daemon -> capture   {"event": "capturing", "device", "pid"} and the file of a capture ring (capture_ring),
                        or {"event": "failed", "why"}

The capture lasts until either end closes the connection. A device has one at most.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from .capture_memory import CaptureMemory
from .errors import ConfigError, PlatformError
from .host import Host
from .life import Life
from .link import send

MOST_BYTES = 1 << 30
LEAST_BYTES = 1 << 20
"""Of a ring: more than one packet."""
MOST_SNAP = 1 << 17


class Captures:
    """Those of a daemon."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._running: dict[Life, tuple[socket.socket, CaptureMemory]] = {}
        host.listeners.append(self._changed)

    def request(self, sock: socket.socket, message: dict[str, Any]) -> None:
        """Somebody asks for one."""
        try:
            life, memory = self._start(message)
        except (ConfigError, PlatformError) as e:
            send(sock, event="failed", why=str(e))
            sock.close()
            return
        self._running[life] = (sock, memory)
        answer = {"event": "capturing", "device": str(life.ident), "pid": os.getpid()}
        try:
            socket.send_fds(sock, [json.dumps(answer).encode()], [memory.fd])
        except OSError:
            pass  # it has gone, which is heard next
        self._host.hear(sock.fileno(), lambda: self._end(life))

    def _start(self, message: dict[str, Any]) -> tuple[Life, CaptureMemory]:
        name, size, snap = message.get("device"), message.get("bytes"), message.get("snap")
        if type(size) is not int or type(snap) is not int or not LEAST_BYTES <= size <= MOST_BYTES:
            raise ConfigError(f"capture: a ring of {size!r} bytes: from {LEAST_BYTES} to {MOST_BYTES}")
        if not 64 <= snap <= MOST_SNAP:
            raise ConfigError(f"capture: {snap} bytes of a packet: from 64 to {MOST_SNAP}")
        life = next((life for life in self._host.lives.values() if str(life.ident) == name), None)
        if life is None:
            raise ConfigError(f"capture: {name}: this daemon serves no device of the name")
        start = getattr(life.device, "capture", None)
        if start is None:
            raise ConfigError(f"capture: {name}: a {life.ident.class_name} carries no packets")
        if life in self._running:
            raise ConfigError(f"capture: {name}: there is a capture already; a device has one")
        memory = CaptureMemory(1 << (size - 1).bit_length(), snap)
        start(memory)
        return life, memory

    def _end(self, life: Life) -> None:
        """The reader has gone, or the device."""
        sock, memory = self._running.pop(life)
        self._host.unhear(sock.fileno())
        sock.close()
        life.device.capture(None)  # type: ignore[attr-defined]
        memory.close()

    def _changed(self, life: Life | None) -> None:
        if life is not None and life.gone and life in self._running:
            self._end(life)
