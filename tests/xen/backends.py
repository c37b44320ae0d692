"""Backends of dom0 for frontends in dom0, by loopback grants: the kernel's, QEMU's and our own; each with disks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from pvdrivers import toolstack
from pvdrivers.frontends.blkfront import Blkfront
from tests.hostile_frontend import Frontend

from .serve import Serve
from .system import RESULTS, sh, until

QEMU = "/usr/libexec/xen-qemu-system-i386"
DEVICE = "xvdy"
QEMU_READ_ONLY = "QEMU 7.2 does not serve a disk of mode r that is made so (Block node is read-only)"


class Backend(Protocol):
    """One that runs."""

    kind: str

    def keys(self, device: str) -> tuple[str, dict[str, str]]:
        """What a toolstack writes about a block device of dom0: `params`, and keys beside it."""

    def stop(self) -> None: ...


class Kernel:
    """Linux's xen-blkback."""

    kind = "vbd"

    def __init__(self, top: Path) -> None:
        sh("modprobe", "xen-blkback")

    def keys(self, device: str) -> tuple[str, dict[str, str]]:
        st = os.stat(device)
        numbers = f"{os.major(st.st_rdev):x}:{os.minor(st.st_rdev):x}"
        # The block script's part; and its word that the device is there.
        return device, {"physical-device": numbers, "hotplug-status": "connected"}

    def stop(self) -> None:
        sh("modprobe", "-r", "xen-blkback")


class Qemu:
    """QEMU's qdisk: a process for each disk, as one of a domain that has had some does not always take the next."""

    kind = "qdisk"

    def __init__(self, top: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def keys(self, device: str) -> tuple[str, dict[str, str]]:
        self.stop()
        with (RESULTS / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                [QEMU, "-xen-domid", "0", "-xen-attach", "-name", "dom0", "-nographic", "-M", "xenpv", "-monitor",
                 "/dev/null", "-serial", "/dev/null", "-parallel", "/dev/null", "-nodefaults", "-no-user-config"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        return f"aio:{device}", {"type": "qdisk"}

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


class Ours:
    """`pvdrivers serve`, with kinds of its own, whatever else is there."""

    kind = "pvblk"

    def __init__(self, top: Path) -> None:
        self.serve = Serve("--class", "pvblk", run_dir=top / "run")

    def keys(self, device: str) -> tuple[str, dict[str, str]]:
        return device, {}

    def look_again(self) -> None:
        """Have it look at the sizes of its disks."""
        self.serve.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        log = self.serve.log.read_text()
        assert self.serve.alive() and "Traceback" not in log and "our own fault" not in log, log[-6000:]
        self.serve.stop()


BACKENDS: dict[str, type[Kernel] | type[Qemu] | type[Ours]] = {"kernel": Kernel, "qemu": Qemu, "ours": Ours}


class Disk:
    """A disk of dom0 itself, by one of the backends. A frontend of ours, honest or not, is what drives it."""

    def __init__(self, name: str, backend: Backend, platform: Any, device: str, mode: str = "w") -> None:
        self.name, self.platform = name, platform
        self.devid = toolstack.devid_of(DEVICE)
        self._fronts: list[Blkfront] = []
        params, be = backend.keys(device)
        self.path = toolstack.attach_vbd(platform.store, 0, DEVICE, params, mode=mode, kind=backend.kind, be=be)

    def key(self, name: str) -> str:
        """What the backend has written, "" if nothing."""
        return (self.platform.store.read(f"{self.path}/{name}") or b"").decode()

    def connect(self, **options: Any) -> Blkfront:
        """An honest frontend."""
        disk = Blkfront(self.platform, self.devid, **options)
        self._fronts.append(disk)
        disk.connect(timeout=60)
        return disk

    def closed(self) -> None:
        """Wait until the backend has closed, which a frontend that has does not."""
        until(lambda: self.key("state") in ("2", "6"), 20, f"{self.path} has closed, or waits again")

    def detach(self) -> None:
        """As xl does, whatever its state; harmless a second time."""
        if self.key("state"):
            toolstack.detach(self.platform.store, self.path, timeout=20, force=True)

    def end(self) -> None:
        """Whatever a test has left: its frontends' watches too, as all tests have one connection to xenstore."""
        for front in self._fronts:
            front.close()
        self.detach()


class RawFrontend(Frontend):
    """The frontend that lies, of a Disk."""

    def __init__(self, disk: Disk) -> None:
        self.platform, self.store = disk.platform, disk.platform.store
        self.dom0 = SimpleNamespace(store=self.store)
        self.domid, self.devid = 0, disk.devid
        self.back = disk.path
        self.front = f"/local/domain/0/device/vbd/{disk.devid}"
        self.error_path = disk.path.replace("/backend/", "/error/backend/") + "/error"
        self.events = self.platform.open_events()
        self.rings, self.grefs, self.pages = [], [], []
        self.gone = False

    def end(self) -> None:
        """Give back what it has; the backend has let go of it."""
        self.events.close()
        for pages in self.pages:
            pages.free()


@contextmanager
def liar(disk: Disk) -> Iterator[RawFrontend]:
    """A frontend that lies, which closes in order in the end."""
    front = RawFrontend(disk)
    try:
        yield front
        front.close()
    finally:
        disk.detach()
        front.end()
