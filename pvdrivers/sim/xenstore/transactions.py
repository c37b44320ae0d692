"""A transaction: a private view of the tree, and at its end the question whether anybody changed what it
used.

As in C xenstored (xenstored_transaction.c): each node is seen as it was when the transaction first used it;
writes stay private until the commit; the commit fails with EAGAIN only if a node that was used has been
changed, created or removed meanwhile. Creating or removing a node uses its parent.
"""

from __future__ import annotations

import errno

from .permissions import Perms, Refused, forget
from .quota import Domain, Quotas
from .tree import Node, Tree


class Transaction:
    """One open transaction of one connection. Implements tree.View."""

    __slots__ = (
        "_delta", "_domain", "_memory", "_quotas", "_tree",
        "changed", "created", "failed", "fires", "nodes", "seen",
    )  # fmt: skip

    def __init__(self, tree: Tree, domain: Domain, quotas: Quotas) -> None:
        self._tree = tree
        self._quotas = quotas
        self._domain = domain
        self._memory = 0
        self._delta: dict[int, int] = {}  # nodes by owner, more or fewer than in the tree
        self.seen: dict[bytes, Node | None] = {}  # as first used; what the tree must still hold at the end
        self.nodes: dict[bytes, Node | None] = {}  # as it is now, for this transaction
        self.changed: dict[bytes, None] = {}  # where nodes[] is our own, in order of the first change
        self.fires: dict[bytes, bool] = {}  # watches to fire at the commit: path -> only for that very path
        self.created = False
        self.failed = 0  # errno that a commit gets, whatever happens

    def get(self, path: bytes, /) -> Node | None:
        try:
            return self.nodes[path]
        except KeyError:
            pass
        node = self._tree.get(path)
        if self._domain.domid:
            if len(self.seen) >= self._quotas.transaction_nodes:
                self.failed = self.failed or errno.ENOMEM
                raise Refused(errno.ENOSPC)
            self._charge(node.size() if node is not None else 0)
        if node is not None:
            node.shared = True
        self.seen[path] = self.nodes[path] = node
        return node

    def _charge(self, size: int) -> None:
        if self._domain.memory + size > self._quotas.memory:
            self.failed = self.failed or errno.ENOMEM
            raise Refused(errno.ENOMEM)
        self._memory += size
        self._domain.memory += size

    def change(self, path: bytes) -> Node:
        node = self.get(path)
        assert node is not None
        if path not in self.changed:
            if self._domain.domid:
                self._charge(self._quotas.node_size)
            self.changed[path] = None
            self.nodes[path] = node = node.copy()
        self._tree.generation = node.generation = self._tree.generation + 1
        return node

    def add(self, path: bytes, value: bytes, perms: Perms) -> Node:
        self.get(path)
        if self._domain.domid:
            self._charge(self._quotas.node_size)
        self.created = True
        self.changed[path] = None
        self._tree.generation += 1
        self.nodes[path] = node = Node(value, perms, self._tree.generation)
        self._count(perms[0][0], 1)
        return node

    def remove(self, path: bytes) -> None:
        node = self.get(path)
        assert node is not None
        self._count(node.perms[0][0], -1)
        self.changed[path] = None
        self.nodes[path] = None

    def set_perms(self, path: bytes, perms: Perms) -> None:
        node = self.change(path)
        self._count(node.perms[0][0], -1)
        self._count(perms[0][0], 1)
        node.perms = perms

    def may_add(self, domid: int, count: int, limit: int) -> bool:
        # What the transaction itself adds is looked at when it ends.
        return self._tree.owned(domid) < limit

    def _count(self, domid: int, change: int) -> None:
        self._delta[domid] = self._delta.get(domid, 0) + change

    def fire_later(self, path: bytes, exact: bool) -> None:
        """Notes a change that watches hear of when it is committed; "and all below" outdoes "only this"."""
        self.fires[path] = exact and self.fires.get(path, True)

    def domain_gone(self, domid: int) -> None:
        """A released domain has no rights here either, and gets no node from a transaction that began before."""
        for node in (*self.seen.values(), *self.nodes.values()):
            if node is not None:
                node.perms = forget(node.perms, domid)
        changed = (self.nodes[path] for path in self.changed)
        if any(node is not None and node.perms[0][0] == domid for node in changed):
            self.failed = self.failed or errno.EAGAIN

    def commit(self) -> None:
        """Makes the changes everybody's, or raises Refused (EAGAIN, ENOSPC, ENOMEM) and does nothing."""
        if self.failed:
            raise Refused(self.failed)
        tree = self._tree
        if self.created and self._domain.domid:
            for domid, delta in self._delta.items():
                # One less than fits without a transaction, and whoever owns them: as C xenstored has it.
                if domid and tree.owned(domid) + delta >= self._quotas.nodes:
                    raise Refused(errno.ENOSPC)
        get = tree.get
        for path, node in self.seen.items():
            if get(path) is not node:
                raise Refused(errno.EAGAIN)
        for path in self.changed:
            changed = self.nodes[path]
            if changed is None:
                tree.nodes.pop(path, None)
            else:
                tree.generation = changed.generation = tree.generation + 1
                tree.nodes[path] = changed
        for domid, delta in self._delta.items():
            tree.count(domid, delta)

    def close(self) -> None:
        """Gives back what was charged to the domain; after the end, committed or not."""
        self._domain.memory -= self._memory
        self._memory = 0
