"""``pvdrivers network-attach``: give a domain a network interface that is served here."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.xenbus import XenbusState
from pvdrivers.xenstore import XenStoreClient
from pvdrivers.xl_vif import XlVif, new_mac, parse_xl_vif

from .devices import attached, wait_attached
from .where import open_store


def run(args: argparse.Namespace) -> int:
    """0 when the backend has taken the vif (with --connect, the guest, too); if it does not, nothing is left."""
    vif = parse_xl_vif(args.vif)
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain)
        home = toolstack.find_domain(store, vif.backend)
        try:
            name, state = _attach(store, domid, home, vif, args)
        except OSError as e:
            raise PlatformError(str(e)) from e
    print(attached(name, domid, state))
    return 0


def _attach(
    store: XenStoreClient, domid: int, home: int, vif: XlVif, args: argparse.Namespace
) -> tuple[str, XenbusState]:
    taken = dict(toolstack.all_macs(store, home))
    if vif.mac and vif.mac in taken:
        raise ConfigError(
            f"mac={vif.mac} is that of {taken[vif.mac]}: two vifs with one address get each other's packets; choose"
            " another, or leave mac out"
        )
    mac = vif.mac or _unused_mac(taken)
    devid = toolstack.free_devid(store, domid) if vif.devid is None else vif.devid
    backend = toolstack.attach(
        store, args.kind, domid, devid, backend_domid=home,
        be={**vif.keys, "handle": devid, "mac": mac},
        fe={"handle": devid, "mac": mac, "mtu": vif.mtu, "trusted": int(vif.trusted)},
    )  # fmt: skip
    name = f"vif {devid} ({mac})"
    return name, wait_attached(store, backend, f"vif {devid} of domain {domid}", toolstack.vifs, args)


def _unused_mac(taken: dict[str, str]) -> str:
    while (mac := new_mac()) in taken:
        pass
    return mac
