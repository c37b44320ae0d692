"""Our netfront in dom0, by loopback grants, against Linux's xen-netback.

Behind our end is a TAP in a network namespace, so that two stacks of Linux talk over the rings: one by the kernel's
backend, and one by our frontend.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from pvdrivers import toolstack
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_tap import Tap

from .system import sh, until

MAC, DEVID, SPACE = "00:16:3e:00:00:77", 7, "front"
THEIRS, OURS = "10.9.0.1", "10.9.0.2"


@pytest.fixture(params=[1, 2], ids=["one queue", "two queues"])
def vif(platform: Any, request: pytest.FixtureRequest) -> Iterator[Netfront]:
    """Connected; the kernel's end has THEIRS, and OURS is in the namespace SPACE."""
    sh("modprobe", "xen-netback")
    sh("modprobe", "tun")
    sh("ip", "netns", "add", SPACE)
    mac = {"mac": MAC, "handle": DEVID}
    back = toolstack.attach(platform.store, "vif", 0, DEVID, be={**mac, "script": "/bin/true"}, fe=mac)
    kernels = f"vif0.{DEVID}"
    try:
        until(lambda: kernels in sh("ip", "-br", "link"), 20, f"the kernel has made {kernels}")
        platform.store.write(f"{back}/hotplug-status", "connected")
        sh("ip", "link", "set", kernels, "up")
        sh("ip", "addr", "add", f"{THEIRS}/24", "dev", kernels)
        with Netfront(platform, DEVID, queues=request.param) as front:
            front.connect(timeout=30)
            tap = Tap(front, "front0")
            try:
                sh("ip", "link", "set", "front0", "netns", SPACE)
                sh("ip", "-n", SPACE, "link", "set", "front0", "up")
                sh("ip", "-n", SPACE, "addr", "add", f"{OURS}/24", "dev", "front0")
                yield front
            finally:
                tap.close()
    finally:
        toolstack.detach(platform.store, back, timeout=20, force=True)
        sh("ip", "netns", "del", SPACE)
        sh("modprobe", "-r", "xen-netback", check=False)


def test_two_stacks_by_the_kernels_netback(vif: Netfront) -> None:
    assert vif.offer.sg and vif.offer.gso4 and vif.offer.gso6 and vif.offer.csum6
    for size in (0, 56, 1472, 1473, 9000, 20000):
        said = sh("ip", "netns", "exec", SPACE, "ping", "-c", "2", "-i", "0.2", "-W", "10", "-s", str(size), THEIRS)
        assert " 0% packet loss" in said and "wrong data" not in said, said
    for words in ([], ["--reverse"], ["-u", "-b", "4M"]):
        with subprocess.Popen(["iperf3", "-s", "-1", "--logfile", "/tmp/iperf-front.log"]) as server:
            until(lambda: "5201" in sh("busybox", "netstat", "-ltn"), 20, "iperf3 listens")
            said = sh("ip", "netns", "exec", SPACE, "iperf3", "--json", "-t", "2", "-c", THEIRS, *words, seconds=120)
            server.wait(20)
        end = json.loads(said)["end"]
        if "-u" in words:
            assert end["sum"]["packets"] > 100 and end["sum"]["lost_percent"] < 20, end["sum"]
        else:
            assert end["sum_received"]["bytes"] > 200_000, end
