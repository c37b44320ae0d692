"""The daemon: finds devices in the store, and leads each through its life, on one control thread.

The thread waits for the store, for the workers' alerts, for finished jobs and for timers, and does nothing
while none of these happen, whatever the number of devices. Signals are for whoever runs it: stop() and
refresh() may be called from a handler.

What a SIGTERM does. Every device finishes what is in flight, is unmapped and unbound, and stays Connected in
the store, so that the next process takes it over and the guest only sees a pause. A device that is being
closed or unplugged stays in its state likewise, and the next process closes it. Nothing is closed because a
process ends: a guest could not get a disk with a mounted file system back.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from .claims import Claims
from .control import Backoff, Done, Jobs, Timer, Timers
from .device import Context, Device, DeviceId
from .errors import ConfigError, DeviceBusyError, PlatformError, PvError
from .life import Life
from .nodes import connection_lost
from .platform import XenStore

log = logging.getLogger("pvdrivers.host")

PREDECESSOR_SECONDS = 5.0
"""How long a process that is ending may keep its claims before that is an error."""
HAND_OVER_SECONDS = 30.0
"""How long devices have to finish what is in flight when the process ends."""
_CLAIM_AGAIN = (0.05, 1.0)
_RECONNECT = (0.1, 5.0)

_Key = tuple[str, int, int]  # class, domid, devid


class _Waiting:
    """A device that another process still serves."""

    def __init__(self, backoff: Backoff, deadline: float, at_start: bool) -> None:
        self.backoff = backoff
        self.deadline = deadline
        self.at_start = at_start
        self.told = False


class Host:
    """All devices of this process. run() is the control thread; the other methods but stop() belong to it."""

    def __init__(
        self,
        context: Context,
        classes: Mapping[str, type[Device]],
        *,
        domains: Collection[int] | None = None,
        connect_store: Callable[[], XenStore] | None = None,
    ) -> None:
        """`domains`: serve only these guests. `connect_store` makes a new connection when the store's is
        lost."""
        self.context = context
        self.classes = classes
        self.domains = domains
        self.lives: dict[_Key, Life] = {}
        self.claims = Claims(context.run_dir)
        self._us = context.platform.domid
        self._top = f"/local/domain/{self._us}/backend/"
        self._connect_store = connect_store
        self._timers = Timers()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._jobs = Jobs(self._wake)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._store_fd = -1
        self._reconnect = Backoff(self, self._store_back, *_RECONNECT)
        self._waiting: dict[_Key, _Waiting] = {}
        self._refused: dict[_Key, str] = {}
        self._stopping = False
        self._refreshing = False
        self._started = False
        self._error: PvError | None = None

    # For other threads and signal handlers

    def stop(self) -> None:
        """Have run() hand all devices over, and return."""
        self._stopping = True
        self._wake()

    def refresh(self) -> None:
        """Have every device look again at what is behind it: a larger image, a disc changed."""
        self._refreshing = True
        self._wake()

    @property
    def wake_fd(self) -> int:
        """For signal.set_wakeup_fd."""
        return self._wake_write

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except (BlockingIOError, BrokenPipeError):
            pass  # full, so it will wake; or closed, and this is a job that finished too late

    # The loop

    def run(self, ready: Callable[[int], None] | None = None) -> None:
        """Serve until stop(). Calls ready(number of devices found) when everything that is there is in hand.

        Raises DeviceBusyError if all the devices that were there at the start are another process's.
        """
        alerts = self.context.workers.alert_fd
        self._selector.register(alerts, selectors.EVENT_READ, self._alerted)
        try:
            self._attach()
            self._started = True
            if ready is not None:
                ready(len(self.lives) + len(self._waiting))
            while not self._stopping and self._error is None:
                self._turn(self._timers.timeout())
            self._hand_over()
        finally:
            self._selector.unregister(alerts)
            self.claims.close()
        if self._error is not None:
            raise self._error

    def _turn(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            self._guarded(key.data)
        self._guarded(self._timers.run_due)

    def _guarded(self, call: Callable[[], None]) -> None:
        """One device's trouble is not the others'."""
        try:
            call()
        except OSError as e:
            if connection_lost(e):
                self.store_lost()
            else:
                log.exception("our own fault")
        except Exception:
            log.exception("our own fault")

    def _woken(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        self._jobs.deliver()
        if self._refreshing:
            self._refreshing = False
            for life in list(self.lives.values()):
                life.refresh()

    def _alerted(self) -> None:
        try:
            alerts = self.context.workers.alerts()
        except PlatformError as e:
            self._error = e  # a worker has ended: who comes next takes over what it served
            return
        for device, violation in alerts:
            life = self.lives.get(_key(device.ident))
            if life is not None and life.device is device:
                life.fault(violation)
        for device, text in self.context.workers.notices():
            log.warning("%s: %s", device.ident, text)

    def close(self) -> None:
        """Give back claims and descriptors, after run() and once no signal handler calls here any more.

        One end of the pipe stays open: a job that finishes late writes to it, and must not hit somebody's file.
        """
        self.claims.close()
        self._selector.close()
        os.close(self._wake_read)

    def _hand_over(self) -> None:
        left = set(self.lives)
        for key, life in list(self.lives.items()):
            life.hand_over(partial(left.discard, key))
        deadline = self.now() + HAND_OVER_SECONDS
        while left and self.now() < deadline:
            self._turn(min(x for x in (deadline - self.now(), self._timers.timeout()) if x is not None))
        for key in left:
            log.error("%s-%d-%d: did not finish within %g s, and is left", *key, HAND_OVER_SECONDS)

    # What a Life wants (pvdrivers.control.Control)

    @property
    def store(self) -> XenStore:
        return self.context.platform.store

    def now(self) -> float:
        return time.monotonic()

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        self._jobs.submit(job, done)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self._timers.later(seconds, call)

    def pause(self, life: Life) -> None:
        log.warning("%s: its frontend's state changes too often; it is looked at once a second", life.ident)
        self.store.unwatch(life.ident.frontend_path + "/state", f"front {life.ident}")

    def resume(self, life: Life) -> None:
        self._watch(life.ident.frontend_path + "/state", f"front {life.ident}")

    def gone(self, life: Life) -> None:
        self.lives.pop(_key(life.ident), None)
        self.claims.drop(life.ident)
        try:
            self.store.unwatch(life.ident.frontend_path + "/state", f"front {life.ident}")
        except OSError as e:
            log.debug("%s: %s", life.ident, e)  # not watched while it was paused, or the store is lost

    def store_lost(self) -> None:
        if self._store_fd < 0:
            return
        log.error("the connection to xenstore is lost; devices are served, but none comes or goes meanwhile")
        self._selector.unregister(self._store_fd)
        self._store_fd = -1
        if self._connect_store is None:
            self._error = PlatformError("the connection to xenstore is lost")
        else:
            self._reconnect.again()

    def _store_back(self) -> None:
        assert self._connect_store is not None
        try:
            store = self._connect_store()
        except OSError as e:
            log.debug("xenstore: %s", e)
            self._reconnect.again()
            return
        self.store.close()
        self.context.platform.store = store
        self._reconnect.reset()
        log.warning("xenstore is back")
        try:
            self._attach()
        except OSError as e:
            log.error("%s", e)
            self.store_lost()

    # Devices that come

    def _attach(self) -> None:
        """Watch everything, and look at everything: at the start, and after the connection was lost."""
        self._store_fd = self.store.fileno()
        self._selector.register(self._store_fd, selectors.EVENT_READ, self._store_events)
        for name in self.classes:
            self._watch(self._top + name, f"back {name}")
        try:
            self._watch("@releaseDomain", "release")
        except OSError as e:
            if connection_lost(e):
                raise
            log.debug("%s", e)  # a driver domain may not watch that; it is told by the toolstack
        for life in list(self.lives.values()):
            self._watch(life.ident.frontend_path + "/state", f"front {life.ident}")
            life.look()
        for name in self.classes:
            self._discover(name)

    def _watch(self, path: str, token: str) -> None:
        try:
            self.store.watch(path, token)
        except FileExistsError:
            pass

    def _discover(self, name: str) -> None:
        for domid in self.store.ls(self._top + name) or ():
            self._discover_domain(name, domid)

    def _discover_domain(self, name: str, domid: str) -> None:
        if _number(domid) is None:
            return
        for devid in self.store.ls(f"{self._top}{name}/{domid}") or ():
            if _number(devid) is not None:
                self._find(name, int(domid), int(devid))

    def _find(self, name: str, domid: int, devid: int) -> None:
        """A directory of a device: if it is complete and ours to serve, then it gets a life."""
        key = (name, domid, devid)
        if key in self.lives or self._stopping or (self.domains is not None and domid not in self.domains):
            return
        if self.store.read(f"{self._top}{name}/{domid}/{devid}/state") is None:
            self._waiting.pop(key, None)
            self._refused.pop(key, None)
            return
        try:
            ident = DeviceId.from_store(self.store, self._us, name, domid, devid)
        except ConfigError as e:
            if self._refused.get(key) != str(e):
                self._refused[key] = str(e)
                log.error("%s", e)
            return
        if ident is None:
            return
        self._refused.pop(key, None)
        try:
            self.claims.take(ident)
        except (DeviceBusyError, PlatformError) as e:
            self._wait(key, e)
            return
        waited = self._waiting.pop(key, None)
        if waited is not None:
            waited.backoff.reset()
        life = self.lives[key] = Life(self.classes[name](ident, self.context), self)
        self._watch(ident.frontend_path + "/state", f"front {ident}")
        life.look()

    def _wait(self, key: _Key, error: PvError) -> None:
        """Another process has the device (or the run directory is full): that may pass, or is an error to be seen."""
        waiting = self._waiting.get(key)
        if waiting is None:
            backoff = Backoff(self, lambda: self._find(*key), *_CLAIM_AGAIN)
            waiting = self._waiting[key] = _Waiting(
                backoff, self.now() + PREDECESSOR_SECONDS, not self._started
            )
        if self.now() >= waiting.deadline and not waiting.told:
            waiting.told = True
            log.error("%s", error)
            if not self.lives and all(other.told and other.at_start for other in self._waiting.values()):
                self._error = error
        waiting.backoff.again()

    # Events of the store

    def _store_events(self) -> None:
        fronts: dict[str, int] = {}
        backs: dict[_Key, set[str]] = {}
        for path, token in self.store.events():
            kind, _, what = token.partition(" ")
            if kind == "front":
                fronts[what] = fronts.get(what, 0) + 1
            elif kind == "back":
                self._back_event(what, path, backs)
            elif kind == "release":
                for life in list(self.lives.values()):
                    life.look()
        # Each device once, however much was written.
        for key, names in backs.items():
            if key in self.lives:
                self.lives[key].handle_backend_change(names)
            else:
                self._find(*key)
        if fronts:
            for life in list(self.lives.values()):
                if str(life.ident) in fronts:
                    life.handle_frontend_change(fronts[str(life.ident)])

    def _back_event(self, name: str, path: str, backs: dict[_Key, set[str]]) -> None:
        if name not in self.classes:
            return
        parts = path.removeprefix(self._top + name).strip("/").split("/")
        if len(parts) >= 2 and None not in (_number(parts[0]), _number(parts[1])):
            backs.setdefault((name, int(parts[0]), int(parts[1])), set()).add("/".join(parts[2:]))
            return
        # A whole domain's, or all: something was removed, or has just been made.
        for key in self.lives:
            if key[0] == name and parts[0] in ("", str(key[1])):
                backs.setdefault(key, set())
        if parts[0]:
            self._discover_domain(name, parts[0])
        else:
            self._discover(name)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each device: where its handshake is, and what its class counts."""
        return {
            str(life.ident): {
                "state": life.state.name,
                "connected": life.connected,
                "violations": life.violations,
                "error": life.error,
                **life.device.stats(),
            }
            for life in self.lives.values()
        }


def _key(ident: DeviceId) -> _Key:
    return ident.class_name, ident.domid, ident.devid


def _number(text: str) -> int | None:
    """A domid or devid as the toolstack writes it; None for anything else ("+1", "01", an Arabic digit)."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or (text[0] == "0" and text != "0"):
        return None
    return int(text)
