"""What is found in the store: other backends' devices, stale directories, a driver domain's narrow view, quotas."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import finder as finder_module
from pvdrivers import nodes as nodes_module
from pvdrivers import pace as pace_module
from pvdrivers import toolstack
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient, XenStoreError
from tests.device.yard import Yard, connect, until
from tests.xenstore.device import XenbusDevice


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


class DriverDomain:
    """The store as domain 3 has it, with a guest's disk attached by dom0."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        home = "/local/domain/3"
        yard.dom0.mkdir(home)
        yard.dom0.set_perms(home, ["n0", "r3"])
        for name in ("error", "data"):
            yard.dom0.mkdir(f"{home}/{name}")
            yard.dom0.set_perms(f"{home}/{name}", ["n3"])
        yard.dom0.mkdir("/local/domain/5")
        yard.dom0.set_perms("/local/domain/5", ["n0", "r5"])
        self.store = yard.served.guest(5)
        yard.stack.callback(self.store.close)
        self.front = "/local/domain/5/device/vbd/51712"
        self.attach(51712)

    def attach(self, devid: int) -> str:
        self.back = toolstack.attach(self.yard.dom0, "vbd", 5, devid, backend_domid=3)
        return self.back

    def state(self) -> S:
        return toolstack.backend_state(self.yard.dom0, self.back)

    def connect(self) -> XenStoreClient:
        """As the daemon in domain 3 would."""
        return self.yard.served.guest(3)

    def publish(self) -> None:
        for key, value in (("ring-ref", 8), ("event-channel", 9), ("state", 3)):
            self.store.write(f"{self.front}/{key}", value)


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
    time.sleep(0.5)
    assert dd.state() == S.InitWait


def test_no_watch_is_left(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain may have 128 watches: frontends beyond that are looked at all the same."""
    monkeypatch.setattr(finder_module, "POLL_SECONDS", 0.05)
    dd = DriverDomain(yard)
    yard.served.call(lambda: setattr(yard.served.server.quotas, "watches", 2))
    for devid in (51728, 51744):
        dd.attach(devid)
    daemon = yard.daemon(domid=3, connect=dd.connect)
    until(lambda: len(daemon.disks) == 3 and all(life.state == S.InitWait for life in daemon.host.lives.values()))
    assert daemon.host.finder.unwatched
    assert "looked at every second" in str(daemon.host.stats())
    assert caplog.text.count("no watch is left") == 1 and "quota-maxwatch" in caplog.text
    for devid in (51712, 51728, 51744):
        dd.front = f"/local/domain/5/device/vbd/{devid}"
        dd.publish()
    until(lambda: all(life.connected for life in daemon.host.lives.values()))
    yard.served.call(lambda: setattr(yard.served.server.quotas, "watches", 128))
    until(lambda: not daemon.host.finder.unwatched)
    assert not any("unwatched" in row["troubles"] for row in daemon.host.stats().values())
    assert caplog.text.count("no watch is left") == 1


def test_no_watch_is_left_on_the_kernels_device(
    yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through /dev/xen/xenbus, which a driver domain has: a refused WATCH is an error of write(2)."""
    monkeypatch.setattr(finder_module, "POLL_SECONDS", 0.05)
    dd = DriverDomain(yard)
    dd.attach(51728)
    device = XenbusDevice(yard.served, 3, yard.stack, monkeypatch)
    device.watches, device.refusal = 2, errno.E2BIG
    daemon = yard.daemon(domid=3, connect=device.connect)
    until(lambda: len(daemon.disks) == 2 and all(life.state == S.InitWait for life in daemon.host.lives.values()))
    assert caplog.text.count("no watch is left") == 1 and "is lost" not in caplog.text
    for devid in (51712, 51728):
        dd.front = f"/local/domain/5/device/vbd/{devid}"
        dd.publish()
    until(lambda: all(life.connected for life in daemon.host.lives.values()))
    device.watches = 128
    until(lambda: not daemon.host.finder.unwatched)
    assert not any("unwatched" in row["troubles"] for row in daemon.host.stats().values())


def test_errors_of_the_store_are_what_they_are(yard: Yard) -> None:
    guest = yard.served.guest(9)
    yard.stack.callback(guest.close)
    with pytest.raises(PermissionError) as denied:
        guest.write("/local/domain/1/x", "1")
    assert isinstance(denied.value, XenStoreError) and denied.value.errno == errno.EACCES
    assert denied.value.operation == "WRITE" and denied.value.path == "/local/domain/1/x"
    yard.dom0.watch("/x", "t")
    with pytest.raises(FileExistsError, match="EEXIST"):
        yard.dom0.watch("/x", "t")
    assert os.strerror(errno.EEXIST) not in str(denied.value)


def test_a_store_that_comes_back_empty(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """xenstored was started afresh: what is served goes on being served."""
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    empty = [True]
    ls = XenStoreClient.ls

    def as_if_empty(self: XenStoreClient, path: str, tx: int = 0) -> list[str] | None:
        return None if empty and path == "/local/domain" else ls(self, path, tx)

    monkeypatch.setattr(XenStoreClient, "ls", as_if_empty)
    before = daemon.platform.store
    daemon.host.submit(lambda: None, lambda *_: daemon.host.store_lost())
    until(lambda: daemon.host._store_fd == -1)
    assert daemon.disks["vbd-5-51712"].attached and daemon.platform.store is before
    empty.clear()
    until(lambda: daemon.platform.store is not before)
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)


def test_a_store_that_has_forgotten_the_guests(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """xenstored was restarted, and xen-init-dom0 has written dom0's home: disks that are in use stay in use."""
    daemon = yard.daemon()
    served, waits = yard.guest(5), yard.guest(6)
    connect(served)
    waits.attach()
    until(lambda: waits.state() == S.InitWait)
    empty = [True]
    ls = XenStoreClient.ls

    def as_if_empty(self: XenStoreClient, path: str, tx: int = 0) -> list[str] | None:
        return None if empty and path == "/local/domain" else ls(self, path, tx)

    monkeypatch.setattr(XenStoreClient, "ls", as_if_empty)
    before = daemon.platform.store
    daemon.host.submit(lambda: None, lambda *_: daemon.host.store_lost())
    until(lambda: daemon.host._store_fd == -1)
    for path in (served.back, waits.back, "/local/domain/5", "/local/domain/6"):
        yard.dom0.rm(path)
    empty.clear()
    until(lambda: daemon.platform.store is not before)
    until(lambda: ("vbd", 6, 51712) not in daemon.host.lives)
    disk, life = daemon.disks["vbd-5-51712"], daemon.host.lives["vbd", 5, 51712]
    assert disk.attached and "disconnect" not in disk.calls and "removed" not in disk.calls
    assert "xenstore was restarted" in life.troubles.now["lost"]
    assert caplog.text.count("xenstore was restarted") == 1
    yard.dom0.write("/local/domain/0/backend/vbd/5/other", "")  # events alone take nothing away
    daemon.host.submit(lambda: None, lambda *_: life.look())
    time.sleep(0.2)
    assert disk.attached
    # Somebody makes the directories again, and then the toolstack takes the disk away.
    yard.dom0.write("/local/domain/5", "")
    yard.dom0.write(served.back + "/frontend", served.front)
    yard.dom0.write(served.back + "/frontend-id", "5")
    yard.dom0.write(served.front + "/state", int(S.Connected))
    yard.dom0.write(served.back + "/state", int(S.Connected))
    until(lambda: "lost" not in life.troubles.now)
    assert disk.attached
    yard.dom0.rm(served.back)
    until(lambda: "removed" in disk.calls)


def test_no_node_is_left(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain may own 1000 nodes: what cannot be published is tried again ever more rarely, and told of."""
    monkeypatch.setattr(pace_module, "RETRY_SECONDS", (0.05, 2.0))
    dd = DriverDomain(yard)
    nodes = yard.served.server.quotas.nodes
    yard.served.call(lambda: setattr(yard.served.server.quotas, "nodes", 0))
    daemon = yard.daemon(domid=3, connect=dd.connect)
    key = ("vbd", 5, 51712)
    until(lambda: key in daemon.host.lives and "quota" in daemon.host.lives[key].troubles.now)
    time.sleep(1.5)
    disk = daemon.disks["vbd-5-51712"]
    assert 3 <= disk.calls.count("advertise") <= 7, "at 0.05, 0.1, 0.2, 0.4, 0.8 s, and not all the time"
    assert "ENOSPC" in daemon.host.stats()["vbd-5-51712"]["troubles"]["quota"]
    assert sum("ENOSPC" in r.message for r in caplog.records if r.levelname == "ERROR") == 1, caplog.text
    yard.served.call(lambda: setattr(yard.served.server.quotas, "nodes", nodes))
    until(lambda: dd.state() == S.InitWait)
    until(lambda: "quota" not in daemon.host.lives[key].troubles.now)
    dd.publish()
    until(lambda: daemon.host.lives[key].connected)
