"""A switch with an uplink: guests of it, and a namespace behind a bridge, by one TAP; and VLANs on the way out."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from .conftest import COMMAND, Daemon, Net, network, until
from .spaces import Bridged, Machine, Make, Namespace, guests, need, ping
from .test_outer import iperf

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]


@pytest.fixture(scope="module")
def host() -> Iterator[Bridged]:
    need("ip")
    host = Bridged()
    yield host
    host.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, host: Bridged) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("uplink")
    out = f"netns={host.name}"
    uplinks = (f"lan=tap:up0,{out},bridge=br0", f"v=tap:up1,{out},bridge=br0,vlan=7", f"t=tap:up2,{out},trunk",
               f"p=packet:veth8,{out}")  # fmt: skip
    with subprocess.Popen([*COMMAND, "sim", "--run-dir", str(path)], stdout=subprocess.PIPE, text=True) as xen:
        assert xen.stdout is not None
        assert xen.stdout.readline().startswith("ready")
        daemon = Daemon(path, path / "log", *(word for uplink in uplinks for word in ("--uplink", uplink)))
        yield daemon
        daemon.stop()
        xen.terminate()
        assert xen.wait(20) == 0


@pytest.fixture
def machine(served: Daemon) -> Iterator[Make]:
    with guests(served.run_dir) as make:
        yield make


@pytest.fixture
def net(served: Daemon) -> Iterator[Net]:
    with network(served) as net:
        yield net


def deaf(space: Machine, target: str) -> bool:
    command = ["ip", "netns", "exec", space.name, "ping", "-c", "1", "-W", "1", target]
    return subprocess.run(command, capture_output=True).returncode != 0


def test_all_reach_all(host: Bridged, machine: Make) -> None:
    a, b = machine("switch:lan,tap=eth0", 1), machine("switch:lan,tap=eth0,queues=2", 2)
    for target in ("10.98.0.9", "10.98.0.2", "fd98::9", "fd98::2"):
        for size in (56, 20000):
            ping(a, target, size)
    ping(b, "10.98.0.9")
    for options in ([], ["--reverse"]):
        assert iperf(b, host.peer, "10.98.0.9", *options)["sum_received"]["bytes"] > 10_000_000


def test_an_uplink_of_one_vlan(host: Bridged, machine: Make) -> None:
    inside, outside = machine("switch:v;vlan=7,tap=eth0", 3), machine("switch:v;vlan=8,tap=eth0", 4)
    ping(inside, "10.98.0.9", 20000)
    assert deaf(outside, "10.98.0.9")
    assert deaf(outside, "10.98.0.3")


def test_a_trunk(host: Bridged, machine: Make) -> None:
    """tcpdump sees the tags of a guest's VLAN, and none of its packets without."""
    need("tcpdump")
    guest = machine("switch:t;vlan=1234,tap=eth0", 5)
    with host.popen("tcpdump", "-l", "-n", "-e", "-i", "up2", "-c", "1", "arp or (vlan and arp)") as dump:
        assert dump.stdout is not None
        while "listening" not in dump.stdout.readline():
            pass
        assert deaf(guest, "10.98.0.77")
        said = dump.stdout.read()
        assert dump.wait(10) == 0
    assert "vlan 1234, p 0, ethertype ARP" in said and guest.mac in said


def test_a_tap_that_goes_while_no_vif_is_connected(host: Bridged, net: Net, machine: Make) -> None:
    """Nothing reads it then, and so nothing hears of it. Each time a vif is advertised or connects it is looked at."""
    guest = net.guest("switch:lan", connect=False)
    until(lambda: net.dom0.store.read(f"{guest.backend}/state") == b"2")
    host.run("ip", "link", "del", "up0")
    guest.vif.connect(20)
    shown = host.run("ip", "link", "show", "up0")
    assert "master br0" in shown and "NO-CARRIER" not in shown
    ping(machine("switch:lan,tap=eth0", 1), "10.98.0.9")
    guest.vif.close()
    host.run("ip", "link", "del", "up0")
    host.run("ip", "tuntap", "add", "dev", "up0", "mode", "tap", "multi_queue", "vnet_hdr")  # ... as another's
    host.run("ip", "link", "set", "up0", "master", "br0")
    ping(machine("switch:lan,tap=eth0", 2), "10.98.0.9")
    host.run("ip", "link", "del", "up0")


def test_a_tap_that_goes_under_traffic(host: Bridged, served: Daemon, machine: Make) -> None:
    a, b = machine("switch:lan,tap=eth0", 1), machine("switch:lan,tap=eth0", 2)
    ping(a, "10.98.0.9")
    said = served.log.read_text().count("uplink of switch lan: TAP up0: it is gone")
    host.run("ip", "link", "del", "up0")
    until(lambda: served.log.read_text().count("uplink of switch lan: TAP up0: it is gone") == said + 1)
    assert deaf(a, "10.98.0.9")
    ping(a, "10.98.0.2")
    served.popen.send_signal(signal.SIGHUP)
    ping(a, "10.98.0.9", tries=20)
    host.run("ip", "link", "del", "up0")
    ping(machine("switch:lan,tap=eth0", 3), "10.98.0.9", tries=20)  # one that connects will do as well
    ping(b, "10.98.0.9")


@pytest.fixture
def behind(host: Bridged) -> Iterator[Namespace]:
    """A namespace behind veth8, the other end of which is its eth0: 10.98.0.8."""
    behind = Namespace()
    plug(host, behind)
    yield behind
    behind.end()


def plug(host: Bridged, behind: Namespace) -> None:
    host.run("ip", "link", "add", "veth8", "type", "veth", "peer", "name", "eth0", "address", "00:16:3e:77:00:08",
             "netns", behind.name)  # fmt: skip
    behind.address("eth0", 8)


def test_an_interface_that_goes_and_comes_back(
    host: Bridged, behind: Namespace, net: Net, served: Daemon, machine: Make
) -> None:
    """While no vif is connected, and under traffic. What is there again is another, of the same name."""
    guest = net.guest("switch:p", connect=False)
    until(lambda: net.dom0.store.read(f"{guest.backend}/state") == b"2")
    host.run("ip", "link", "del", "veth8")
    guest.vif.start()
    until(lambda: "there is no interface veth8" in guest.said())
    plug(host, behind)
    until(lambda: net.dom0.store.read(f"{guest.backend}/state") == b"4", 30)
    talker = machine("switch:p,tap=eth0", 1)
    ping(talker, "10.98.0.8")
    host.run("ip", "link", "del", "veth8")
    said = served.log.read_text().count("there is no interface veth8")
    until(lambda: "uplink of switch p: packet socket on veth8: it is gone" in served.log.read_text())
    served.popen.send_signal(signal.SIGHUP)
    until(lambda: served.log.read_text().count("there is no interface veth8") > said)
    plug(host, behind)
    served.popen.send_signal(signal.SIGHUP)
    ping(talker, "10.98.0.8", tries=20)
