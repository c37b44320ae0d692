"""A guest that has the project: our backends and frontends run in it as they do in dom0.

It boots from dom0's own root disk and mounts the project's image beside it, which the kernel's xen-blkback serves.
"""

from __future__ import annotations

from collections.abc import Callable

from .guests import Guest
from .system import sh

DISKS = ("phy:/dev/vda,xvda,r", "phy:/dev/vdb,xvdb,r")
SET_UP = """
mount -t tmpfs run /run
mkdir -p /run/p/image /run/p/up /run/p/work
mount -t ext4 -o ro,noatime /dev/xvdb /run/p/image
mount -t overlay -o lowerdir=/run/p/image,upperdir=/run/p/up,workdir=/run/p/work project /opt/pvdrivers
modprobe -a xen-gntdev xen-gntalloc xen-evtchn xenfs tun
mount -t xenfs xenfs /proc/xen
"""


def with_project(make: Callable[..., Guest], *config: str) -> Guest:
    """A guest with the project in place; `config`: more lines of xl's configuration file."""
    sh("modprobe", "xen-blkback")
    guest = make(
        *DISKS, root="/dev/xvda", extra="bed.overlay bed.init=/bed/agent", memory=1000, config=list(config),
    )  # fmt: skip
    guest.run(f"set -e{SET_UP}", 60)
    return guest


def python(words: str) -> str:
    """A shell line for that guest, which runs the project's Python."""
    return f". /bed/environment; cd /opt/pvdrivers; python {words}"
