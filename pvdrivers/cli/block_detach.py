"""``pvdrivers block-detach``: take a disk from a domain that `block-attach` gave it."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenstore import XenStoreClient

from .where import open_store


def run(args: argparse.Namespace) -> int:
    """0 when it is gone."""
    devid = toolstack.devid_of(args.vdev)
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain)
        try:
            _detach(store, domid, devid, args)
        except OSError as e:
            raise PlatformError(str(e)) from e
    print(f"{args.vdev}: detached from domain {domid}")
    return 0


def _detach(store: XenStoreClient, domid: int, devid: int, args: argparse.Namespace) -> None:
    all_of_it = toolstack.disks(store, domid)
    found = [disk for disk in all_of_it if disk.devid == devid]
    if not found:
        have = ", ".join(disk.name for disk in all_of_it) or "none"
        raise ConfigError(f"domain {domid} has no disk {args.vdev}; it has: {have}")
    disk = found[0]  # pvblk is looked for first
    if disk.made_by_xl:
        raise ConfigError(f"{args.vdev} of domain {domid} was attached by xl: xl block-detach {domid} {args.vdev}")
    if toolstack.detach(store, disk.backend, timeout=args.timeout, force=args.force, at_once=args.force):
        return
    why = toolstack.what_it_said(store, disk.backend)
    if args.force:
        raise PlatformError(
            f"{args.vdev} of domain {domid}: taken away, but its backend was not seen to let go within"
            f" {args.timeout:g} s{': ' + why if why else ''}; is `pvdrivers serve` running?"
        )
    state = next((d for d in toolstack.disks(store, domid) if d.backend == disk.backend), disk)
    raise PlatformError(
        f"{args.vdev} of domain {domid}: not let go within {args.timeout:g} s: backend {state.state.name}, frontend"
        f" state {state.front_state or 'not there'}{': ' + why if why else ''}; is it mounted in the guest? It goes"
        " when the guest lets go; --force takes it away at once"
    )
