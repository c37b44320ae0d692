"""What changes outside of a vif, or is written of it, while its guest is served: it goes on, and the operator hears."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from pvdrivers.cli.stats import snapshot

from . import test_outer
from .conftest import until
from .spaces import Bridged
from .test_outer import bridged

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]
host = test_outer.host


def mtu_of(host: Bridged, device: str) -> int:
    return int(host.run("cat", f"/sys/class/net/{device}/mtu"))


@pytest.mark.parametrize("host", [1500], indirect=True)
@pytest.mark.parametrize("outside", ["bridge", "interface"])
def test_an_mtu_that_does_not_fit_any_more(host: Bridged, net: Any, outside: str) -> None:
    """It is told, and no reason to close a vif that is served, neither by this daemon nor by the next."""
    if outside == "interface":
        host.run("ip", "link", "set", "veth0", "nomaster")
    guest = net.guest(bridged(host) if outside == "bridge" else f"packet:veth0;netns={host.name}")
    net.dom0.store.write(f"{guest.backend}/mtu", 1500)
    host.run("ip", "link", "set", "veth0", "mtu", "1400")
    net.daemon.kill()
    net.daemon.start()
    until(lambda: "an MTU of 1500 does not fit" in guest.said())
    assert (guest.vif.state, guest.vif.connections) == (4, 1)
    assert net.dom0.store.read(f"{guest.backend}/state") == b"4"
    host.run("ip", "link", "set", "veth0", "mtu", "1500")
    net.daemon.popen.send_signal(signal.SIGHUP)
    until(lambda: not guest.said())
    net.dom0.store.write(f"{guest.backend}/mtu", 9001)
    until(lambda: "an MTU of 9001 does not fit" in guest.said())
    net.dom0.store.write(f"{guest.backend}/mtu", 1400)
    until(lambda: not guest.said())
    assert guest.vif.connections == 1


def test_the_mtu_of_a_tap_is_the_vifs(host: Bridged, net: Any) -> None:
    guest = net.guest(bridged(host))
    assert mtu_of(host, "out0") == 1500
    for mtu in (9000, 576):
        net.dom0.store.write(f"{guest.backend}/mtu", mtu)
        until(lambda n=mtu: mtu_of(host, "out0") == n)
    net.dom0.store.rm(f"{guest.backend}/mtu")
    until(lambda: mtu_of(host, "out0") == 1500)
    assert not guest.said() and guest.vif.connections == 1


def test_all_of_it_is_told_while_a_tap_cannot_be_made_again(host: Bridged, net: Any) -> None:
    """The operator's link, though the bridge is gone as well; and SIGHUP has it tried as often as that takes."""
    guest = net.guest(bridged(host))
    host.run("ip", "link", "del", "br0")
    host.run("ip", "link", "del", "out0")
    until(lambda: "port" in troubles(net, guest))
    for link, carrier in (("down", b"0"), ("up", b"1")):
        net.dom0.store.write(f"{guest.backend}/link", link)
        until(lambda value=carrier: net.dom0.store.read(f"{guest.backend}/carrier") == value)
        until(lambda: "bridge br0 is not there" in guest.said())
        assert "SIGHUP" in guest.said() and "port" in troubles(net, guest)
    host.run("ip", "link", "add", "br0", "type", "bridge")
    net.daemon.popen.send_signal(signal.SIGHUP)
    until(lambda: host.has("out0") and not guest.said())
    until(lambda: "port" not in troubles(net, guest))
    assert "NO-CARRIER" not in host.run("ip", "link", "show", "out0")
    assert guest.vif.connections == 1


def troubles(net: Any, guest: Any) -> Any:
    return next(d for d in snapshot(net.run_dir) if d["device"] == guest.name).get("troubles", ())
