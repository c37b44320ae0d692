"""``python -m tests.xen.front_inside disk DEVICE | vif DEVID LINE``: frontends in a guest, for test_frontends_inside.

Says "right" at the end, and fails if it is not.
"""

from __future__ import annotations

import os
import subprocess
import sys

from pvdrivers import toolstack
from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.load import Load, Plan
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_tap import Tap
from pvdrivers.platform import Platform, open_platform


def disk(xen: Platform, device: str) -> None:
    """Every byte of some requests and of a load, on rings of one page and of four; persistent grants and none."""
    for order, persistent in ((0, True), (2, False)):
        front = Blkfront(xen, toolstack.devid_of(device), ring_order=order, persistent=persistent)
        front.connect(timeout=60)
        try:
            data = os.urandom(600_064)
            front.write(512, data)
            front.flush()
            assert front.read(512, len(data)) == data
            load = Load(front, Plan(depth=8, write_percent=50, verify="all", length=4 << 20, requests=400)).run(200)
            assert load.right and load.first_error is None, load
        finally:
            front.close()
    print("right")


def vif(xen: Platform, devid: str, line: str) -> None:
    """A shell line, with a TAP named front0 behind the vif meanwhile."""
    with Netfront(xen, int(devid)) as front:
        front.connect(timeout=60)
        tap = Tap(front, "front0")
        try:
            subprocess.run(line, shell=True, check=True, timeout=300)
        finally:
            tap.close()
    print("right")


def main(what: str, *words: str) -> None:
    xen = open_platform("xen")
    try:
        {"disk": disk, "vif": vif}[what](xen, *words)
    finally:
        xen.close()


main(*sys.argv[1:])
