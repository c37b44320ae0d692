"""The life of a device on the guest's side, of whatever class: what is said to the backend, and when.

The table of pvdrivers.xenbus decides; here its actions are carried out, on one control thread a device. A watch
callback only sets a flag: whatever a backend writes, and however often, costs one look at a time.
"""

from __future__ import annotations

import errno
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from pvdrivers.closing import Closing
from pvdrivers.errors import ConfigError, ProtocolViolation, PvError
from pvdrivers.platform import Platform
from pvdrivers.xenbus import Action, BadState, Role, XenbusState, parse_state, step

from .watches import Watches

__all__ = ["DRAIN", "GIVE_BACK", "POLL", "Frontend"]

DRAIN = 5.0  # seconds that requests in flight have to end when the backend closes, or we do
GIVE_BACK = 2.0  # seconds that the backend has to close, and so to unmap, after us
POLL = 0.02


class Frontend(Closing):
    """Everything of a device but its class. `kind` is the class's directory in xenstore, `noun` what people call it."""

    kind = ""
    noun = ""

    def __init__(self, platform: Platform, devid: int, name: str, watches: Watches | None) -> None:
        self.platform = platform
        self.devid = devid
        self.name = name
        self.path = f"/local/domain/{platform.domid}/device/{self.kind}/{devid}"
        self.state = XenbusState.Unknown
        self.failure = ""  # why the device is out of use
        self.connected_at = time.monotonic()
        self.connections = 0
        self._own_watches = watches is None
        self._watches = watches
        self._tokens: list[str] = []
        self._backend = ""
        self._backend_id = 0
        self._wanted = True
        self._look = threading.Event()
        self._change = threading.Condition()
        self._saying = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False

    # What a class does

    @abstractmethod
    def _publish(self, new: XenbusState) -> None:
        """New rings, and where they are: everything that the backend needs to connect."""

    @abstractmethod
    def _use(self, new: XenbusState) -> None:
        """The backend is connected: learn what it says of the device, and begin."""

    def _refresh(self) -> None:  # a class may have nothing to do here
        """The backend has changed something while it is connected."""

    @abstractmethod
    def _suspend(self, patience: float) -> None:
        """Leave the rings; what is in flight may end within `patience` seconds."""

    @abstractmethod
    def _give_back(self) -> None:
        """Take rings and grants back from the backend, which has let go of them if it ever will."""

    @abstractmethod
    def _stop(self, why: str) -> None:
        """Out of use: whoever waits for something gets an error."""

    @abstractmethod
    def _end(self) -> None:
        """Nothing will be used again."""

    def _busy(self) -> bool:
        """Whether close() should wait for something that is in flight."""
        return False

    # For everybody

    @property
    def backend_domid(self) -> int:
        """The domain that serves this device."""
        return self._backend_id

    def start(self) -> None:
        """Begin to follow the backend, on a thread of its own, without waiting for it; connect() does."""
        if self._thread is not None:
            return
        self._read_backend()
        self._say(XenbusState.Initialising)
        if self._watches is None:
            self._watches = Watches(self.platform.store)
        self._watch()
        self._thread = threading.Thread(target=self._follow, name=f"{self.kind}-{self.name}", daemon=True)
        self._thread.start()

    def connect(self, timeout: float = 30.0) -> None:
        """Wait until the device can be used. PvError when it cannot within `timeout` seconds, with the reason."""
        self.start()
        if not self.wait_state(lambda: self.state is XenbusState.Connected or bool(self.failure), timeout):
            theirs = self._their_state()
            raise PvError(
                f"{self.noun} {self.name} ({self.path}): no connection within {timeout:g} s; we are {self.state.name},"
                f" the backend {self._backend} is {getattr(theirs, 'name', theirs)}. Is a backend running for it?"
            )
        if self.failure:
            raise PvError(self.failure)

    def wait_state(self, reached: Any, timeout: float) -> bool:
        """Wait until reached() is true, looking whenever the state changes. False after `timeout` seconds."""
        with self._change:
            return bool(self._change.wait_for(reached, timeout))

    def close(self, timeout: float = DRAIN) -> None:
        """Orderly: what is in flight ends first, then state Closed, then rings and grants are taken back.

        What has not ended after `timeout` seconds gets OSError(EIO). Harmless a second time.
        """
        if self._ended:
            return
        self._wanted = False
        thread = self._thread
        if thread is not None:
            deadline = time.monotonic() + timeout
            while self._busy() and time.monotonic() < deadline and not self.failure:
                time.sleep(POLL)
            self._ended = True
            self._look.set()
            thread.join()
            try:
                self._drop(self.failure or f"{self.noun} {self.name} is closed")
                if self.state is not XenbusState.Unknown:
                    self._say(XenbusState.Closing)
                    self._say(XenbusState.Closed)
            except OSError:
                pass  # the store is gone, and nobody to say it to
            self._release(GIVE_BACK)
            self._end()
        self._ended = True
        if self._watches is not None:
            for token in self._tokens:
                self._watches.remove(token)
            if self._own_watches:
                self._watches.close()

    # Following the backend: the control thread

    def _follow(self) -> None:
        while True:
            self._look.wait()
            self._look.clear()
            if self._ended:
                return
            try:
                while not self._ended and not self.failure and self._step():
                    pass
            except PvError as error:
                self._went_wrong(str(error))
            except ValueError as error:
                if self._their_state() is not XenbusState.Unknown:  # removed while it was read: our watch says so
                    self._went_wrong(str(ProtocolViolation(self._backend_id, self._ident, f"backend's {error}")))
            except OSError as error:
                self._went_wrong(f"{self.noun} {self.name}: {error}")

    def _step(self) -> bool:
        """One look at the backend, and what follows from it. True if the state has changed: look again."""
        theirs = self._their_state()
        if self._gone():
            self._fail(self._gone_text)
            return False
        if isinstance(theirs, BadState):
            raise ProtocolViolation(self._backend_id, self._ident, f"backend state is {theirs.text}")
        if theirs is XenbusState.Unknown:
            self._read_backend()
        new, action = step(Role.FRONT, self.state, theirs, self._wanted)
        if self.state is XenbusState.Closed and new is XenbusState.Initialising and self._read_key("online") == b"0":
            return False  # unplugged: nobody will come back
        if action is Action.REJECT:
            raise ProtocolViolation(
                self._backend_id, self._ident, f"backend went to {theirs.name} while we are {self.state.name}"
            )
        if action in (Action.ADVERTISE, Action.RECONNECT):
            self._publish(new)
        elif action is Action.CONNECT:
            self._use(new)
        elif action is Action.REFRESH:
            self._refresh()
            if new is not self.state:
                self._say(new)
        elif action is Action.CLOSE:
            self._suspend(DRAIN if theirs is XenbusState.Closing else 0)
            self._say(new)
            self._release(GIVE_BACK)
            return True
        elif action in (Action.SAY, Action.RECONFIGURE):
            self._say(new)
            return True
        return False

    def _release(self, patience: float) -> None:
        """Take rings and grants back, once the backend has let go of them or `patience` seconds are over."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self._their_state() in (
            XenbusState.Connected,
            XenbusState.Closing,
        ):
            time.sleep(POLL)
        self._give_back()

    def _count_connection(self) -> None:
        """One more; the first begins the time that statistics are over."""
        if not self.connections:
            self.connected_at = time.monotonic()
        self.connections += 1

    # When it goes wrong

    def violated(self, violation: str) -> None:
        """A queue's ring is dead; on its pump's thread."""
        self._fail(str(ProtocolViolation(self._backend_id, self._ident, violation)))

    def _fail(self, why: str) -> None:
        """Out of use until it is closed. Every caller gets EIO; the backend is told to go."""
        if self.failure:
            return
        self._drop(why)
        try:
            if self.platform.store.read(f"{self.path}/backend") is not None:
                self._say(XenbusState.Closing)
                self._say(XenbusState.Closed)
        except OSError:
            pass  # the store is gone as well
        with self._change:
            self._change.notify_all()

    def _drop(self, why: str) -> None:
        self.failure = why
        self._stop(why)

    def _went_wrong(self, why: str) -> None:
        """On the control thread. What cannot be read or written any more has gone with our directory, perhaps."""
        self._fail(self._gone_text if self._gone() else why)

    def _gone(self) -> bool:
        """Whether the toolstack has removed our directory, which it may do between any two steps of ours."""
        try:
            return self.platform.store.read(f"{self.path}/backend-id") is None
        except OSError:
            return False  # the store is gone, and what is in it is not known

    @property
    def _gone_text(self) -> str:
        return f"{self.noun} {self.name} has been detached"

    @property
    def _ident(self) -> str:
        return f"{self.kind} {self.name}"

    # Xenstore

    def _watch(self) -> None:
        assert self._watches is not None
        for token in self._tokens:
            self._watches.remove(token)
        paths = (f"{self._backend}/state", f"{self.path}/backend")
        self._tokens = [self._watches.add(path, self._look.set) for path in paths]

    def _read_backend(self) -> None:
        """Who the backend is; again when it is gone, for another domain may be in its place."""
        store = self.platform.store
        path, domid = store.read(f"{self.path}/backend"), store.read(f"{self.path}/backend-id")
        if path is None or domid is None or not domid.isdigit():
            if self._backend:
                raise ConfigError(self._gone_text)
            raise ConfigError(f"{self.noun} {self.name}: no backend and backend-id in {self.path}; attach it first")
        before, self._backend = self._backend, path.decode()
        self._backend_id = int(domid)
        if before not in ("", self._backend):
            self._watch()

    def _read_key(self, key: str) -> bytes | None:
        try:
            return self.platform.store.read(f"{self._backend}/{key}")
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            return None

    def _their_state(self) -> XenbusState | BadState:
        try:
            return parse_state(self._read_key("state"))
        except OSError:
            return XenbusState.Unknown

    def _say(self, state: XenbusState) -> None:
        """To the backend. Of a device that has failed only its end: that is found on other threads, at any time."""
        with self._saying:
            if self.failure and state not in (XenbusState.Closing, XenbusState.Closed):
                return
            self.platform.store.write(f"{self.path}/state", int(state))
            self._entered(state)

    def _commit(self, write: Callable[[int], None], state: XenbusState) -> None:
        """The same of a state that is written with other keys, in a transaction."""
        with self._saying:
            if not self.failure:
                self.platform.store.transaction(write)
                self._entered(state)

    def _entered(self, state: XenbusState) -> None:
        with self._change:
            self.state = state
            self._change.notify_all()
