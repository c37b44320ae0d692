"""The requests on nodes, watches and transactions: one function each.

Every function takes the connection, the view (the tree, or the transaction that the request names) and the
payload, and returns the reply's payload or raises Refused. Rules and errors: C xenstored 4.17
(xenstored_core.c, do_*).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ...xs_wire import PAYLOAD_MAX
from .permissions import OWNER, READ, WRITE, Perms, Refused, access, inherit, parse, serialize
from .transactions import Transaction
from .tree import Node, View, below, check_path, enter, name_of, parent_of, strike

if TYPE_CHECKING:
    from .connection import Connection

OK = b"OK\0"
_EXTRA_CHILD = 1  # a NUL


def find(conn: Connection, view: View, path: bytes, need: int) -> Node | None:
    """The node, None if it is not there. Raises Refused(EACCES), also instead of "not there" if the nearest
    node above would not let the caller know, and EINVAL."""
    node = view.get(path)
    if node is None:
        check_path(path, conn.server.quotas.path_max)
        # In a transaction the node above counts as used, for dom0 too, as in C xenstored.
        if not conn.privileged or view is not conn.server.nodes:
            above = path
            parent = None
            while parent is None and above != b"/":
                above = parent_of(above)
                parent = view.get(above)
            if not conn.privileged and (parent is None or not access(parent.perms, conn.domain.domids) & need):
                raise Refused(errno.EACCES)
    elif not conn.privileged and access(node.perms, conn.domain.domids) & need != need:
        raise Refused(errno.EACCES)
    return node


def _one_path(conn: Connection, payload: bytes) -> bytes:
    """The payload's only string, as an absolute path. A NUL inside makes it one that no node has."""
    if payload[-1:] != b"\0":
        raise Refused(errno.EINVAL)
    return payload[:-1] if payload[:1] == b"/" else conn.absolute(payload[:-1])


def _existing(conn: Connection, view: View, path: bytes, need: int) -> Node:
    node = find(conn, view, path, need)
    if node is None:
        raise Refused(errno.ENOENT)
    return node


def changed(conn: Connection, view: View, path: bytes, node: Node, exact: bool, before: Perms | None = None) -> None:
    """Lets watches hear of a change, at once or, in a transaction, at its commit."""
    if isinstance(view, Transaction):
        view.fire_later(path, exact)
    else:
        conn.server.watches.fire(path, node, exact, before, conn.domain if conn.domain.domid else None)


def read(conn: Connection, view: View, payload: bytes) -> bytes:
    path = _one_path(conn, payload)
    node = view.get(path)
    if node is None or not conn.privileged:
        node = _existing(conn, view, path, READ)
    if len(node.value) > PAYLOAD_MAX:
        raise Refused(errno.E2BIG)
    return node.value


def write(conn: Connection, view: View, payload: bytes) -> bytes:
    raw, nul, value = payload.partition(b"\0")
    if not nul:
        raise Refused(errno.EINVAL)
    path = raw if raw[:1] == b"/" else conn.absolute(raw)
    node = find(conn, view, path, WRITE)
    if node is None:
        node = create(conn, view, path, value)
    else:
        if not conn.privileged:
            _check_size(conn, node, len(value) - len(node.value))
        node = view.change(path)
        node.value = value
    changed(conn, view, path, node, False)
    return OK


def mkdir(conn: Connection, view: View, payload: bytes) -> bytes:
    path = _one_path(conn, payload)
    if find(conn, view, path, WRITE) is None:
        changed(conn, view, path, create(conn, view, path, b""), False)
    return OK


def _check_size(conn: Connection, node: Node, more: int) -> None:
    if node.size() + more >= conn.server.quotas.node_size:
        raise Refused(errno.ENOSPC)


def create(conn: Connection, view: View, path: bytes, value: bytes) -> Node:
    """Makes a node that is not there, and the missing ones above it. All or nothing."""
    missing = [path]
    above = parent_of(path)
    while (parent := view.get(above)) is None:
        missing.append(above)
        above = parent_of(above)
    perms = parent.perms
    if not conn.privileged:
        domid, quotas = conn.domain.domid, conn.server.quotas
        if not view.may_add(domid, len(missing), quotas.nodes):
            raise Refused(errno.ENOSPC)
        _check_size(conn, parent, len(name_of(missing[-1])) + _EXTRA_CHILD)
        perms = inherit(perms, domid)
        if Node(value, perms, 0).size() >= quotas.node_size:
            raise Refused(errno.ENOSPC)
    node = view.change(above)
    for new in reversed(missing):
        enter(node, name_of(new))
        node = view.add(new, b"", perms)
    node.value = value
    return node


def rm(conn: Connection, view: View, payload: bytes) -> bytes:
    path = _one_path(conn, payload)
    if find(conn, view, path, WRITE) is None:
        # Not there is fine, if only the parent is.
        if view.get(parent_of(path)) is None:
            raise Refused(errno.ENOENT)
        return OK
    if path == b"/":
        raise Refused(errno.EINVAL)
    remove_subtree(conn, view, path)
    return OK


def remove_subtree(conn: Connection, view: View, path: bytes) -> None:
    """Removes a node and all below it, whatever their permissions; watches hear of every one."""
    paths = below(view, path)
    for gone in paths:
        node = view.get(gone)
        assert node is not None
        changed(conn, view, gone, node, gone is not path)
    for gone in paths:
        view.remove(gone)
    strike(view.change(parent_of(path)), name_of(path))


def directory(conn: Connection, view: View, payload: bytes) -> bytes:
    reply = _existing(conn, view, _one_path(conn, payload), READ).serialize_children()
    if len(reply) > PAYLOAD_MAX:
        raise Refused(errno.E2BIG)
    return reply


def directory_part(conn: Connection, view: View, payload: bytes) -> bytes:
    words = payload.split(b"\0")
    if len(words) != 3:
        raise Refused(errno.EINVAL)
    node = _existing(conn, view, conn.absolute(words[0]), READ)
    offset = number(words[1])
    children = node.serialize_children()
    reply = b"%d\0" % node.generation
    if offset >= len(children):
        return reply + b"\0"
    room = PAYLOAD_MAX - len(reply) - 1  # the byte that is left is the empty string at the end
    end = offset + room
    if end >= len(children):
        return reply + children[offset:] + b"\0"
    # Whole names only. One name is at most 2,048 bytes, so there is always one that fits.
    return reply + children[offset : children.rindex(b"\0", offset, end) + 1]


def get_perms(conn: Connection, view: View, payload: bytes) -> bytes:
    return serialize(_existing(conn, view, _one_path(conn, payload), READ).perms)


def set_perms(conn: Connection, view: View, payload: bytes) -> bytes:
    raw, *words = payload.split(b"\0")[:-1] or [b""]
    if not words:
        raise Refused(errno.EINVAL)
    quotas = conn.server.quotas
    if not conn.privileged and len(words) > quotas.permissions:
        raise Refused(errno.ENOSPC)
    perms = conn.server.existing_only(parse(words))
    if raw[:1] == b"@":
        special = conn.server.watches.special
        if raw not in special:
            raise Refused(errno.EINVAL)
        if not conn.privileged and not access(special[raw], conn.domain.domids) & OWNER:
            raise Refused(errno.EACCES)
        special[raw] = perms
        return OK
    path = conn.absolute(raw)
    node = _existing(conn, view, path, WRITE | OWNER)
    before = node.perms
    if not conn.privileged:
        if perms[0][0] != before[0][0]:
            raise Refused(errno.EPERM)
        _check_size(conn, node, 8 * (len(perms) - len(before)))
    view.set_perms(path, perms)
    now = view.get(path)
    assert now is not None
    changed(conn, view, path, now, False, before)
    return OK


def watch(conn: Connection, view: View, payload: bytes) -> bytes:
    words = payload.split(b"\0")[:-1]
    if not 2 <= len(words) <= 3:
        raise Refused(errno.EINVAL)
    depth = -1
    if len(words) == 3:
        if not words[2].isdigit() or len(words[2]) > 4:
            raise Refused(errno.EINVAL)
        depth = int(words[2])
    conn.server.watches.add(conn, words[0], words[1], depth)
    conn.first_event = (words[0], words[1])
    return OK


def unwatch(conn: Connection, view: View, payload: bytes) -> bytes:
    words = payload.split(b"\0")[:-1]
    if len(words) != 2:
        raise Refused(errno.EINVAL)
    conn.server.watches.remove(conn, words[0], words[1])
    return OK


def reset_watches(conn: Connection, view: View, payload: bytes) -> bytes:
    conn.server.watches.remove_all(conn)
    conn.drop_transactions()
    return OK


def transaction_start(conn: Connection, view: View, payload: bytes) -> bytes:
    if isinstance(view, Transaction):
        raise Refused(errno.EBUSY)
    return b"%d\0" % conn.start_transaction()


def transaction_end(conn: Connection, view: View, payload: bytes) -> bytes:
    if payload not in (b"T\0", b"F\0"):
        raise Refused(errno.EINVAL)
    if not isinstance(view, Transaction):
        raise Refused(errno.ENOENT)
    conn.end_transaction(view)
    if payload == b"T\0":
        view.commit()
        fire, get = conn.server.watches.fire, conn.server.nodes.get
        cause = conn.domain if conn.domain.domid else None
        for path, exact in view.fires.items():
            old = view.seen.get(path)
            fire(path, get(path), exact, old.perms if old is not None else None, cause)
    return OK


def number(word: bytes) -> int:
    """A decimal number, not negative. Raises Refused(EINVAL)."""
    if not word.isdigit() or len(word) > 10:
        raise Refused(errno.EINVAL)
    return int(word)
