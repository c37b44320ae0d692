"""The network of `make bench-xen`: two guests, and between them a switch of ours, and xen-netback with a Linux bridge.

Both in one boot and one pair of guests, whose xen-netfront is Linux's; they take turns. What is counted is all of
dom0's for what arrived: a large transfer by TCP, as segments of the stack's making, and small packets by UDP.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from . import counting
from .guests import Guest, vif
from .serve import Serve
from .system import sh, until, write

BRIDGE = "pvbench0"


@dataclass
class Way:
    """A network between the guests, and who serves it: addresses NET.1 and NET.2."""

    name: str
    device: str
    net: str


KERNEL, OURS = Way("xen-netback and a bridge", "eth0", "10.1.0"), Way("ours", "eth1", "10.2.0")


@dataclass
class Amount:
    """One kind of traffic from the first guest to the second: what is counted is for a `unit`; `words` are iperf3's."""

    name: str
    unit: str
    words: str


def amounts(quick: bool) -> tuple[Amount, Amount]:
    """What is counted, and later timed."""
    seconds = 3 if quick else 8
    return (
        Amount("TCP, segments (GSO)", "64 KiB", f"-t {seconds}"),
        Amount("UDP, 64 bytes", "packet", f"-u -l 64 -b 1M -t {seconds}"),
    )


def prepare(stack: ExitStack) -> tuple[list[Guest], Serve]:
    """Two guests on both networks."""
    for module in ("xen-netback", "bridge"):
        sh("modprobe", module)
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    stack.callback(sh, "ip", "link", "del", BRIDGE)
    sh("ip", "link", "set", BRIDGE, "up")
    serve = stack.enter_context(Serve("--class", "pvnet"))
    guests = []
    for number in (1, 2):
        guest = stack.enter_context(Guest(config=[f"vif=['{vif(BRIDGE, number)}']"], wait=False))
        guests.append(guest)
        # What its script would do; the guest waits for it as it boots.
        kernels = f"vif{guest.domid}.0"
        until(lambda name=kernels: name in sh("ip", "-br", "link"), 20, f"{kernels} is there")
        sh("ip", "link", "set", kernels, "master", BRIDGE, "up")
        write(**{f"/local/domain/0/backend/vif/{guest.domid}/0/hotplug-status": "connected"})
        guest.wait_ready()
        words = ("--class", "pvnet", "--connect", str(guest.domid), "bridge=switch:bench", "devid=1")
        sh("pvdrivers", "network-attach", "--run-dir", str(serve.run_dir), *words)
        for way in (KERNEL, OURS):
            guest.run(f"until ip link show {way.device}; do usleep 100000; done", seconds=30)
            guest.run(f"ip link set {way.device} up; ip addr add {way.net}.{number}/24 dev {way.device}")
    for way in (KERNEL, OURS):
        guests[0].run(f"until /bin/ping -c 1 -W 5 {way.net}.2; do :; done", seconds=60)
    return guests, serve


def transfer(guests: list[Guest], way: Way, amount: Amount) -> tuple[float, float]:
    """Units that arrived, and how many that was a second."""
    a, b = guests
    b.run("iperf3 -s -D -1 --logfile /tmp/iperf.log; sleep 1")
    said = json.loads(a.run(f"iperf3 --json -c {way.net}.2 {amount.words}", seconds=150))["end"]
    if amount.unit == "packet":
        arrived = said["sum"]["packets"] * (1 - said["sum"]["lost_percent"] / 100)
        return arrived, arrived / said["sum"]["seconds"]
    received = said["sum_received"]
    return received["bytes"] / 65536, received["bytes"] / 65536 / received["seconds"]


def counted(guests: list[Guest], serve: Serve, way: Way, amount: Amount) -> list[str]:
    """A row: what dom0 asked of Xen, and what we asked of Linux, for a unit that arrived."""
    with counting.tracing(Path("/tmp")) as trace, counting.system_calls(serve.process.pid) as calls:
        units, _ = transfer(guests, way, amount)
    found = counting.count(trace.raw, 0)
    lost = f" ({found.lost} records lost)" if found.lost else ""
    ours = f"{sum(calls.values()) / units:.2f}" if way is OURS else ""
    numbers = (found.grant_ops, found.grant_calls, found.event_calls)
    return [amount.name, way.name, amount.unit, *(f"{n / units:.2f}" for n in numbers), ours + lost]


def throughput(guests: list[Guest], kinds: tuple[Amount, ...], rounds: int) -> Iterator[list[str]]:
    """Rows: the ratio ours / theirs, the median over rounds."""
    for amount in kinds:
        if amount.unit == "packet":
            amount.words = amount.words.replace("-b 1M", "-b 0")
        got = [[transfer(guests, way, amount)[1] for way in (OURS, KERNEL)] for _ in range(rounds)]
        found = sorted(ours / theirs for ours, theirs in got)
        yield [amount.name, f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"]


def run(quick: bool) -> str:
    """The tables, as text."""
    with ExitStack() as stack:
        guests, serve = prepare(stack)
        kinds = amounts(quick)
        head = ["traffic", "by", "for each", "grant operations", "grant hypercalls", "event hypercalls",
                "system calls of ours"]  # fmt: skip
        rows = (counted(guests, serve, way, amount) for amount in kinds for way in (OURS, KERNEL))
        text = counting.table("Network, counted: from guest to guest, all of dom0", head, rows)
        ratios = throughput(guests, kinds, 1 if quick else 3)
        title = "Network, throughput under emulation, in turn"
        return f"{text}\n{counting.table(title, ['traffic', 'ours / xen-netback'], ratios)}"
