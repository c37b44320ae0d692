"""xenstored ends, hangs, comes back with nothing in it, or refuses: what is served goes on being served."""

from __future__ import annotations

import errno
import itertools
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pvdrivers import host as host_module
from pvdrivers.incarnation import incarnation
from pvdrivers.nodes import Nodes
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreClient, XenStoreError
from tests.device.yard import Daemon, Yard, break_connection, connect, no_store, until
from tests.xenstore.conftest import Served


def as_if_empty(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have the store seem to be empty until the list is."""
    empty = [True]
    ls = XenStoreClient.ls

    def list_(self: XenStoreClient, path: str, tx: int = 0) -> list[str] | None:
        return None if empty and path == "/local/domain" else ls(self, path, tx)

    monkeypatch.setattr(XenStoreClient, "ls", list_)
    return empty


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def restart_xenstored(yard: Yard, daemon: Daemon) -> None:
    """The new one has dom0's home in it, as xen-init-dom0 makes it, and no guest's."""
    yard.served.close()
    until(lambda: daemon.host._store_fd == -1)
    yard.served.path.unlink(missing_ok=True)
    yard.served = Served(yard.served.path)
    yard.stack.callback(yard.served.close)
    time.sleep(0.3)
    with yard.served.client() as dom0:
        dom0.write("/local/domain/0/name", "Domain-0")
    until(lambda: daemon.host._store_fd >= 0)


def test_xenstored_is_restarted_twice(yard: Yard, caplog: pytest.LogCaptureFixture) -> None:
    daemon = yard.daemon()
    connect(yard.guest(5))
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    for _ in range(2):
        restart_xenstored(yard, daemon)
        until(lambda: "lost" in daemon.host.stats()["vbd-5-51712"]["troubles"])
        time.sleep(0.2)
        life = daemon.host.lives["vbd", 5, 51712]
        assert life.connected and daemon.disks["vbd-5-51712"].calls == ["advertise", "connect"]
        assert "lost" in daemon.host.stats()["vbd-5-51712"]["troubles"]
    assert caplog.text.count("xenstore was restarted") == 1


def test_xenstored_is_restarted_while_a_disk_is_taken_over(yard: Yard) -> None:
    first = yard.daemon()
    connect(yard.guest(5))
    second = yard.daemon()
    stuck = second.stuck["vbd-5-51712"] = threading.Event()
    first.host.stop()
    until(lambda: "vbd-5-51712" in second.disks and second.disks["vbd-5-51712"].calls == ["advertise"])
    restart_xenstored(yard, second)
    stuck.set()
    until(lambda: second.host.lives["vbd", 5, 51712].connected)
    time.sleep(0.2)
    assert second.disks["vbd-5-51712"].calls == ["advertise", "recover"]


def test_the_connection_breaks_again_while_devices_are_looked_for(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    came_back, times = Nodes.came_back, []

    def breaks(self: Nodes, *, another: bool) -> bool:
        times.append(1)
        if len(times) <= 2:
            break_connection(daemon)
        return came_back(self, another=another)

    monkeypatch.setattr(Nodes, "came_back", breaks)
    yard.dom0.rm("/local/domain/0/data")  # as if it were another store
    break_connection(daemon)
    until(lambda: len(times) == 3)
    until(lambda: "xenstore is back" in caplog.text)
    assert caplog.text.count("xenstore is lost") == 1, "it is away once"
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)


def test_xenstored_hangs(yard: Yard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and requests, and answers none: the control thread waits for one of them, and then turns."""
    monkeypatch.setattr(host_module, "STORE_SECONDS", 2.0)
    daemon = yard.daemon()
    guest = yard.guest(5)
    connect(guest)
    until(lambda: daemon.host.lives["vbd", 5, 51712].connected)
    hangs, turns = threading.Event(), [time.monotonic()]

    def turn() -> None:
        turns.append(time.monotonic())
        daemon.host.later(0.02, turn)

    inside = threading.Event()

    def hang() -> None:
        inside.set()
        hangs.wait(20)

    hanging = threading.Thread(target=lambda: yard.served.call(hang))
    hanging.start()
    assert inside.wait(10)
    try:
        daemon.host.submit(lambda: None, lambda *_: turn())
        daemon.host.refresh()  # it asks for the parameters
        until(lambda: "xenstore is lost" in caplog.text)
        first = len(turns)
        time.sleep(5)
    finally:
        hangs.set()
        hanging.join()
    gaps = [after - before for before, after in itertools.pairwise(turns)]
    assert max(gaps[:first]) < 4 and max(gaps[first + 1 :]) < 1.5, "one wait, and then it is tried elsewhere"
    assert daemon.disks["vbd-5-51712"].attached
    until(lambda: daemon.host._store_fd >= 0)
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)


def test_which_store_it_is_is_asked_beside_a_long_transaction(yard: Yard) -> None:
    """A guest may make one of another thread's long, and the control thread waits for none."""
    inside, end = threading.Event(), threading.Event()

    def long(tx: int) -> None:
        inside.set()
        assert end.wait(20)

    with yard.served.client() as store, ThreadPoolExecutor(2) as pool:
        pool.submit(store.transaction, long)
        try:
            assert inside.wait(10)
            assert len(pool.submit(incarnation, store, 0).result(5)) == 32
        finally:
            end.set()


def test_the_control_thread_waits_less_than_the_manager(yard: Yard) -> None:
    unit = Path(__file__).parents[2] / "examples/dom0/pvdrivers.service"
    seconds = re.search(r"^WatchdogSec=(\d+)$", unit.read_text(), re.MULTILINE)
    assert seconds is not None and host_module.STORE_SECONDS <= 5 < int(seconds[1]) / 2
    yard.dom0.write("/local/domain/0/name", "Domain-0")
    daemon = yard.daemon()
    first = daemon.platform.store
    assert first.timeout == host_module.STORE_SECONDS
    break_connection(daemon)
    until(lambda: daemon.platform.store is not first)
    assert daemon.platform.store.timeout == host_module.STORE_SECONDS


def test_trying_leaves_nothing_open(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """xenstored takes connections, and answers with errors: it is tried for ever, on the same few descriptors."""
    daemon = yard.daemon()
    connect(yard.guest(5))
    tries: list[int] = []
    ls = XenStoreClient.ls

    def refuses(self: XenStoreClient, path: str, tx: int = 0) -> list[str] | None:
        if path == "/local/domain" and len(tries) < 4:
            tries.append(open_files())
            raise XenStoreError(errno.EIO, "DIRECTORY", path)
        return ls(self, path, tx)

    monkeypatch.setattr(XenStoreClient, "ls", refuses)
    break_connection(daemon)
    until(lambda: daemon.host._store_fd == -1)
    until(lambda: daemon.host._store_fd >= 0)
    assert len(tries) == 4 and tries[-1] - tries[0] < 4


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
    empty = as_if_empty(monkeypatch)
    before = daemon.platform.store
    daemon.host.submit(lambda: None, lambda *_: daemon.host.store_lost())
    until(lambda: daemon.host._store_fd == -1)
    assert daemon.disks["vbd-5-51712"].attached and daemon.platform.store is before
    empty.clear()
    until(lambda: daemon.platform.store is not before)
    guest.say(S.Closed)
    until(lambda: guest.state() == S.Closed)


def test_a_guest_is_destroyed_while_the_connection_is_lost(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """xenstored is the same as before, and what is not in it any more was taken away."""
    daemon = yard.daemon()
    stays, goes = yard.guest(5), yard.guest(6)
    connect(stays)
    connect(goes)
    until(lambda: all(life.connected for life in daemon.host.lives.values()))
    with no_store(daemon):
        for path in (goes.back, "/local/domain/6"):
            yard.dom0.rm(path)
    until(lambda: ("vbd", 6, 51712) not in daemon.host.lives)
    assert daemon.disks["vbd-6-51712"].calls[-1] == "removed"
    assert daemon.host.lives["vbd", 5, 51712].connected and "disconnect" not in daemon.disks["vbd-5-51712"].calls


@pytest.mark.parametrize("home", [None, "/local/domain/5/memory/target"])
def test_a_store_that_has_forgotten_the_guests(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str | None
) -> None:
    """xenstored was restarted, and xen-init-dom0 has written dom0's home: disks that are in use stay in use. So they do
    where somebody has begun to write about their guests anew, as `xl mem-set` does."""
    daemon = yard.daemon()
    served, waits = yard.guest(5), yard.guest(6)
    connect(served)
    waits.attach()
    until(lambda: waits.state() == S.InitWait)
    empty = as_if_empty(monkeypatch)
    before = daemon.platform.store
    daemon.host.submit(lambda: None, lambda *_: daemon.host.store_lost())
    until(lambda: daemon.host._store_fd == -1)
    for path in (served.back, waits.back, "/local/domain/5", "/local/domain/6", "/local/domain/0/data"):
        yard.dom0.rm(path)
    if home is not None:
        yard.dom0.write(home, "262144")
    empty.clear()
    until(lambda: daemon.platform.store is not before)
    until(lambda: ("vbd", 6, 51712) not in daemon.host.lives)
    disk, life = daemon.disks["vbd-5-51712"], daemon.host.lives["vbd", 5, 51712]
    assert disk.attached and "disconnect" not in disk.calls and "removed" not in disk.calls
    assert "xenstore was restarted" in life.troubles.now["lost"]
    store = daemon.platform.store
    break_connection(daemon)  # once more, and this time it is the same store that comes back
    until(lambda: daemon.platform.store is not store)
    time.sleep(0.2)
    assert "lost" in life.troubles.now
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
