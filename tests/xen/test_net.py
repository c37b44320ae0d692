"""Linux's xen-netfront, unchanged, on vifs that `xl create` makes: guests that talk to each other by our switch."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .guests import Guest, vif
from .serve import Serve
from .system import RESULTS, CommandError, dump, read, sh, until, write

SIZES = (0, 1, 56, 1472, 1473, 4000, 8972, 9000, 20000)
"""Bytes in a ping: up to a frame of 1500, fragments, and those of 9000."""


class Pair:
    """Two guests of one switch. `a` and `b` are .1 and .2 of 10.0.0.0/24 and fd00::/64."""

    def __init__(self, make: Callable[..., Guest], bridge: str, *, kernels: tuple[str, str] = ("debian", "debian"),
                 **options: Any) -> None:  # fmt: skip
        self.guests = []
        for number, kernel in enumerate(kernels, 1):
            config = [f"vif=['{vif(bridge, number)}']"]
            self.guests.append(make(kernel=kernel, config=config, wait=False, **options))
        for number, guest in enumerate(self.guests, 1):
            guest.wait_ready()
            up(guest, number)
        self.a, self.b = self.guests


def up(guest: Guest, number: int, device: str = "eth0", mtu: int = 1500) -> None:
    guest.run(
        f"echo 0 > /proc/sys/net/ipv6/conf/{device}/accept_dad; ip link set {device} up mtu {mtu};"
        f" ip addr add 10.0.0.{number}/24 dev {device}; ip addr add fd00::{number}/64 dev {device}"
    )


def ping(guest: Guest, target: str, *sizes: int) -> None:
    """Every byte that comes back is compared by ping itself: not busybox's, which its shell has for that name."""
    for size in sizes:
        said = guest.run(f"/bin/ping -c 2 -i 0.2 -W 10 -s {size} {target}")
        assert " 0% packet loss" in said, said
        assert "wrong data" not in said, said


def iperf(server: Guest, client: Guest, target: str, words: str = "") -> dict[str, Any]:
    """What the client says of a transfer of two seconds."""
    server.run("iperf3 -s -D -1 -I /tmp/iperf.pid --logfile /tmp/iperf.log; sleep 1")
    said = client.run(f"iperf3 --json -t 2 -c {target} {words}", seconds=150)
    end: dict[str, Any] = json.loads(said)["end"]
    return end


@pytest.fixture(scope="module")
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    return module_serve("--class", "vif")


@pytest.fixture(scope="module")
def pair(daemon: Serve, module_guest: Callable[..., Guest]) -> Iterator[Pair]:
    made = Pair(module_guest, "switch:lan")
    yield made
    (RESULTS / "vifs").write_text(dump("/local/domain/0/backend/vif"))


def stats(guest: Guest) -> dict[str, Any]:
    found = json.loads(sh("pvdrivers", "stats", "--json", "--run-dir", "/run/pvdrivers"))
    device: dict[str, Any] = next(one for one in found if one["device"] == f"vif-{guest.domid}-0")
    return device


def test_what_was_negotiated(pair: Pair) -> None:
    front, back = (f"/local/domain/{pair.a.domid}/device/vif/0", f"/local/domain/0/backend/vif/{pair.a.domid}/0")
    assert read(f"{front}/state") == read(f"{back}/state") == "4"
    for key in ("feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6", "feature-rx-notify", "request-rx-copy"):
        assert read(f"{front}/{key}") == "1", key
    assert read(f"{front}/event-channel-tx") != read(f"{front}/event-channel-rx") is not None


@pytest.mark.parametrize("family", ["10.0.0", "fd00:"])
def test_ping_with_every_size(pair: Pair, family: str) -> None:
    a, b = (f"{family}.1", f"{family}.2") if "." in family else ("fd00::1", "fd00::2")
    ping(pair.a, b, *SIZES)
    ping(pair.b, a, 56, 9000)


def test_tcp_both_ways(pair: Pair) -> None:
    for words in ("", "--reverse"):
        end = iperf(pair.b, pair.a, "10.0.0.2", words)
        assert end["sum_received"]["bytes"] > 200_000
    assert iperf(pair.b, pair.a, "fd00::2")["sum_received"]["bytes"] > 200_000


def test_udp_both_ways(pair: Pair) -> None:
    for words in ("-u -b 4M", "-u -b 4M --reverse"):
        end = iperf(pair.b, pair.a, "10.0.0.2", words)
        assert end["sum"]["packets"] > 100 and end["sum"]["lost_percent"] < 20, end["sum"]


def test_checksum_offload_off_in_one_guest(pair: Pair) -> None:
    pair.a.run("ethtool -K eth0 tx off tso off gso off sg off")
    try:
        for words in ("", "--reverse"):
            assert iperf(pair.b, pair.a, "10.0.0.2", words)["sum_received"]["bytes"] > 200_000
        ping(pair.b, "10.0.0.1", 56, 9000)
    finally:
        pair.a.run("ethtool -K eth0 tx on sg on tso on gso on")


def test_jumbo_frames(pair: Pair) -> None:
    for guest in pair.guests:
        guest.run("ip link set eth0 mtu 9000")
    try:
        said = pair.a.run("/bin/ping -c 2 -i 0.2 -W 10 -M do -s 8972 10.0.0.2")
        assert " 0% packet loss" in said, said
    finally:
        for guest in pair.guests:
            guest.run("ip link set eth0 mtu 1500")


def test_multicast_and_broadcast(pair: Pair) -> None:
    pair.b.run("echo 0 > /proc/sys/net/ipv4/icmp_echo_ignore_broadcasts")
    for target in ("-b 10.0.0.255", "ff02::1%eth0"):
        said = pair.a.run(f"/bin/ping -c 2 -i 0.2 -W 10 {target}")
        assert "10.0.0.2" in said if "." in target else "bytes from" in said, said


def test_the_daemon_is_killed_and_started_under_traffic(pair: Pair, daemon: Serve) -> None:
    """TCP goes on: it sends again what was lost, after ever longer pauses."""
    pair.b.run("iperf3 -s -D -1 --logfile /tmp/iperf.log; sleep 1")
    job = pair.a.start("iperf3 -t 300 -c 10.0.0.2 & echo $! > /tmp/pid; wait; true")

    def came() -> int:
        return int(pair.b.run("cat /sys/class/net/eth0/statistics/rx_bytes"))

    def wait_progress() -> None:
        before = came()
        until(lambda: came() > before + (1 << 20), 90, "TCP goes on", pause=0.5)

    for end in (daemon.kill, daemon.stop):
        wait_progress()
        end()
        daemon.start()
    wait_progress()
    pair.a.run("kill $(cat /tmp/pid)")
    job.wait(60)
    ping(pair.b, "10.0.0.1", 56)


def test_a_vif_comes_and_goes_under_traffic(pair: Pair) -> None:
    job = pair.a.start("/bin/ping -i 0.2 -W 10 -c 60 10.0.0.2")
    pair.b.xl("network-attach", *vif("switch:lan", 9).split(","))
    until(lambda: pair.b.ask("ip link show eth1")[0] == 0, 30, "eth1 is there")
    pair.b.run("ip link set eth1 up; ip addr add 10.0.1.2/24 dev eth1")
    until(lambda: read(f"/local/domain/0/backend/vif/{pair.b.domid}/1/state") == "4", 30, "it is connected")
    pair.b.xl("network-detach", "1")
    until(lambda: pair.b.ask("ip link show eth1")[0] != 0, 30, "eth1 is gone")
    assert " 0% packet loss" in job.wait(120)


def test_the_link_is_taken_down_and_up(pair: Pair) -> None:
    back = f"/local/domain/0/backend/vif/{pair.a.domid}/0"
    assert read(f"{back}/carrier") == "1"
    write(**{f"{back}/link": "down"})
    until(lambda: read(f"{back}/carrier") == "0", 10, "it has no carrier")
    assert pair.a.ask("/bin/ping -c 1 -W 2 10.0.0.2")[0] != 0
    write(**{f"{back}/link": "up"})
    until(lambda: read(f"{back}/carrier") == "1", 10, "it has a carrier")
    until(lambda: pair.a.ask("/bin/ping -c 1 -W 5 10.0.0.2")[0] == 0, 60, "it is answered again")


def test_our_own_words(pair: Pair, daemon: Serve) -> None:
    """A vif more, by the verbs of ours; the guest sees no difference."""
    here, mac = ("--run-dir", str(daemon.run_dir)), "00:16:3e:00:00:0a"
    sh("pvdrivers", "network-attach", *here, "--connect", pair.b.name, f"mac={mac}", "bridge=switch:lan", "devid=5")
    pair.b.run("ip link set eth1 up")
    listed = sh("pvdrivers", "network-list", *here, pair.b.name)
    assert re.search(rf"^5 .*{mac}.* Connected .*switch:lan", listed, re.MULTILINE), listed
    sh("pvdrivers", "network-detach", *here, pair.b.name, mac)
    until(lambda: pair.b.ask("ip link show eth1")[0] != 0, 30, "eth1 is gone")
    assert mac not in sh("pvdrivers", "network-list", *here, pair.b.name)


def test_save_and_restore(pair: Pair, tmp_path: Path) -> None:
    image = tmp_path / "saved"
    pair.b.save(image)
    pair.b.restore(image)
    until(lambda: pair.a.ask("/bin/ping -c 1 -W 5 10.0.0.2")[0] == 0, 60, "it answers again")
    assert iperf(pair.b, pair.a, "10.0.0.2")["sum_received"]["bytes"] > 200_000


def test_a_guest_is_destroyed_under_traffic(pair: Pair, guest: Callable[..., Guest]) -> None:
    third = guest(config=[f"vif=['{vif('switch:lan', 3)}']"])
    up(third, 3)
    third.start("/bin/ping -f 10.0.0.1")
    job = pair.a.start("/bin/ping -i 0.2 -W 10 -c 40 10.0.0.2")
    time.sleep(2)
    back = f"/local/domain/0/backend/vif/{third.domid}"
    third.destroy()
    until(lambda: read(f"{back}/0/state") is None, 30, "its directory is gone")
    assert " 0% packet loss" in job.wait(120)


@pytest.mark.skipif(not os.path.isdir("/bed/guests/backports"), reason="no newer guest kernel: no backports there")
def test_two_queues_and_two_kernels(daemon: Serve, guest: Callable[..., Guest]) -> None:
    pair = Pair(guest, "switch:queues", kernels=("debian", "backports"), vcpus=2)
    for one in pair.guests:
        assert read(f"/local/domain/{one.domid}/device/vif/0/multi-queue-num-queues") == "2"
    ping(pair.a, "10.0.0.2", 56, 9000)
    end = iperf(pair.b, pair.a, "10.0.0.2", "-P 6")
    assert end["sum_received"]["bytes"] > 200_000
    queues = stats(pair.b)["queues"]
    assert len(queues) == 2 and all(q["requests"]["sent"] > 10 and q["requests"]["received"] > 10 for q in queues)


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge of dom0's, which is .9 there."""
    for module in ("bridge", "tun"):
        sh("modprobe", module)
    sh("ip", "link", "add", "pvbr0", "type", "bridge")
    try:
        sh("ip", "link", "set", "pvbr0", "up")
        sh("ip", "addr", "add", "10.0.0.9/24", "dev", "pvbr0")
        yield "pvbr0"
    finally:
        sh("ip", "link", "del", "pvbr0")


def test_a_bridge_of_linux_with_taps(daemon: Serve, guest: Callable[..., Guest], bridge: str) -> None:
    """One TAP by a name of its own, and one that has the kernel's name for it, as `xl` has vif-bridge for a script."""
    words = (vif(f"tap:pvtap0;bridge={bridge}", 1), vif(bridge, 2, script="vif-bridge"))
    guests = [guest(config=[f"vif=['{word}']"]) for word in words]
    for number, one in enumerate(guests, 1):
        up(one, number)
    taps = sh("ip", "-br", "link", "show", "master", bridge)
    assert "pvtap0" in taps and f"vif{guests[1].domid}.0" in taps
    a, b = guests
    for target in ("10.0.0.2", "10.0.0.9"):
        ping(a, target, *SIZES)
    ping(b, "fd00::1", 56, 9000)
    for words in ("", "--reverse"):
        assert iperf(b, a, "10.0.0.2", words)["sum_received"]["bytes"] > 200_000
    name = f"vif{b.domid}.0"
    for one in guests:
        one.destroy()
    until(lambda: "pvtap0" not in sh("ip", "-br", "link") and name not in sh("ip", "-br", "link"), 30, "they are gone")


def test_what_cannot_be_served_is_said(daemon: Serve, guest: Callable[..., Guest]) -> None:
    with pytest.raises(CommandError, match="unable to add"):
        guest(config=[f"vif=['{vif('no-such:thing', 5)}']"], wait=False)
    assert "'no-such:thing' is no port that is known" in daemon.log.read_text()
    assert daemon.alive()
