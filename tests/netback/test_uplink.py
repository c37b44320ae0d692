"""A switch with an uplink: guests of it, and a namespace behind a bridge, by one TAP; and VLANs on the way out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import COMMAND, Daemon
from .spaces import Bridged, Machine, Make, guests, need, ping
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
def run_dir(tmp_path_factory: pytest.TempPathFactory, host: Bridged) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("uplink")
    out = f"netns={host.name}"
    uplinks = (f"lan=tap:up0,{out},bridge=br0", f"v=tap:up1,{out},bridge=br0,vlan=7", f"t=tap:up2,{out},trunk")
    with subprocess.Popen([*COMMAND, "sim", "--run-dir", str(path)], stdout=subprocess.PIPE, text=True) as sim:
        assert sim.stdout is not None
        assert sim.stdout.readline().startswith("ready")
        daemon = Daemon(path, path / "log", *(word for uplink in uplinks for word in ("--uplink", uplink)))
        yield path
        daemon.stop()
        sim.terminate()
        assert sim.wait(20) == 0


@pytest.fixture
def machine(run_dir: Path) -> Iterator[Make]:
    with guests(run_dir) as make:
        yield make


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
