"""The store as the hypervisor process itself uses it: dom0's rights, plain calls, no socket."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ...xs_wire import XS_GET_PERMS, XS_MKDIR, XS_READ, XS_RM, XS_SET_PERMS, XS_WRITE, split
from .connection import Connection
from .permissions import Refused


class DirectStore:
    """Reads and writes as dom0. Raises Refused. Watches fire as for anybody else's changes."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    def _request(self, type_: int, payload: bytes) -> bytes:
        try:
            return self._conn.request(type_, 0, payload)
        finally:
            if self._conn.server.dirty:
                self._conn.server.flush()

    def read(self, path: str) -> bytes | None:
        """The value of a node, None if there is no such node."""
        try:
            return self._request(XS_READ, path.encode() + b"\0")
        except Refused as e:
            if e.errno == errno.ENOENT:
                return None
            raise

    def write(self, path: str, value: bytes | str | int) -> None:
        """Sets a value; the node and missing parents are created."""
        raw = value if isinstance(value, bytes) else str(value).encode()
        self._request(XS_WRITE, path.encode() + b"\0" + raw)

    def mkdir(self, path: str) -> None:
        """Makes sure that a node is there; its value stays if it is."""
        self._request(XS_MKDIR, path.encode() + b"\0")

    def rm(self, path: str) -> None:
        """Removes a node and all below it; missing is fine."""
        try:
            self._request(XS_RM, path.encode() + b"\0")
        except Refused as e:
            if e.errno != errno.ENOENT:
                raise

    def ls(self, path: str) -> list[str] | None:
        """Names of a node's children, None if there is no such node."""
        node = self._conn.server.nodes.get(self._conn.absolute(path.encode()))
        return None if node is None else [name.decode() for name in node.children]

    def get_perms(self, path: str) -> list[str]:
        """Permissions as "n0", "r5", ..."""
        return [p.decode() for p in split(self._request(XS_GET_PERMS, path.encode() + b"\0"))]

    def set_perms(self, path: str, perms: Sequence[str]) -> None:
        """Replaces permissions; the first entry names the owner."""
        self._request(XS_SET_PERMS, path.encode() + b"\0" + b"".join(p.encode() + b"\0" for p in perms))
