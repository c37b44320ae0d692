"""Guests with a TAP in a network namespace of their own: ping and iperf3 over the rings, by two network stacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.cli.stats import snapshot

from .conftest import COMMAND, Daemon

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]


def run(*command: str, timeout: float = 30) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
    return done.stdout


class Space:
    """A network namespace, and in it a process that is a guest with one vif; its TAP is eth0."""

    def __init__(self, run_dir: Path, number: int, options: str) -> None:
        self.name, self.address, self.address6 = f"pvd{os.getpid()}-{number}", f"10.99.0.{number}", f"fd99::{number}"
        run("ip", "netns", "add", self.name)
        command = ["ip", "netns", "exec", self.name, *COMMAND, "guest", "--run-dir", str(run_dir), "--memory", "16"]
        self.popen = subprocess.Popen(
            [*command, "--net", f"switch:taps,tap=eth0{options}"], stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdout is not None
        self.said = self.popen.stdout.readline()
        assert self.said.startswith("vif 0: 00:16:3e:"), self.said
        self.run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "addr", "add", f"{self.address6}/64", "dev", "eth0", "nodad")

    def run(self, *command: str, timeout: float = 30) -> str:
        return run("ip", "netns", "exec", self.name, *command, timeout=timeout)

    def end(self) -> None:
        self.popen.terminate()
        assert self.popen.wait(20) == 0
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        run("ip", "netns", "del", self.name)


@pytest.fixture
def spaces(xen: Path, daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[tuple[Space, Space]]:
    need("ip")
    options = getattr(request, "param", "")
    with contextlib.ExitStack() as stack:
        made = []
        for number, mine in ((1, options), (2, options)) if isinstance(options, str) else enumerate(options, 1):
            made.append(Space(xen, number, mine))
            stack.callback(made[-1].end)
        yield made[0], made[1]


def need(program: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")


@contextlib.contextmanager
def iperf_server(space: Space) -> Iterator[None]:
    with subprocess.Popen(
        ["ip", "netns", "exec", space.name, "iperf3", "--server", "--one-off", "--forceflush"],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass
        yield
        server.terminate()


@pytest.mark.parametrize("spaces", ["", ",mtu=9000", ",queues=2,hash=on"], indirect=True)
def test_ping(spaces: tuple[Space, Space], daemon: Daemon) -> None:
    """Every size up to fragments, IPv4 and IPv6; the kernel checks each byte of what comes back."""
    need("ping")
    a, b = spaces
    for size in ("0", "56", "1472", "1473", "8972", "20000"):
        for target in (b.address, b.address6):
            # One at a time: ping's socket has not room for two of the largest.
            said = a.run("ping", "-c", "1", "-W", "5", "-s", size, target)
            assert " 0% packet loss" in said, said + run(*COMMAND, "stats", "--run-dir", str(daemon.run_dir))


@pytest.mark.parametrize("reverse", [[], ["--reverse"], ["-6"]])
def test_tcp(spaces: tuple[Space, Space], reverse: list[str]) -> None:
    """With segments of the stack's making (GSO) and blank checksums, as the TAPs offer both."""
    need("iperf3")
    a, b = spaces
    target = b.address6 if "-6" in reverse else b.address
    with iperf_server(b):
        said = json.loads(a.run("iperf3", "--json", "--time", "1", "--client", target, *reverse))
    end = said["end"]
    assert end["sum_received"]["bytes"] > 10_000_000
    print(f"{end['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)


@pytest.mark.parametrize("spaces", [("", ",gso=0,csum=0"), ("", ",sg=0,gso=0")], indirect=True)
@pytest.mark.parametrize("six", [[], ["-6"]])
def test_tcp_to_a_guest_that_takes_no_segments(spaces: tuple[Space, Space], six: list[str], daemon: Daemon) -> None:
    """Its kernel drops what has a wrong checksum, length or number, and says so."""
    need("iperf3")
    a, b = spaces
    with iperf_server(b):
        said = json.loads(a.run("iperf3", "--json", "--time", "1", "--client", b.address6 if six else b.address, *six))
    assert said["end"]["sum_received"]["bytes"] > 10_000_000
    counted = b.run("cat", "/proc/net/snmp").splitlines()
    names, values = (line.split() for line in counted if line.startswith("Tcp:"))
    assert dict(zip(names, values))["InErrs"] == "0"
    assert sum(q["requests"]["cut"] for d in snapshot(daemon.run_dir) for q in d["queues"]) > 100
    print(f"{said['end']['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)


def test_tcp_goes_on_when_the_daemon_is_killed(spaces: tuple[Space, Space], daemon: Daemon) -> None:
    need("iperf3")
    a, b = spaces
    with iperf_server(b):
        client = subprocess.Popen(
            ["ip", "netns", "exec", a.name, "iperf3", "--json", "--time", "8", "--client", b.address],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(1)
        daemon.kill()
        daemon.start()
        out, _ = client.communicate(timeout=60)
    assert client.returncode == 0, out
    intervals = json.loads(out)["intervals"]
    assert intervals[-1]["sum"]["bytes"] > 1_000_000
