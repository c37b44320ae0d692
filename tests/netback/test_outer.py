"""A vif with a TAP behind it, on a bridge of Linux: ping, iperf3 and tcpdump between a guest and a namespace."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Daemon
from .spaces import Bridged, Machine, iperf_server, need, ping

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]

Make = Callable[[str, int], Machine]


@pytest.fixture
def host() -> Iterator[Bridged]:
    need("ip")
    host = Bridged(9000)
    yield host
    host.end()


@pytest.fixture
def machine(xen: Path, daemon: Daemon, host: Bridged) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(net: str, number: int) -> Machine:
            made = Machine(xen, net, number)
            stack.callback(made.end)
            return made

        yield make


@pytest.mark.parametrize("queues", [1, 3])
def test_ping_through_a_bridge(host: Bridged, machine: Make, queues: int) -> None:
    """Every size up to fragments, IPv4 and IPv6; the kernel checks each byte of what comes back."""
    need("ping")
    guest = machine(f"tap:out0;netns={host.name};bridge=br0,tap=eth0,mtu=9000,queues={queues}", 1)
    for size in (0, 56, 1472, 1473, 8972, 20000):
        for target in ("10.98.0.9", "fd98::9"):
            ping(guest, target, size)
    assert "fe:ff:ff:ff:ff:ff" in host.run("ip", "link", "show", "out0")


@pytest.mark.parametrize("options", [["--reverse"], [], ["-6"]])
def test_tcp(host: Bridged, machine: Make, options: list[str]) -> None:
    need("iperf3")
    guest = machine(f"tap:out0;netns={host.name};bridge=br0,tap=eth0", 1)
    target = "fd98::9" if "-6" in options else "10.98.0.9"
    with iperf_server(host.peer):
        said = json.loads(guest.run("iperf3", "--json", "--time", "1", "--client", target, *options))
    assert said["end"]["sum_received"]["bytes"] > 10_000_000
    print(f"{said['end']['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)
