"""Who hears of a change.

Watches are found by path: a change at a/b/c looks at a/b/c, a/b, a and the root, however many watches there
are. Source: docs/misc/xenstore.txt ("Watches"), and C xenstored's fire_watches() and watch_permitted().
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ...xs_wire import HEADER, PAYLOAD_MAX, REL_PATH_MAX, XS_WATCH_EVENT
from .permissions import DOM0_ONLY, READ, Perms, Refused, access, forget
from .tree import Node, Tree, check_path, parent_of

if TYPE_CHECKING:
    from .connection import Connection
    from .quota import Domain

INTRODUCE = b"@introduceDomain"
RELEASE = b"@releaseDomain"


class Watch:
    """One registration."""

    __slots__ = ("conn", "depth", "levels", "path", "strip", "token")

    def __init__(self, conn: Connection, path: bytes, token: bytes, strip: int, depth: int) -> None:
        self.conn = conn
        self.path = path  # absolute, or a special one beginning with @
        self.token = token
        self.strip = strip  # bytes to take from the front of an event's path: the watch's own was relative
        self.depth = depth  # levels below `path` that count; -1: all
        self.levels = _levels(path)

    def charge(self) -> int:
        """Bytes of the domain's memory quota."""
        return len(self.path) + len(self.token)


class Watches:
    """All watches of all connections, and the permissions of the special ones."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._by_path: dict[bytes, list[Watch]] = {}
        self.special: dict[bytes, Perms] = {INTRODUCE: DOM0_ONLY, RELEASE: DOM0_ONLY}

    def add(self, conn: Connection, raw: bytes, token: bytes, depth: int = -1) -> None:
        """Registers and reports once at once. Raises Refused (EINVAL, EEXIST, E2BIG, ENOMEM)."""
        quotas, domain = conn.server.quotas, conn.domain
        path, strip = conn.absolute(raw), 0
        if path[:1] == b"@":
            if len(path) > REL_PATH_MAX:
                raise Refused(errno.EINVAL)
        else:
            check_path(path, quotas.path_max)
            strip = len(path) - len(raw)
        if (path, token) in conn.watches:
            raise Refused(errno.EEXIST)
        watch = Watch(conn, path, token, strip, depth)
        if domain.domid:
            if domain.watches > quotas.watches:
                raise Refused(errno.E2BIG)
            if domain.memory + watch.charge() > quotas.memory:
                raise Refused(errno.ENOMEM)
        domain.watches += 1
        domain.memory += watch.charge()
        conn.watches[(path, token)] = watch
        self._by_path.setdefault(path, []).append(watch)

    def remove(self, conn: Connection, raw: bytes, token: bytes) -> None:
        """Raises Refused(ENOENT) if there is no such watch."""
        watch = conn.watches.pop((conn.absolute(raw), token), None)
        if watch is None:
            raise Refused(errno.ENOENT)
        self._drop(watch)

    def remove_all(self, conn: Connection) -> None:
        for watch in conn.watches.values():
            self._drop(watch)
        conn.watches.clear()

    def _drop(self, watch: Watch) -> None:
        watches = self._by_path[watch.path]
        watches.remove(watch)
        if not watches:
            del self._by_path[watch.path]
        watch.conn.domain.watches -= 1
        watch.conn.domain.memory -= watch.charge()

    def fire(self, path: bytes, node: Node | None, exact: bool, before: Perms | None, cause: Domain | None) -> None:
        """Reports a change of `path`, to the watches of that very path or of everything above it.

        `node` is what is there now (None: removed), `before` its permissions until now if they were others. A
        guest hears of it if it may read the node, or its parent, or could before. `cause` is the guest whose
        request it was.
        """
        by_path = self._by_path
        if not by_path:
            return
        at = path
        while True:
            watches = by_path.get(at)
            if watches is not None:
                for watch in watches:
                    conn = watch.conn
                    if watch.depth >= 0 and _levels(path) - watch.levels > watch.depth:
                        continue
                    if conn.privileged or self._permitted(conn, path, node, before):
                        conn.queue_event(event(path[watch.strip :], watch.token), cause)
            if exact or at == b"/":
                return
            at = at[: at.rindex(b"/")] or b"/"

    def _permitted(self, conn: Connection, path: bytes, node: Node | None, before: Perms | None) -> bool:
        domids = conn.domain.domids
        if before is not None and access(before, domids) & READ:
            return True
        if node is None:
            return False
        if access(node.perms, domids) & READ:
            return True
        parent = self._tree.get(parent_of(path))
        return parent is not None and bool(access(parent.perms, domids) & READ)

    def fire_special(self, name: bytes, domid: int) -> None:
        """Reports that a domain came or went."""
        one = b"%s/%d" % (name, domid)
        for watch in [*self._by_path.get(name, ()), *self._by_path.get(one, ())]:
            conn = watch.conn
            if conn.privileged or access(self.special[name], conn.domain.domids) & READ:
                path = one if watch.depth == 1 else watch.path
                conn.queue_event(event(path, watch.token), None)

    def forget_domain(self, domid: int) -> None:
        """A domain that is gone has no rights to the special watches, and does not own them."""
        for name, perms in self.special.items():
            if perms[0][0] == domid:
                perms = ((0, perms[0][1]), *perms[1:])
            self.special[name] = forget(perms, domid)


def event(path: bytes, token: bytes) -> bytes:
    """A WATCH_EVENT message; empty if it would be longer than a message may be."""
    length = len(path) + len(token) + 2
    if length > PAYLOAD_MAX:
        return b""
    return b"%s%s\0%s\0" % (HEADER.pack(XS_WATCH_EVENT, 0, 0, length), path, token)


def _levels(path: bytes) -> int:
    return path.count(b"/") if path != b"/" else 0
