"""``pvdrivers block-attach``: give a domain a disk that is served here, beside whatever serves the others."""

from __future__ import annotations

import argparse
import time

from pvdrivers import toolstack
from pvdrivers.errors import PlatformError
from pvdrivers.storage.xl_disk import XlDisk, parse_xl_disk
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient

from .where import open_store

_READY = (XenbusState.InitWait, XenbusState.Initialised, XenbusState.Connected)


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
    guest = "" if state is XenbusState.Connected else "; the guest has not connected yet"
    print(f"{disk.vdev}: attached to domain {domid}, {state.name}{guest}")
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
    deadline = time.monotonic() + args.timeout
    state = toolstack.wait_for(store, backend, _READY, args.timeout)
    if state in _READY and args.connect:
        state = toolstack.wait_for(store, backend, (XenbusState.Connected,), deadline - time.monotonic())
    if state in _READY and (state is XenbusState.Connected or not args.connect):
        return state
    why = toolstack.what_it_said(store, backend)
    front = toolstack.disks(store, domid)
    theirs = next((d.front_state for d in front if d.backend == backend), "")
    toolstack.detach(store, backend, timeout=1.0, force=True, at_once=True)
    if not why and state is XenbusState.Initialising:
        why = (
            f"no backend has taken it within {args.timeout:g} s: is `pvdrivers serve` running in domain {home}, and"
            f" does it serve the class {args.kind}, and this domain?"
        )
    elif not why:
        why = f"the guest has not connected within {args.timeout:g} s: its state is {theirs or 'not there'}"
    raise PlatformError(f"{disk.vdev} of domain {domid}: {why}")
