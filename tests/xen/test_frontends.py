"""Our blkfront in dom0, by loopback grants, against each backend that is there: the kernel's, QEMU's and our own.

The same cases for all. Where backends differ, the difference stands in OFFERS, and in docs/compatibility.md.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import toolstack
from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.load import Load, Plan

from .serve import Serve
from .stores import Stores
from .system import sh, until

QEMU = "/usr/libexec/xen-qemu-system-i386"
DEVICE = "xvdy"
MIB = 32

OFFERS: dict[str, dict[str, Any]] = {
    "kernel": {"barrier": True, "persistent": True, "indirect": 256, "queues": 2, "discard": True},
    "qemu": {"barrier": False, "persistent": False, "indirect": 0, "queues": 1, "discard": True},
    "ours": {"barrier": True, "persistent": True, "indirect": 256, "queues": 4, "discard": True},
}
"""What each offers for the same store, a loop device of dom0 (Linux 6.1, QEMU 7.2 as Debian 12 has them)."""


def attach_kernel(store: Any, device: str, log: Path) -> tuple[str, Callable[[], None]]:
    sh("modprobe", "xen-blkback")
    st = os.stat(device)
    numbers = f"{os.major(st.st_rdev):x}:{os.minor(st.st_rdev):x}"
    # The block script's part; and its word that the device is there.
    be = {"physical-device": numbers, "hotplug-status": "connected"}
    path = toolstack.attach_vbd(store, 0, DEVICE, device, be=be)

    def end() -> None:
        sh("modprobe", "-r", "xen-blkback")

    return path, end


def attach_qemu(store: Any, device: str, log: Path) -> tuple[str, Callable[[], None]]:
    pidfile = Path("/run/xen/qemu-dom0.pid")
    sh(QEMU, "-xen-domid", "0", "-xen-attach", "-name", "dom0", "-nographic", "-M", "xenpv", "-daemonize", "-monitor",
       "/dev/null", "-serial", "/dev/null", "-parallel", "/dev/null", "-nodefaults", "-no-user-config",
       "-pidfile", pidfile)  # fmt: skip
    path = toolstack.attach_vbd(store, 0, DEVICE, f"aio:{device}", kind="qdisk", be={"type": "qdisk"})

    def end() -> None:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)

    return path, end


def attach_ours(store: Any, device: str, log: Path) -> tuple[str, Callable[[], None]]:
    serve = Serve("--class", "pvblk", run_dir=log / "run")
    path = toolstack.attach_vbd(store, 0, DEVICE, device, kind="pvblk")

    def end() -> None:
        serve.stop()

    return path, end


ATTACH = {"kernel": attach_kernel, "qemu": attach_qemu, "ours": attach_ours}


class Peer:
    """A backend with a disk for us, and our end of it."""

    def __init__(self, name: str, platform: Any, stores: Stores, tmp_path: Path) -> None:
        self.offers = OFFERS[name]
        self.platform = platform
        device = stores.loop(stores.file("disk", MIB))
        self.backend, self._end = ATTACH[name](platform.store, device, tmp_path)
        self.devid = toolstack.devid_of(DEVICE)

    def connect(self, **options: Any) -> Blkfront:
        disk = Blkfront(self.platform, self.devid, **options)
        disk.connect(timeout=60)
        return disk

    def end(self) -> None:
        toolstack.detach(self.platform.store, self.backend, timeout=20, force=True)
        self._end()


@pytest.fixture(params=list(ATTACH))
def peer(request: pytest.FixtureRequest, platform: Any, stores: Stores, tmp_path: Path) -> Iterator[Peer]:
    made = Peer(request.param, platform, stores, tmp_path)
    yield made
    made.end()
    time.sleep(0.5)


def test_the_same_cases_for_every_backend(peer: Peer) -> None:
    """What it offers; every kind of request; and again after an orderly close, with other rings."""
    disk = peer.connect(ring_order=2)
    info, offers = disk.info, peer.offers
    found = {name: getattr(info, name) for name in ("barrier", "persistent", "indirect", "discard")}
    assert found == {name: offers[name] for name in found}
    assert int(peer.platform.store.read(peer.backend + "/multi-queue-max-queues") or 1) == offers["queues"]
    assert info.sectors == MIB << 11
    assert info.flush
    assert disk.ring_order == 2
    data = os.urandom(600_064)
    data = data[: len(data) // 512 * 512]
    disk.write(512, data)
    assert disk.read(512, len(data)) == data
    disk.flush()
    if info.barrier:
        disk.barrier(1 << 20, b"b" * 4096)
        assert disk.read(1 << 20, 4096) == b"b" * 4096
    disk.discard(4 << 20, 1 << 20)
    assert disk.read(4 << 20, 4096) == bytes(4096)
    disk.close()
    until(lambda: peer.platform.store.read(peer.backend + "/state") in (b"2", b"6"), 20, "the backend has closed")
    again = peer.connect(ring_order=0, persistent=False, queues=1)
    assert again.read(512, len(data)) == data
    load = Load(again, Plan(depth=8, write_percent=50, verify="all", length=4 << 20, requests=400)).run(120)
    assert load.right and load.first_error is None
    again.close()
