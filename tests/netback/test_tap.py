"""Guests with a TAP in a network namespace of their own: ping and iperf3 over the rings, by two network stacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.cli.stats import snapshot

from .conftest import COMMAND, Daemon
from .spaces import Machine, guests, ip, iperf_server, need, run

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namemachines"),
    pytest.mark.root,
]


@pytest.fixture
def machines(xen: Path, daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[tuple[Machine, Machine]]:
    """Two on one switch, of the numbers 1 and 2. The parameter is of --net, for both or for each."""
    need("ip")
    options = getattr(request, "param", "")
    one, other = (options, options) if isinstance(options, str) else options
    with guests(xen) as make:
        yield make(f"switch:taps,tap=eth0{one}", 1), make(f"switch:taps,tap=eth0{other}", 2)


@pytest.mark.parametrize("machines", ["", ",mtu=9000", ",queues=2,hash=on"], indirect=True)
def test_ping(machines: tuple[Machine, Machine], daemon: Daemon) -> None:
    """Every size up to fragments, IPv4 and IPv6; the kernel checks each byte of what comes back."""
    need("ping")
    a, _ = machines
    for size in ("0", "56", "1472", "1473", "8972", "20000"):
        for target in (ip(2), ip(2, six=True)):
            # One at a time: ping's socket has not room for two of the largest.
            said = a.run("ping", "-c", "1", "-W", "5", "-s", size, target)
            assert " 0% packet loss" in said, said + run(*COMMAND, "stats", "--run-dir", str(daemon.run_dir))


@pytest.mark.parametrize("reverse", [[], ["--reverse"], ["-6"]])
def test_tcp(machines: tuple[Machine, Machine], reverse: list[str]) -> None:
    """With segments of the stack's making (GSO) and blank checksums, as the TAPs offer both."""
    need("iperf3")
    a, b = machines
    target = ip(2, six="-6" in reverse)
    with iperf_server(b):
        said = json.loads(a.run("iperf3", "--json", "--time", "1", "--client", target, *reverse))
    end = said["end"]
    assert end["sum_received"]["bytes"] > 10_000_000
    print(f"{end['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)


@pytest.mark.parametrize("machines", [("", ",gso=0,csum=0"), ("", ",sg=0,gso=0")], indirect=True)
@pytest.mark.parametrize("six", [[], ["-6"]])
def test_tcp_to_one_that_takes_no_segments(machines: tuple[Machine, Machine], six: list[str], daemon: Daemon) -> None:
    """Its kernel drops what has a wrong checksum, length or number, and says so."""
    need("iperf3")
    a, b = machines
    with iperf_server(b):
        target = ip(2, six=bool(six))
        said = json.loads(a.run("iperf3", "--json", "--time", "1", "--client", target, *six))
    assert said["end"]["sum_received"]["bytes"] > 10_000_000
    counted = b.run("cat", "/proc/net/snmp").splitlines()
    names, values = (line.split() for line in counted if line.startswith("Tcp:"))
    assert dict(zip(names, values))["InErrs"] == "0"
    assert sum(q["requests"]["cut"] for d in snapshot(daemon.run_dir) for q in d["queues"]) > 100
    print(f"{said['end']['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)


def moved(line: str) -> bool:
    """Whether an interval of iperf3's is one in which something went."""
    return "sec" in line and "Bytes" in line and " 0.00 Bytes" not in line


def test_tcp_goes_on_when_the_daemon_is_killed(machines: tuple[Machine, Machine], daemon: Daemon) -> None:
    """However long the next one takes to start: TCP asks again after 0.2, 0.4, 0.8 s and so on."""
    need("iperf3")
    a, b = machines
    command = ["ip", "netns", "exec", a.name, "iperf3", "--forceflush", "--time", "60", "--client", ip(2)]
    with iperf_server(b), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert any(moved(line) for line in client.stdout)
            daemon.kill()
            assert any("sec" in line and not moved(line) for line in client.stdout), "it went on without a daemon"
            daemon.start()
            assert any(moved(line) for line in client.stdout), "nothing went any more"
        finally:
            client.kill()
