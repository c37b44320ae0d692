"""A newer process takes over from a running one, and the guests see a pause of milliseconds.

The old one starts the new one with its own command line and a link between them. The new one imports and compiles
everything, finds all devices, and says that it is warm; until then the old one serves on, and if the new one fails, it
always will. Then the old one lets go of one device after the other - drained, journal kept, state Connected - and tells
which, so that the new one takes each at once. Messages are JSON, one a packet:

    upgrade -> old      {"do": "upgrade", "timeout": seconds}
    old -> upgrade      {"event": "started", "pid"}, then "warm", or "failed" with "why"
    new -> old          {"event": "warm", "pid", "version"}, or "failed" with "why"
    old -> new          {"event": "go"} and the connection to `upgrade`, then for each device "released": its key, and
                        when it was stopped (CLOCK_MONOTONIC; null if it was not connected); the end of the old one is
                        the end of the link
    new -> upgrade      {"event": "served", "device", "pause"} for each, then "done" with what is "left"
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from . import __version__
from .control import Timer
from .finder import Key, key_of
from .host import Host
from .life import Life
from .link import ENVIRONMENT, PACKET, receive, send

log = logging.getLogger("pvdrivers.host")

_TAKE_SECONDS = 60.0
"""How long the new one reports on devices that it has not taken over yet."""
_SEND_SECONDS = 5.0


class Old:
    """The part of the process that is to be followed."""

    def __init__(
        self, host: Host, listener: socket.socket, command: list[str], main_pid: Callable[[int], None]
    ) -> None:
        """`command` starts a successor; `main_pid` tells the service manager of it."""
        self._host = host
        self._listener = listener
        self._command = command
        self._main_pid = main_pid
        self._asked: socket.socket | None = None  # who wants to know how it goes
        self._link: socket.socket | None = None
        self._new: subprocess.Popen[bytes] | None = None
        self._timer: Timer | None = None
        self._why = ""
        host.hear(listener.fileno(), self._accept)

    def close(self) -> None:
        """The process ends: the successor, if there is one and it was told to go on, has what was released."""
        for sock in (self._listener, self._asked, self._link):
            if sock is not None:
                sock.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            sock.close()
            return
        sock.setblocking(False)
        self._host.hear(sock.fileno(), lambda: self._request(sock))

    def _request(self, sock: socket.socket) -> None:
        self._host.unhear(sock.fileno())
        try:
            message = receive(sock) or {}
        except BlockingIOError:
            message = {}
        timeout = message.get("timeout")
        if message.get("do") != "upgrade" or not isinstance(timeout, int | float):
            sock.close()
        elif self._link is not None or self._host.stopping:
            send(sock, event="failed", why="an upgrade is under way already, or this daemon is ending")
            sock.close()
        else:
            self._start(sock, timeout)

    def _start(self, sock: socket.socket, timeout: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {k: v for k, v in os.environ.items() if k != "WATCHDOG_PID"}
        try:
            self._new = subprocess.Popen(
                [sys.executable, *self._command[1:]],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**environ, ENVIRONMENT: str(theirs.fileno())},
            )
        except OSError as e:
            ours.close()
            send(sock, event="failed", why=f"{' '.join(self._command)}: {e.strerror}")
            sock.close()
            return
        finally:
            theirs.close()
        log.warning("upgrade: process %d is getting ready to take over", self._new.pid)
        send(sock, event="started", pid=self._new.pid)
        ours.setblocking(False)
        self._asked, self._link, self._why = sock, ours, ""
        self._host.hear(ours.fileno(), self._heard)
        self._timer = self._host.later(timeout, lambda: self._too_late(timeout))

    def _too_late(self, timeout: float) -> None:
        assert self._new is not None
        self._why = f"it was not ready within {timeout:g} s; compile beforehand (pvdrivers warm), or give it --timeout"
        self._new.kill()  # which ends the link

    def _heard(self) -> None:
        assert self._link is not None and self._new is not None
        try:
            message = receive(self._link)
        except BlockingIOError:
            return
        if message is None:
            self._failed()
        elif message.get("event") == "failed":
            self._why = str(message.get("why"))
        elif message.get("event") == "warm" and not self._host.stopping:
            self._go(message)

    def _failed(self) -> None:
        """The successor has ended, or was: all is as before."""
        assert self._link is not None and self._new is not None
        self._host.unhear(self._link.fileno())
        self._new.kill()
        status = self._new.wait()
        why = self._why or f"it ended with status {status}; its messages are where those of this daemon are"
        if not self._host.stopping:
            log.error("upgrade: process %d does not take over: %s", self._new.pid, why)
        send(self._asked, event="failed", why=why)
        for sock in (self._link, self._asked):
            if sock is not None:
                sock.close()
        self._link = self._asked = self._new = None
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go(self, message: dict[str, Any]) -> None:
        assert self._link is not None and self._new is not None
        self._cancel()
        send(self._asked, event="warm", pid=self._new.pid, version=message.get("version"), old=__version__)
        log.warning("upgrade: version %s, process %d takes over", message.get("version"), self._new.pid)
        self._host.unhear(self._link.fileno())
        self._link.settimeout(_SEND_SECONDS)
        fds = [] if self._asked is None else [self._asked.fileno()]
        socket.send_fds(self._link, [json.dumps({"event": "go"}).encode()], fds)
        self._main_pid(self._new.pid)
        self._host.released = self._released
        self._host.stop()

    def _released(self, life: Life, stopped: float | None) -> None:
        send(self._link, event="released", key=key_of(life.ident), stopped=stopped)


class New:
    """The part of the process that follows: passive until it is told to go, then it takes what is released."""

    def __init__(self, host: Host, link: socket.socket, begun: Callable[[], None]) -> None:
        """`begun` is called when this process is the service."""
        self._host = host
        self._link = link
        self._begun = begun
        self._asked: socket.socket | None = None
        self._stopped: dict[Key, float] = {}
        self._gone = False  # the old one
        host.finder.passive = True
        host.listeners.append(self._changed)
        host.hear(link.fileno(), self._heard)

    def warm(self) -> None:
        """Everything is compiled, and every device found."""
        send(self._link, event="warm", pid=os.getpid(), version=__version__)

    def _heard(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._link, PACKET, 1)
        except OSError:
            data, fds = b"", []
        if fds:
            self._asked = socket.socket(fileno=fds[0])
        message = json.loads(data) if data else None
        if message is None:
            self._end()
        elif message["event"] == "go":
            self._host.finder.passive = False
            self._begun()
        elif message["event"] == "released":
            name, domid, devid = message["key"]
            if message["stopped"] is not None:
                self._stopped[name, domid, devid] = message["stopped"]
            self._host.finder.find(name, domid, devid)

    def _end(self) -> None:
        """The old one is no more: what it has not released is free, too."""
        self._host.unhear(self._link.fileno())
        self._link.close()
        if self._host.finder.passive:
            log.error("upgrade: the daemon to be followed has ended; so does this one")
            self._host.stop()
            return
        self._gone = True
        self._host.finder.take_waiting()
        self._host.later(_TAKE_SECONDS, self._report)
        if not self._stopped:
            self._report()

    def _changed(self, life: Life | None) -> None:
        if life is None or not life.connected:
            return
        stopped = self._stopped.pop(key_of(life.ident), None)
        if stopped is None:
            return
        pause = self._host.now() - stopped
        log.info("%s: was paused for %.1f ms", life.ident, pause * 1000)
        send(self._asked, event="served", device=str(life.ident), pause=pause)
        if self._gone and not self._stopped:
            self._report()

    def _report(self) -> None:
        """All is taken over, or the rest takes too long to be waited for."""
        if self._asked is None:
            return
        left = {}
        for key in self._stopped:
            life = self._host.lives.get(key)
            left["{}-{}-{}".format(*key)] = (life.error if life else "") or "not taken over yet"
        send(self._asked, event="done", pid=os.getpid(), version=__version__, left=left)
        self._asked.close()
        self._asked = None
