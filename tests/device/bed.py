"""What the tests of device lives stand on: a real store, a toolstack, a guest that obeys the test, a device."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from pvdrivers.control import Done, Timer, Timers
from pvdrivers.device import Context, Device, DeviceId, FrontKeys, Publish
from pvdrivers.life import Life
from pvdrivers.platform import Platform, XenStore
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient
from tests.xenstore.conftest import Served

BACK = "/local/domain/0/backend/vbd/{domid}/{devid}"
FRONT = "/local/domain/{domid}/device/vbd/{devid}"


class Disk(Device):
    """A small class: two keys to check, a record of all that was done to it, and troubles to order."""

    def __init__(self, ident: DeviceId, context: Context) -> None:
        super().__init__(ident, context)
        self.calls: list[str] = []
        self.troubles: dict[str, list[BaseException]] = {}
        self.attached = False
        self.sectors = 100
        self.front: FrontKeys | None = None
        self.hold: Callable[[str], None] = lambda what: None

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.hold(what)
        if self.troubles.get(what):
            raise self.troubles[what].pop(0)

    def advertise(self) -> Publish:
        assert not self.attached
        self._called("advertise")
        assert self.params.str_key("mode", "w") in ("r", "w")
        return {"multi-queue-max-queues": 4, "feature-x": "1"}

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        assert not self.attached, "connected twice"
        self._called("recover" if recover else "connect")
        front.int_key("ring-ref", None, 1, 1 << 20)
        front.int_key("event-channel", None, 1, 4095)
        self.front = front
        self.attached = True
        return {"sectors": self.sectors, "sector-size": 512}

    def disconnect(self) -> None:
        assert self.attached, "disconnected twice"
        self.attached = False
        self._called("disconnect")

    def hand_over(self) -> None:
        self.attached = False
        self._called("hand_over")

    def refresh(self) -> Publish | None:
        self._called("refresh")
        return {"sectors": self.sectors}

    def removed(self) -> None:
        assert not self.attached
        self._called("removed")

    def stats(self) -> dict[str, Any]:
        return {"requests": 7}


class Guest:
    """A guest's device, and the toolstack's part of it."""

    def __init__(self, dom0: XenStore, guest: XenStore, domid: int, devid: int = 51712) -> None:
        self.dom0 = dom0
        self.guest = guest
        self.domid, self.devid = domid, devid
        self.back = BACK.format(domid=domid, devid=devid)
        self.front = FRONT.format(domid=domid, devid=devid)

    def attach(self, **keys: str | int) -> None:
        """As libxl: both directories in one transaction."""

        def write(tx: int) -> None:
            home = f"/local/domain/{self.domid}"
            for path, perms in (
                (home, ["n0", f"r{self.domid}"]),
                (self.back, ["n0", f"r{self.domid}"]),
                (self.front, [f"n{self.domid}", "r0"]),
            ):
                self.dom0.mkdir(path, tx)
                self.dom0.set_perms(path, perms, tx)
            front: dict[str, str | int] = {"backend": self.back, "backend-id": 0, "virtual-device": self.devid}
            back: dict[str, str | int] = {"frontend": self.front, "frontend-id": self.domid, "online": 1, "mode": "w"}
            front |= {"state": 1}
            back |= {**keys, "state": 1}
            for key, value in front.items():
                self.dom0.write(f"{self.front}/{key}", value, tx)
            for key, value in back.items():
                self.dom0.write(f"{self.back}/{key}", value, tx)

        self.dom0.transaction(write)

    def unplug(self) -> None:
        """As libxl: and now it waits for Closed."""

        def write(tx: int) -> None:
            self.dom0.write(self.back + "/online", 0, tx)
            self.dom0.write(self.back + "/state", 5, tx)

        self.dom0.transaction(write)

    def destroy(self) -> None:
        """The domain is gone from the store."""
        self.dom0.rm(f"/local/domain/{self.domid}")

    def say(self, state: int | bytes | str, **keys: str | int | bytes) -> None:
        """The guest writes keys (with _ for -) and its state."""

        def write(tx: int) -> None:
            for key, value in keys.items():
                self.guest.write(f"{self.front}/{key.replace('_', '-')}", value, tx)
            self.guest.write(self.front + "/state", state, tx)

        self.guest.transaction(write)

    def publish(self, state: int = S.Initialised) -> None:
        """An honest frontend's keys."""
        self.say(state, ring_ref=8, event_channel=9)

    def state(self) -> int | None:
        """The backend's state."""
        raw = self.dom0.read(self.back + "/state")
        return None if raw is None else int(raw)

    def key(self, name: str) -> str | None:
        """A key of the backend's directory."""
        raw = self.dom0.read(f"{self.back}/{name}")
        return None if raw is None else raw.decode()

    def error(self) -> str | None:
        """What Linux's place for errors says."""
        raw = self.dom0.read(f"/local/domain/0/error/backend/vbd/{self.domid}/{self.devid}/error")
        return None if raw is None else raw.decode()


class ByHand:
    """A control thread that the test is: time and jobs go on when it says so."""

    def __init__(self, store: XenStore) -> None:
        self._store = store
        self.time = 0.0
        self.timers = Timers(lambda: self.time)
        self.jobs: list[tuple[Callable[[], Any], Done]] = []
        self.hold = False
        self.lost = 0
        self.paused: set[str] = set()
        self.ended: list[str] = []

    @property
    def store(self) -> XenStore:
        return self._store

    def now(self) -> float:
        return self.time

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        self.jobs.append((job, done))
        if not self.hold:
            self.work()

    def work(self) -> None:
        """Run the jobs that were submitted."""
        while self.jobs:
            job, done = self.jobs.pop(0)
            try:
                result = job()
            except BaseException as e:
                done(None, e)
            else:
                done(result, None)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.timers.later(seconds, call)

    def store_lost(self) -> None:
        self.lost += 1

    def pause(self, life: Life) -> None:
        self.paused.add(str(life.ident))

    def resume(self, life: Life) -> None:
        self.paused.discard(str(life.ident))

    def gone(self, life: Life) -> None:
        self.ended.append(str(life.ident))

    def changed(self, life: Life) -> None: ...

    def pass_time(self, seconds: float) -> None:
        """Let time go on, and timers come."""
        end = self.time + seconds
        while (left := self.timers.timeout()) is not None and self.time + left <= end:
            self.time += left
            self.timers.run_due()
        self.time = end


class Bed:
    """A store with dom0 and guests, and lives led by hand."""

    def __init__(self, directory: Path) -> None:
        self.served = Served(directory / "xenstored")
        self.dom0: XenStoreClient = self.served.client()
        self.control = ByHand(self.served.client())
        platform = SimpleNamespace(domid=0, store=self.control.store)
        self.context = Context(cast(Platform, platform), cast(Any, None), directory)
        self._clients: dict[int, XenStoreClient] = {}

    def guest(self, domid: int = 5, devid: int = 51712) -> Guest:
        if domid not in self._clients:
            self._clients[domid] = self.served.guest(domid)
        return Guest(self.dom0, self._clients[domid], domid, devid)

    def life(self, guest: Guest) -> tuple[Life, Disk]:
        """A life of a device that is in the store."""
        ident = DeviceId.from_store(self.control.store, 0, "vbd", guest.domid, guest.devid)
        assert ident is not None
        disk = Disk(ident, self.context)
        return Life(disk, self.control), disk

    def connected(self, domid: int = 5) -> tuple[Guest, Life, Disk]:
        """An honest guest with a connected device."""
        guest = self.guest(domid)
        guest.attach()
        life, disk = self.life(guest)
        life.look()
        guest.publish()
        life.handle_frontend_change()
        guest.say(S.Connected)
        life.handle_frontend_change()
        assert guest.state() == S.Connected and life.connected
        disk.calls.clear()
        return guest, life, disk

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self.control.store.close()
        self.dom0.close()
        self.served.close()


class OwnFaults(logging.Handler):
    """Collects what the product calls its own fault: no guest may cause any."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None:
            self.found.append(logging.Formatter().format(record))


@contextmanager
def no_own_faults() -> Iterator[OwnFaults]:
    handler = OwnFaults()
    logger = logging.getLogger("pvdrivers")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
    assert not handler.found, handler.found[0]


@contextmanager
def new_bed() -> Iterator[Bed]:
    with tempfile.TemporaryDirectory() as directory:
        bed = Bed(Path(directory))
        try:
            yield bed
        finally:
            bed.close()
