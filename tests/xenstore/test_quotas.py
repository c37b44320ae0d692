"""What a guest may use, and the errno it meets; dom0 meets none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from pvdrivers.xs_wire import XS_MKDIR, XS_RM, XS_SET_PERMS, XS_UNWATCH, XS_WATCH

OK = b"OK\0"


def test_nodes(new_store: Callable[..., Any]) -> None:
    store = new_store(nodes=5)
    dom0, guest, other = store.connect(), store.guest(1), store.guest(2)
    assert guest.write(b"a/b", b"") == OK
    assert guest.write(b"c/d/e", b"") == errno.ENOSPC, "three more would be six"
    assert guest.read(b"c") == errno.ENOENT, "all or nothing"
    assert guest.write(b"c/d", b"") == OK
    assert guest.ask(XS_MKDIR, b"f") == errno.ENOSPC
    assert guest.write(b"a", b"still works") == OK
    assert other.write(b"x", b"") == OK, "each has its own"
    guest.ask(XS_RM, b"c/d")
    assert guest.write(b"f", b"") == OK
    for i in range(20):
        assert dom0.write(b"/many/%d" % i, b"") == OK
    dom0.ask(XS_SET_PERMS, b"/local/domain/1/a", b"n2")
    assert store.server.nodes.owned(1) == 4
    assert store.server.nodes.check() == []


def test_nodes_in_a_transaction(new_store: Callable[..., Any]) -> None:
    store = new_store(nodes=4)
    guest = store.guest(1)
    tx = guest.begin()
    assert guest.write(b"a/b/c/d/e", b"", tx) == OK, "looked at when it ends, as in C xenstored"
    assert guest.end(tx) == errno.ENOSPC
    tx = guest.begin()
    guest.write(b"a/b", b"", tx)
    assert guest.end(tx) == OK
    tx = guest.begin()
    guest.write(b"c", b"", tx)
    assert guest.end(tx) == errno.ENOSPC, "a transaction may not even reach the limit"
    assert guest.write(b"c", b"") == OK
    tx = guest.begin()
    assert guest.write(b"d", b"", tx) == errno.ENOSPC
    guest.ask(XS_RM, b"a", tx=tx)
    assert guest.end(tx) == OK
    assert store.server.nodes.owned(1) == 2
    assert store.server.nodes.check() == []


def test_a_commit_counts_what_others_made_meanwhile(new_store: Callable[..., Any]) -> None:
    store = new_store(nodes=4)
    guest = store.guest(1)
    for path in (b"p", b"q"):
        guest.write(path, b"")
    tx = guest.begin()
    assert guest.write(b"p/in", b"", tx) == OK
    assert guest.write(b"q/out", b"") == OK
    assert guest.end(tx) == errno.ENOSPC
    assert store.server.nodes.owned(1) == 4


def test_size(new_store: Callable[..., Any]) -> None:
    store = new_store(node_size=100, permissions=3)
    dom0, guest = store.connect(), store.guest(1)
    assert guest.write(b"v", b"x" * 67) == OK  # 24 for the header, 8 for a permission
    assert guest.write(b"v", b"x" * 68) == errno.ENOSPC
    assert guest.write(b"w", b"x" * 68) == errno.ENOSPC
    assert guest.read(b"w") == errno.ENOENT
    assert guest.write(b"n" * 70, b"") == errno.ENOSPC, "the name is part of its parent"
    assert guest.ask(XS_SET_PERMS, b"v", b"n1", b"r2") == errno.ENOSPC
    assert guest.ask(XS_SET_PERMS, b"v", b"n1", b"r2", b"r3", b"r4") == errno.ENOSPC
    assert dom0.write(b"/local/domain/1/v", b"x" * 3000) == OK
    assert dom0.ask(XS_SET_PERMS, b"/local/domain/1/v", b"n1", b"r2", b"r3", b"r4") == OK
    assert guest.write(b"v", b"") == OK, "smaller is always possible"


def test_watches(new_store: Callable[..., Any]) -> None:
    store = new_store(watches=3)
    guest, second = store.guest(1), store.connect(1)
    for i in range(3):
        assert guest.ask(XS_WATCH, b"w%d" % i, b"t") == OK
    assert second.ask(XS_WATCH, b"w", b"t") == OK, "one more fits, as in C xenstored"
    assert second.ask(XS_WATCH, b"x", b"t") == errno.E2BIG, "all connections of a domain count"
    guest.ask(XS_UNWATCH, b"w0", b"t")
    assert second.ask(XS_WATCH, b"x", b"t") == OK
    second.sock.close()
    store.step()
    assert store.server.domains[1].watches == 2


def test_transactions(new_store: Callable[..., Any]) -> None:
    store = new_store(transactions=2)
    guest, dom0 = store.guest(1), store.connect()
    open_ = [guest.begin() for _ in range(3)]
    assert guest.ask(6, b"") == errno.ENOSPC
    guest.end(open_[0])
    guest.begin()
    for _ in range(20):
        dom0.begin()


def test_nodes_used_in_a_transaction(new_store: Callable[..., Any]) -> None:
    store = new_store(transaction_nodes=3)
    guest, dom0 = store.guest(1), store.connect()
    for name in (b"a", b"b", b"c", b"d"):
        guest.write(name, b"")
    tx = guest.begin()
    for name in (b"a", b"b", b"c", b"a"):
        assert guest.read(name, tx) == b""
    assert guest.read(b"d", tx) == errno.ENOSPC
    assert guest.write(b"a", b"lost", tx) == OK
    assert guest.end(tx) == errno.ENOMEM
    assert guest.read(b"a") == b""
    tx = dom0.begin()
    for i in range(10):
        assert dom0.read(b"/%d" % i, tx) == errno.ENOENT
    assert dom0.end(tx) == OK


def test_memory_of_transactions_is_given_back(new_store: Callable[..., Any]) -> None:
    store = new_store(memory=20_000)
    guest = store.guest(1)
    tx = guest.begin()
    answers = [guest.write(b"n%d" % i, b"", tx) for i in range(20)]
    assert errno.ENOMEM in answers
    assert guest.end(tx) == errno.ENOMEM
    assert store.server.domains[1].memory == 0
    assert guest.write(b"n", b"") == OK
