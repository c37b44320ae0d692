"""The embedded Xen's xenstore: the wire protocol of xs_wire.h, the rules of C xenstored 4.17.

permissions and quota are values; tree holds the nodes and transactions a private view of them; operations is
one function for each request; watches says who hears of a change; connection carries bytes; server ties them
together.
"""

from __future__ import annotations

from .permissions import Refused
from .quota import Quotas
from .server import XenStoreServer, XenStoreServerError

__all__ = ["Quotas", "Refused", "XenStoreServer", "XenStoreServerError"]
