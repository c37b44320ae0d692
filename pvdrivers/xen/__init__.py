"""The real Xen: gntdev, gntalloc and evtchn of the Linux kernel, and xenstore; in dom0 or in any other domain.

No Xen library is used: the devices' ioctls (include/uapi/xen/*.h) and the store's wire protocol are all there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .joined import XenPlatform


def open(*, store_path: str | None = None) -> XenPlatform:
    """This domain's Xen. `store_path`: a socket or device of xenstore, by default where libxenstore would look.

    Raises PlatformError naming the device that is missing or refused, and what to do about it.
    """
    from .joined import XenPlatform  # numba comes with it

    return XenPlatform(store_path)
