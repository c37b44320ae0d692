"""A life led step by step against a real store: what the guest, the toolstack and the disk do to it."""

from __future__ import annotations

import errno
import logging

import pytest

from pvdrivers.device import NotRecoverable
from pvdrivers.errors import ConfigError, PlatformError, ProtocolViolation, StoreError
from pvdrivers.life import EVENTS, QUIET_SECONDS
from pvdrivers.xenbus import XenbusState as S
from pvdrivers.xenstore import XenStoreError
from tests.device.bed import Bed


def test_the_ordinary_handshake(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    life.look()
    assert guest.state() == S.InitWait
    assert guest.key("multi-queue-max-queues") == "4", "published before InitWait"
    assert guest.key("hotplug-status") == "connected"
    guest.publish()
    life.handle_frontend_change()
    assert guest.state() == S.Connected
    assert guest.key("sectors") == "100"
    guest.say(S.Connected)
    life.handle_frontend_change()
    life.handle_backend_change(["state", "sectors", "feature-x"])
    assert disk.calls == ["advertise", "connect"]
    assert disk.params.str_key("mode", None) == "w"
    assert life.violations == 0 and life.error == ""


def test_a_frontend_may_be_ahead(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    guest.publish(S.Connected)
    life, disk = bed.life(guest)
    life.look()
    assert guest.state() == S.Connected
    assert disk.calls == ["advertise", "connect"]


def test_a_frontend_directory_that_comes_later(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    bed.dom0.rm(guest.front)
    life, _ = bed.life(guest)
    life.look()
    assert guest.state() == S.Initialising
    bed.dom0.write(guest.front + "/state", 1)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait


def test_keys_and_state_become_visible_together(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, _ = bed.life(guest)
    guest.guest.watch(guest.back, "w")
    life.look()
    order = [path.rpartition("/")[2] for path, _ in guest.guest.events()]
    assert order[-1] == "state", "who sees the state sees the keys"


def test_closing_and_coming_back(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.say(S.Closing)
    life.handle_frontend_change()
    assert guest.state() == S.Closing
    assert life.connected, "requests in flight end first"
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed and disk.calls == ["disconnect"]
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait
    guest.publish()
    life.handle_frontend_change()
    assert guest.state() == S.Connected and life.connected
    assert disk.calls == ["disconnect", "advertise", "connect"]


def test_unplug(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.unplug()
    life.handle_backend_change(["online", "state"])
    assert life.connected, "the guest goes on until it closes"
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed and life.gone
    assert disk.calls == ["disconnect", "removed"]
    assert bed.control.ended == ["vbd-5-51712"]
    assert bed.dom0.ls(guest.back), "libxl, which waits for Closed, removes the directory itself"


def test_closed_is_written_after_everything_is_released(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    seen: list[int | None] = []
    disk.hold = lambda what: seen.append(guest.state())
    guest.unplug()
    bed.dom0.rm(guest.front)
    life.handle_backend_change(["online", "state"])
    assert disk.calls == ["disconnect", "removed"] and seen == [S.Closing, S.Closing]
    assert guest.state() == S.Closed


def test_online_alone_asks_the_frontend_to_close(bed: Bed) -> None:
    guest, life, _ = bed.connected()
    bed.dom0.write(guest.back + "/online", 0)
    life.handle_backend_change(["online"])
    assert guest.state() == S.Closing and life.connected
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert life.gone


def test_a_frontend_that_vanishes_may_return_while_the_domain_is_there(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.guest.rm(guest.front + "/state")
    life.handle_frontend_change()
    assert guest.state() == S.Closed and not life.gone and disk.calls == ["disconnect"]
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait


def test_a_domain_that_is_gone_takes_the_device_along(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.destroy()
    life.look()
    assert life.gone and disk.calls == ["disconnect", "removed"]
    assert bed.dom0.ls(guest.back) is None, "nobody else would remove it"
    assert bed.dom0.ls("/local/domain/0/backend/vbd/5") is None


def test_a_directory_that_is_removed_is_not_written_again(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    bed.dom0.rm(guest.back)
    life.handle_backend_change([""])
    assert life.gone and disk.calls == ["disconnect", "removed"]
    assert bed.dom0.ls(guest.back) is None


def test_the_directory_goes_while_the_disk_is_opened(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    bed.control.hold = True
    life.look()
    bed.dom0.rm(guest.back)
    life.handle_backend_change([""])
    bed.control.hold = False
    bed.control.work()
    assert bed.dom0.ls(guest.back) is None
    assert life.gone and disk.calls == ["advertise", "removed"]


def test_the_toolstack_closes_while_the_rings_are_mapped(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    life.look()
    guest.publish()
    bed.control.hold = True
    life.handle_frontend_change()
    guest.unplug()
    bed.control.hold = False
    bed.control.work()
    assert guest.state() == S.Closing, "its Closing is not written over with Connected"
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert life.gone and disk.calls == ["advertise", "connect", "disconnect", "removed"]


def test_a_crash_kernel_starts_over(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait and disk.calls == ["disconnect", "advertise"]
    assert not life.connected


def test_new_rings_without_closing(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.say(S.Initialised, ring_ref=80)
    life.handle_frontend_change()
    assert disk.calls == ["disconnect", "connect"] and guest.state() == S.Connected
    assert disk.front is not None and disk.front.int_key("ring-ref", None, 0, 999) == 80


def test_new_rings_when_memory_is_short(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    disk.troubles["connect"] = [PlatformError("no handles left")]
    guest.say(S.Initialised, ring_ref=80)
    life.handle_frontend_change()
    assert not life.connected
    bed.control.pass_time(1)
    assert life.connected and disk.calls == ["disconnect", "connect", "connect"]


# A guest that lies


@pytest.mark.parametrize("state", [b"9", b"-1", b"99999999999999999999999", b"abc", b"\xff\x00\xfe", b""])
def test_a_state_that_is_none(bed: Bed, state: bytes, caplog: pytest.LogCaptureFixture) -> None:
    guest, life, disk = bed.connected()
    guest.say(state)
    life.handle_frontend_change()
    life.handle_frontend_change()
    assert guest.state() == S.Closing and disk.calls == ["disconnect"]
    assert life.violations == 1 and "domain 5, device vbd-5-51712" in caplog.text
    error = guest.error()
    assert error is not None and "frontend state is" in error
    guest.say(S.Closed)
    life.handle_frontend_change()
    assert guest.state() == S.Closed
    guest.say(S.Initialising)
    life.handle_frontend_change()
    assert guest.state() == S.InitWait and guest.error() is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "ring-ref is missing"),
        ({"ring_ref": "x"}, "ring-ref is 'x', not a number"),
        ({"ring_ref": 1 << 21}, "ring-ref is '2097152', not from 1 to 1048576"),
        ({"ring_ref": "9" * 200}, "not a number"),
        ({"ring_ref": "9" * 2000}, "more than 256 bytes"),
        ({"ring_ref": b"\xff\x1b[31m"}, r"'\xff\x1b[31m'"),
        ({"ring_ref": 5, "event_channel": -1}, "event-channel is '-1'"),
    ],
)
def test_keys_that_make_no_sense(
    bed: Bed, keys: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    life.look()
    guest.say(S.Initialised, **keys)
    life.handle_frontend_change()
    assert guest.state() == S.Closing and not life.connected
    assert said in caplog.text and "domain 5, device vbd-5-51712" in caplog.text
    assert life.violations == 1 and "disconnect" not in disk.calls


def test_a_directory_without_end(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, _ = bed.life(guest)
    life.look()
    for i in range(1030):
        bed.dom0.write(f"{guest.front}/key{i}", "")  # over the guest's quota: a store may have none
    guest.say(S.Initialised)
    life.handle_frontend_change()
    assert guest.state() == S.Closing and life.violations == 1


def test_reconfiguring_out_of_turn(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, _ = bed.life(guest)
    life.look()
    guest.say(S.Reconfiguring)
    life.handle_frontend_change()
    assert guest.state() == S.Closing and life.violations == 1


def test_a_violation_on_the_ring(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    guest, life, disk = bed.connected()
    for _ in range(1000):
        life.fault("producer index 7 beyond the ring")
    assert guest.state() == S.Closing and disk.calls == ["disconnect"]
    assert life.violations == 1000
    assert 1 <= caplog.text.count("producer index 7") < 30, "told, but not a thousand times"
    life.look()
    assert guest.state() == S.Closing and disk.calls == ["disconnect"], "a frontend that stalls holds nothing"


def test_a_violation_while_connecting(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    life.look()
    guest.publish()
    bed.control.hold = True
    life.handle_frontend_change()
    life.fault("at once")
    bed.control.hold = False
    bed.control.work()
    assert disk.calls == ["advertise", "connect", "disconnect"] and guest.state() == S.Closing


def test_a_storm_of_states(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    other, neighbour, _ = bed.connected(6)
    for _ in range(int(EVENTS[1])):
        life.handle_frontend_change()
    life.handle_frontend_change()
    assert bed.control.paused == {"vbd-5-51712"}
    guest.say(S.Closed)
    life.handle_frontend_change(100000)
    assert disk.calls == [], "not looked at"
    other.say(S.Closed)
    neighbour.handle_frontend_change()
    assert other.state() == S.Closed, "others are"
    bed.control.pass_time(QUIET_SECONDS)
    assert bed.control.paused == set() and guest.state() == S.Closed and disk.calls == ["disconnect"]


def test_reconnecting_in_a_circle_is_slowed_down(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guest, life, disk = bed.connected()
    for _ in range(100):
        for state in (S.Initialising, S.Initialised, S.Connected):
            guest.say(state)
            life.look()
    assert disk.calls.count("connect") < 12
    assert len(caplog.records) < 100
    guest.say(S.Initialising)
    bed.control.pass_time(60)
    life.look()
    guest.publish()
    life.look()
    bed.control.pass_time(2)
    assert guest.state() == S.Connected


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


def test_retries_become_rare(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    disk.troubles["advertise"] = [StoreError("gone")] * 1000
    life.look()
    bed.control.pass_time(600)
    assert 20 <= len(disk.calls) < 40


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


def test_handing_over_while_something_is_under_way(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    bed.control.hold = True
    life.look()
    done: list[int] = []
    life.hand_over(lambda: done.append(1))
    assert done == []
    bed.control.hold = False
    bed.control.work()
    assert done == [1] and disk.calls == ["advertise", "hand_over"] and guest.state() == S.InitWait


# Others


def test_a_resize(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    disk.sectors = 200
    guest.guest.watch(guest.back + "/state", "w")
    guest.guest.events()
    life.refresh()
    guest.guest.read(guest.front + "/state")
    assert guest.key("sectors") == "200" and disk.calls == ["refresh"]
    assert len(guest.guest.events()) == 1, "the unchanged state was written again"
    assert guest.state() == S.Connected
    bed.dom0.write(guest.back + "/params", "bigger.img")
    life.handle_backend_change(["params"])
    assert disk.calls == ["refresh", "refresh"]


def test_reconfiguring(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.say(S.Reconfiguring)
    life.handle_frontend_change()
    assert guest.state() == S.Reconfigured and disk.calls == ["refresh"]
    guest.say(S.Connected)
    life.handle_frontend_change()
    assert guest.state() == S.Connected and life.connected


def test_the_store_is_lost_and_comes_back(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    guest.say(S.Closed)
    bed.control.store.close()
    life.handle_frontend_change()
    assert bed.control.lost == 1 and disk.calls == []
    bed.control._store = bed.served.client()
    life.look()
    assert guest.state() == S.Closed and disk.calls == ["disconnect"]


def test_the_store_is_lost_while_a_fault_is_handled(bed: Bed) -> None:
    guest, life, disk = bed.connected()
    bed.control.hold = True
    life.fault("x")
    bed.control.store.close()
    bed.control.work()
    assert bed.control.lost >= 1
    bed.control._store = bed.served.client()
    bed.control.hold = False
    life.look()
    assert guest.state() == S.Closing and disk.calls == ["disconnect"]


def test_identity_is_not_the_guests_to_choose(bed: Bed) -> None:
    guest = bed.guest()
    guest.attach()
    bed.dom0.write(guest.back + "/frontend", "/local/domain/6/device/vbd/51712")
    with pytest.raises(ConfigError, match="not below /local/domain/5"):
        bed.life(guest)
    with pytest.raises(XenStoreError):
        guest.guest.write(guest.back + "/frontend", "/local/domain/5/data")
