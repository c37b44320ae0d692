"""A newer process takes over from a running one, and the guests see a pause of milliseconds.

The old one starts the new one with its own command line and a link between them. The new one imports and compiles
everything, finds all devices, and says that it is warm and which journals it can read; until then the old one serves
on, and if the new one fails, or cannot read these, it always will. Then the old one lets go of one device after the
other - drained, journal kept, state Connected - and tells which, so that the new one takes each at once. The old one
ends when the new one has all in hand. If the new one dies before that, or takes nothing, the old one takes all back,
by the same journals. If the old one dies before it has told the new one to go, both end; later, the new one has what is
left. Messages are JSON, one a packet:

    upgrade -> old      {"do": "upgrade", "timeout": seconds, "force": bool}
    old -> upgrade      {"event": "started", "pid"}, then "warm", or "failed" with "why"
    new -> old          {"event": "warm", "pid", "version", "journals", "classes"}, or "failed" with "why"
    old -> new          {"event": "go"} and the connection to `upgrade`, then for each device "released": its key, and
                        when it was stopped (CLOCK_MONOTONIC; null if it was not connected); then "all", with those that
                        are not free before the old one has ended
    new -> old          "took" for each device that it serves, or that has an error now, and "settled" after the last
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
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from . import __version__, journal
from .control import Timer
from .finder import Key, key_of
from .handover import HandOver
from .host import Host
from .life import Life
from .link import ENVIRONMENT, PACKET, receive, send

log = logging.getLogger("pvdrivers.host")

_TAKE_SECONDS = 60.0
"""How long the new one has to take what is free, and reports on devices that it has not taken over yet."""
_SEND_SECONDS = _END_SECONDS = 5.0
_CLOSES = (
    "every disk would be closed, and a Linux guest loses a disk that it has open: restart the daemon while no guest"
    " runs, or do it with --force"
)


class _Now(Enum):
    """What the old one is at."""

    SERVING = "no upgrade is under way"
    STARTING = "the new one gets ready"
    LETTING_GO = "the new one was told to go"
    TAKING_BACK = "the new one has failed, and what it was to have is not all served here again"


class Old:
    """The part of the process that is to be followed."""

    def __init__(
        self,
        host: Host,
        listener: socket.socket,
        command: list[str],
        main_pid: Callable[[int], None],
        others: Mapping[str, Callable[[socket.socket, dict[str, Any]], None]] | None = None,
    ) -> None:
        """`command` starts a successor; `main_pid` tells the service manager of it; `others` answer what else may be
        asked for at the same socket ("do")."""
        self._host = host
        self._listener = listener
        self._command = command
        self._others = dict(others or {})
        self._main_pid = main_pid
        self._now = _Now.SERVING
        self._asked: socket.socket | None = None  # who wants to know how it goes
        self._link: socket.socket | None = None  # while there is a new one
        self._new: subprocess.Popen[bytes] | None = None
        self._timer: Timer | None = None
        self._why = ""
        self._force = False
        self._released_at: dict[Key, float] = {}  # devices that were connected, and when they were stopped
        self._taken = 0
        host.listeners.append(self._changed)
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
        timeout, force = message.get("timeout"), message.get("force") is True
        if (other := self._others.get(str(message.get("do")))) is not None:
            other(sock, message)
        elif message.get("do") != "upgrade" or not isinstance(timeout, int | float):
            sock.close()
        elif self._now is not _Now.SERVING or self._host.stopping or self._host.finder.passive:
            send(sock, event="failed", why="an upgrade is under way already, or this daemon is ending")
            sock.close()
        elif not force and not self._host.context.options.get("journal", True):
            send(sock, event="failed", why=f"it keeps no journal (--no-journal), so {_CLOSES}")
            sock.close()
        elif not force and (lost := [str(i.ident) for i in self._host.lives.values() if "lost" in i.troubles.now]):
            why = f"xenstore was restarted and has forgotten {', '.join(lost)}, which nobody could take over"
            send(sock, event="failed", why=f"{why}: end its guest first, or give --force, and it is lost")
            sock.close()
        else:
            self._force = force
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
        self._now, self._asked, self._link, self._why = _Now.STARTING, sock, ours, ""
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
        elif message.get("event") == "warm" and self._now is _Now.STARTING and not self._host.stopping:
            self._warm(message)
        elif message.get("event") == "took":
            self._taken += 1
        elif message.get("event") == "settled":
            self._followed()

    def _warm(self, message: dict[str, Any]) -> None:
        assert self._new is not None
        if not (why := self._cannot(message)):
            return self._go(message)
        self._why = why
        self._new.kill()  # which ends the link

    def _cannot(self, message: dict[str, Any]) -> str:
        """Why it cannot follow, "" if it can. A version that does not tell its classes has those of this one."""
        ours, theirs, classes = journal.layout(), message.get("journals"), message.get("classes")
        lost = [str(i.ident) for i in self._host.lives.values() if i.ident.class_name not in (classes or ())]
        if isinstance(classes, list) and lost:
            return (
                f"it does not serve {', '.join(lost)}, which nobody would have then; its messages say why that class is"
                " left out: keep a driver of the kernel's from loading (docs/dom0.md), and upgrade again"
            )
        if self._force or (isinstance(theirs, list) and ours in theirs):
            return ""
        known = ", ".join(map(str, theirs)) if isinstance(theirs, list) else "none that it tells of"
        version = f"version {message.get('version')}"
        return f"{version} reads other journals ({known}) than those of version {__version__} ({ours}): {_CLOSES}"

    def _failed(self) -> None:
        """The successor has ended, or was: all is as before, or will be soon."""
        assert self._link is not None and self._new is not None
        self._host.unhear(self._link.fileno())
        self._new.kill()
        try:
            status: int | str = self._new.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            status = "unknown"
        why = self._why or f"it ended with status {status}; its messages are where those of this daemon are"
        if not self._host.stopping:
            log.error("upgrade: process %d does not take over: %s", self._new.pid, why)
        self._cancel()
        self._link.close()
        self._link = self._new = None
        self._why = why
        if self._now is not _Now.LETTING_GO or self._host.stopping:
            return self._tell()
        self._now = _Now.TAKING_BACK
        self._timer = self._host.later(_TAKE_SECONDS, self._tell)
        if not self._released_at:
            self._tell()
        assert self._host.letting_go is not None
        self._host.letting_go.take_back()  # last: the store may be lost meanwhile

    def _tell(self) -> None:
        """It has failed, and all is served here."""
        self._cancel()
        self._now = _Now.SERVING
        send(self._asked, event="failed", why=self._why)
        if self._asked is not None:
            self._asked.close()
        self._asked = None
        self._released_at.clear()

    def _changed(self, life: Life | None) -> None:
        """Whether what was taken back is served again."""
        if self._now is not _Now.TAKING_BACK or life is None or not (life.connected or life.gone):
            return
        stopped = self._released_at.pop(key_of(life.ident), None)
        if stopped is not None:
            log.info("%s: was paused for %.1f ms", life.ident, (self._host.now() - stopped) * 1000)
            if not self._released_at:
                self._tell()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go(self, message: dict[str, Any]) -> None:
        assert self._link is not None and self._new is not None
        self._cancel()
        send(self._asked, event="warm", pid=self._new.pid, version=message.get("version"), old=__version__)
        log.warning("upgrade: version %s, process %d takes over", message.get("version"), self._new.pid)
        self._link.settimeout(_SEND_SECONDS)
        fds = [] if self._asked is None else [self._asked.fileno()]
        try:
            socket.send_fds(self._link, [json.dumps({"event": "go"}).encode()], fds)
        except OSError:
            return  # it has ended, which is heard next
        self._taken = 0
        self._released_at.clear()
        self._now = _Now.LETTING_GO
        HandOver(self._host, self._released, self._all)

    def _released(self, life: Life, stopped: float | None) -> None:
        key = key_of(life.ident)
        if stopped is not None:
            self._released_at[key] = stopped
        send(self._link, event="released", key=key, stopped=stopped)

    def _all(self, left: dict[Key, float | None]) -> None:
        send(self._link, event="all", left=list(left.items()))
        self._timer = self._host.later(_TAKE_SECONDS, self._not_settled)

    def _not_settled(self) -> None:
        """Something takes long in the new one. If it has got nowhere at all, it is no good."""
        if self._taken or self._new is None:
            return self._followed()
        self._why = f"it had not taken a single device after {_TAKE_SECONDS:g} s"
        self._new.kill()

    def _followed(self) -> None:
        """The new one is the service; this one ends."""
        assert self._new is not None
        self._cancel()
        self._main_pid(self._new.pid)
        self._host.stop()


class New:
    """The part of the process that follows: passive until it is told to go, then it takes what is released."""

    def __init__(
        self, host: Host, link: socket.socket, begun: Callable[[], None], main_pid: Callable[[int], None]
    ) -> None:
        """`begun` is called when this process begins to serve; `main_pid` tells the service manager in the end."""
        self._host = host
        self._link = link
        self._begun = begun
        self._main_pid = main_pid
        self._asked: socket.socket | None = None
        self._stopped: dict[Key, float] = {}
        """Devices that were connected, and are not yet again."""
        self._in_trouble: set[Key] = set()  # those of them that are in hand, with an error
        self._all = False  # all were named that could be
        self._gone = False  # the old one
        host.finder.passive = True
        host.listeners.append(self._changed)
        host.hear(link.fileno(), self._heard)

    def warm(self) -> None:
        """Everything is compiled, and every device found."""
        ready = {"version": __version__, "journals": journal.readable(), "classes": sorted(self._host.finder.classes)}
        send(self._link, event="warm", pid=os.getpid(), **ready)

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
            self._take(tuple(message["key"]), message["stopped"])
        elif message["event"] == "all":
            self._all = True
            for key, stopped in message["left"]:
                if stopped is not None:
                    self._stopped[tuple(key)] = stopped
                self._in_trouble.add(tuple(key))  # not before the old one has ended
            self._host.finder.take_waiting()
            self._settled()

    def _take(self, key: Key, stopped: float | None) -> None:
        if stopped is not None:
            self._stopped[key] = stopped
        self._host.finder.find(*key)
        if key not in self._host.lives and key not in self._host.finder.waiting:
            self._stopped.pop(key, None)  # the toolstack has taken it away

    def _end(self) -> None:
        """The old one is no more: what it has not released is free, too."""
        self._host.unhear(self._link.fileno())
        self._link.close()
        if self._host.finder.passive:
            log.error("upgrade: the daemon to be followed has ended; so does this one")
            self._host.stop()
            return
        self._gone = True
        self._main_pid(os.getpid())
        self._host.finder.take_waiting()
        self._host.finder.discover()
        self._host.later(_TAKE_SECONDS, self._report)
        if not self._stopped:
            self._report()

    def _changed(self, life: Life | None) -> None:
        if life is None or (key := key_of(life.ident)) not in self._stopped:
            return
        if life.connected:
            pause = self._host.now() - self._stopped.pop(key)
            log.info("%s: was paused for %.1f ms", life.ident, pause * 1000)
            send(self._asked, event="served", device=str(life.ident), pause=pause)
        elif life.gone:
            del self._stopped[key]
        elif life.error and key not in self._in_trouble:
            self._in_trouble.add(key)
        else:
            return
        if not self._gone:
            send(self._link, event="took", device=str(life.ident))
            self._settled()
        elif not self._stopped:
            self._report()

    def _settled(self) -> None:
        if self._all and self._stopped.keys() <= self._in_trouble:
            send(self._link, event="settled")

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
