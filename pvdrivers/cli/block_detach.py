"""``pvdrivers block-detach``: take a disk from a domain that `block-attach` gave it."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenstore import XenStoreClient

from .devices import let_go
from .where import open_store

_HINT = "is it mounted in the guest? It goes when the guest lets go"


def run(args: argparse.Namespace) -> int:
    """0 when it is gone."""
    devid = toolstack.devid_of(args.vdev)
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain, left=True)
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
    what = f"{args.vdev} of domain {domid}"
    # pvblk is looked for first
    let_go(store, found[0], what, toolstack.disks, args, verb="block-detach", hint=_HINT)
