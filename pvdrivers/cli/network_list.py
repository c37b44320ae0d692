"""``pvdrivers network-list``: the network interfaces of a domain, with xl's columns and ours."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack

from .where import open_store

_XL = "{:<3} {:<2} {:<17} {:<6} {:<5} {:<6} {:>5}/{:<11} {:<30}"
_OURS = " {:<12} {:<6} {}"


def run(args: argparse.Namespace) -> int:
    """One line a vif."""
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain)
        found = toolstack.vifs(store, domid)
    xl = ("Idx", "BE", "Mac Addr.", "handle", "state", "evt-ch", "tx-", "rx-ring-ref", "BE-path")
    print(_XL.format(*xl) + _OURS.format("backend", "queues", "bridge"))
    for vif in found:
        # xl's column "handle" has the devid, too: libxl gives both the same number.
        theirs = (vif.devid, vif.backend_domid, vif.mac or "-", vif.devid, *(text or "-" for text in (
            vif.front_state, vif.event_channel, vif.tx_ring_ref, vif.rx_ring_ref)), vif.backend)  # fmt: skip
        print(_XL.format(*theirs) + _OURS.format(vif.state.name, vif.queues, vif.port or "-"))
    return 0
