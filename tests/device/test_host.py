"""The daemon's control thread, running: devices come, go, get stuck; processes follow one another."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pvdrivers import finder, handover
from pvdrivers.errors import DeviceBusyError, LeftInUse, PlatformError
from pvdrivers.xenbus import XenbusState as S
from tests.device.yard import Daemon, Yard, connect, until


def test_devices_come_and_go(yard: Yard) -> None:
    early = yard.guest(4)
    early.attach()
    daemon = yard.daemon()
    assert daemon.found == 1
    until(lambda: early.state() == S.InitWait)
    guest = yard.guest(5)
    connect(guest)
    assert set(daemon.host.lives) == {("vbd", 4, 51712), ("vbd", 5, 51712)}
    until(lambda: daemon.host.stats()["vbd-5-51712"]["state"] == "Connected")
    stats = daemon.host.stats()["vbd-5-51712"]
    assert stats["requests"] == 7 and stats["violations"] == 0
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
    yard.dom0.write("/local/domain/7/device/vbd/1/state", 1)  # first, or it would be what a domain that is gone left
    yard.dom0.write(f"{top}/7/1/frontend", "/local/domain/7/device/vbd/1")
    until(lambda: yard.dom0.read(f"{top}/7/1/state") == b"2")


def test_guests_are_split_over_daemons(yard: Yard) -> None:
    first, second = yard.daemon(domains=[5]), yard.daemon(domains=[6])
    connect(yard.guest(5))
    connect(yard.guest(6))
    assert list(first.disks) == ["vbd-5-51712"] and list(second.disks) == ["vbd-6-51712"]


def test_a_second_daemon_on_the_same_device(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder, "PREDECESSOR_SECONDS", 0.2)
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


def test_a_disk_that_is_being_unplugged_has_a_follower_too(yard: Yard) -> None:
    first = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    guest.unplug()  # and the guest has it mounted
    until(lambda: guest.state() == S.Closing)
    first.host.stop()
    first.thread.join(10)
    second = yard.daemon()
    until(lambda: second.host.lives["vbd", 5, 51712].connected)
    disk = second.disks["vbd-5-51712"]
    assert disk.calls == ["advertise", "recover"] and guest.state() == S.Closing
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)
    assert disk.calls[2:] == ["disconnect", "removed"]


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


def test_keys_that_are_written_while_they_are_read(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    """Each try to have all of them at one moment fails: that takes a while, which must not be the others'."""
    daemon = yard.daemon()
    liar, other = yard.guest(5), yard.guest(6)
    liar.attach()
    until(lambda: liar.state() == S.InitWait)
    for i in range(400):
        liar.guest.write(f"{liar.front}/queue-{i % 2}/k{i}", 1)
    longest = [0.0]
    guarded = daemon.host._guarded

    def timed(call: Callable[[], None]) -> None:
        began = time.monotonic()
        guarded(call)
        longest[0] = max(longest[0], time.monotonic() - began)

    daemon.host._guarded = timed  # type: ignore[method-assign]
    end = threading.Event()
    client = yard.served.guest(5)

    def write() -> None:
        number = 0
        while not end.wait(0.001):
            client.write(liar.front + "/queue-0/k0", number := number + 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        liar.publish()
        life = daemon.host.lives["vbd", 5, 51712]
        until(lambda: life.error)
        said = life.error
        began = time.monotonic()
        connect(other)
        assert time.monotonic() - began < 5
    finally:
        end.set()
        writer.join()
        client.close()
    assert "was written to each of" in said and longest[0] < 1
    until(lambda: liar.state() == S.Connected)
    until(lambda: life.error == "")


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


@pytest.mark.parametrize("first", ["hand_over", "disconnect"])
def test_a_worker_that_ends_with_requests_under_way(
    yard: Yard, first: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk stays as it is, and claimed, for as long as the process lives; nobody waits for it, and others go."""
    daemon = yard.daemon()
    guest, other = yard.guest(5), yard.guest(6)
    connect(guest)
    connect(other)
    disk = daemon.disks["vbd-5-51712"]
    disk.troubles[first] = [LeftInUse("worker 0 has ended")]
    if first == "disconnect":
        guest.say(S.Closed)
        until(lambda: daemon.host.in_use)
    daemon.host.stop()
    daemon.thread.join(10)
    assert not daemon.thread.is_alive() and disk.calls == ["advertise", "connect", first]
    assert daemon.disks["vbd-6-51712"].calls[-1] == "hand_over"
    assert guest.state() == S.Connected and "is left as it is: its worker has ended" in caplog.text
    second = yard.daemon()
    until(lambda: "vbd-6-51712" in second.disks)
    assert "vbd-5-51712" not in second.disks and ("vbd", 5, 51712) in second.host.finder.waiting


def test_a_disk_that_is_not_free_in_time(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handover, "SECONDS", 0.2)
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    stuck = daemon.stuck["vbd-5-51712"] = threading.Event()
    daemon.host.stop()
    daemon.thread.join(10)
    assert not daemon.thread.is_alive() and set(daemon.host.lives) == {("vbd", 5, 51712)}
    assert "is left as it is: it did not finish within 0.2 s" in caplog.text
    second = yard.daemon()
    assert second.disks == {} and ("vbd", 5, 51712) in second.host.finder.waiting, "it is in use"
    stuck.set()


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
