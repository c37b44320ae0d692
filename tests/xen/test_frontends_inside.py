"""Our frontends in a guest, which they are for: blkfront on the kernel's backend and on ours, netfront on our switch.

The guest's kernel knows these devices too, and is told to leave them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .guests import Guest, vif
from .inside import python, with_project
from .serve import Serve
from .stores import Stores, checksum
from .system import sh
from .test_net import up

DEVICE = "xvdp"
ALONE = """
echo 0 > /sys/bus/xen/drivers_autoprobe
echo 32768 > /sys/module/xen_gntalloc/parameters/limit
"""


@pytest.fixture(scope="module")
def inside(module_guest: Callable[..., Guest]) -> Iterator[Guest]:
    guest = with_project(module_guest)
    guest.run(f"set -e{ALONE}")
    yield guest
    guest.destroy()
    sh("modprobe", "-r", "xen-blkback")


@pytest.fixture(scope="module")
def daemon(module_serve: Callable[..., Serve]) -> Serve:
    return module_serve("--class", "pvblk", "vif")


@pytest.mark.parametrize("backend", ["kernel", "ours"])
def test_a_disk(inside: Guest, daemon: Serve, stores: Stores, backend: str) -> None:
    image = stores.file("disk", 16)
    device = stores.loop(image)
    before = checksum(image)
    if backend == "kernel":
        inside.xl("block-attach", f"phy:{device},{DEVICE},w")
    else:
        words = f"vdev={DEVICE},access=rw,target={device}"
        sh("pvdrivers", "block-attach", "--run-dir", daemon.run_dir, str(inside.domid), words)
    assert inside.run(python(f"-m tests.xen.front_inside disk {DEVICE}"), 400) == "right"
    if backend == "kernel":
        inside.xl("block-detach", DEVICE)
    else:
        sh("pvdrivers", "block-detach", "--run-dir", daemon.run_dir, str(inside.domid), DEVICE)
    assert checksum(image) != before, "nothing was written"


def test_a_network(inside: Guest, daemon: Serve, guest: Callable[..., Guest]) -> None:
    """Two stacks of Linux that talk by our switch: one behind its own netfront and one behind ours."""
    other = guest(config=[f"vif=['{vif('switch:inside', 1)}']"])
    up(other, 1)
    inside.xl("network-attach", *vif("switch:inside", 2).split(","))
    other.run("iperf3 -s -D --logfile /tmp/iperf.log; sleep 1")
    pings = "; ".join(f"/bin/ping -c 2 -i 0.2 -W 10 -s {size} 10.0.0.1" for size in (0, 56, 1473, 9000, 20000))
    line = f"ip addr add 10.0.0.2/24 dev front0; {pings}; iperf3 -t 2 -c 10.0.0.1; iperf3 -t 2 -R -c 10.0.0.1"
    said = inside.run(python(f"-m tests.xen.front_inside vif 0 'set -e; {line}'"), 300)
    assert said.endswith("right"), said
    assert said.count(" 0% packet loss") == 5 and "wrong data" not in said, said
    assert said.count("iperf Done.") == 2, said
    inside.xl("network-detach", "0")
