"""The nodes, by path.

A node is changed in place, unless a transaction has seen it: then a copy replaces it, so that the transaction
goes on seeing what it saw, and knows at its end, by identity, whether anybody changed it. Nothing is copied
otherwise.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Protocol

from .permissions import DOM0_ONLY, Perms, Refused, forget

_VALID = re.compile(rb"/|(?:/[A-Za-z0-9_@-]+)+")
_DOMAIN_PREFIX = re.compile(rb"/local/domain/[0-9]{1,5}/")
_HEADER_BYTES = 24  # struct xs_tdb_record_hdr without permissions
_PERMISSION_BYTES = 8  # struct xs_permissions


class Node:
    """A value, its permissions and the names of its children (in order of creation)."""

    __slots__ = ("childlen", "children", "generation", "perms", "shared", "value")

    def __init__(self, value: bytes, perms: Perms, generation: int) -> None:
        self.value = value
        self.perms = perms
        self.children: dict[bytes, None] = {}
        self.childlen = 0  # bytes of the children's names, a NUL each
        self.generation = generation  # another one after each change; DIRECTORY_PART shows it
        self.shared = False  # a transaction holds it: replace, do not change

    def copy(self) -> Node:
        node = Node(self.value, self.perms, self.generation)
        node.children = self.children.copy()
        node.childlen = self.childlen
        return node

    def size(self) -> int:
        """Bytes as C xenstored counts them for its quota."""
        return _HEADER_BYTES + _PERMISSION_BYTES * len(self.perms) + len(self.value) + self.childlen

    def serialize_children(self) -> bytes:
        """Payload of a DIRECTORY reply, of any length."""
        return b"\0".join(self.children) + b"\0" if self.children else b""


class View(Protocol):
    """What an operation works on: the tree itself, or a transaction's view of it."""

    def get(self, path: bytes, /) -> Node | None: ...

    def change(self, path: bytes) -> Node:
        """A node that is there, to be changed in place."""

    def add(self, path: bytes, value: bytes, perms: Perms) -> Node:
        """A new node; the caller enters it in its parent."""

    def remove(self, path: bytes) -> None:
        """Takes out a node without children; the caller strikes it from its parent."""

    def set_perms(self, path: bytes, perms: Perms) -> None: ...

    def may_add(self, domid: int, count: int, limit: int) -> bool:
        """Whether a guest that may own `limit` nodes may make `count` more."""


class Tree:
    """The store that everybody sees."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        # Bound once: every request begins with it.
        self.get: Callable[[bytes], Node | None] = self.nodes.get
        self.generation = 0
        self._owned: dict[int, int] = {}
        self.add(b"/", b"", DOM0_ONLY)
        for path in (b"/tool", b"/tool/xenstored"):
            self.add(path, b"", DOM0_ONLY)
            enter(self.change(parent_of(path)), name_of(path))

    def change(self, path: bytes) -> Node:
        node = self.nodes[path]
        if node.shared:
            self.nodes[path] = node = node.copy()
        self.generation = node.generation = self.generation + 1
        return node

    def add(self, path: bytes, value: bytes, perms: Perms) -> Node:
        self.generation += 1
        self.nodes[path] = node = Node(value, perms, self.generation)
        self.count(perms[0][0], 1)
        return node

    def remove(self, path: bytes) -> None:
        self.count(self.nodes.pop(path).perms[0][0], -1)

    def set_perms(self, path: bytes, perms: Perms) -> None:
        node = self.change(path)
        self.count(node.perms[0][0], -1)
        self.count(perms[0][0], 1)
        node.perms = perms

    def may_add(self, domid: int, count: int, limit: int) -> bool:
        return self.owned(domid) + count <= limit

    def owned(self, domid: int) -> int:
        """Nodes that belong to a domain."""
        return self._owned.get(domid, 0)

    def count(self, domid: int, change: int) -> None:
        """Notes that a domain owns more or fewer nodes."""
        self._owned[domid] = self._owned.get(domid, 0) + change

    def forget_domain(self, domid: int) -> list[bytes]:
        """Strikes a domain from all permissions; the topmost nodes that it owns, for the caller to remove."""
        owned: list[bytes] = []
        pending = [b"/"]
        while pending:
            path = pending.pop()
            node = self.nodes[path]
            if node.perms[0][0] == domid and path != b"/":
                owned.append(path)
                continue
            # In place, and no change of the node: transactions that use it do not fail for this.
            node.perms = forget(node.perms, domid)
            pending.extend(child_of(path, name) for name in node.children)
        if self.nodes[b"/"].perms[0][0] == domid:
            self.set_perms(b"/", DOM0_ONLY)  # the root cannot go
        return owned

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty for a sound tree."""
        faults = []
        owned: dict[int, int] = {}
        for path, node in self.nodes.items():
            owned[node.perms[0][0]] = owned.get(node.perms[0][0], 0) + 1
            if node.childlen != sum(len(name) + 1 for name in node.children):
                faults.append(f"{path.decode()}: the children's length is wrong")
            for name in node.children:
                if child_of(path, name) not in self.nodes:
                    faults.append(f"{path.decode()}: child {name.decode()} is missing")
            if path != b"/":
                parent = self.nodes.get(parent_of(path))
                if parent is None or name_of(path) not in parent.children:
                    faults.append(f"{path.decode()}: not in its parent")
        if owned != {domid: n for domid, n in self._owned.items() if n}:
            faults.append("nodes per owner are miscounted")
        return faults


def check_path(path: bytes, path_max: int) -> None:
    """Raises Refused(EINVAL) for what cannot be the absolute path of a node (is_valid_nodename())."""
    limit = path_max
    if len(path) > limit:
        prefix = _DOMAIN_PREFIX.match(path)
        limit += prefix.end() if prefix else 0
    if len(path) > limit or _VALID.fullmatch(path) is None:
        raise Refused(errno.EINVAL)


def parent_of(path: bytes) -> bytes:
    return path[: path.rindex(b"/")] or b"/"


def name_of(path: bytes) -> bytes:
    return path[path.rindex(b"/") + 1 :]


def child_of(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path != b"/" else b"/" + name


# A transaction sees each node as of another moment, so that a parent may not have a child that is there, or have
# one that is not. It cannot be committed then, but its requests must not fail for it.


def enter(parent: Node, name: bytes) -> None:
    """Adds a name to the children of a node got by View.change()."""
    if name not in parent.children:
        parent.children[name] = None
        parent.childlen += len(name) + 1


def strike(parent: Node, name: bytes) -> None:
    """Takes a name from the children of a node got by View.change()."""
    if name in parent.children:
        del parent.children[name]
        parent.childlen -= len(name) + 1


def below(view: View, path: bytes) -> list[bytes]:
    """The paths of a subtree, children before their parents, `path` itself last."""
    pending, found = [path], []
    while pending:
        at = pending.pop()
        node = view.get(at)
        if node is not None:
            found.append(at)
            pending.extend(child_of(at, name) for name in node.children)
    found.reverse()
    return found
