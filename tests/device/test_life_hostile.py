"""A guest that lies, breaks its ring, or writes without end."""

from __future__ import annotations

import logging

import pytest

from pvdrivers.pace import EVENTS, QUIET_SECONDS
from pvdrivers.xenbus import XenbusState as S
from tests.device.bed import Bed


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
