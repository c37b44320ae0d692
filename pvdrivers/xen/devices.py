"""The devices of the Linux kernel by their ioctls: numbers, layouts, and opening them with errors that help.

Linux include/uapi/xen/gntdev.h, gntalloc.h, evtchn.h. On Linux these are _IOC(_IOC_NONE, ...): the size is in the
number, the direction is not.
"""

from __future__ import annotations

import errno
import os

import numpy as np

from pvdrivers.errors import PlatformError, UnavailableError

GNTDEV = "/dev/xen/gntdev"
GNTALLOC = "/dev/xen/gntalloc"
EVTCHN = "/dev/xen/evtchn"


def _ioc(kind: str, number: int, size: int) -> int:
    return size << 16 | ord(kind) << 8 | number


MAP_REQUEST = np.dtype([("count", "u4"), ("pad", "u4"), ("index", "u8")])
"""struct ioctl_gntdev_map_grant_ref without its array: MAP_REF[count] follows."""
MAP_REF = np.dtype([("domid", "u4"), ("ref", "u4")])
"""struct ioctl_gntdev_grant_ref."""
UNMAP_REQUEST = np.dtype([("index", "u8"), ("count", "u4"), ("pad", "u4")])
"""struct ioctl_gntdev_unmap_grant_ref, and ioctl_gntalloc_dealloc_gref."""
NOTIFY_REQUEST = np.dtype([("index", "u8"), ("action", "u4"), ("port", "u4")])
"""struct ioctl_gntdev_unmap_notify, and that of gntalloc."""
COPY_REQUEST = np.dtype([("count", "u4"), ("pad", "u4"), ("segments", "u8")])
"""struct ioctl_gntdev_grant_copy."""
COPY_SEGMENT = np.dtype(
    [("source", "u8"), ("dest", "u8"), ("len", "u2"), ("flags", "u2"), ("status", "i2"), ("pad", "u2")]
)
"""struct gntdev_grant_copy_segment. A granted end is gref | offset << 32 | domid << 48, a local one an address."""
ALLOC_REQUEST = np.dtype([("domid", "u2"), ("flags", "u2"), ("count", "u4"), ("index", "u8")])
"""struct ioctl_gntalloc_alloc_gref without its array: u4[count], the grefs, follows."""

IOCTL_GNTDEV_MAP_GRANT_REF = _ioc("G", 0, 24)
IOCTL_GNTDEV_UNMAP_GRANT_REF = _ioc("G", 1, 16)
IOCTL_GNTDEV_SET_UNMAP_NOTIFY = _ioc("G", 7, 16)
IOCTL_GNTDEV_GRANT_COPY = _ioc("G", 8, 16)
IOCTL_GNTALLOC_ALLOC_GREF = _ioc("G", 5, 24)
IOCTL_GNTALLOC_DEALLOC_GREF = _ioc("G", 6, 16)
IOCTL_GNTALLOC_SET_UNMAP_NOTIFY = _ioc("G", 7, 16)
IOCTL_EVTCHN_BIND_INTERDOMAIN = _ioc("E", 1, 8)
IOCTL_EVTCHN_BIND_UNBOUND_PORT = _ioc("E", 2, 4)
IOCTL_EVTCHN_UNBIND = _ioc("E", 3, 4)
IOCTL_EVTCHN_NOTIFY = _ioc("E", 4, 4)

GNTCOPY_source_gref = 1
GNTCOPY_dest_gref = 2
GNTALLOC_FLAG_WRITABLE = 1
UNMAP_NOTIFY_CLEAR_BYTE = 1
UNMAP_NOTIFY_SEND_EVENT = 2


def open_device(path: str) -> int:
    """A descriptor of one of the devices. Raises PlatformError with what is wrong and what to do; UnavailableError if
    the operator has to do it, and no later try would have the device."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        hint = {
            errno.ENOENT: f"modprobe xen-{os.path.basename(path)}, on a kernel that runs on Xen",
            errno.ENODEV: f"modprobe xen-{os.path.basename(path)}, on a kernel that runs on Xen",
            errno.EACCES: "run as root, or give the service's user this device",
            errno.EPERM: "run as root, or allow the device (DeviceAllow= in the unit)",
        }.get(e.errno or 0)
        if hint is None:
            raise PlatformError(f"{path}: {e.strerror}; see the kernel's log") from e
        raise UnavailableError(f"{path}: {e.strerror}; {hint}") from e
