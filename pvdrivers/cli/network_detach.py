"""``pvdrivers network-detach``: take a network interface from a domain that `network-attach` gave it."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenstore import XenStoreClient
from pvdrivers.xl_vif import parse_mac

from .devices import let_go
from .where import open_store

_HINT = "it goes when the guest lets go"


def run(args: argparse.Namespace) -> int:
    """0 when it is gone."""
    wanted = _wanted(args.vif)
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain)
        try:
            vif = _find(store, domid, wanted)
            what = f"vif {vif.devid} of domain {domid}"
            let_go(store, vif, what, toolstack.vifs, args, verb="network-detach", hint=_HINT)
        except OSError as e:
            raise PlatformError(str(e)) from e
    print(f"vif {vif.devid} ({vif.mac}): detached from domain {domid}")
    return 0


def _wanted(text: str) -> int | str:
    """A devid, or an address: what has a colon in it, as xl tells them apart. Raises ConfigError."""
    if ":" in text:
        try:
            return parse_mac(text)
        except ValueError as e:
            raise ConfigError(str(e)) from None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"vif {text!r}: neither a number (devid) nor an address such as 00:16:3e:12:34:56")
    return int(text)


def _find(store: XenStoreClient, domid: int, wanted: int | str) -> toolstack.Vif:
    all_of_it = toolstack.vifs(store, domid)
    found = [vif for vif in all_of_it if wanted in (vif.devid, vif.mac)]
    if not found:
        have = ", ".join(f"{vif.devid} ({vif.mac})" for vif in all_of_it) or "none"
        raise ConfigError(f"domain {domid} has no vif {wanted}; it has: {have}")
    if len(found) > 1:
        devids = ", ".join(str(vif.devid) for vif in found)
        raise ConfigError(f"domain {domid} has several vifs with the address {wanted}: name one by its devid: {devids}")
    return found[0]
