"""Which of the kernel's own backends are there, and which come by themselves.

Xen's bus announces each new device of a guest with an alias such as xen-backend:vbd, and udev has modprobe load what
has it (Linux, xenbus_probe_backend.c, xenbus_uevent_backend). A driver that is not there yet is then there as soon as
the first guest gets a disk, takes that disk, and knows nothing of us.

A driver that is loaded later takes each device that the bus knows: those whose directory it has seen before we wrote
InitWait there, a race that the kernel mostly wins (xenbus_probe_node). Its probe writes InitWait over our Connected,
finds that the guest's port is bound, to us, and writes Closing (xen-blkback's frontend_changed, xenbus_dev_fatal). So
it serves nothing, and Linux's blkfront gives the disk up. All that can be done from here is not to join in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["MODULES", "comes_with_udev", "has_device", "in_kernel", "kept_out"]

MODULES = {"vbd": "xen-blkback", "vif": "xen-netback", "vscsi": "xen-scsiback"}
"""Kind of backend -> the module that serves it."""
_DRIVERS = "sys/bus/xen-backend/drivers"
_UDEV = "run/udev/control"
_DIRECTORIES = ("etc/modprobe.d", "run/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d")
_ROOT = Path("/")


def in_kernel(name: str, root: Path = _ROOT) -> str:
    """Which driver of this kernel serves this kind of backend, "" if none does: a line for people."""
    if not (root / _DRIVERS / name).exists():
        return ""
    return f"the kernel's {MODULES.get(name, 'driver')} (/{_DRIVERS}/{name})"


def has_device(name: str, domid: int, devid: int, root: Path = _ROOT) -> bool:
    """Whether that driver has this very device: its directory of sysfs links to it (backend_bus_id)."""
    return os.path.lexists(root / _DRIVERS / name / f"{name}-{domid}-{devid}")


def comes_with_udev(name: str, root: Path = _ROOT) -> str:
    """The same for a driver that is not there, and will be as soon as a guest gets a device of this kind."""
    module = MODULES.get(name, "")
    if not module or not (root / _UDEV).exists() or kept_out(module, root):
        return ""
    aliases = root / "lib/modules" / os.uname().release / "modules.alias"
    try:
        known = f"alias xen-backend:{name} " in aliases.read_text()
    except OSError:
        return ""  # no modules to load, or nobody who could
    return f"the kernel's {module}, which udev loads for the first device," if known else ""


def kept_out(module: str, root: Path = _ROOT) -> str:
    """The file that keeps a module from being loaded by its alias, as udev does it; "" if none does."""
    words = re.sub("[-_]", "[-_]", module)
    line = re.compile(rf"^\s*(blacklist|install)\s+{words}\b", re.MULTILINE)
    for directory in _DIRECTORIES:
        for path in sorted((root / directory).glob("*.conf")):
            try:
                if line.search(path.read_text()):
                    return str(path)
            except OSError:
                pass
    return ""
