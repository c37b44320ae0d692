"""What is found in the store: other backends' devices, stale directories, a driver domain's narrow view."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import nodes as nodes_module
from pvdrivers import toolstack
from pvdrivers.xenbus import XenbusState as S
from tests.device.bed import Guest
from tests.device.yard import DriverDomain, Yard, connect, until


def test_a_kernel_driver_that_is_loaded_meanwhile(yard: Yard, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drivers = tmp_path / "sys/bus/xen-backend/drivers"
    drivers.mkdir(parents=True)
    daemon = yard.daemon(kernel_root=tmp_path)
    first = yard.guest(5)
    connect(first)
    (drivers / "vbd").mkdir()
    second = yard.guest(6)
    second.attach()
    until(lambda: ("vbd", 6, 51712) in daemon.host.finder.refused)
    assert second.state() == S.Initialising and first.state() == S.Connected
    assert caplog.text.count("xen-blkback") == 1
    (drivers / "vbd").rmdir()
    yard.dom0.write(second.back + "/mode", "w")
    until(lambda: second.state() == S.InitWait)
    assert daemon.host.finder.refused == {}


class KernelBackend:
    """What xen-blkback does to a device that is connected elsewhere (Linux 6.1): see pvdrivers/modprobe.py."""

    def __init__(self, yard: Yard, root: Path) -> None:
        self.store = yard.dom0
        self.directory = root / "sys/bus/xen-backend/drivers/vbd"

    def load(self, guest: Guest) -> None:
        self.directory.mkdir(parents=True)
        (self.directory / f"vbd-{guest.domid}-51712").symlink_to("../../../../devices/nowhere")
        for key, value in (("feature-max-indirect-segments", 256), ("state", 2), ("state", 5)):
            self.store.write(f"{guest.back}/{key}", value)

    def unload(self, guest: Guest) -> None:
        (self.directory / f"vbd-{guest.domid}-51712").unlink()
        self.directory.rmdir()
        if self.store.read(f"{guest.back}/state") is not None:
            self.store.write(f"{guest.back}/state", 6)


def test_a_kernel_driver_that_takes_what_is_connected(
    yard: Yard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = KernelBackend(yard, tmp_path)
    daemon = yard.daemon(kernel_root=tmp_path)
    taken, other = yard.guest(5), yard.guest(6)
    for guest in (taken, other):
        connect(guest)
    life, disk = daemon.host.lives["vbd", 5, 51712], daemon.disks["vbd-5-51712"]
    until(lambda: life.connected)
    calls = list(disk.calls)
    kernel.load(taken)
    until(lambda: "kernel" in life.troubles.now)
    taken.say(S.Closing)
    yard.dom0.write(other.back + "/mode", "w")
    until(lambda: daemon.disks["vbd-6-51712"].calls[-1] == "refresh")
    time.sleep(0.2)
    assert taken.state() == S.Closing, "as the kernel has it"
    assert disk.calls == calls and life.connected and "kernel" in life.troubles.now
    assert caplog.text.count("xen-blkback (/sys/bus/xen-backend/drivers/vbd) was loaded while it was served") == 1
    assert "rmmod xen-blkback" in life.troubles.now["kernel"]
    assert daemon.host.lives["vbd", 6, 51712].troubles.now == {} and other.state() == S.Connected
    kernel.unload(taken)
    until(lambda: "kernel" not in life.troubles.now and disk.calls[-1] == "disconnect")
    assert not life.connected


def test_what_the_kernel_had_taken_is_let_go_of_when_it_is_detached(yard: Yard, tmp_path: Path) -> None:
    kernel = KernelBackend(yard, tmp_path)
    daemon = yard.daemon(kernel_root=tmp_path)
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    kernel.load(guest)
    until(lambda: "kernel" in daemon.host.lives["vbd", 5, 51712].troubles.now)
    yard.dom0.rm(guest.front)
    yard.dom0.rm(guest.back)
    until(lambda: not daemon.host.lives)
    assert daemon.disks["vbd-5-51712"].calls[-2:] == ["disconnect", "removed"]
    assert yard.dom0.read(guest.back + "/state") is None


def test_a_qdisk_that_is_a_qemus(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    yard.dom0.write("/local/domain/0/device-model/6/state", "running")
    daemon = yard.daemon(kind="qdisk")
    theirs, ours = (toolstack.attach_vbd(yard.dom0, domid, 51712, "/x", kind="qdisk") for domid in (6, 5))
    until(lambda: toolstack.backend_state(yard.dom0, ours) == S.InitWait)
    assert "domain 6 has a QEMU, which serves it; not served" in daemon.host.finder.refused["qdisk", 6, 51712]
    assert toolstack.backend_state(yard.dom0, theirs) == S.Initialising
    assert caplog.text.count("has a QEMU") == 1


def test_a_frontend_that_is_another_backends(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    """A directory of ours was left behind, and the toolstack gave the guest the same device from elsewhere."""
    guest = yard.guest(5)
    guest.attach()
    yard.dom0.write(guest.front + "/backend", "/local/domain/0/backend/other/5/51712")
    guest.publish()
    daemon = yard.daemon()
    until(lambda: daemon.host.lives["vbd", 5, 51712].troubles.now)
    assert "another backend's" in daemon.host.lives["vbd", 5, 51712].troubles.now["stale"]
    assert daemon.disks["vbd-5-51712"].calls == [] and guest.state() == S.Initialising
    assert caplog.text.count("another backend's") == 1
    yard.dom0.write(guest.front + "/backend", guest.back)
    guest.say(S.Initialised)
    until(lambda: guest.state() == S.Connected)
    assert "stale" not in daemon.host.lives["vbd", 5, 51712].troubles.now


def test_a_toolstack_that_writes_while_we_look(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """We read our state just before it wrote Closing, and the rest after that: it waits for Closed all the same."""
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    read = nodes_module.Nodes.read

    def read_before(self: nodes_module.Nodes, *, whose: bool = False) -> tuple[Any, Any, bool]:
        ours, theirs, online = read(self, whose=whose)
        return S.Connected if ours is S.Closing else ours, theirs, online

    monkeypatch.setattr(nodes_module.Nodes, "read", read_before)

    def take_away(tx: int) -> None:
        yard.dom0.rm(guest.front, tx)
        yard.dom0.write(guest.back + "/online", 0, tx)
        yard.dom0.write(guest.back + "/state", int(S.Closing), tx)

    yard.dom0.transaction(take_away)
    until(lambda: guest.state() == S.Closed)


def test_what_a_toolstack_takes_away_is_said_once(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    """xl destroy: the frontend goes first, and the directory is still there for a while when it is Closed."""
    caplog.set_level(logging.INFO)
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)

    def take_away(tx: int) -> None:
        yard.dom0.rm(guest.front, tx)
        yard.dom0.write(guest.back + "/online", 0, tx)
        yard.dom0.write(guest.back + "/state", int(S.Closing), tx)

    yard.dom0.transaction(take_away)
    until(lambda: guest.state() == S.Closed)
    for n in range(3):
        yard.dom0.write(guest.back + "/hotplug-status", n)
        until(lambda: not daemon.host.lives)
        time.sleep(0.1)
    yard.dom0.rm(guest.back)
    assert caplog.text.count("removed") == 1 and "no frontend" not in caplog.text


@pytest.mark.parametrize("state", [S.InitWait, S.Connected, S.Closing])
def test_a_directory_without_a_frontend(yard: Yard, caplog: pytest.LogCaptureFixture, state: S) -> None:
    guest = yard.guest(5)
    guest.attach()
    yard.dom0.write(guest.back + "/state", int(state))
    yard.dom0.rm(guest.front)
    daemon = yard.daemon()
    until(lambda: guest.state() == S.Closed)
    life = daemon.host.lives["vbd", 5, 51712]
    assert "no frontend" in life.troubles.now["stale"] and daemon.disks["vbd-5-51712"].calls == []
    daemon.host.refresh()
    yard.dom0.write(guest.back + "/mode", "w")
    assert caplog.text.count("no frontend") == 1
    connect_again(yard, guest)
    until(lambda: life.troubles.now == {})


def connect_again(yard: Yard, guest: Any) -> None:
    """The toolstack writes the frontend's directory again."""
    yard.dom0.mkdir(guest.front)
    yard.dom0.set_perms(guest.front, [f"n{guest.domid}", "r0"])
    yard.dom0.write(guest.front + "/backend", guest.back)
    yard.dom0.write(guest.front + "/state", 1)
    until(lambda: guest.state() == S.InitWait)
    guest.publish()
    until(lambda: guest.state() == S.Connected)


def test_a_directory_of_a_domain_that_is_gone(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    guest = yard.guest(5)
    guest.attach()
    yard.dom0.write(guest.back + "/state", 4)
    guest.destroy()
    daemon = yard.daemon()
    until(lambda: yard.dom0.ls(guest.back) is None and not daemon.host.lives)
    assert caplog.text.count("its domain is gone") == 1
    assert daemon.disks["vbd-5-51712"].calls == ["removed"]


def test_a_guest_that_never_connects(
    yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvdrivers.troubles.SLOW_SECONDS", 0.1)
    caplog.set_level("INFO")
    daemon = yard.daemon()
    guest = yard.guest(5)
    guest.attach()
    until(lambda: "pvdrivers" in caplog.text and "has not connected" in caplog.text)
    assert "guest" in daemon.host.lives["vbd", 5, 51712].troubles.now
    guest.publish()
    until(lambda: guest.state() == S.Connected)
    until(lambda: daemon.host.lives["vbd", 5, 51712].troubles.now == {})
    guest.say(S.Connected)
    guest.unplug()
    until(lambda: guest.state() == S.Closing)
    until(lambda: "has not let go of it" in caplog.text)
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)


# A driver domain: domain 3 serves domain 5


def test_a_driver_domain(yard: Yard) -> None:
    dd = DriverDomain(yard)
    daemon = yard.daemon(domid=3, connect=dd.connect)
    until(lambda: dd.state() == S.InitWait)
    dd.publish()
    until(lambda: dd.state() == S.Connected)
    disk = daemon.disks["vbd-5-51712"]
    # The guest locks us out of its directory: as if there were none.
    dd.store.set_perms(dd.front + "/state", ["n5"])
    dd.store.write(dd.front + "/state", 3)
    yard.dom0.write(dd.back + "/mode", "w")
    until(lambda: dd.state() == S.Closed)
    assert disk.calls[-1] == "disconnect"
    # The domain ends; nobody tells us but by the directory that goes.
    toolstack.detach(yard.dom0, dd.back, force=True, timeout=5)
    until(lambda: not daemon.host.lives)


def test_a_driver_domain_whose_guest_vanishes(yard: Yard) -> None:
    dd = DriverDomain(yard)
    daemon = yard.daemon(domid=3, connect=dd.connect)
    until(lambda: dd.state() == S.InitWait)
    dd.publish()
    until(lambda: dd.state() == S.Connected)
    yard.dom0.rm("/local/domain/5")
    until(lambda: dd.state() == S.Closed)  # it may not look whether the domain is there: the toolstack tells
    yard.dom0.rm(dd.back)
    until(lambda: not daemon.host.lives)
    assert daemon.disks["vbd-5-51712"].calls == ["advertise", "connect", "disconnect", "removed"]


def test_a_driver_domain_removes_what_is_closed(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """libxl waits for Closed, and then for the directory to go, which it leaves to the domain that serves."""
    monkeypatch.setattr(nodes_module, "SEEN_SECONDS", 0.3)
    dd = DriverDomain(yard)
    daemon = yard.daemon(domid=3, connect=dd.connect)
    until(lambda: dd.state() == S.InitWait)
    dd.publish()
    until(lambda: dd.state() == S.Connected)
    yard.dom0.write(f"{dd.back}/online", 0)
    yard.dom0.write(f"{dd.back}/state", int(S.Closing))
    dd.store.write(f"{dd.front}/state", int(S.Closed))
    until(lambda: dd.state() == S.Closed)
    until(lambda: yard.dom0.read(f"{dd.back}/state") is None)
    until(lambda: not daemon.host.lives)
    # Attached again at once: the directory that is in use is left alone.
    dd.attach(51712)
    until(lambda: dd.state() == S.InitWait)
    yard.dom0.write(f"{dd.back}/online", 0)
    yard.dom0.write(f"{dd.back}/state", int(S.Closing))
    until(lambda: dd.state() == S.Closed)
    yard.dom0.rm(dd.back)
    dd.attach(51712)
    until(lambda: dd.state() == S.InitWait)
    time.sleep(0.5)
    assert dd.state() == S.InitWait


def test_a_directory_that_goes_as_it_is_found(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolstack takes it away between the finder's look and the device's own: nothing of it stays with us."""
    daemon = yard.daemon()
    guest = yard.guest(5)
    take = daemon.host.claims.take

    def takes(ident: Any) -> None:
        yard.dom0.rm(guest.back)
        take(ident)

    monkeypatch.setattr(daemon.host.claims, "take", takes)
    guest.attach()
    until(lambda: "vbd-5-51712" in daemon.disks)
    until(lambda: not daemon.host.lives)


def test_disks_that_a_start_leaves_to_the_kernel(
    yard: Yard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A daemon had them, and xen-blkback is there when the next one starts: what it has not got is nobody's."""
    drivers = tmp_path / "sys/bus/xen-backend/drivers/vbd"
    others = yard.daemon(domains=[8])  # a daemon that has run since before that
    guests = {domid: yard.guest(domid) for domid in (5, 6, 7, 8)}
    for guest in guests.values():
        guest.attach()
    for domid in (5, 6, 7):
        yard.dom0.write(guests[domid].back + "/state", int(S.Connected if domid != 7 else S.InitWait))
    connect(guests[8])
    drivers.mkdir(parents=True)
    (drivers / "vbd-6-51712").symlink_to("../../../../devices/nowhere")
    yard.daemon(kind="pvblk", kernel_root=tmp_path)
    said = [record for record in caplog.records if "served by nobody" in record.message]
    assert [record.levelname for record in said] == ["ERROR"]
    assert said[0].message.startswith("vbd-5-51712: connected, and served by nobody, as vbd is left to the kernel's")
    assert others.host.lives.keys() == {("vbd", 8, 51712)} and guests[8].state() == S.Connected
