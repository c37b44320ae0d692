"""A life led step by step against a real store: what an honest guest and the toolstack do to it."""

from __future__ import annotations

import gc
import weakref

import pytest

from pvdrivers.errors import ConfigError, PlatformError
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


def test_a_device_that_is_gone_is_not_held_by_a_timer(bed: Bed) -> None:
    """One would have been told in a minute that its guest does not connect; its class may hold much by then."""
    guest = bed.guest()
    guest.attach()
    life, disk = bed.life(guest)
    life.look()
    assert guest.state() == S.InitWait
    guest.unplug()
    bed.dom0.rm(guest.front)
    life.handle_backend_change(["online", "state"])
    assert life.gone and disk.calls[-1] == "removed"
    there = weakref.ref(life.troubles)
    del life, disk
    gc.collect()
    assert there() is None


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


@pytest.mark.parametrize("state", [S.Connected, S.Initialised])
def test_new_rings_when_memory_is_short_and_the_frontend_goes_on(bed: Bed, state: S) -> None:
    """It sees us Connected, as we were: nobody tells it that its rings are not used yet."""
    guest, life, disk = bed.connected()
    disk.troubles["connect"] = [PlatformError("no handles left")] * 4
    guest.say(S.Initialised, ring_ref=80)
    life.handle_frontend_change()
    guest.say(state)
    life.handle_frontend_change()
    assert not life.connected and 1 <= disk.calls.count("connect") <= 3, "it is not tried all the time"
    bed.control.pass_time(10)
    assert life.connected and guest.state() == S.Connected and guest.error() is None
    assert disk.front is not None and disk.front.int_key("ring-ref", None, 0, 999) == 80
    calls = len(disk.calls)
    life.handle_frontend_change()
    assert len(disk.calls) == calls


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
