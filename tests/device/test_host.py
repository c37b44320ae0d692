"""The daemon's control thread, running: devices come, go, get stuck; processes follow one another."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pvdrivers import host as host_module
from pvdrivers.device import Context, DeviceId
from pvdrivers.errors import DeviceBusyError, PlatformError
from pvdrivers.host import Host
from pvdrivers.platform import Platform
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient
from tests.device.bed import Disk, Guest
from tests.xenstore.conftest import Served


class Pool:
    """Workers that do nothing but report what the test tells them."""

    def __init__(self) -> None:
        self.alert_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.found: list[tuple[Any, str]] = []
        self.said: list[tuple[Any, str]] = []
        self.failed = ""

    def start(self) -> None: ...

    def stop(self) -> None:
        os.close(self.alert_fd)

    def alerts(self) -> list[tuple[Any, str]]:
        os.eventfd_read(self.alert_fd)
        if self.failed:
            raise PlatformError(self.failed)
        found, self.found = self.found, []
        return found

    def notices(self) -> list[tuple[Any, str]]:
        said, self.said = self.said, []
        return said

    def report(self, device: Any, violation: str) -> None:
        self.found.append((device, violation))
        os.eventfd_write(self.alert_fd, 1)


class Daemon:
    """A host in a thread."""

    def __init__(self, run_dir: Path, connect: Callable[[], XenStoreClient], **options: Any) -> None:
        self.disks: dict[str, Disk] = {}
        self.stuck: dict[str, threading.Event] = {}
        self.pool = Pool()
        platform = SimpleNamespace(domid=0, store=connect())
        self.platform = platform
        context = Context(cast(Platform, platform), self.pool, run_dir)
        self.host = Host(context, {"vbd": self._make}, connect_store=connect, **options)  # type: ignore[dict-item]
        self.ready = threading.Event()
        self.found = -1
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _make(self, ident: DeviceId, context: Context) -> Disk:
        disk = self.disks[str(ident)] = Disk(ident, context)

        def hold(what: str) -> None:
            if str(ident) in self.stuck:
                self.stuck[str(ident)].wait(20)

        disk.hold = hold
        return disk

    def _run(self) -> None:
        try:
            self.host.run(self._is_ready)
        except BaseException as e:
            self.error = e
        self.ready.set()

    def _is_ready(self, found: int) -> None:
        self.found = found
        self.ready.set()

    def stop(self) -> None:
        self.host.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.host.close()
        self.platform.store.close()
        self.pool.stop()


class Yard:
    """A store, guests, and daemons that are stopped at the end."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.run_dir = directory
        self.served = Served(directory / "xenstored")
        stack.callback(self.served.close)
        self.stack = stack
        self.dom0 = self.served.client()
        stack.callback(self.dom0.close)

    def daemon(self, **options: Any) -> Daemon:
        daemon = Daemon(self.run_dir, self.served.client, **options)
        self.stack.callback(daemon.stop)
        assert daemon.ready.wait(10)
        return daemon

    def guest(self, domid: int, devid: int = 51712) -> Guest:
        client = self.served.guest(domid)
        self.stack.callback(client.close)
        return Guest(self.dom0, client, domid, devid)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with ExitStack() as stack:
        yield Yard(tmp_path, stack)


def until(what: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def connect(guest: Guest) -> None:
    guest.attach()
    until(lambda: guest.state() == S.InitWait)
    guest.publish()
    until(lambda: guest.state() == S.Connected)
    guest.say(S.Connected)


def test_devices_come_and_go(yard: Yard) -> None:
    early = yard.guest(4)
    early.attach()
    daemon = yard.daemon()
    assert daemon.found == 1
    until(lambda: early.state() == S.InitWait)
    guest = yard.guest(5)
    connect(guest)
    assert set(daemon.host.lives) == {("vbd", 4, 51712), ("vbd", 5, 51712)}
    stats = daemon.host.stats()["vbd-5-51712"]
    assert stats["state"] == "Connected" and stats["requests"] == 7 and stats["violations"] == 0
    guest.unplug()
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)
    until(lambda: ("vbd", 5, 51712) not in daemon.host.lives)
    yard.dom0.rm(guest.back)
    connect(guest)
    # A domain that is destroyed: as libxl does it, frontend first, then the whole backend directory.
    yard.dom0.rm(guest.front)
    until(lambda: guest.state() == S.Closed)
    yard.dom0.rm("/local/domain/0/backend/vbd/5")
    until(lambda: ("vbd", 5, 51712) not in daemon.host.lives)
    assert daemon.disks["vbd-5-51712"].calls == ["advertise", "connect", "disconnect", "removed"]


def test_directories_that_are_no_devices(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    top = "/local/domain/0/backend/vbd"
    for path in ("x/1/state", "5/y/state", "05/1/state", "5/1/nothing", "-1/2/state", "5/2/state/deep"):
        yard.dom0.write(f"{top}/{path}", 1)
    yard.dom0.write(f"{top}/7/1/state", 1)
    yard.dom0.write(f"{top}/7/1/frontend", "/local/domain/8/device/vbd/1")
    daemon = yard.daemon()
    assert daemon.found == 0
    yard.dom0.write(f"{top}/7/1/mode", "w")
    guest = yard.guest(6)
    connect(guest)
    assert caplog.text.count("not below /local/domain/7") == 1
    # Once the toolstack has put it right, it is served.
    yard.dom0.write(f"{top}/7/1/frontend", "/local/domain/7/device/vbd/1")
    yard.dom0.write("/local/domain/7/device/vbd/1/state", 1)
    until(lambda: yard.dom0.read(f"{top}/7/1/state") == b"2")


def test_guests_are_split_over_daemons(yard: Yard) -> None:
    first, second = yard.daemon(domains=[5]), yard.daemon(domains=[6])
    connect(yard.guest(5))
    connect(yard.guest(6))
    assert list(first.disks) == ["vbd-5-51712"] and list(second.disks) == ["vbd-6-51712"]


def test_a_second_daemon_on_the_same_device(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "PREDECESSOR_SECONDS", 0.2)
    first = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    second = Daemon(yard.run_dir, yard.served.client)
    second.thread.join(10)
    second.stop()  # harmless
    assert isinstance(second.error, DeviceBusyError)
    assert f"pid {os.getpid()}" in str(second.error) and "0-vbd-5-51712.lock" in str(second.error)
    assert second.disks == {} and first.disks["vbd-5-51712"].attached and guest.state() == S.Connected


def test_one_process_follows_another(yard: Yard) -> None:
    first = yard.daemon()
    guests = [yard.guest(domid) for domid in (5, 6)]
    for guest in guests:
        connect(guest)
    second = yard.daemon()  # while the first still runs: it waits
    assert second.found == 2 and second.disks == {}
    first.host.stop()
    until(lambda: len(second.disks) == 2 and all(disk.attached for disk in second.disks.values()))
    for disk in first.disks.values():
        assert disk.calls == ["advertise", "connect", "hand_over"]
    for disk in second.disks.values():
        assert disk.calls == ["advertise", "recover"]
    assert [guest.state() for guest in guests] == [S.Connected, S.Connected]


def test_one_stuck_disk(yard: Yard) -> None:
    daemon = yard.daemon()
    stuck = daemon.stuck["vbd-5-51712"] = threading.Event()
    slow = yard.guest(5)
    slow.attach()
    began = time.monotonic()
    for domid in range(6, 10):
        connect(yard.guest(domid))
    assert time.monotonic() - began < 10
    assert slow.state() == S.Initialising
    stuck.set()
    until(lambda: slow.state() == S.InitWait)


def test_a_guest_that_breaks_its_ring(yard: Yard) -> None:
    daemon = yard.daemon()
    guest, other = yard.guest(5), yard.guest(6)
    connect(guest)
    connect(other)
    daemon.pool.report(daemon.disks["vbd-5-51712"], "producer index beyond the ring")
    until(lambda: guest.state() == S.Closing)
    assert "producer index beyond the ring" in str(guest.error())
    assert other.state() == S.Connected
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)
    guest.say(S.Initialising)
    until(lambda: guest.state() == S.InitWait)


def test_a_storm_does_not_hold_up_others(yard: Yard) -> None:
    daemon = yard.daemon()
    storm, other = yard.guest(5), yard.guest(6)
    connect(storm)
    end = threading.Event()
    client = yard.served.guest(5)

    def write() -> None:
        while not end.is_set():
            client.write(storm.front + "/state", 4)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: daemon.host.lives["vbd", 5, 51712]._paused)
        connect(other)
    finally:
        end.set()
        writer.join()
        client.close()
    storm.say(S.Closed)
    until(lambda: storm.state() == S.Closed)


def test_the_connection_to_the_store_is_lost(yard: Yard) -> None:
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    with socket.socket(fileno=os.dup(daemon.platform.store._fd)) as theirs:
        theirs.shutdown(socket.SHUT_RDWR)
    late = yard.guest(6)
    late.attach()
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)
    until(lambda: late.state() == S.InitWait)
    connect(yard.guest(7))


def test_refresh(yard: Yard) -> None:
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    daemon.disks["vbd-5-51712"].sectors = 4711
    daemon.host.refresh()
    until(lambda: guest.key("sectors") == "4711")
    assert guest.state() == S.Connected


def test_a_worker_that_ends_ends_the_daemon(yard: Yard) -> None:
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    daemon.pool.failed = "worker 0 has ended"
    os.eventfd_write(daemon.pool.alert_fd, 1)
    daemon.thread.join(10)
    assert isinstance(daemon.error, PlatformError)
    assert guest.state() == S.Connected, "the next process takes over"


def test_an_idle_host_does_nothing(yard: Yard) -> None:
    daemon = yard.daemon()
    for domid in range(5, 35):
        yard.guest(domid).attach()
    until(lambda: len(daemon.disks) == 30 and all(life.state == S.InitWait for life in daemon.host.lives.values()))
    turns = 0
    turn = daemon.host._turn

    def counted(timeout: float | None) -> None:
        nonlocal turns
        turns += 1
        turn(timeout)

    time.sleep(0.3)  # the echo of our own writes
    daemon.host._turn = counted  # type: ignore[method-assign]
    daemon.host._wake()
    time.sleep(0.5)
    assert turns <= 2


@contextmanager
def _many(yard: Yard, count: int) -> Iterator[Daemon]:
    for domid in range(100, 100 + count):
        yard.guest(domid).attach()
    yield yard.daemon()


def test_a_hundred_at_the_start(yard: Yard) -> None:
    with _many(yard, 100) as daemon:
        assert daemon.found == 100
        until(lambda: all(life.state == S.InitWait for life in daemon.host.lives.values()), 20)
