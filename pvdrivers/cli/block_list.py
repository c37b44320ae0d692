"""``pvdrivers block-list``: the disks of a domain, with xl's columns and ours."""

from __future__ import annotations

import argparse

from pvdrivers import toolstack

from .where import open_store

_XL = "{:<9} {:<3} {:<6} {:<5} {:<6} {:<8} {:<44}"
_OURS = " {:<8} {:<4} {:<12} {:<6} {}"


def run(args: argparse.Namespace) -> int:
    """One line a disk."""
    with open_store(args.run_dir) as store:
        domid = toolstack.find_domain(store, args.domain, left=True)
        found = toolstack.disks(store, domid)
    xl = ("Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path")
    print(_XL.format(*xl) + _OURS.format("name", "mode", "backend", "queues", "target"))
    for disk in found:
        theirs = (disk.devid, disk.backend_domid, domid, *(text or "-" for text in
                  (disk.front_state, disk.event_channel, disk.ring_ref)), disk.backend)  # fmt: skip
        ours = (disk.name, disk.mode, disk.state.name, disk.queues, disk.target)
        print(_XL.format(*theirs) + _OURS.format(*ours))
    return 0
