"""What a device class is: three methods and a line in a table.

A class (blkback, netback, ...) derives from Device; pvdrivers.life leads it through the xenbus handshake, and
pvdrivers.host owns all of them. A device takes its identity and its parameters only from its own directory in
the store, which the toolstack wrote; the guest's directory holds claims, and every one of them is checked
(FrontKeys).
"""

from __future__ import annotations

import errno
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from .budget import Budget
from .errors import ConfigError, GuestError, ProtocolViolation, PvError
from .platform import Platform, XenStore

log = logging.getLogger(__name__)

Publish: TypeAlias = dict[str, str | int | bytes]
"""Keys for the backend's directory, relative to it."""

MAX_NODES = 512
"""Nodes in a frontend directory. 16 queues with rings of 16 pages take about 300."""
MAX_NAME = 64
"""Characters in the name of a node there; the longest in use is half of it."""
MAX_VALUE = 256
"""Bytes in a value there."""
_MOST_TRIES = 4
_MAX_DEPTH = 3  # vscsi-devs/dev-0/state
_DOMID_FIRST_RESERVED = 0x7FF0


class NotRecoverable(PvError):
    """connect(recover=True): what the dead process left behind does not do; reconnect in order instead."""


class NotYet(PvError):
    """connect() has to wait for something that is under way: no error, and asked again after `seconds`."""

    def __init__(self, text: str, seconds: float = 1.0) -> None:
        super().__init__(text)
        self.seconds = seconds


@dataclass(frozen=True)
class DeviceId:
    """One device: who serves it, and which it is of which guest. str() is "vbd-D-V"."""

    backend_domid: int
    class_name: str
    domid: int
    devid: int
    frontend_path: str
    """The `frontend` key of the backend's directory."""

    @property
    def backend_path(self) -> str:
        return f"/local/domain/{self.backend_domid}/{self.nodename}"

    @property
    def nodename(self) -> str:
        """As Linux calls it: backend/vbd/D/V."""
        return f"backend/{self.class_name}/{self.domid}/{self.devid}"

    @property
    def error_path(self) -> str:
        """Where xenbus_dev_error of Linux puts the text of an error."""
        return f"/local/domain/{self.backend_domid}/error/{self.nodename}/error"

    @property
    def domain_path(self) -> str:
        return f"/local/domain/{self.domid}"

    def __str__(self) -> str:
        return f"{self.class_name}-{self.domid}-{self.devid}"

    @classmethod
    def from_store(
        cls, store: XenStore, backend_domid: int, class_name: str, domid: int, devid: int
    ) -> DeviceId | None:
        """The device in a backend directory; None while the toolstack has not written enough of it.

        Raises ConfigError if its `frontend` key points into somebody else's domain.
        """
        device = cls(backend_domid, class_name, domid, devid, "")
        raw = store.read(device.backend_path + "/frontend")
        if not raw:
            return None
        front = raw.decode("latin-1").rstrip("\0/")
        if domid >= _DOMID_FIRST_RESERVED or not front.startswith(device.domain_path + "/"):
            raise ConfigError(
                f"{device.backend_path}/frontend is {front!a}, not below {device.domain_path}: not served"
            )
        return cls(backend_domid, class_name, domid, devid, front)


class _Keys:
    """Values of one directory, read at one moment, with checks."""

    def __init__(self, device: DeviceId, values: Mapping[str, bytes], prefix: str = "") -> None:
        self.device = device
        self._values = values
        self._prefix = prefix

    def wrong(self, name: str, why: str) -> PvError:
        """The error to raise about key `name`."""
        raise NotImplementedError

    def raw(self, name: str) -> bytes | None:
        """The value as it stands, None if there is no such node."""
        return self._values.get(self._prefix + name)

    def has(self, name: str) -> bool:
        """Whether there is such a node, with a value or with children."""
        path = self._prefix + name
        return path in self._values or any(key.startswith(path + "/") for key in self._values)

    def names(self) -> Iterator[str]:
        """Every node below, relative: "ring-ref", "queue-0/ring-ref"."""
        skip = len(self._prefix)
        return (key[skip:] for key in self._values if key.startswith(self._prefix))

    def int_key(self, name: str, default: int | None, low: int, high: int) -> int:
        """A decimal number from `low` to `high`. A missing key is `default`, or an error if that is None."""
        raw = self.raw(name)
        if raw is None:
            if default is None:
                raise self.wrong(name, "is missing")
            return default
        text = raw.strip(b" \t\n\0")
        if not re.fullmatch(rb"-?[0-9]{1,20}", text):
            raise self.wrong(name, f"is {_shown(raw)}, not a number")
        if not low <= int(text) <= high:
            raise self.wrong(name, f"is {_shown(raw)}, not from {low} to {high}")
        return int(text)

    def flag(self, name: str, default: bool = False) -> bool:
        """A 0 or 1. Any other number counts as 1, as in the drivers that read it with %u."""
        return self.int_key(name, int(default), 0, 0xFFFFFFFF) != 0

    def str_key(
        self, name: str, default: str | None, choices: Collection[str] | None = None, max_length: int = MAX_VALUE
    ) -> str:
        """A string of `choices`. A missing key is `default`, or an error if that is None."""
        raw = self.raw(name)
        if raw is None:
            if default is None:
                raise self.wrong(name, "is missing")
            return default
        if len(raw) > max_length:
            raise self.wrong(name, f"has {len(raw)} bytes, more than {max_length}")
        try:
            text = raw.rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise self.wrong(name, f"is {_shown(raw)}, not text") from None
        if choices is not None and text not in choices:
            raise self.wrong(name, f"is {_shown(raw)}, not one of {', '.join(sorted(choices))}")
        return text


def _shown(raw: bytes) -> str:
    """A stranger's bytes, short and safe to print."""
    return ascii(raw[:32].decode("latin-1")) + ("..." if len(raw) > 32 else "")


class FrontKeys(_Keys):
    """What the guest wrote into its directory, read at one moment. Every error is a ProtocolViolation."""

    def violation(self, text: str) -> ProtocolViolation:
        """For a check of the class's own, about more than one key."""
        return ProtocolViolation(self.device.domid, str(self.device), text)

    def wrong(self, name: str, why: str) -> ProtocolViolation:
        """ProtocolViolation naming domain, device and key."""
        return self.violation(f"frontend key {self._prefix}{name} {why}")

    def queue(self, index: int) -> FrontKeys:
        """The keys below queue-<index>; with one queue a frontend writes them flat, and `self` has them."""
        return FrontKeys(self.device, self._values, f"{self._prefix}queue-{index}/")

    def below(self, name: str) -> FrontKeys:
        """The keys below a directory."""
        return FrontKeys(self.device, self._values, f"{self._prefix}{name}/")

    @classmethod
    def read(cls, store: XenStore, device: DeviceId) -> FrontKeys:
        """The directory as it is at one moment; bounded, as the guest says how much is in it and how often.

        Raises ProtocolViolation beyond the bounds, GuestError if the guest writes there all the time.
        """

        def snapshot(tx: int) -> dict[str, bytes]:
            values: dict[str, bytes] = {}
            for path in _walk(store, device, tx, ""):
                raw = store.read(f"{device.frontend_path}/{path}", tx)
                values[path] = (raw or b"")[: MAX_VALUE + 1]
            return values

        try:
            values: dict[str, bytes] = store.transaction(snapshot, tries=_MOST_TRIES)
        except OSError as e:
            if e.errno != errno.EAGAIN:  # a conflict each time
                raise
            raise GuestError(f"{device.frontend_path} was written to each of {_MOST_TRIES} times it was read") from e
        keys = cls(device, values)
        for path, raw in values.items():
            if len(raw) > MAX_VALUE:
                raise keys.wrong(path, f"has more than {MAX_VALUE} bytes")
        return keys


def _walk(store: XenStore, device: DeviceId, tx: int, top: str) -> list[str]:
    """All nodes below the frontend's directory. Raises ProtocolViolation beyond the bounds."""
    found: list[str] = []
    todo = [top]
    while todo:
        directory = todo.pop()
        for name in store.ls(f"{device.frontend_path}/{directory}".rstrip("/"), tx) or ():
            path = f"{directory}/{name}".lstrip("/")
            if len(name) > MAX_NAME or len(found) >= MAX_NODES:
                text = f"frontend directory has more than {MAX_NODES} nodes, or a name longer than {MAX_NAME}"
                raise ProtocolViolation(device.domid, str(device), text)
            found.append(path)
            # Only these have children in any protocol; asking every node would double the round trips.
            if path.count("/") < _MAX_DEPTH - 1 and re.match(r"queue-|vscsi-devs|port", path):
                todo.append(path)
    return found


class BackKeys(_Keys):
    """What the toolstack wrote into the backend's own directory. Every error is a ConfigError."""

    def wrong(self, name: str, why: str) -> ConfigError:
        """ConfigError naming the key."""
        path = f"{self.device.backend_path}/{self._prefix}{name}"
        return ConfigError(f"{self.device}: backend key {path} {why}")

    def below(self, name: str) -> BackKeys:
        """The keys below a directory."""
        return BackKeys(self.device, self._values, f"{self._prefix}{name}/")

    @classmethod
    def read(cls, store: XenStore, device: DeviceId, *, wait: bool = True) -> BackKeys:
        """All of it at one moment: trusted, and small. The control thread has wait=False, see XenStoreClient."""
        found: BackKeys = store.transaction(lambda tx: cls.within(store, device, tx), wait=wait)
        return found

    @classmethod
    def within(cls, store: XenStore, device: DeviceId, tx: int) -> BackKeys:
        """The same, as a transaction sees it."""
        values: dict[str, bytes] = {}
        todo = [""]
        while todo:
            directory = todo.pop()
            for name in store.ls(f"{device.backend_path}/{directory}".rstrip("/"), tx) or ():
                path = f"{directory}/{name}".lstrip("/")
                values[path] = store.read(f"{device.backend_path}/{path}", tx) or b""
                if not values[path]:  # a directory, or an empty value
                    todo.append(path)
        return cls(device, values)


class Workers(Protocol):
    """The pool of data-plane threads (pvdrivers.worker) as the host sees it; rings concern the classes."""

    alert_fd: int
    """An eventfd, readable when something needs the control thread."""

    def start(self) -> None: ...

    def stop(self, *, left: bool = False) -> None:
        """`left`: devices were not disconnected in time; what they use is to stay until the process ends."""

    def alive(self) -> bool:
        """Whether each has gone round its loop since the last call; has them go round it again."""

    def alerts(self) -> Sequence[tuple[Any, str]]:
        """Takes what there is: the Device given at attach, and its guest's violation; quiets `alert_fd`.

        Raises PlatformError if a worker has ended.
        """

    def notices(self) -> Sequence[tuple[Any, str, str, int]]:
        """After alerts(): what an operator should hear while the Device goes on: the Device, a kind of trouble, a text,
        which is empty if it is over, and how often it has come up since the Device was connected."""


@dataclass
class Context:
    """Everything a device needs from the process it lives in."""

    platform: Platform
    workers: Workers
    run_dir: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of `pvdrivers serve`: journal (bool), spin (microseconds or None), strict (bool), grant_pages and
    grant_pages_per_domain (see Budget)."""
    budget: Budget = field(init=False)
    """Of pages of guests that may be mapped: for all devices of this process."""

    def __post_init__(self) -> None:
        self.budget = Budget(
            self.run_dir,
            getattr(self.platform, "grant_pages", None),
            mappings=getattr(self.platform, "mapping_pages", None),
            pages=self.options.get("grant_pages"),
            per_domain=self.options.get("grant_pages_per_domain"),
        )


class Device(ABC):
    """A device of some class. Called by one thread at a time, not always the same one.

    Any method may take long (draining a disk takes seconds): it holds up this device and no other. Whatever
    an exception leaves open, the method that raised has to close itself: after a connect() that raised there
    is no disconnect(). Exceptions: ProtocolViolation closes the device; ConfigError waits for the operator; NotYet
    is no trouble; StoreError, PlatformError, DeviceBusyError, GuestError and OSError are tried again, later and
    later; anything else is our own fault, is logged with its traceback, and closes the device.
    """

    violations: Mapping[int, str] = {}
    """RING.violation of the class's own, from worker.records.V_CLASS on, in words."""
    live_keys: Sequence[str] = ()
    """Of the guest's directory: refresh() is called when it changes one while it is connected."""
    wrong = ""
    """What the operator has to mend, though the guest is served: as connect() and refresh() have found it."""
    lost = False
    """What port_lost() has said is so still."""
    params: BackKeys
    """The backend's own directory, read just before any of advertise(), connect(), refresh() and reconfigure()."""

    def __init__(self, ident: DeviceId, context: Context) -> None:
        self.ident = ident
        self.context = context

    @abstractmethod
    def advertise(self) -> Publish:
        """Open what is behind the device; what to publish with InitWait (one transaction, the state last).

        Called again after a disconnect() and after an error, when `params` may say something else: then that is opened.
        """

    def reopen(self) -> None:
        """advertise() before connect(recover=True), publishing nothing: what is merely `wrong` is no error."""
        self.advertise()

    @abstractmethod
    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        """Check the frontend's keys, map its rings, bind its ports, hand the rings to a worker.

        Returns what to publish together with Connected. With `recover` a process that died had the device
        connected: re-attach so that the guest notices nothing, or raise NotRecoverable.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Finish what is in flight, take the rings from the worker, unmap, unbind. Idempotent. Must not fail: what
        cannot be undone is logged and left behind."""

    def refresh(self) -> Publish | None:
        """Look again at what is behind (SIGHUP, or a changed backend key): keys to rewrite, None if none. They are
        written together with the unchanged state, which is how Linux tells a frontend of a resize."""
        return None

    def reconfigure(self) -> Publish | None:
        """The guest is Reconfiguring: refresh(), and look at what it has changed for that."""
        return self.refresh()

    def hand_over(self) -> None:
        """The process ends, and the guest is not to notice: disconnect(), but keep what a successor needs. Called once,
        last, connected or not."""
        self.disconnect()

    def undo(self, steps: Iterable[Callable[[], None]]) -> None:
        """Let go of what disconnect() has to: each step is done, whatever became of those before."""
        for step in steps:
            try:
                step()
            except (PvError, OSError) as e:  # the guest is gone, say: what cannot be undone is left behind
                log.warning("%s: while disconnecting: %s", self.ident, e)

    def removed(self) -> None:  # noqa: B027 - most classes have nothing to do here
        """The device is gone for good, after disconnect(): close and delete what is left. To the toolstack all is
        released after this, so that another guest may have the image."""

    @classmethod
    def pages_mapped(cls) -> Mapping[str, int]:
        """Pages of its guest that a device of the usual size has mapped at most, by the operator's policy."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Counters for `pvdrivers stats`."""
        return {}
