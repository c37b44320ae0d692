"""A device's nodes in the store: reading both states, publishing, and telling of errors where others look.

Every method may raise OSError from the connection to the store. All of them are called on the control thread, which
waits for no other's transaction (wait=False). In a driver domain we see of a guest only what it or the toolstack lets
us: a node that we may not read is as good as none, and a home that we may not read is one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

from .control import Control
from .device import BackKeys, DeviceId, NotYet, Publish
from .xenbus import BadState, XenbusState, parse_state

log = logging.getLogger("pvdrivers.device")

SEEN_SECONDS = 2.0
"""How long the toolstack has to see that a device of a driver domain is closed, before its directory goes."""
_WRITTEN_TO_SECONDS = 0.05
"""Until a device is advertised again whose directory was written to meanwhile: whoever does so may not have ended."""
_MOST_TEXT = 1024
_LOST = {
    errno.ECONNRESET,
    errno.EPIPE,
    errno.EPROTO,
    errno.ETIMEDOUT,
    errno.EBADF,
    errno.ENOTCONN,
}
QUOTA = {errno.E2BIG, errno.ENOSPC, errno.ENOMEM}
"""xenstore has no more of something for this domain: C xenstored and oxenstored differ in which they say."""
_OWN_KEYS = {"", "state", "online", "hotplug-status", "hotplug-error"}


def connection_lost(error: OSError) -> bool:
    """Whether it was the connection to the store that failed, and not the one request."""
    return error.errno in _LOST


_IN_FULL = 8  # errors of a device that the log hears of each time


class Nodes:
    """The nodes of one device."""

    def __init__(self, control: Control, ident: DeviceId) -> None:
        self.ident = ident
        self.reported = ""
        self.stray = False
        """The frontend was found to be another backend's."""
        self.in_kernel: Callable[[], bool] = lambda: False
        """Whether the kernel's own backend has this device: who finds devices knows."""
        self._control = control
        self._errors = 0  # that were for the log
        self._written = True  # what was reported: not if the connection broke over it
        self._published: set[str] = set()
        self._lost = False  # our directory was not removed, but xenstored has forgotten everything

    def read(self, *, whose: bool = False) -> tuple[XenbusState, XenbusState | BadState, bool]:
        """Our state, the frontend's, and whether the device is to stay.

        With `whose`, a frontend that names another backend is none: that one has its rings.
        """
        store, ident = self._control.store, self.ident
        raw = store.read(ident.backend_path + "/state")
        ours = parse_state(raw)
        if isinstance(ours, BadState):
            self.report(f"{ident.backend_path}/state is {ours.text}, not a state")
            ours = XenbusState.Unknown
        theirs = parse_state(self._front("state"))
        self.stray = False
        if whose and theirs is not XenbusState.Unknown:
            backend = self._front("backend")
            self.stray = backend is not None and backend.rstrip(b"\0/") != ident.backend_path.encode()
            theirs = XenbusState.Unknown if self.stray else theirs
        # Our directory was there when we were made: if there is none, it was removed.
        online = raw is not None and self._online()
        if theirs is XenbusState.Unknown and online:
            online = self.domain_exists()
        return ours, theirs, online

    def _online(self, tx: int = 0) -> bool:
        """Whether the toolstack wants the device to stay. Linux takes a missing `online` for 0; then one that somebody
        attached by hand could never reconnect."""
        raw = self._control.store.read(self.ident.backend_path + "/online", tx)
        return (raw or b"1").strip(b" \n\0") != b"0"

    def untouched(self, tx: int = 0) -> bool:
        """Whether our directory is one that no backend has served yet. Once we have, that is another than ours was: the
        toolstack has removed that one, and attached the next device in its place."""
        state = self._control.store.read(self.ident.backend_path + "/state", tx)
        return parse_state(state) is XenbusState.Initialising and self._online(tx) and self.domain_exists()

    def came_back(self, *, another: bool) -> bool:
        """The connection to the store broke, and there is one again. Whether we are not in it any more, as it was
        restarted.

        xenstored keeps nothing over a restart (C xenstored without a live update), and what is missing then was
        removed by nobody: the guest runs, and so does its disk. `another`: it is known to be another store. Where that
        is not known, a guest with a home there has lost its device to the toolstack; in another store that proves
        nothing, as `xl mem-set` makes one.
        """
        gone = self._control.store.read(self.ident.backend_path + "/state") is None
        self._lost = gone and (another or not self.domain_exists())
        return self._lost

    @property
    def lost(self) -> bool:
        """That is so still: there is nothing to be read or written."""
        if self._lost:
            try:
                self._lost = self._control.store.read(self.ident.backend_path + "/state") is None
            except OSError:
                pass  # this connection has broken, too
        return self._lost

    @property
    def not_ours(self) -> bool:
        """xenstored has forgotten it, or the kernel's backend has it: nothing of it is to be read or written."""
        if self.lost or not self.in_kernel():
            return self._lost
        try:
            return self._control.store.read(self.ident.backend_path + "/state") is not None  # or it was removed
        except OSError:
            return True  # the connection has broken

    def domain_exists(self) -> bool:
        """Whether the guest has a home in the store; the toolstack removes it last."""
        try:
            return self._control.store.read(self.ident.domain_path) is not None
        except PermissionError:
            return True

    def _front(self, key: str) -> bytes | None:
        try:
            return self._control.store.read(f"{self.ident.frontend_path}/{key}")
        except PermissionError:
            return None

    def foreign(self, keys: Iterable[str]) -> bool:
        """Whether one of these keys of our directory is not one that we write ourselves."""
        return bool(set(keys) - _OWN_KEYS - self._published)

    def publish(self, ours: XenbusState, keys: Publish, state: XenbusState | None, of: BackKeys | None = None) -> bool:
        """Write keys and then the state, in one transaction. Without a state ours stays, and is written again if a key
        was not what it is now: that is how Linux tells a frontend of a new size, as of a disk that was taken over.

        False, and nothing done, if our state is no longer `ours`: the toolstack may have written Closing, or
        removed the directory, which a write would bring back. NotYet, and nothing done, if the toolstack does not ask
        for what it did in `of`: by now this is another device's directory, perhaps, though in the same state.
        """
        store, path = self._control.store, self.ident.backend_path

        def write(tx: int) -> bool:
            if parse_state(store.read(path + "/state", tx)) is not ours:
                return False
            if of is not None and self._said(of) != self._said(BackKeys.within(store, self.ident, tx)):
                raise NotYet("its directory was written to while it was opened", _WRITTEN_TO_SECONDS)
            new = state
            for key, value in keys.items():
                raw = value if isinstance(value, bytes) else str(value).encode()
                if store.read(f"{path}/{key}", tx) != raw:
                    store.write(f"{path}/{key}", raw, tx)
                    new = ours if state is None else state
            if new is not None:
                store.write(path + "/state", int(new), tx)
            return True

        self._published |= keys.keys()
        return bool(store.transaction(write, wait=False))

    def _said(self, keys: BackKeys) -> dict[str, bytes | None]:
        """What the toolstack has said of the device: all but what we write."""
        return {name: keys.raw(name) for name in keys.names() if self.foreign([name])}

    def leave(self, state: XenbusState) -> bool:
        """Our last word, whatever the toolstack has written meanwhile: it waits for this.

        False, and nothing done, if our directory has been removed, be it that there is another now: Closed is not for
        us to say of a device that is yet to be served.
        """
        store, path = self._control.store, self.ident.backend_path + "/state"

        def write(tx: int) -> bool:
            if store.read(path, tx) is None or self.untouched(tx):
                return False
            store.write(path, int(state), tx)
            return True

        return bool(store.transaction(write, wait=False))

    def report(self, text: str, *, hotplug: bool = False, logged: bool = False) -> None:
        """Tell the operator, once for each text: in the log, where Linux does, and to libxl if `hotplug`."""
        known, self.reported = text == self.reported, text
        if known and self._written:
            return
        self._written = False
        if not (logged or known):
            # A guest can fail in ever new words, by another gref each time: the log hears ever more rarely of it.
            self._errors += 1
            if self._errors <= _IN_FULL or self._errors & (self._errors - 1) == 0:
                so_far = f" ({self._errors} errors so far)" if self._errors > _IN_FULL else ""
                log.error("%s: %s%s", self.ident, text, so_far)
        store, path = self._control.store, self.ident.backend_path
        short = text.encode()[:_MOST_TEXT]

        def fail(tx: int) -> None:
            if store.read(path + "/state", tx) is not None:  # a directory that is removed must not come back
                self._try(lambda: store.write(path + "/hotplug-error", short, tx))
                self._try(lambda: store.write(path + "/hotplug-status", b"error", tx))

        self._try(lambda: store.write(self.ident.error_path, b"%d %s" % (errno.EINVAL, short)))
        if hotplug:
            self._try(lambda: store.transaction(fail, wait=False, tries=8))
        self._written = True

    def _try(self, write: Callable[[], object]) -> None:
        """A quota of a driver domain may be in the way, say: what can be said is said all the same."""
        try:
            write()
        except OSError as e:
            if connection_lost(e):
                raise
            log.debug("%s: %s", self.ident, e)

    def tell(self, wrong: str) -> None:
        """All is well, but for this."""
        if wrong:
            self.report(wrong)
        else:
            self.clear_report()

    def clear_report(self) -> None:
        """What was reported is over."""
        if self.reported:
            self.reported = ""
            self._control.store.rm(self.ident.error_path.rpartition("/")[0])
            self._control.store.rm(self.ident.backend_path + "/hotplug-error")

    def tidy(self) -> None:
        """The device is gone: if the guest is too, then nobody else will remove our directory.

        While the guest is there the toolstack does it, and would be confused if it were gone before it
        looked. In a driver domain it never does: there it is `xl devd` or us for whom libxl waits ten seconds.
        """
        store, path = self._control.store, self.ident.backend_path
        if self.ident.backend_domid != 0:
            self._control.later(SEEN_SECONDS, self._remove_closed)
            return
        if self.domain_exists():
            return
        store.rm(self.ident.error_path.rpartition("/")[0])
        store.rm(path)
        parent = path.rpartition("/")[0]
        if store.ls(parent) == []:
            store.rm(parent)

    def _remove_closed(self) -> None:
        """Remove our directory, unless it is in use again."""
        store, path = self._control.store, self.ident.backend_path

        def remove(tx: int) -> None:
            if not self._online(tx) and parse_state(store.read(path + "/state", tx)) is XenbusState.Closed:
                store.rm(path, tx)

        try:
            store.transaction(remove, wait=False)
        except OSError as e:
            if connection_lost(e):
                raise
            log.warning("%s: its directory cannot be removed: %s", self.ident, e)
