"""A vif that leads out: ping, iperf3 and tcpdump between guests and a namespace, by a TAP on a bridge, or a veth."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netback.outer import OuterPort
from netback.port import parse_port
from pvdrivers.cli.stats import snapshot
from pvdrivers.errors import PlatformError
from pvdrivers.frontends.netfront_keys import Wishes
from pvdrivers.sim import toolstack

from .conftest import COMMAND, Daemon, until
from .spaces import Bridged, Make, guests, iperf_server, need, ping

pytestmark = [
    pytest.mark.jit_only("a real daemon serves"),
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes network namespaces"),
    pytest.mark.root,
]

@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Bridged]:
    need("ip")
    host = Bridged(getattr(request, "param", 9000))
    yield host
    host.end()


@pytest.fixture
def machine(xen: Path, daemon: Daemon, host: Bridged) -> Iterator[Make]:
    with guests(xen) as make:
        yield make


def bridged(host: Bridged) -> str:
    return f"tap:out0;netns={host.name};bridge=br0"


@pytest.mark.parametrize("queues", [1, 3])
def test_ping_through_a_bridge(host: Bridged, machine: Make, queues: int) -> None:
    """Every size up to fragments, IPv4 and IPv6; the kernel checks each byte of what comes back."""
    need("ping")
    guest = machine(f"{bridged(host)},tap=eth0,mtu=9000,queues={queues}", 1)
    for size in (0, 56, 1472, 1473, 8972, 20000):
        for target in ("10.98.0.9", "fd98::9"):
            ping(guest, target, size)
    shown = host.run("ip", "-d", "link", "show", "out0")
    for what in ("fe:ff:ff:ff:ff:ff", "master br0", "mtu 9000", "alias pvdrivers vif-", f"numqueues {queues}"):
        assert what in shown


def iperf(client: Any, server: Any, target: str, *options: str) -> dict[str, Any]:
    with iperf_server(server):
        said: dict[str, Any] = json.loads(client.run("iperf3", "--json", "--time", "1", "--client", target, *options))
    return said["end"]


@pytest.mark.parametrize("options", [["--reverse"], [], ["-6"]])
def test_tcp(host: Bridged, machine: Make, options: list[str]) -> None:
    """With segments of the stacks' making (GSO), whole through the TAP."""
    need("iperf3")
    guest = machine(f"{bridged(host)},tap=eth0", 1)
    said = iperf(guest, host.peer, "fd98::9" if "-6" in options else "10.98.0.9", *options)
    assert said["sum_received"]["bytes"] > 10_000_000
    print(f"{said['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s", file=sys.stderr)


@pytest.mark.parametrize("options", [["--reverse"], []])
def test_udp(host: Bridged, machine: Make, options: list[str]) -> None:
    need("iperf3")
    guest = machine(f"{bridged(host)},tap=eth0", 1)
    said = iperf(guest, host.peer, "10.98.0.9", "--udp", "--bandwidth", "20M", "--length", "1400", *options)
    assert said["sum"]["packets"] > 100
    assert said["sum"]["lost_percent"] < 50


@pytest.mark.parametrize("staged", [True, False])
def test_every_byte_leaves_by_a_tap(host: Bridged, net: Any, staged: bool) -> None:
    """From pages that are mapped it is written as it lies there, but for its head. From others it is fetched first."""
    bridge = f"br0;netns={host.name}"
    a, b = (net.guest(bridge, wishes=Wishes(staging=one), be={"mtu": 9000}) for one in (staged, True))
    first = a.frame(b, b"first")

    def forwards() -> bool:
        a.vif.send(first)
        with contextlib.suppress(TimeoutError):
            return bool(b.vif.receive(0.1) == first)
        return False

    until(forwards)
    for size in (60, 128, 129, 1514, 4096, 4097, 9014):
        frame = a.frame(b, os.urandom(size - 14))
        a.vif.send(frame)
        while (got := b.vif.receive(5)) != frame:
            assert got[6:12] != a.mac or got == first  # the bridge's own host talks as well
    (q,) = next(d for d in snapshot(net.run_dir) if d["device"] == a.name)["queues"]
    by_grefs, by_us = q["grants_copied"], q["persistent_hits"]
    heads = q["requests"]["sent"] + q["requests"]["received"]  # small ones of the bridge's host
    assert (by_grefs, by_us) == (1, heads) if staged else by_grefs > heads and by_us == 0, "a list of grefs, and heads"


def test_segments_are_whole_on_the_tap(host: Bridged, machine: Make) -> None:
    """tcpdump on the TAP sees TCP packets that are larger than its MTU, with a checksum that is not complete."""
    need("iperf3")
    need("tcpdump")
    guest = machine(f"{bridged(host)},tap=eth0", 1)
    with host.popen("tcpdump", "-l", "-n", "-i", "out0", "-c", "1", "greater 4000 and src host 10.98.0.1") as dump:
        assert dump.stdout is not None
        while "listening" not in dump.stdout.readline():
            pass
        iperf(guest, host.peer, "10.98.0.9")
        assert dump.wait(10) == 0


def test_a_tap_outlives_its_daemon_and_not_its_vif(host: Bridged, machine: Make, daemon: Daemon) -> None:
    guest = machine(f"{bridged(host)};ip=10.98.0.5/24,tap=eth0", 1)
    ping(guest, "10.98.0.9")
    assert "10.98.0.5/24" in host.run("ip", "addr", "show", "out0")
    daemon.kill()
    index = host.run("cat", "/sys/class/net/out0/ifindex")
    daemon.start()
    ping(guest, "10.98.0.9", tries=20)
    assert host.run("cat", "/sys/class/net/out0/ifindex") == index
    guest.process.send_signal(signal.SIGTERM)
    assert guest.process.wait(20) == 0
    assert not host.has("out0")


def test_a_bridge_by_its_name(host: Bridged, net: Any) -> None:
    """As xl says it, and with the name that its script knows; before the guest is there."""
    guest = net.guest(f"br0;netns={host.name}", connect=False)
    name = f"vif{guest.domain.domid}.0"
    until(lambda: net.dom0.store.read(f"{guest.backend}/state") == b"2")
    assert "master br0" in host.run("ip", "link", "show", name)
    assert "NO-CARRIER" in host.run("ip", "link", "show", name)
    guest.vif.connect(20)
    assert "NO-CARRIER" not in host.run("ip", "link", "show", name)
    named = net.guest(f"br0;netns={host.name}", be={"vifname": "web0"})
    assert host.has("web0")
    named.vif.send(named.frame(guest, b"by the bridge of Linux"))
    while (got := guest.vif.receive(5)) != named.frame(guest, b"by the bridge of Linux"):
        assert got[6:12] != named.mac  # the bridge's own host talks as well


def test_a_tap_that_is_deleted(host: Bridged, machine: Make, daemon: Daemon, xen: Path, net: Any) -> None:
    guest, (a, b) = machine(f"{bridged(host)},tap=eth0", 1), (net.guest(), net.guest())
    ping(guest, "10.98.0.9")
    before = {d["device"] for d in snapshot(xen)}
    host.run("ip", "link", "del", "out0")

    def found() -> dict[str, Any]:
        return next(d for d in snapshot(xen) if d.get("uri") == "tap:out0" and not d["device"].endswith(".port"))

    until(lambda: "TAP out0: it is gone" in found().get("error", ""))
    assert "port" in found()["troubles"]
    name = found()["device"]
    error = f"/local/domain/0/error/backend/{name.replace('-', '/')}/error"
    assert b"TAP out0: it is gone" in (net.dom0.store.read(error) or b"")
    failed = subprocess.run(["ip", "netns", "exec", guest.name, "ping", "-c", "2", "-W", "1", "10.98.0.9"])
    assert failed.returncode != 0
    assert {d["device"] for d in snapshot(xen)} == before  # nothing was closed
    (port,) = [d for d in snapshot(xen) if d["device"] == f"{name}.port"]
    assert sum(q["requests"]["failed"] for q in port["queues"]) > 0
    a.vif.send(a.frame(b, b"and the rest goes on"))
    assert b.vif.receive(5) == a.frame(b, b"and the rest goes on")
    daemon.popen.send_signal(signal.SIGHUP)
    ping(guest, "10.98.0.9", tries=20)
    until(lambda: not found().get("error"))
    assert net.dom0.store.read(error) is None


def test_an_interface_that_goes_and_comes_back(host: Bridged, machine: Make, daemon: Daemon, xen: Path) -> None:
    """To look for it while it is not there changes nothing: it is found when it is."""

    def plug() -> None:
        host.run("ip", "link", "add", "veth8", "type", "veth", "peer", "name", "eth8",
                 "address", "00:16:3e:77:00:08", "netns", host.peer.name)  # fmt: skip
        host.peer.run("ip", "link", "set", "eth8", "up")
        host.peer.run("ip", "addr", "add", "10.98.0.8/32", "dev", "eth8")
        host.peer.run("ip", "route", "replace", "10.98.0.1/32", "dev", "eth8")

    def error() -> str:
        return " ".join(str(d.get("error", "")) for d in snapshot(xen) if d.get("uri") == "packet:veth8")

    plug()
    guest = machine(f"packet:veth8;netns={host.name},tap=eth0", 1)
    ping(guest, "10.98.0.8")
    host.run("ip", "link", "del", "veth8")
    until(lambda: "packet socket on veth8: it is gone" in error())
    daemon.popen.send_signal(signal.SIGHUP)
    until(lambda: "packet socket on veth8: there is no interface veth8" in daemon.log.read_text())
    plug()
    daemon.popen.send_signal(signal.SIGHUP)
    ping(guest, "10.98.0.8", tries=20)


def test_a_tap_of_which_no_more_queues_are_to_be_had_stays(
    host: Bridged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an operator has set at it by hand is nothing to lose for an error that passes."""

    class Nowhere:
        def leave(self, port: object) -> None:
            pass

    def no_more() -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    port = OuterPort(parse_port(f"tap:out0;netns={host.name}"), 1500, "test", tmp_path)
    try:
        host.run("ip", "addr", "add", "10.98.0.77/24", "dev", "out0")
        before = host.run("cat", "/sys/class/net/out0/ifindex")
        with monkeypatch.context() as full, pytest.raises(PlatformError, match="Too many open files"):
            full.setattr("netback.tap.open_tun", no_more)
            port.attach(Nowhere(), 2, 0, None)  # type: ignore[arg-type]
        assert host.run("cat", "/sys/class/net/out0/ifindex") == before
        assert "10.98.0.77/24" in host.run("ip", "addr", "show", "out0")
    finally:
        port.close(delete=True)


@pytest.mark.parametrize("queues", [1, 2])
def test_a_packet_socket(host: Bridged, machine: Make, queues: int) -> None:
    need("ping")
    host.run("ip", "link", "set", "veth0", "nomaster")
    guest = machine(f"packet:veth0;netns={host.name},tap=eth0,mtu=9000,queues={queues}", 1)
    for size in (0, 1472, 1473, 8972, 20000):
        for target in ("10.98.0.9", "fd98::9"):
            ping(guest, target, size)
    for options in ([], ["--reverse"]):
        assert iperf(guest, host.peer, "10.98.0.9", *options)["sum_received"]["bytes"] > 10_000_000


@pytest.mark.parametrize("host", [1500], indirect=True)
def test_what_cannot_be_had(host: Bridged, net: Any) -> None:
    """Each is told at its vif, and of the others none is the worse for it."""
    host.run("ip", "tuntap", "add", "dev", "plain0", "mode", "tap")
    space = f"netns={host.name}"
    first = net.guest(f"tap:out0;{space};bridge=br0")
    for bridge, be, text in (
        (f"tap:out0;{space}", {}, f"TAP out0 is that of {first.name} already"),
        (f"tap:out3;{space};bridge=br7", {}, "bridge br7 is not there"),
        (f"tap:out4;{space};bridge=veth0", {}, "veth0 is an interface, but no bridge"),
        ("tap:out5;netns=pvt-nowhere", {}, "network namespace pvt-nowhere: there is none of that name"),
        (f"tap:out1;{space};bridge=br0", {"mtu": 9000}, "an MTU of 9000 does not fit bridge br0, which has 1500"),
        (f"tap:out1;{space}", {"mtu": 70000}, "not from 68 to 65521"),
        (f"tap:veth0;{space}", {}, "there is an interface of that name, which is no TAP"),
        (f"tap:plain0;{space}", {}, "which is no TAP of several queues"),
        (f"tap:out1;{space};ip=10.98.0.300/24", {}, "is no address with a length"),
        (f"tap:out1;{space};speed=5", {}, "'speed' is no option of a tap port"),
        (f"packet:veth7;{space}", {}, "there is no interface veth7"),
        (f"packet:veth0;{space}", {"mtu": 9000}, "an MTU of 9000 does not fit veth0, which has 1500"),
        ("switch:x;vlan=4095", {}, "vlan '4095' is not from 1 to 4094"),
        ("switch:x;vlan=5;trunk", {}, "not both"),
    ):
        guest = net.guest(bridge, be=be, connect=False)
        until(guest.said)
        assert text in guest.said()
    assert not any(host.has(f"out{k}") for k in (1, 3, 4, 5))
    second = net.guest(f"tap:out2;{space};bridge=br0")
    second.vif.send(second.frame(first, b"as if nothing were"))
    while (got := first.vif.receive(5)) != second.frame(first, b"as if nothing were"):
        assert got[6:12] != second.mac


def test_a_tap_of_another_daemon(host: Bridged, net: Any, tmp_path: Path) -> None:
    """Both would have queues of it, and each would get what is for the other's guest."""
    first = net.guest(f"tap:out0;netns={host.name}")
    other = Daemon(net.run_dir, tmp_path / "log", "--class", "pvnet")
    try:
        keys = {"mac": "00:16:3e:00:fe:02", "handle": 0}
        be = {**keys, "bridge": f"tap:out0;netns={host.name}"}
        back = toolstack.attach(net.dom0.store, "pvnet", first.domain.domid, 1, be=be, fe=keys)
        error = f"/local/domain/0/error/backend/pvnet/{first.domain.domid}/1/error"
        until(lambda: b"TAP out0 is that of another process, pid" in (net.dom0.store.read(error) or b""))
        assert f"pid {net.daemon.popen.pid} " in net.dom0.store.read(error).decode()
        net.guests.remove(first)
        first.vif.close()
        assert toolstack.detach(net.dom0.store, first.backend, timeout=20)
        until(lambda: net.dom0.store.read(f"{back}/state") == b"2", 30)
        first.end()
    finally:
        other.stop()


def test_what_comes_later_is_taken_then(host: Bridged, net: Any) -> None:
    guest = net.guest(f"tap:out3;netns={host.name};bridge=br5", connect=False)
    until(lambda: "bridge br5 is not there" in guest.said())
    host.run("ip", "link", "add", "br5", "type", "bridge")
    guest.vif.connect(20)
    assert not guest.said()


TRY = """
from netback.port import parse_port
from netback.tap import Tap
try:
    Tap(parse_port("tap:pvtno0"), 1500, "test")
except Exception as e:
    print(type(e).__name__, e)
"""


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (
            ["setpriv", "--bounding-set", "-net_admin"],
            "PlatformError TAP pvtno0: Operation not permitted; it takes CAP_NET_ADMIN",
        ),
        (
            ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net; exec "$@"', "sh"],
            "/dev/net/tun cannot be opened: No such file",
        ),
    ],
)
def test_what_a_daemon_may_lack(before: list[str], text: str) -> None:
    need(before[0])
    done = subprocess.run([*before, sys.executable, "-c", TRY], capture_output=True, text=True, timeout=60)
    assert text in done.stdout, done.stderr


def test_uplinks_that_are_wrong_are_told_at_once(tmp_path: Path, xen: Path) -> None:
    for uplink, text in (
        ("lan", "is not SWITCH=PORT"),
        ("lan=switch:x", "an uplink is tap:NAME"),
        ("lan=tap:x,mtu=9", "is not from 68 to 65521"),
    ):
        command = [*COMMAND, "serve", "--run-dir", str(xen), "--class", "vif", "--domain", "999", "--uplink", uplink]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert text in done.stderr
