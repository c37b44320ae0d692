"""The daemon: finds devices in the store, and leads each through its life, on one control thread.

The thread waits for the store, for the workers' alerts, for finished jobs and for timers, and does nothing
while none of these happen, whatever the number of devices. Signals are for whoever runs it: stop() and
refresh() may be called from a handler.

What a SIGTERM does. Every device finishes what is in flight, is unmapped and unbound, and stays Connected in
the store, so that the next process takes it over and the guest only sees a pause. A device that is being
closed or unplugged stays in its state likewise, and the next process takes it over, too: it is served until its
guest lets go of it. Nothing is closed because a process ends: a guest could not get a disk with a mounted file
system back.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .claims import Claims
from .control import Backoff, Done, Jobs, Timer, Timers
from .device import Context, Device
from .errors import LeftInUse, PlatformError, PvError
from .finder import Finder, Key, key_of
from .handover import HandOver
from .incarnation import incarnation
from .life import Life
from .nodes import connection_lost
from .platform import XenStore

log = logging.getLogger("pvdrivers.host")

_RECONNECT = (0.1, 5.0)
STORE_SECONDS = 5.0
"""How long a request to xenstore may hold up the control thread, which gives the signs of life. It takes much less than
a millisecond; after this the connection is given up, and made anew."""


class Host:
    """All devices of this process. run() is the control thread; the other methods but stop() belong to it."""

    def __init__(
        self,
        context: Context,
        classes: Mapping[str, type[Device]],
        *,
        domains: Collection[int] | None = None,
        connect_store: Callable[[], XenStore] | None = None,
        kernel_root: Path | None = None,
    ) -> None:
        """`domains`: serve only these guests. `connect_store` makes a new connection when the store's is
        lost. `kernel_root`: below it is seen what the kernel serves itself, on a real Xen."""
        self.context = context
        context.platform.store.timeout = STORE_SECONDS
        self.lives: dict[Key, Life] = {}
        self.claims = Claims(context.run_dir)
        self.finder = Finder(self, classes, domains, kernel_root)
        self.started = False
        """Everything that was there at the start is in hand."""
        self.stopping = False
        self.listeners: list[Callable[[Life | None], None]] = []
        """Called when a device has changed in some way; None: one that is not served."""
        self.letting_go: HandOver | None = None
        self.in_use = 0
        """Devices that stay as they are until the process ends: see LeftInUse."""
        self.refreshed: Callable[[], None] = lambda: None
        """Called when all that refresh() asks for is under way."""
        self._connect_store = connect_store
        self._timers = Timers()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._jobs = Jobs(self._wake)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._store_fd = -1
        self._away = False  # ... for a while now: said once
        self._incarnation = b""
        self._reconnect = Backoff(self, self._try_store, *_RECONNECT)
        self._refreshing = False
        self._error: PvError | None = None

    # For other threads and signal handlers

    def stop(self) -> None:
        """Have run() hand all devices over, and return."""
        self.stopping = True
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
            self._hear_store()
            self._incarnation = incarnation(self.store, self.context.platform.domid)
            self.finder.attach()
            self.finder.name_left_out()
            self.started = True
            if ready is not None:
                ready(len(self.lives) + len(self.finder.waiting))
            while not self.stopping and self._error is None:
                self._turn(self._timers.timeout())
            self._hand_over()
        finally:
            self._selector.unregister(alerts)
            self._close_claims()
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
            self.refreshed()

    def hear(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` called whenever `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def unhear(self, fd: int) -> None:
        """No more of that."""
        self._selector.unregister(fd)

    def _alerted(self) -> None:
        try:
            alerts = self.context.workers.alerts()
        except PlatformError as e:
            self._error = e  # a worker has ended: who comes next takes over what it served
            return
        for device, violation in alerts:
            if (life := self._life_of(device)) is not None:
                life.fault(violation)
        for device, kind, text, times in self.context.workers.notices():
            if (life := self._life_of(device)) is not None:
                life.notice(kind, text, times)
                if kind == "stalled":
                    life.refresh()  # its class has something to tell the guest

    def _life_of(self, device: Device) -> Life | None:
        life = self.lives.get(key_of(device.ident))
        return life if life is not None and life.device is device else None

    def close(self) -> None:
        """Give back claims and descriptors, after run() and once no signal handler calls here any more.

        One end of the pipe stays open: a job that finishes late writes to it, and must not hit somebody's file.
        """
        self._close_claims()
        self._selector.close()
        os.close(self._wake_read)

    def _close_claims(self) -> None:
        if not self.lives:  # or what is left would be another process's while it is in use here
            self.claims.close()

    def _hand_over(self) -> None:
        """The process ends."""
        if self.letting_go is None:
            HandOver(self, lambda life, stopped: None, lambda left: None)
        while self.letting_go is not None and not self.letting_go.over:
            self._turn(self._timers.timeout())

    # What a Life wants (pvdrivers.control.Control)

    @property
    def store(self) -> XenStore:
        return self.context.platform.store

    def now(self) -> float:
        return time.monotonic()

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        self._jobs.submit(job, partial(self._finished, done))

    def _finished(self, done: Done, result: Any, error: BaseException | None) -> None:
        if not isinstance(error, LeftInUse):
            return done(result, error)
        # Nothing follows on it: the device is busy for good.
        self.in_use += 1
        if self.letting_go is not None:
            self.letting_go.look()

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self._timers.later(seconds, call)

    def pause(self, life: Life) -> None:
        self.finder.unwatch_front(life)

    def resume(self, life: Life) -> None:
        self.finder.watch_front(life)

    def gone(self, life: Life) -> None:
        self.forget(life)
        self.unwatch(life)
        for other in list(self.lives.values()):
            other.ask_again()  # what it had may be what they wait for
        self.later(0.0, partial(self.finder.look_for_next, life))
        self.changed(life)

    def forget(self, life: Life) -> None:
        """It is not ours any more."""
        self.lives.pop(key_of(life.ident), None)
        self.claims.drop(life.ident)

    def unwatch(self, life: Life) -> None:
        """Nothing is to be heard of its frontend."""
        try:
            self.finder.unwatch_front(life)
        except OSError as e:
            log.debug("%s: %s", life.ident, e)  # not watched while it was paused, or the store is lost

    def changed(self, life: Life | None) -> None:
        for call in self.listeners:
            call(life)

    def fail(self, error: PvError) -> None:
        """Have run() end with this error."""
        self._error = error

    def store_lost(self) -> None:
        if self._store_fd < 0:
            return
        if not self._away:
            log.error("the connection to xenstore is lost; devices are served, but none comes or goes meanwhile")
        self._away = True
        self._selector.unregister(self._store_fd)
        self._store_fd = -1
        if self._connect_store is None:
            self._error = PlatformError("the connection to xenstore is lost")
        else:
            self._reconnect.again()

    def _try_store(self) -> None:
        # By a job: an xenstored that hangs must not have this thread wait for it again and again.
        assert self._connect_store is not None
        self.submit(partial(_open_store, self._connect_store), self._store_back)

    def _store_back(self, store: XenStore | None, error: BaseException | None) -> None:
        if store is None:
            if not isinstance(error, OSError):
                log.error("xenstore: our own fault", exc_info=error)
            log.debug("xenstore: %s", error)
            self._reconnect.again()
            return
        self.store.close()
        self.context.platform.store = store
        self._hear_store()
        try:
            self._look_for_lost()
            self.finder.attach()
        except Exception as e:
            if not isinstance(e, OSError):
                log.exception("xenstore: our own fault")
            log.debug("xenstore: %s", e)
            self.store_lost()
            return
        if self._store_fd >= 0:
            self._reconnect.reset()
            self._away = False
            log.warning("xenstore is back")

    def _look_for_lost(self) -> None:
        now = incarnation(self.store, self.context.platform.domid)
        restarted = now != self._incarnation or not now
        another = restarted and bool(now and self._incarnation)
        for life in self.lives.values():
            if restarted and life.in_use and life.nodes.came_back(another=another):
                text = "xenstore was restarted, and knows neither it nor its guest; it is served as before"
                life.troubles.add("lost", text)
            elif not life.nodes.lost:
                life.troubles.over("lost")
        self._incarnation = now  # last: if this connection breaks as well, all this is done again

    def _hear_store(self) -> None:
        self._store_fd = self.store.fileno()
        self._selector.register(self._store_fd, selectors.EVENT_READ, self.finder.store_events)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each device: where its handshake is and since when (seconds since the epoch), what is not as it should be,
        how often that was so, and what its class counts."""
        return {
            str(life.ident): {
                "state": life.state.name,
                "since": life.troubles.since,
                "connected": life.connected,
                "violations": life.violations,
                "error": life.error,
                "troubles": dict(life.troubles.now),
                "counts": dict(life.troubles.counts),
                **life.device.stats(),
            }
            for life in self.lives.values()
        }


def _open_store(connect: Callable[[], XenStore]) -> XenStore:
    """A connection that answers. OSError: there is none, or nothing in the store."""
    store = connect()
    store.timeout = STORE_SECONDS
    try:
        if store.ls("/local/domain") is None:
            # Started afresh, with nothing in it: to look at it now would be to give up all that is served.
            raise OSError(errno.ENOENT, "xenstore is empty")
    except PermissionError:
        pass  # a driver domain's view
    except BaseException:
        store.close()
        raise
    return store
