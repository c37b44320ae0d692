"""Which xenstore this is: one that was restarted knows nothing of what is served, one that was only away knows all.

C xenstored keeps nothing over a restart, unless it is a live update. What is missing then was removed by nobody, and
is served on; while what is missing from the same store as before was taken away by the toolstack.
"""

from __future__ import annotations

import uuid

from .nodes import connection_lost
from .platform import XenStore

_NODE = "/local/domain/{domid}/data/pvdrivers/incarnation"
"""In the part of its home that a driver domain may write to, too."""


def incarnation(store: XenStore, domid: int) -> bytes:
    """A word that stays as long as the store does; whoever finds none writes one. Empty if that is not allowed.
    The control thread asks, and waits for no other's transaction.

    Raises OSError when the connection is lost.
    """
    path = _NODE.format(domid=domid)

    def find(tx: int) -> bytes:
        word: bytes | None = store.read(path, tx)
        if word is None:
            word = uuid.uuid4().hex.encode()
            store.write(path, word, tx)
        return word

    try:
        return bytes(store.transaction(find, wait=False))
    except OSError as e:
        if connection_lost(e):
            raise
        return b""
