"""A disk that is attached in the place of another, of whose end we have not heard yet: a guest gets the one it has."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace as replace_id
from pathlib import Path
from typing import Any

import pytest

from blkback.backend import BlkBackend
from netback.backend import VifBackend
from pvdrivers.device import Device, DeviceId, FrontKeys, Publish
from pvdrivers.errors import ConfigError
from pvdrivers.life import Life
from pvdrivers.storage.store import Store
from pvdrivers.worker.pool import WorkerPool
from pvdrivers.xenbus import XenbusState as S
from tests.device.bed import Bed, Disk, Guest
from tests.device.yard import Yard, connect, no_store, until


class Unserved(BlkBackend):
    """Opens what is asked for, and has no rings."""

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        return {"sectors": self.opened.sectors}

    def disconnect(self) -> None: ...

    @property
    def opened(self) -> Store:
        assert self.store is not None
        return self.store

    def has(self, image: Path) -> bool:
        """It, and not another of that name, or one that had it."""
        return os.path.samestat(os.fstat(self.opened.fd), image.stat())


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "first.img", tmp_path / "next.img"
    for image in found:
        image.write_bytes(bytes(1 << 20))
    return found


def life_of(bed: Bed, guest: Guest) -> tuple[Life, Unserved]:
    pool = WorkerPool.__new__(WorkerPool)
    pool.fence = None
    bed.context.workers = pool
    ident = DeviceId.from_store(bed.control.store, 0, "vbd", guest.domid, guest.devid)
    assert ident is not None
    disk = Unserved(ident, bed.context)
    return Life(disk, bed.control), disk


def attached(bed: Bed, params: object, *, connected: bool = False) -> tuple[Guest, Life, Unserved]:
    guest = bed.guest()
    guest.attach(params=str(params))
    life, disk = life_of(bed, guest)
    if connected:
        life.look()
        handshake(guest, life)
    return guest, life, disk


def handshake(guest: Guest, life: Life) -> None:
    guest.publish()
    life.handle_frontend_change()
    guest.say(S.Connected)
    life.handle_frontend_change()
    assert guest.state() == S.Connected and life.connected


def replace(guest: Guest, params: object) -> None:
    """xl block-detach --force, and xl block-attach at once."""
    guest.dom0.rm(guest.front)
    guest.dom0.rm(guest.back)
    guest.attach(params=str(params))


def meanwhile(bed: Bed, what: Callable[[], Any]) -> None:
    """Do it while a job is under way, which ends then."""
    what()
    bed.control.hold = False
    bed.control.work()


def test_replaced_while_it_is_opened(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0])
    bed.control.hold = True
    life.look()
    meanwhile(bed, lambda: replace(guest, images[1]))
    assert guest.state() == S.Initialising and guest.key("multi-queue-max-queues") is None, "nothing of the first"
    bed.control.pass_time(1)
    assert guest.state() == S.InitWait and disk.has(images[1])
    assert life.troubles.now == {} and guest.error() is None


def test_other_parameters_while_it_is_opened_once_more(bed: Bed, images: tuple[Path, Path]) -> None:
    """The process before this one had offered it, and its state stays."""
    guest, life, disk = attached(bed, images[0])
    guest.dom0.write(guest.back + "/state", int(S.InitWait))
    bed.control.hold = True
    life.look()
    meanwhile(bed, lambda: guest.dom0.write(guest.back + "/params", str(images[1])))
    bed.control.pass_time(1)
    assert guest.state() == S.InitWait and disk.has(images[1])


def test_what_we_write_ourselves_is_no_other_directory(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0])
    bed.control.hold = True
    life.look()
    meanwhile(bed, lambda: guest.dom0.write(guest.back + "/hotplug-status", "connected"))
    assert guest.state() == S.InitWait and disk.has(images[0])


def test_replaced_while_it_is_closed(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0], connected=True)
    bed.control.hold = True
    guest.say(S.Closed)
    life.handle_frontend_change()
    meanwhile(bed, lambda: replace(guest, images[1]))
    assert guest.state() == S.InitWait and disk.has(images[1])


def test_replaced_unheard(bed: Bed, images: tuple[Path, Path]) -> None:
    """The connection to the store was broken."""
    guest, life, disk = attached(bed, images[0], connected=True)
    replace(guest, images[1])
    life.look()
    assert guest.state() == S.InitWait and disk.has(images[1]) and not life.connected
    handshake(guest, life)


def test_a_fresh_disk_of_the_same_name(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0], connected=True)
    os.rename(images[1], images[0])
    replace(guest, images[0])
    life.look()
    assert guest.state() == S.InitWait and disk.has(images[0])


def test_the_guest_connects_anew_to_another_image(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0], connected=True)
    guest.say(S.Closed)
    life.handle_frontend_change()
    guest.dom0.write(guest.back + "/params", str(images[1]))
    life.handle_backend_change(["params"])
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait and disk.has(images[1])


def test_the_same_image_stays_open(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0], connected=True)
    store = disk.opened
    for state in (S.Closed, S.Initialising):
        guest.say(state)
        life.handle_frontend_change()
    assert guest.state() == S.InitWait and disk.opened is store


def test_an_image_is_let_go_of_though_the_next_is_nonsense(bed: Bed, images: tuple[Path, Path]) -> None:
    guest, life, disk = attached(bed, images[0], connected=True)
    replace(guest, "nonsense:")
    life.look()
    assert guest.state() == S.Initialising and disk.store is None
    assert guest.key("hotplug-status") == "error"
    guest.dom0.write(guest.back + "/params", str(images[1]))
    life.handle_backend_change(["params"])
    assert guest.state() == S.InitWait and disk.has(images[1])


@pytest.mark.parametrize("how", [replace, lambda guest, params: guest.dom0.write(guest.back + "/params", params)])
def test_memory_of_another_size(bed: Bed, how: Callable[[Guest, str], None]) -> None:
    """A fresh disk, and nobody's contents to take over: also when it had no room at first."""
    guest, life, disk = attached(bed, "memory:1M", connected=True)
    guest.say(S.Closed)
    life.handle_frontend_change()
    for params in (f"memory:{1 << 30}G", "memory:2M"):
        how(guest, params)
        life.handle_backend_change(["params"])
        guest.say(S.Initialising)
        life.handle_frontend_change()
    assert guest.state() == S.InitWait and disk.opened.size == 2 << 20


def test_contents_do_not_stay_for_the_next(bed: Bed) -> None:
    guest, life, disk = attached(bed, "memory:1M", connected=True)
    os.pwrite(disk.opened.fd, b"secret", 4096)
    replace(guest, "memory:1M")
    life.look()
    assert guest.state() == S.InitWait and os.pread(disk.opened.fd, 6, 4096) == bytes(6)


@pytest.mark.parametrize("class_name", ["vbd", "vif"])
def test_nothing_is_left_of_a_guest_that_went_while_no_daemon_ran(bed: Bed, class_name: str) -> None:
    guest, life, disk = attached(bed, "memory:1M", connected=True)
    run_dir, name = bed.context.run_dir, f"{class_name}-5-51712"
    disk.opened.close()  # as a process that is killed leaves it
    for path in ("stats", "journal", "answers", "groups", "hash"):
        (run_dir / path).mkdir()
        (run_dir / path / (f"0-{name}" if path == "journal" else name)).touch()
    before = {path for path in run_dir.rglob("*") if "51712" in path.name}
    guest.destroy()
    device: Device
    if class_name == "vbd":
        life, device = life_of(bed, guest)
        life.look()
        assert life.gone
        left = {path for path in before if path.parent.name in ("answers", "groups", "hash")}
    else:
        device = VifBackend(replace_id(life.ident, class_name="vif"), bed.context)
        device.removed()
        left = {path for path in before if path.parent.name == "journal" or path.name.startswith("memory-")}
    assert len(before) == 6 and {path for path in before if path.exists()} == left


# The next device, when this one is removed


def test_closed_is_not_said_of_the_next_device(bed: Bed, images: tuple[Path, Path]) -> None:
    """It was taken away by force, and drained slowly."""
    guest, life, _ = attached(bed, images[0], connected=True)
    bed.control.hold = True
    guest.dom0.rm(guest.front)
    guest.unplug()
    life.handle_backend_change(["online", "state"])
    meanwhile(bed, lambda: replace(guest, images[1]))
    assert life.gone and guest.state() == S.Initialising
    life, disk = life_of(bed, guest)
    life.look()
    assert guest.state() == S.InitWait and disk.has(images[1])


@pytest.mark.parametrize("online", [0, 1])
def test_closed_is_said_of_one_that_nobody_has_served(bed: Bed, online: int) -> None:
    """The toolstack waits for it, or its guest is gone."""
    guest = bed.guest()
    guest.attach()
    life, _ = bed.life(guest)
    bed.control.hold = True
    if online:
        guest.destroy()
    else:
        guest.dom0.write(guest.back + "/online", 0)
    life.look()
    bed.control.work()
    assert life.gone and guest.state() == (None if online else S.Closed)


@pytest.mark.parametrize("directory", ["closed first", "removed first"])
def test_the_next_device_is_found(yard: Yard, directory: str) -> None:
    """What was told of it was told to the one before, which was drained."""
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    first = daemon.disks["vbd-5-51712"]
    drained = daemon.stuck["vbd-5-51712"] = threading.Event()

    def take_away(tx: int) -> None:
        guest.dom0.rm(guest.front, tx)
        if directory == "removed first":
            return guest.dom0.rm(guest.back, tx)
        guest.dom0.write(guest.back + "/online", 0, tx)
        guest.dom0.write(guest.back + "/state", int(S.Closing), tx)

    guest.dom0.transaction(take_away)
    until(lambda: first.calls[-1] == "disconnect")
    replace(guest, "next.img")
    until(lambda: daemon.host.lives["vbd", 5, 51712]._again)
    del daemon.stuck["vbd-5-51712"]
    drained.set()
    until(lambda: guest.state() == S.InitWait)
    last = daemon.disks["vbd-5-51712"]
    if last is first:  # the daemon had read our state before all this and the guest's after it: it was only closed
        assert first.calls[-2:] == ["disconnect", "advertise"]
    else:
        assert first.calls[-1] == "removed" and last.calls == ["advertise"]


def test_replaced_while_the_connection_is_broken(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had waited for the operator waits no longer."""

    def advertise(self: Disk) -> Publish:
        if self.params.str_key("params", None) == "nonsense":
            raise ConfigError("what is nonsense?")
        return {}

    monkeypatch.setattr(Disk, "advertise", advertise)
    daemon = yard.daemon()
    guest = yard.guest(5)
    guest.attach(params="nonsense")
    until(lambda: guest.key("hotplug-status") == "error")
    with no_store(daemon):
        replace(guest, "good")
    until(lambda: guest.state() == S.InitWait)
    assert guest.key("hotplug-status") == "connected"
