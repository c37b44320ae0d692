"""What xenstore does not take at the moment: what was done stays done, and is written later."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.device import BackKeys, FrontKeys, NotRecoverable, Publish
from pvdrivers.journal import Journal
from pvdrivers.life import Life
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreError
from tests.device.bed import Bed, Disk, Guest


class Journalled(Disk):
    """As blkback: what is disconnected has no journal any more, and without one nothing is taken over."""

    @property
    def path(self) -> Path:
        return self.context.run_dir / "journal"

    def connect(self, front: FrontKeys, *, recover: bool) -> Publish:
        if not recover:
            Journal.create(self.path, "this one", [4]).close()
        elif (journal := Journal.open(self.path, "this one", [4])) is None:
            raise NotRecoverable("no journal")
        else:
            journal.close()
        return super().connect(front, recover=recover)

    def disconnect(self) -> None:
        super().disconnect()
        self.path.unlink()


def left_behind(bed: Bed, backend: int = S.Connected) -> tuple[Guest, Life, Journalled]:
    """A connected disk whose process has died, and the next process's life of it."""
    guest, life, _ = bed.connected()
    guest.dom0.write(guest.back + "/state", backend)
    disk = Journalled(life.ident, bed.context)
    Journal.create(disk.path, "this one", [4]).close()
    return guest, Life(disk, bed.control), disk


def refuse(bed: Bed, monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.ENOSPC) -> None:
    """Have xenstore refuse the control thread's next transactions that write."""
    left = [number] * times
    store = bed.control.store
    write = store.write

    def refused(path: str, value: bytes | str | int, tx: int = 0) -> None:
        if tx and left:
            raise XenStoreError(left.pop(), "WRITE", path)
        write(path, value, tx)

    monkeypatch.setattr(store, "write", refused)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN])
@pytest.mark.parametrize("backend", [S.Connected, S.Closing])
def test_taken_over_and_not_published(bed: Bed, monkeypatch: pytest.MonkeyPatch, backend: S, number: int) -> None:
    """The disk is served, and stays: to take it over once more would be to drop its rings and its journal."""
    guest, life, disk = left_behind(bed, backend)
    disk.sectors = 200
    refuse(bed, monkeypatch, 3, number)
    life.look()
    assert life.connected and disk.path.exists() and guest.key("sectors") == "100"
    assert guest.error() is not None
    life.handle_frontend_change()
    bed.control.pass_time(10)
    assert disk.calls == ["advertise", "recover"], "once"
    assert life.connected and disk.path.exists() and guest.state() == backend
    assert guest.key("sectors") == "200" and guest.error() is None and life.troubles.now == {}
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed and disk.calls == ["advertise", "recover", "disconnect"]


def lose(bed: Bed) -> Callable[[str], None]:
    """Lose the connection to the store while a disk is in other threads' hands."""
    return lambda what: bed.control.store.close() if what in ("recover", "refresh") else None


def test_the_store_is_lost_while_a_disk_is_taken_over(bed: Bed) -> None:
    guest, life, disk = left_behind(bed)
    disk.sectors, disk.hold = 200, lose(bed)
    life.look()
    assert bed.control.lost >= 1 and life.connected
    bed.control._store = bed.served.client()
    life.look()
    assert disk.calls == ["advertise", "recover"] and life.connected and disk.path.exists()
    assert guest.state() == S.Connected and guest.key("sectors") == "200" and guest.error() is None


def test_unplugged_before_it_could_be_published(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, life, disk = left_behind(bed)
    refuse(bed, monkeypatch, 1)
    disk.sectors = 200
    life.look()
    guest.unplug()
    life.handle_backend_change(["online", "state"])
    assert life.connected and guest.state() == S.Closing
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert life.gone and guest.state() == S.Closed
    assert disk.calls == ["advertise", "recover", "disconnect", "removed"]


def test_reconfigured_and_not_published(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What refresh() says it says once."""
    guest, life, disk = bed.connected()
    said: list[Publish | None] = [None, {"sectors": 200}]
    monkeypatch.setattr(disk, "refresh", lambda: said.pop() if said else None)
    refuse(bed, monkeypatch, 1)
    guest.say(S.Reconfiguring)
    life.handle_frontend_change()
    assert guest.state() == S.Connected and life.connected
    bed.control.pass_time(0.2)
    assert guest.state() == S.Connected, "it is not tried all the time"
    bed.control.pass_time(1)
    assert guest.state() == S.Reconfigured and guest.key("sectors") == "200"


# A resize


def resized(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> tuple[Guest, Life, Disk]:
    """A connected disk that has another size now; as blkback's, its refresh() says so once."""
    guest, life, disk = bed.connected()
    disk.sectors, told = 200, [100]
    refresh = disk.refresh

    def once() -> Publish | None:
        keys = refresh()
        return keys if told and told.pop() != disk.sectors else None

    monkeypatch.setattr(disk, "refresh", once)
    return guest, life, disk


def test_a_size_that_could_not_be_published(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, life, disk = resized(bed, monkeypatch)
    refuse(bed, monkeypatch, 2)
    guest.guest.watch(guest.back + "/state", "w")
    guest.guest.events()
    life.refresh()
    assert guest.key("sectors") == "100"
    bed.control.pass_time(2)
    guest.guest.read(guest.front + "/state")
    assert guest.key("sectors") == "200" and len(guest.guest.events()) == 1, "the guest is told"
    assert disk.calls == ["refresh"] and life.troubles.now == {} and guest.error() is None


@pytest.mark.parametrize("at", ["the parameters", "refresh", "the new size"])
def test_the_store_is_lost_at_a_resize(bed: Bed, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    guest, life, disk = resized(bed, monkeypatch)
    read = BackKeys.read
    if at == "the parameters":
        monkeypatch.setattr(BackKeys, "read", lambda store, *_, **__: store.close() or store.read("/"))
    elif at == "refresh":  # as netback's, which reads what the guest says
        disk.troubles["refresh"] = [XenStoreError(errno.ECONNRESET, "READ", "/")]
        disk.hold = lose(bed)
    else:
        disk.hold = lose(bed)
    life.refresh()
    assert bed.control.lost >= 1 and life.connected and guest.key("sectors") == "100"
    monkeypatch.setattr(BackKeys, "read", read)
    disk.hold = lambda what: None
    bed.control._store = bed.served.client()
    life.look()
    assert guest.key("sectors") == "200" and guest.state() == S.Connected and guest.error() is None


def test_a_size_that_changed_while_no_daemon_ran(bed: Bed) -> None:
    guest, life, disk = left_behind(bed)
    disk.sectors = 200
    guest.guest.watch(guest.back + "/state", "w")
    guest.guest.events()
    life.look()
    guest.guest.read(guest.front + "/state")
    assert guest.key("sectors") == "200" and len(guest.guest.events()) == 1, "the guest is told"
    assert guest.state() == S.Connected and disk.calls == ["advertise", "recover"]
