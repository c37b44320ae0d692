"""Trouble behind the device, and processes that follow one another."""

from __future__ import annotations

import errno

import pytest

from pvdrivers.device import NotRecoverable
from pvdrivers.errors import ConfigError, PlatformError, ProtocolViolation, StoreError
from pvdrivers.storage.locks import DrainingError
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreError
from tests.device.bed import Bed

# Trouble behind the device


@pytest.mark.parametrize(
    "trouble", [StoreError("disk.img: busy"), OSError(errno.EMFILE, "out of files"), MemoryError()]
)
def test_what_may_pass_is_tried_again(bed: Bed, trouble: Exception) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [trouble] * 3
    life.look()
    assert guest.state() == S.Initialising
    error = guest.error()
    assert error is not None and (str(trouble) or repr(trouble)) in error
    assert guest.key("hotplug-error") == (str(trouble) or repr(trouble)) and guest.key("hotplug-status") == "error"
    life.handle_backend_change(["hotplug-error", "hotplug-status"])
    assert disk.calls == ["advertise"], "our own words are no reason to try again"
    bed.control.pass_time(2)
    assert guest.state() == S.InitWait and disk.calls == ["advertise"] * 4
    assert guest.error() is None and guest.key("hotplug-error") is None
    assert guest.key("hotplug-status") == "connected"


def test_a_guest_does_not_fill_the_log_with_new_words(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    guest = bed.guest()
    guest.attach()
    life, _ = bed.life(guest)
    life.look()
    for gref in range(300):
        life.nodes.report(f"grant reference {gref} of domain 7 cannot be mapped")
        assert life.nodes.reported.endswith(f"{gref} of domain 7 cannot be mapped")
    lines = [r.getMessage() for r in caplog.records if "cannot be mapped" in r.getMessage()]
    assert len(lines) == 8 + 5
    assert lines[-1].endswith("grant reference 255 of domain 7 cannot be mapped (256 errors so far)")
    assert str(guest.error()).endswith("grant reference 299 of domain 7 cannot be mapped"), "xenstore has them all"


@pytest.mark.parametrize("node", ["error/backend", "hotplug-error", "hotplug-status"])
def test_the_connection_breaks_while_an_error_is_told(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, node: str
) -> None:
    """The toolstack waits for hotplug-status: it is told when the store is back, and the log is not told again."""
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [ConfigError("no such disk"), ConfigError("no such disk")]
    write, left = bed.control.store.write, [1]

    def breaks(path: str, value: bytes | str | int, tx: int = 0) -> None:
        if node in path and left:
            left.pop()
            raise XenStoreError(errno.ECONNRESET, "WRITE", path)
        write(path, value, tx)

    monkeypatch.setattr(bed.control.store, "write", breaks)
    life.look()
    assert bed.control.lost == 1
    life.look()
    assert guest.key("hotplug-status") == "error" and guest.key("hotplug-error") == "no such disk"
    assert "no such disk" in str(guest.error()) and caplog.text.count("no such disk") == 1


def test_a_refresh_that_failed_is_over_when_one_has_not(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    disk.troubles["refresh"] = [StoreError("disk.img: gone")]
    life.refresh()
    assert life.error == "not refreshed: disk.img: gone" and "gone" in str(guest.error()) and life.connected
    disk.refresh = lambda: None  # type: ignore[method-assign]
    life.refresh()
    assert life.error == "" and guest.error() is None


def test_retries_become_rare(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [StoreError("gone")] * 1000
    life.look()
    bed.control.pass_time(600)
    assert 20 <= len(disk.calls) < 40


def test_io_of_the_dead_is_waited_for_and_told_once(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """Its guest waits as well: it is looked at each half a second, however long it takes."""
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [DrainingError("disk.img: I/O of one that has ended is under way")] * 200
    life.look()
    bed.control.pass_time(60)
    assert 100 < len(disk.calls) < 200
    assert life.troubles.now == {"draining": "disk.img: I/O of one that has ended is under way"}
    assert guest.error() is not None and "is under way" in str(guest.error())
    assert len([r for r in caplog.records if "is under way" in r.getMessage() and r.levelname == "ERROR"]) == 1
    bed.control.pass_time(60)
    assert guest.state() == S.InitWait and life.troubles.now == {} and guest.error() is None


def test_a_wrong_configuration_waits_for_the_operator(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach(params="nonsense:")
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [ConfigError("params: what is nonsense:?")]
    life.look()
    bed.control.pass_time(1000)
    assert disk.calls == ["advertise"] and guest.state() == S.Initialising
    bed.dom0.write(guest.back + "/params", "/disk.img")
    life.handle_backend_change(["params"])
    assert guest.state() == S.InitWait
    assert disk.params.str_key("params", None) == "/disk.img"


def test_a_connection_short_of_resources(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["connect"] = [PlatformError("no grant handles"), PlatformError("no grant handles")]
    life.look()
    guest.publish()
    life.handle_frontend_change()
    assert guest.state() == S.InitWait
    bed.control.pass_time(3)
    assert guest.state() == S.Connected
    assert disk.calls == ["advertise", "connect", "connect", "connect"]


def test_a_wrong_configuration_does_not_close_who_is_connected(bed: Bed) -> None:
    """The operator has changed something while no daemon ran: the guest waits until it is mended."""
    _left_behind(bed)
    guest = bed.guest()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [ConfigError("params: what is nonsense:?")] * 1000
    life.look()
    bed.control.pass_time(100)
    assert guest.state() == S.Connected and not life.connected and "nonsense" in str(guest.error())
    assert len(disk.calls) < 30
    disk.troubles = {}
    life.handle_backend_change(["params"])
    assert life.connected and guest.state() == S.Connected and guest.error() is None


def test_what_is_wrong_with_one_that_is_served_is_told(bed: Bed) -> None:
    """For as long as it is so, whatever else is published meanwhile."""
    guest, life, disk = bed.connected()
    disk.wrong = "rate: what is fast?"
    for sectors in (200, 300):
        disk.sectors = sectors
        life.handle_backend_change(["rate"])
        assert guest.key("sectors") == str(sectors) and "rate: what is fast?" in str(guest.error())
    disk.wrong = ""
    life.handle_backend_change(["rate"])
    assert guest.error() is None and guest.state() == S.Connected


def test_a_port_that_could_not_be_made_again_is_trouble_still(bed: Bed) -> None:
    _, life, disk = bed.connected()
    life.notice("port", "TAP x: it is gone")
    disk.lost, disk.wrong = True, "bridge y is not there"
    life.refresh()
    assert life.troubles.now == {"port": "TAP x: it is gone"} and life.error == "bridge y is not there"
    disk.lost, disk.wrong = False, ""
    life.refresh()
    assert life.troubles.now == {} and life.error == ""


@pytest.mark.usefixtures("own_fault")
def test_our_own_fault_closes_one_device(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["connect"] = [ZeroDivisionError("oops")]
    life.look()
    guest.publish()
    life.handle_frontend_change()
    assert guest.state() == S.Closing and life.violations == 0
    assert "ZeroDivisionError" in caplog.text
    guest.say(S.Closed)
    life.handle_frontend_change()
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait


@pytest.mark.usefixtures("own_fault")
def test_a_disconnect_that_fails_is_done_once(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    disk.troubles["disconnect"] = [RuntimeError("stuck")]
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed and disk.calls == ["disconnect"]


# Taking over


def _left_behind(bed: Bed, backend: int = S.Connected, frontend: int = S.Connected) -> None:
    guest = bed.guest()
    guest.attach()
    guest.publish(frontend)
    bed.dom0.write(guest.back + "/state", backend)


def test_a_connection_is_taken_over_and_nothing_is_seen(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    bed.dom0.write(guest.back + "/sectors", 100)
    bed.dom0.write(guest.back + "/sector-size", 512)
    guest.guest.watch(guest.back, "w")
    guest.guest.events()
    life, disk = bed.life(guest)
    life.look()
    assert disk.calls == ["advertise", "recover"] and life.connected
    assert guest.state() == S.Connected
    guest.guest.read(guest.front + "/state")
    assert guest.guest.events() == [], "not one key was touched"


def test_what_cannot_be_taken_over_reconnects(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    life, disk = bed.life(guest)
    disk.troubles["recover"] = [NotRecoverable("no journal")]
    life.look()
    assert guest.state() == S.Closing and not life.connected
    assert "no journal" in str(guest.error())
    for state in (S.Closed, S.Initialising):
        guest.say(state)
        life.handle_frontend_change()
    guest.publish()
    life.handle_frontend_change()
    assert guest.state() == S.Connected and life.connected and guest.error() is None
    assert disk.calls == ["advertise", "recover", "advertise", "connect"]


def test_taking_over_waits_for_the_disk(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [StoreError("still being written by pid 7")] * 2
    life.look()
    assert guest.state() == S.Connected
    bed.control.pass_time(2)
    assert life.connected and disk.calls == ["advertise"] * 3 + ["recover"]


def test_a_lie_is_found_when_taking_over(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    life, disk = bed.life(guest)
    disk.troubles["recover"] = [ProtocolViolation(5, "vbd-5-51712", "changed its keys")]
    life.look()
    assert guest.state() == S.Closing and life.violations == 1


def test_closing_is_taken_over_too(bed: Bed) -> None:
    _left_behind(bed, backend=S.Closing)
    guest = bed.guest()
    life, disk = bed.life(guest)
    life.look()
    assert life.connected and guest.state() == S.Closing
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed and disk.calls == ["advertise", "recover", "disconnect"]


@pytest.mark.parametrize("backend", [S.Connected, S.Closing], ids=str)
@pytest.mark.parametrize("frontend", [S.Connected, S.Closing], ids=str)
def test_what_is_being_unplugged_is_taken_over_too(bed: Bed, backend: S, frontend: S) -> None:
    """A mounted disk, say, that its guest does not let go of: it goes on, and goes when the guest does."""
    _left_behind(bed, backend, frontend)
    guest = bed.guest()
    bed.dom0.write(guest.back + "/online", 0)
    life, disk = bed.life(guest)
    life.look()
    assert life.connected and disk.calls == ["advertise", "recover"] and guest.state() == S.Closing
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert disk.calls == ["advertise", "recover", "disconnect", "removed"]
    assert life.gone and guest.state() == S.Closed


def test_what_is_being_unplugged_and_cannot_be_taken_over(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    bed.dom0.write(guest.back + "/online", 0)
    life, disk = bed.life(guest)
    disk.troubles["recover"] = [NotRecoverable("no journal")]
    life.look()
    assert guest.state() == S.Closing and not life.connected and disk.calls == ["advertise", "recover"]
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert life.gone and guest.state() == S.Closed and disk.calls == ["advertise", "recover", "removed"]


def test_a_frontend_that_restarted_meanwhile_is_offered_the_device(bed: Bed) -> None:
    _left_behind(bed, frontend=S.Initialising)
    guest = bed.guest()
    life, disk = bed.life(guest)
    life.look()
    assert guest.state() == S.InitWait and disk.calls == ["advertise"]


def test_the_stale_directory_of_a_domain_that_is_gone(bed: Bed) -> None:
    _left_behind(bed)
    guest = bed.guest()
    life, _ = bed.life(guest)
    guest.destroy()
    life.look()
    assert life.gone and bed.dom0.ls(guest.back) is None


def test_handing_over(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    done: list[int] = []
    life.hand_over(lambda: done.append(1))
    assert done == [1] and disk.calls == ["hand_over"] and guest.state() == S.Connected
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert disk.calls == ["hand_over"], "the next process sees to it"


@pytest.mark.parametrize("away", [False, True], ids=["the store is there", "the store is away"])
def test_handing_over_while_something_is_under_way(bed: Bed, away: bool) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    bed.control.hold = True
    life.look()
    done: list[int] = []
    life.hand_over(lambda: done.append(1))
    assert done == []
    bed.control.hold = False
    if away:
        bed.dom0.close()
    bed.control.work()
    assert done == [1] and disk.calls == ["advertise", "hand_over"]
    assert away or guest.state() == S.InitWait
