"""``pvdrivers guest``: act as the toolstack, then be the guest: blkfront, its disks by NBD if asked, and netfront."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pvdrivers import sim
from pvdrivers.closing import Closing
from pvdrivers.errors import ConfigError, PlatformError, PvError
from pvdrivers.frontends import netfront_tap
from pvdrivers.frontends.blkfront import Blkfront, Io, warm
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.watches import Watches
from pvdrivers.nbd.server import NbdServer
from pvdrivers.platform import open_platform
from pvdrivers.sim import toolstack
from pvdrivers.storage.uri import DiskSpec, parse_disk
from pvdrivers.xenbus import XenbusState
from pvdrivers.xl_vif import new_mac
from rings.vdev import vdev_name, vdev_number

from .guest_net import NetSpec, describe_net, parse_net, spread

_CONNECT = 30.0  # seconds; a backend may have to open an image on a slow disk
_SECOND_TRY = 1.5  # seconds that a backend which reports an error may still come round
_DETACH = 10.0
_LOOK = 1.0  # seconds between looks at disks that may have failed


def run(args: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM; then everything is taken down in order."""
    specs = [parse_disk(text) for text in args.disks]
    nets = [parse_net(text) for text in args.nets]
    if not specs and not nets:
        raise ConfigError("a guest of nothing: name a disk with --disk, or a vif with --net")
    if specs:
        warm(load=False)  # here, and not while somebody waits for a disk
    if nets:
        netfront_tap.warm()
    indirect: bool | int = True if args.indirect is None else args.indirect
    with Guest(args.run_dir, memory_mib=args.memory) as guest:
        server = None
        try:
            for spec in specs:
                disk = guest.attach(
                    spec,
                    queues=args.queues,
                    ring_order=args.ring_order,
                    abi=args.abi,
                    persistent=args.persistent,
                    indirect=indirect,
                    trusted=not args.untrusted_backend,
                )
                print(describe(disk), flush=True)
            for net in nets:
                print(describe_net(guest.attach_net(net), net), flush=True)
            if args.nbd is not None:
                server = NbdServer(args.nbd, {disk.name: Export(disk) for disk in guest.disks})
                print(f"nbd: unix:{args.nbd}", flush=True)
            _stay(guest)
        except KeyboardInterrupt:
            pass  # as good a way to end this as SIGTERM, and whoever reads a line may send it right then
        finally:
            if server is not None:
                server.close()
    return 0


def _stay(guest: Guest) -> None:
    """Until a signal ends it. A disk that fails is told of once."""
    told: set[str] = set()
    while True:
        threading.Event().wait(_LOOK)
        for disk in (*guest.disks, *guest.vifs):
            if disk.failure and disk.name not in told:
                told.add(disk.name)
                print(f"pvdrivers: {disk.name}: {disk.failure}", file=sys.stderr, flush=True)


def describe(disk: Blkfront) -> str:
    """One line: what the disk is, and how it is connected."""
    info = disk.info
    size = f"{info.size >> 20} MiB" if info.size % (1 << 20) == 0 else f"{info.size} bytes"
    pages = 1 << disk.ring_order
    parts = [
        size,
        f"{len(disk.queues)} queue{'s' * (len(disk.queues) > 1)}",
        f"rings of {pages} page{'s' * (pages > 1)}",
        "persistent grants" if disk.persistent else "a grant a request",
        f"{disk.max_segments} segments",
    ]
    if info.sector_size != 512:
        parts.append(f"sectors of {info.sector_size} bytes")
    parts += [word for word, true in (("read-only", info.readonly), ("CD-ROM", info.cdrom)) if true]
    return f"{disk.name}: {', '.join(parts)}"


class Guest(Closing):
    """A domain of the embedded Xen with disks; a context manager that takes it down in order."""

    def __init__(self, run_dir: Path, *, memory_mib: int) -> None:
        """Raises PlatformError if there is no embedded Xen in `run_dir`."""
        if not (run_dir / "xenstored").exists():
            raise PlatformError(
                f"no embedded Xen in {run_dir}: start one with `pvdrivers sim --run-dir {run_dir}`,"
                f" and backends with `pvdrivers serve --run-dir {run_dir}`"
            )
        self.disks: list[Blkfront] = []
        self.vifs: list[Netfront] = []
        self._taps: list[netfront_tap.Tap] = []
        self._backends: list[str] = []
        self._toolstack = sim.open(run_dir)
        try:
            domain = toolstack.create_domain(self._toolstack, memory_mib=memory_mib)
            self.domid = domain.domid
            self._platform = open_platform("sim", run_dir=run_dir, domid=domain.domid, token=domain.token)
            self._watches = Watches(self._platform.store)
        except BaseException:
            self._toolstack.close()
            raise

    def attach(self, spec: DiskSpec, **options: Any) -> Blkfront:
        """Attach a disk, wait for its backend, and connect. `options` are Blkfront's. Raises PvError."""
        vdev = spec.vdev or self._next_name()
        try:
            devid = vdev_number(vdev)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        trusted = options.get("trusted", True)
        backend = toolstack.attach_vbd(
            self._toolstack.store,
            self.domid,
            devid,
            spec.text(),
            mode=spec.mode,
            device_type="cdrom" if spec.cdrom else "disk",
            be={"dev": vdev_name(devid), "removable": int(spec.removable), "discard-enable": int(spec.discard)},
            fe={"trusted": int(trusted)},
        )
        self._backends.append(backend)
        disk = Blkfront(self._platform, devid, watches=self._watches, **options)
        self.disks.append(disk)
        self._connect(disk, backend)
        return disk

    def attach_net(self, spec: NetSpec) -> Netfront:
        """Attach a vif, wait for its backend, connect, and make its TAP if it is to have one. Raises PvError."""
        devid = len(self.vifs)
        mac = spec.mac or new_mac()
        keys: dict[str, str | int | bytes] = {"mac": mac, "handle": devid, "mtu": spec.mtu}
        backend = toolstack.attach(
            self._toolstack.store, "vif", self.domid, devid, be={**keys, "bridge": spec.bridge}, fe=keys
        )
        self._backends.append(backend)
        vif = Netfront(self._platform, devid, queues=spec.queues, wishes=spec.wishes, watches=self._watches)
        self.vifs.append(vif)
        self._connect(vif, backend)
        if spec.hash:
            spread(vif)
        if spec.tap:
            self._taps.append(netfront_tap.Tap(vif, spec.tap, mtu=spec.mtu))
        return vif

    def _connect(self, disk: Blkfront | Netfront, backend: str) -> None:
        """Wait for the backend, but not for one that says why it will not come."""
        deadline = time.monotonic() + _CONNECT
        patience = None
        disk.start()
        while not disk.wait_state(lambda: disk.state is XenbusState.Connected or disk.failure, _LOOK / 4):
            said = self._backend_error(backend)
            if said and patience is None:
                patience = time.monotonic() + _SECOND_TRY
            if time.monotonic() > min(deadline, patience or deadline):
                break
        try:
            disk.connect(0)
        except PvError as error:
            said = self._backend_error(backend)
            raise PvError(f"{disk.noun} {disk.name}: {said}" if said else str(error)) from error

    def _next_name(self) -> str:
        taken = {disk.name for disk in self.disks}
        return next(name for i in range(1 << 16) if (name := vdev_name(1 << 28 | i << 8)) not in taken)

    def _backend_error(self, backend: str) -> str:
        """What the backend has to say, where Linux's xenbus_dev_error puts it."""
        node = backend.removeprefix("/local/domain/0/")
        text = self._toolstack.store.read(f"/local/domain/0/error/{node}/error") or b""
        number, _, rest = text.decode(errors="replace").partition(" ")
        return rest if number.lstrip("-").isdigit() else text.decode(errors="replace")

    def close(self) -> None:
        """Close the disks, detach them, destroy the domain. Signals have to wait meanwhile."""
        before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            for tap in self._taps:
                tap.close()
            for device in (*self.disks, *self.vifs):
                device.close()
            for backend in self._backends:
                if not toolstack.detach(self._toolstack.store, backend, timeout=_DETACH, force=True):
                    print(f"pvdrivers: {backend}: the backend did not let go of it", file=sys.stderr)
            self._watches.close()
            self._platform.close()
            if any(domain.domid == self.domid for domain in toolstack.list_domains(self._toolstack.hypercalls)):
                toolstack.destroy(self._toolstack, self.domid)
            else:
                toolstack.clean(self._toolstack.store, self.domid)
        except (OSError, PlatformError) as error:
            print(f"pvdrivers: domain {self.domid} could not be taken down in order: {error}", file=sys.stderr)
        finally:
            self._toolstack.close()
            for number, handler in before:
                signal.signal(number, handler)


class Export:
    """A disk as the NBD server wants it."""

    def __init__(self, disk: Blkfront) -> None:
        self._disk = disk

    @property
    def size(self) -> int:
        return self._disk.info.size

    @property
    def block_size(self) -> int:
        return self._disk.info.sector_size

    @property
    def readonly(self) -> bool:
        return self._disk.info.readonly

    @property
    def can_trim(self) -> bool:
        return self._disk.info.discard

    @property
    def description(self) -> str:
        return describe(self._disk)

    def submit(self, op: str, offset: int = 0, length: int = 0, buffer: Any = None) -> Future[int]:
        return self._disk.submit(Io(op, offset, length, buffer))
