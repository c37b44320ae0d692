"""``pvdrivers block-attach``: give a domain a disk that is served here, beside whatever serves the others."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack
from pvdrivers.errors import PlatformError
from pvdrivers.storage.xl_disk import XlDisk, parse_xl_disk
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient

from .devices import attached, wait_attached
from .where import open_store


def run(args: argparse.Namespace) -> int:
    """0 when the backend has taken the disk (with --connect, the guest, too); if it does not, nothing is left."""
    disk = parse_xl_disk(args.disk)
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain)
        home = toolstack.find_domain(store, disk.backend)
        try:
            state = _attach(store, domid, home, disk, args)
        except OSError as e:
            raise PlatformError(str(e)) from e
    print(attached(disk.vdev, domid, state))
    return 0


def _attach(store: XenStoreClient, domid: int, home: int, disk: XlDisk, args: argparse.Namespace) -> XenbusState:
    spec = disk.spec
    keys: dict[str, toolstack.Value] = {
        "dev": disk.vdev,
        "removable": int(spec.removable or spec.cdrom),
        "discard-enable": int(spec.discard),
    }
    if disk.direct_io_safe:
        keys["direct-io-safe"] = 1
    backend = toolstack.attach_vbd(
        store,
        domid,
        disk.devid,
        spec.text(),
        mode=spec.mode,
        backend_domid=home,
        device_type="cdrom" if spec.cdrom else "disk",
        kind=args.kind,
        be=keys,
        fe={"trusted": int(disk.trusted)},
    )
    return wait_attached(store, backend, f"{disk.vdev} of domain {domid}", toolstack.disks, args)
