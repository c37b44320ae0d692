"""Finds the devices of a daemon in the store, claims them, and gives each a life."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from . import classes as table
from . import modprobe
from .control import Backoff, Timer
from .device import Device, DeviceId
from .errors import ConfigError, DeviceBusyError, PlatformError, PvError
from .life import Life
from .nodes import QUOTA, connection_lost
from .xenbus import XenbusState

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger("pvdrivers.host")

PREDECESSOR_SECONDS = 5.0
"""How long a process that is ending may keep its claims before that is an error."""
POLL_SECONDS = 1.0
"""How often a frontend is looked at that cannot be watched."""
_CLAIM_AGAIN = (0.05, 1.0)

Key: TypeAlias = tuple[str, int, int]
"""class, domid, devid"""


class _Waiting:
    """A device that another process still serves."""

    def __init__(self, backoff: Backoff, deadline: float, at_start: bool) -> None:
        self.backoff = backoff
        self.deadline = deadline
        self.at_start = at_start
        self.error = ""
        self.told = False


class Finder:
    """Watches the backend directories of some classes. All of it runs on the control thread."""

    def __init__(
        self,
        host: Host,
        classes: Mapping[str, type[Device]],
        domains: Collection[int] | None,
        kernel_root: Path | None,
    ) -> None:
        """`domains`: serve only these guests. `kernel_root`: below it the kernel's own backends are seen; None
        on the embedded Xen."""
        self.classes = classes
        self.domains = domains
        self.waiting: dict[Key, _Waiting] = {}
        self.refused: dict[Key, str] = {}
        """Directories that are not served, and why."""
        self.unwatched: dict[Key, Life] = {}
        """Devices whose frontends are looked at every second: xenstore lets us watch no more."""
        self.passive = False
        """Devices are found, and not claimed: who has them is going to hand them over."""
        self._host = host
        self._kernel_root = kernel_root
        self._top = f"/local/domain/{host.context.platform.domid}/backend/"
        self._poll: Timer | None = None
        self._told_quota = False

    # Watches

    def attach(self) -> None:
        """Watch everything, and look at everything: at the start, and with a new connection to the store."""
        for name in self.classes:
            self._watch(self._top + name, f"back {name}")
        try:
            self._watch("@releaseDomain", "release")
        except OSError as e:
            if connection_lost(e):
                raise
            log.debug("%s", e)  # a driver domain may not watch that; it is told by the toolstack
        self.unwatched.clear()
        for life in list(self._host.lives.values()):
            self.watch_front(life)
            life.handle_backend_change(None)  # while there was no connection anything may have been written
        self.discover()

    def discover(self) -> None:
        """Look for devices that have no life yet."""
        for name in self.classes:
            self._discover(name)

    def watch_front(self, life: Life) -> None:
        """Hear of a frontend's state; where xenstore has no watch left, or refuses one, look at it every second."""
        try:
            self._watch(f"{life.ident.frontend_path}/state", f"front {life.ident}")
        except OSError as e:
            if connection_lost(e):
                raise
            quota = e.errno in QUOTA
            if quota and not self._told_quota:
                self._told_quota = True
                log.error(
                    "%s: no watch is left (%s): it and those that come after are looked at every second; a domain has"
                    " 128 by default, xenstored -W or quota-maxwatch in oxenstored.conf gives it more", life.ident, e
                )  # fmt: skip
            self.unwatched[key_of(life.ident)] = life
            why = "no watch is left for it" if quota else f"its frontend cannot be watched ({e})"
            level = logging.DEBUG if quota else logging.ERROR  # of a quota the log has heard
            life.troubles.add("unwatched", f"{why}: it is looked at every second", level)
            if self._poll is None:
                self._poll = self._host.later(POLL_SECONDS, self._look_at_unwatched)
        else:
            life.troubles.over("unwatched")
            self._watch_live(life)

    def _watch_live(self, life: Life) -> None:
        for key in life.device.live_keys:
            try:
                self._watch(f"{life.ident.frontend_path}/{key}", f"live {life.ident}")
            except OSError as e:
                if connection_lost(e):
                    raise
                log.debug("%s: %s", life.ident, e)  # then it holds from the next connection on

    def unwatch_front(self, life: Life) -> None:
        """Hear no more of it."""
        ident = life.ident
        if self.unwatched.pop(key_of(ident), None) is None:
            self._host.store.unwatch(ident.frontend_path + "/state", f"front {ident}")
            for key in life.device.live_keys:
                self._unwatch_live(ident, key)

    def _unwatch_live(self, ident: DeviceId, key: str) -> None:
        try:
            self._host.store.unwatch(f"{ident.frontend_path}/{key}", f"live {ident}")
        except FileNotFoundError:
            pass  # there was no watch left for it

    def _look_at_unwatched(self) -> None:
        self._poll = None
        for life in list(self.unwatched.values()):
            del self.unwatched[key_of(life.ident)]
            self.watch_front(life)
            life.look()

    def _watch(self, path: str, token: str) -> None:
        try:
            self._host.store.watch(path, token)
        except FileExistsError:
            pass

    # Devices that come

    def _discover(self, name: str) -> None:
        for domid in self._host.store.ls(self._top + name) or ():
            self._discover_domain(name, domid)

    def _discover_domain(self, name: str, domid: str) -> None:
        if _number(domid) is None:
            return
        for devid in self._host.store.ls(f"{self._top}{name}/{domid}") or ():
            if _number(devid) is not None:
                self._try(name, int(domid), int(devid))

    def _try(self, name: str, domid: int, devid: int) -> None:
        """find(), and what goes wrong with one is not the others'."""
        try:
            self.find(name, domid, devid)
        except OSError as e:
            if connection_lost(e):
                raise
            self._refuse((name, domid, devid), f"{self._top}{name}/{domid}/{devid}: {e}")

    def find(self, name: str, domid: int, devid: int) -> None:
        """A directory of a device: if it is complete and ours to serve, then it gets a life."""
        host, key = self._host, (name, domid, devid)
        if key in host.lives or host.stopping or (self.domains is not None and domid not in self.domains):
            return
        if name not in self.classes:  # of a predecessor that had more
            return
        if host.store.read(f"{self._top}{name}/{domid}/{devid}/state") is None:
            if self.waiting.pop(key, None) is not None or self.refused.pop(key, None) is not None:
                host.changed(None)
            return
        if self._kernel_root is not None and (driver := modprobe.in_kernel(name, self._kernel_root)):
            text = f"{driver} was loaded meanwhile; not served, as two backends would destroy the disk"
            return self._refuse(key, f"{self._top}{name}/{domid}/{devid}: {text}")
        if qemu := table.in_qemu(host.store, host.context.platform.domid, name, domid, devid):
            text = f"{qemu}; not served, as two backends would destroy the disk; use backendtype=phy, or block-attach"
            return self._refuse(key, f"{self._top}{name}/{domid}/{devid}: {text}")
        try:
            ident = DeviceId.from_store(host.store, host.context.platform.domid, name, domid, devid)
        except ConfigError as e:
            return self._refuse(key, str(e))
        if ident is None:
            return
        self.refused.pop(key, None)
        if self.passive:
            self.waiting.setdefault(key, self._new_waiting(key))
            return
        try:
            host.claims.take(ident)
        except (DeviceBusyError, PlatformError) as e:
            self._wait(key, e)
            return
        waited = self.waiting.pop(key, None)
        if waited is not None:
            waited.backoff.reset()
        try:
            life = host.lives[key] = Life(self.classes[name](ident, host.context), host)
        except BaseException:
            host.claims.drop(ident)
            raise
        if self._kernel_root is not None:
            life.nodes.in_kernel = partial(modprobe.has_device, *key, self._kernel_root)
        self.watch_front(life)
        life.look()

    def look_for_next(self, life: Life) -> None:
        """Take the device that was attached in the place of one that is gone: what was told of it was told to that."""
        if life.nodes.untouched():
            self._try(*key_of(life.ident))

    def _look_for_kernel(self, life: Life) -> None:
        """Name a device that a backend of the kernel's has taken."""
        name, root = life.ident.class_name, self._kernel_root
        if root is not None and life.nodes.in_kernel():
            driver, module = modprobe.in_kernel(name, root), modprobe.MODULES.get(name, name)
            life.troubles.add("kernel", f"{driver} was loaded while it was served here, and has taken it: we leave it"
                              f" alone, and its guest may lose it. rmmod {module}, keep that out (docs/dom0.md), then"
                              " attach the device anew, or reboot the guest", logging.ERROR)  # fmt: skip
        elif "kernel" in life.troubles.now:
            life.troubles.over("kernel")
            life.drop("the kernel's backend had it meanwhile; it is closed, and may connect anew")

    def _refuse(self, key: Key, why: str) -> None:
        if self.refused.get(key) != why:
            self.refused[key] = why
            log.error("%s", why)
            self._host.changed(None)

    def _wait(self, key: Key, error: PvError) -> None:
        """Another process has the device (or the run directory is full): that may pass, or is an error to be seen."""
        host = self._host
        waiting = self.waiting.get(key)
        if waiting is None:
            waiting = self.waiting[key] = self._new_waiting(key)
            host.changed(None)
        waiting.error = str(error)
        if host.now() >= waiting.deadline and not waiting.told:
            waiting.told = True
            log.error("%s", error)
            if not host.lives and all(other.told and other.at_start for other in self.waiting.values()):
                host.fail(error)
        waiting.backoff.again()

    def _new_waiting(self, key: Key) -> _Waiting:
        backoff = Backoff(self._host, lambda: self._try(*key), *_CLAIM_AGAIN)
        return _Waiting(backoff, self._host.now() + PREDECESSOR_SECONDS, not self._host.started)

    def take_waiting(self) -> None:
        """Who had the devices that are waited for has ended."""
        keys = list(self.waiting)
        self.waiting.clear()
        for key in keys:
            self._try(*key)

    def name_left_out(self) -> None:
        """At the start: devices in use of a kind that is left to the kernel, whose driver has not got them."""
        root, home = self._kernel_root, self._host.context.platform.domid
        if root is None or self.passive:
            return
        for name in sorted(table.known().keys() - self.classes.keys()):
            driver = modprobe.in_kernel(name, root) or modprobe.comes_with_udev(name, root)
            left = [
                key for key in self._connected(name) if not modprobe.has_device(*key, root)
                and not self._host.claims.held(DeviceId(home, *key, ""))
            ] if driver else []  # fmt: skip
            if left:
                log.error(
                    "%s: connected, and served by nobody, as %s is left to %s: its guest waits. Keep that out, as"
                    " docs/dom0.md has it, and restart this service",
                    ", ".join("{}-{}-{}".format(*key) for key in left), name, driver.rstrip(","),
                )  # fmt: skip

    def _connected(self, name: str) -> Iterator[Key]:
        store, top = self._host.store, self._top + name
        for domid in store.ls(top) or ():
            for devid in store.ls(f"{top}/{domid}") or ():
                if None not in (_number(domid), _number(devid)):
                    if store.read(f"{top}/{domid}/{devid}/state") == b"%d" % XenbusState.Connected:
                        yield name, int(domid), int(devid)

    # Events of the store

    def store_events(self) -> None:
        """Take what the watches tell, and look at what it is about: each device once, however much was written."""
        lives = self._host.lives
        fronts: dict[str, int] = {}
        live: dict[str, int] = {}
        backs: dict[Key, set[str]] = {}
        for path, token in self._host.store.events():
            kind, _, what = token.partition(" ")
            if kind == "front":
                fronts[what] = fronts.get(what, 0) + 1
            elif kind == "live":
                live[what] = live.get(what, 0) + 1
            elif kind == "back":
                self._back_event(what, path, backs)
            elif kind == "release":
                for life in list(lives.values()):
                    life.look()
        for key, names in backs.items():
            if key in lives:
                self._look_for_kernel(lives[key])
                lives[key].handle_backend_change(names)
            else:
                self._try(*key)
        if fronts or live:
            for life in list(lives.values()):
                if str(life.ident) in live:
                    life.handle_live_key(live[str(life.ident)])
                if str(life.ident) in fronts:
                    life.handle_frontend_change(fronts[str(life.ident)])

    def _back_event(self, name: str, path: str, backs: dict[Key, set[str]]) -> None:
        if name not in self.classes:
            return
        parts = path.removeprefix(self._top + name).strip("/").split("/")
        if len(parts) >= 2 and None not in (_number(parts[0]), _number(parts[1])):
            backs.setdefault((name, int(parts[0]), int(parts[1])), set()).add("/".join(parts[2:]))
            return
        # A whole domain's, or all: something was removed, or has just been made.
        for key in [*self._host.lives, *self.waiting, *self.refused]:
            if key[0] == name and parts[0] in ("", str(key[1])):
                backs.setdefault(key, set())
        if parts[0]:
            self._discover_domain(name, parts[0])
        else:
            self._discover(name)


def key_of(ident: DeviceId) -> Key:
    """What a device is found by."""
    return ident.class_name, ident.domid, ident.devid


def _number(text: str) -> int | None:
    """A domid or devid as the toolstack writes it; None for anything else ("+1", "01", an Arabic digit)."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or (text[0] == "0" and text != "0"):
        return None
    return int(text)
