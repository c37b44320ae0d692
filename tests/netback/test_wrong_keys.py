"""Keys that the toolstack has written and that make no sense, or none any more, while a guest is served: it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront_keys import Wishes

from .conftest import Guest, Net, until
from .test_live import EVERYBODY, A, drained, heard, passes
from .test_switch import nothing_came
from .test_waiting import carrier, fill

pytestmark = pytest.mark.jit_only("a real daemon serves")


def restart(net: Net, *guests: Guest) -> None:
    net.daemon.kill()
    net.daemon.start()
    served(*guests)


def served(*guests: Guest) -> None:
    """By this daemon, and without a new connection."""
    for guest in guests:
        until(lambda: guest.name in [one["device"] for one in snapshot(guest.net.run_dir) if one.get("connected")])  # noqa: B023
        assert (guest.vif.state, guest.vif.connections) == (4, 1)
        assert guest.net.dom0.store.read(f"{guest.backend}/state") == b"4"


def test_a_wrong_key_is_no_reason_to_close_when_a_daemon_takes_over(net: Any) -> None:
    """What was before holds still, though the store does not tell it any more."""
    a, b = net.guest(), net.guest(be={"mtu": 1000, "link": "up"})
    wrong = {"rate": "fast", "mtu": "big", "link": "sideways", "queues": "9", "staging": "-1", "mac": "mine",
             "rx_stall_timeout_msecs": "soon"}  # fmt: skip
    for key, value in wrong.items():
        net.dom0.store.write(f"{b.backend}/{key}", value)
    until(lambda: all(f"/{key} " in b.said() for key in wrong))
    for _ in range(2):
        restart(net, a, b)
        until(lambda: passes(a, b, a.frame(b, bytes(1000))))
        assert not passes(a, b, a.frame(b, bytes(1001)))
        assert all(f"/{key} " in b.said() for key in wrong) and not a.said()
    for key in wrong:
        net.dom0.store.rm(f"{b.backend}/{key}")
    until(lambda: not b.said())
    until(lambda: passes(a, b, a.frame(b, bytes(1001))))
    assert not (net.run_dir / "live" / b.name).exists()
    restart(net, a, b)
    until(lambda: passes(a, b, a.frame(b, bytes(1001))))


def test_a_link_that_was_down_stays_so(net: Any) -> None:
    a, b = net.guest(), net.guest(be={"link": "down"})
    net.dom0.store.write(f"{b.backend}/link", "dwon")
    until(lambda: "not one of down, up" in b.said())
    restart(net, a, b)
    until(lambda: b.counted("no carrier") > 0 or not heard(a, b, b.mac))
    assert not heard(a, b, b.mac) and carrier(b) == b"0" and not b.vif.carrier
    net.dom0.store.write(f"{b.backend}/link", "up")
    until(lambda: heard(a, b, b.mac))


def test_less_queues_hold_from_the_next_connection_on(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=2)
    net.dom0.store.write(f"{b.backend}/queues", 1)
    restart(net, a, b)
    until(lambda: heard(b, a, a.mac))
    a.vif.send(a.frame(b))
    until(lambda: b.counted("received") > 0)
    assert len(b.vif.queues) == 2 and not b.said() and b.vif.connections == 1
    net.dom0.store.write(f"{b.backend}/state", 5)
    until(lambda: b.vif.connections == 2 and b.vif.state == 4)
    assert len(b.vif.queues) == 1


def test_a_guest_may_reconfigure_whatever_the_toolstack_has_written(net: Any) -> None:
    a, b = net.guest(), net.guest()
    net.dom0.store.write(f"{b.backend}/mtu", "10")
    until(lambda: "not from 68" in b.said())
    b.vif.set_headroom(256)
    assert heard(a, b, b.mac, 5) and b.vif.connections == 1
    assert "not from 68" in b.said(), "it is so still"


def test_where_its_packets_go_has_to_be_known(net: Any) -> None:
    """Nobody can serve it then; but it is not closed, and goes on when that is mended."""
    a, b = net.guest(), net.guest()
    net.dom0.store.write(f"{b.backend}/bridge", "swich:")
    until(lambda: "no port that is known" in b.said())
    assert heard(a, b, b.mac, 5)
    net.daemon.kill()
    net.daemon.start()
    served(a)
    until(lambda: "no port that is known" in b.said())
    assert not heard(a, b, b.mac)
    assert net.dom0.store.read(f"{b.backend}/state") == b"4"
    net.dom0.store.write(f"{b.backend}/bridge", "switch:")
    until(lambda: heard(a, b, b.mac))
    served(b)
    until(lambda: not b.said())


def test_a_wrong_key_keeps_nothing_else_from_being_told(net: Any) -> None:
    """That its guest takes nothing, and what that guest wishes."""
    be = {"rx_stall_timeout_msecs": 400, "rx_drain_timeout_msecs": 100}
    a, b = net.guest(), net.guest(be=be, wishes=Wishes(multicast=True))
    net.dom0.store.write(f"{b.backend}/rate", "fast")
    until(lambda: "rate is 'fast'" in b.said())
    fill(a, b, 1)
    until(lambda: carrier(b) == b"0")
    until(lambda: not b.vif.carrier)
    drained(b)
    until(lambda: carrier(b) == b"1")
    assert heard(a, b, EVERYBODY, 5) and not heard(a, b, A)
    b.vif.groups.filter(False)
    until(lambda: heard(a, b, A))
    net.dom0.store.write(f"{b.backend}/link", "down")
    until(lambda: carrier(b) == b"0")
    a.vif.send(a.frame(b))
    nothing_came(b)
    assert "rate is 'fast'" in b.said()
