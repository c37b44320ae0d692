"""What docs/misc/xenstore.txt and C xenstored promise, rule by rule."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pvdrivers import xs_wire as wire
from pvdrivers.xs_wire import (
    XS_CONTROL,
    XS_DIRECTORY,
    XS_DIRECTORY_PART,
    XS_GET_DOMAIN_PATH,
    XS_GET_PERMS,
    XS_INTRODUCE,
    XS_IS_DOMAIN_INTRODUCED,
    XS_MKDIR,
    XS_RELEASE,
    XS_RESET_WATCHES,
    XS_RESUME,
    XS_RM,
    XS_SET_PERMS,
    XS_SET_TARGET,
    XS_UNWATCH,
    XS_WATCH,
)

OK = b"OK\0"


def test_nodes(stepped: Any) -> None:
    dom0 = stepped.connect()
    assert dom0.read(b"/a/b") == errno.ENOENT
    assert dom0.write(b"/a/b", b"v\0w") == OK
    assert dom0.read(b"/a/b") == b"v\0w"
    assert dom0.read(b"/a") == b""
    assert dom0.ask(XS_MKDIR, b"/a/b") == OK
    assert dom0.read(b"/a/b") == b"v\0w", "MKDIR leaves a value alone"
    dom0.write(b"/a/c", b"")
    assert dom0.ask(XS_DIRECTORY, b"/a") == b"b\0c\0"
    assert dom0.ask(XS_DIRECTORY, b"/a/b") == b""
    assert dom0.ask(XS_RM, b"/a") == OK
    assert dom0.read(b"/a/b") == errno.ENOENT
    assert dom0.ask(XS_RM, b"/a") == OK, "not there is fine, as its parent is"
    assert dom0.ask(XS_RM, b"/a/b/c") == errno.ENOENT
    assert dom0.ask(XS_RM, b"/") == errno.EINVAL
    assert stepped.server.nodes.check() == []


@pytest.mark.parametrize("path", [b"", b"//", b"/a/", b"/a//b", b"/a b", b"/a.b", b"@x", b"/\xff", b"/" + b"x" * 2048])
def test_bad_paths(stepped: Any, path: bytes) -> None:
    dom0 = stepped.connect()
    assert dom0.read(path) == errno.EINVAL
    assert dom0.write(path, b"v") == errno.EINVAL


def test_longest_path(stepped: Any) -> None:
    dom0 = stepped.connect()
    assert dom0.write(b"/" + b"x" * 2047, b"") == OK
    inside = b"/local/domain/5/"
    assert dom0.write(inside + b"x" * 2048, b"") == OK
    assert dom0.write(inside + b"x" * 2049, b"") == errno.EINVAL


def test_relative_paths(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(7)
    assert guest.write(b"data/x", b"1") == OK
    assert dom0.read(b"/local/domain/7/data/x") == b"1"
    dom0.write(b"y", b"2")
    assert dom0.read(b"/local/domain/0/y") == b"2"
    assert guest.ask(XS_WATCH, b"data", b"t") == OK
    guest.write(b"/local/domain/7/data/x", b"3")
    assert guest.heard() == [(b"data", b"t"), (b"data/x", b"t")]


def test_lists_longer_than_a_message(stepped: Any) -> None:
    dom0 = stepped.connect()
    names = [b"%0100d" % i for i in range(60)]
    for name in names:
        dom0.write(b"/long/" + name, b"")
    assert dom0.ask(XS_DIRECTORY, b"/long") == errno.E2BIG
    collected, generations = b"", set()
    while not collected.endswith(b"\0\0"):
        reply = dom0.ask(XS_DIRECTORY_PART, b"/long", b"%d" % len(collected))
        generation, _, part = reply.partition(b"\0")
        generations.add(generation)
        collected += part
    assert collected[:-1].split(b"\0")[:-1] == names
    assert len(generations) == 1
    dom0.write(b"/long/more", b"")
    assert not dom0.ask(XS_DIRECTORY_PART, b"/long", b"0").startswith(generations.pop() + b"\0")
    assert dom0.ask(XS_DIRECTORY_PART, b"/long", b"99999999").endswith(b"\0\0")


def test_permissions(stepped: Any) -> None:
    dom0, guest, other = stepped.connect(), stepped.guest(1), stepped.guest(2)
    dom0.write(b"/shared/secret", b"s")
    assert guest.read(b"/shared/secret") == errno.EACCES
    assert guest.read(b"/shared/missing") == errno.EACCES, "and does not learn what is there"
    dom0.ask(XS_SET_PERMS, b"/shared", b"n0", b"r1")
    assert guest.read(b"/shared/missing") == errno.ENOENT
    assert guest.read(b"/shared") == b""
    assert guest.write(b"/shared", b"x") == errno.EACCES
    assert guest.write(b"/shared/new", b"x") == errno.EACCES
    dom0.ask(XS_SET_PERMS, b"/shared", b"n0", b"b1")
    assert guest.write(b"/shared/new", b"x") == OK
    assert dom0.ask(XS_GET_PERMS, b"/shared/new") == b"n1\0b1\0", "inherited, and owned by who made it"
    assert other.read(b"/shared/new") == errno.EACCES
    assert guest.ask(XS_SET_PERMS, b"/shared/new", b"r1") == OK
    assert other.read(b"/shared/new") == b"x"
    assert guest.ask(XS_SET_PERMS, b"/shared/new", b"r2") == errno.EPERM
    assert other.ask(XS_SET_PERMS, b"/shared/new", b"r2") == errno.EACCES
    assert dom0.ask(XS_SET_PERMS, b"/shared/new", b"w2", b"n1") == OK
    assert guest.read(b"/shared/new") == errno.EACCES
    for words in ([], [b"x0"], [b"r"], [b"r-1"], [b"r65536"], [b"r1 "]):
        assert dom0.ask(XS_SET_PERMS, b"/shared", *words) == errno.EINVAL
    assert dom0.ask(XS_SET_PERMS, b"/nope", b"r0") == errno.ENOENT


def test_guests_may_not(stepped: Any) -> None:
    guest = stepped.guest(3)
    for operation in (
        XS_INTRODUCE,
        XS_RELEASE,
        XS_IS_DOMAIN_INTRODUCED,
        XS_RESUME,
        XS_SET_TARGET,
        XS_CONTROL,
    ):
        assert guest.ask(operation, b"3", b"1", b"1") == errno.EACCES
    assert guest.ask(wire.XS_WATCH_EVENT, b"") == errno.ENOSYS
    assert guest.ask(20, b"") == errno.ENOSYS
    assert guest.ask(4_000_000_000, b"") == errno.ENOSYS
    assert guest.ask(XS_GET_DOMAIN_PATH, b"12") == b"/local/domain/12\0"


def test_watches(stepped: Any) -> None:
    dom0 = stepped.connect()
    assert dom0.ask(XS_WATCH, b"/w", b"t") == OK
    assert dom0.heard() == [(b"/w", b"t")], "once at once"
    assert dom0.ask(XS_WATCH, b"/w", b"t") == errno.EEXIST
    assert dom0.ask(XS_WATCH, b"/w", b"u") == OK
    assert dom0.ask(XS_UNWATCH, b"/w", b"u") == OK
    assert dom0.ask(XS_UNWATCH, b"/w", b"u") == errno.ENOENT
    dom0.heard()
    dom0.write(b"/w/a/b", b"")
    assert dom0.heard() == [(b"/w/a/b", b"t")]
    dom0.ask(XS_SET_PERMS, b"/w/a", b"r0")
    dom0.ask(XS_MKDIR, b"/w/m")
    dom0.ask(XS_MKDIR, b"/w/m")
    dom0.write(b"/wider", b"")
    assert dom0.heard() == [(b"/w/a", b"t"), (b"/w/m", b"t")]
    dom0.ask(XS_WATCH, b"/w/a/b", b"deep")
    dom0.heard()
    dom0.ask(XS_RM, b"/w/a")
    assert sorted(dom0.heard()) == [(b"/w/a", b"t"), (b"/w/a/b", b"deep")]
    dom0.ask(XS_RM, b"/w")
    assert (b"/w", b"t") in dom0.heard()


def test_depth_of_watches(stepped: Any) -> None:
    dom0 = stepped.connect()
    for depth in (b"0", b"1", b"2"):
        assert dom0.ask(XS_WATCH, b"/d", depth, depth) == OK
    dom0.heard()
    for path, tokens in (
        (b"/d", [b"0", b"1", b"2"]),
        (b"/d/x", [b"1", b"2"]),
        (b"/d/x/y", [b"2"]),
        (b"/d/x/y/z", []),
    ):
        dom0.write(path, b"")
        assert [token for _, token in dom0.heard()] == tokens
    assert dom0.ask(XS_WATCH, b"/d", b"t", b"-1") == errno.EINVAL
    assert dom0.ask(XS_WATCH, b"/d") == errno.EINVAL


def test_guests_hear_only_of_what_they_may_read(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(4)
    guest.ask(XS_WATCH, b"/x", b"t")
    guest.heard()
    dom0.write(b"/x/y", b"1")
    assert guest.heard() == []
    dom0.ask(XS_SET_PERMS, b"/x/y", b"n0", b"r4")
    dom0.write(b"/x/y", b"2")
    dom0.ask(XS_SET_PERMS, b"/x/y", b"n0")
    dom0.write(b"/x/y", b"3")
    assert guest.heard() == [(b"/x/y", b"t")] * 3, "granting, a change while granted, and losing it again"


def test_event_for_losing_the_right_to_read(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(4)
    dom0.write(b"/x", b"1")
    dom0.ask(XS_SET_PERMS, b"/x", b"n0", b"r4")
    guest.ask(XS_WATCH, b"/x", b"t")
    guest.heard()
    dom0.ask(XS_SET_PERMS, b"/x", b"n0")
    assert guest.heard() == [(b"/x", b"t")]


def test_domains_come_and_go(stepped: Any) -> None:
    dom0 = stepped.connect()
    for words in ((b"@introduceDomain", b"i"), (b"@releaseDomain", b"r"), (b"@releaseDomain", b"d", b"1"),
                  (b"@releaseDomain/9", b"nine")):  # fmt: skip
        assert dom0.ask(XS_WATCH, *words) == OK
    dom0.heard()
    assert dom0.ask(XS_INTRODUCE, b"9", b"1", b"2") == OK
    assert dom0.ask(XS_INTRODUCE, b"0", b"1", b"2") == errno.EINVAL
    assert dom0.ask(XS_INTRODUCE, b"8", b"1", b"0") == errno.EINVAL
    assert dom0.heard() == [(b"@introduceDomain", b"i")]
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"9") == b"T\0"
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"8") == b"F\0"
    assert dom0.ask(XS_RESUME, b"9") == OK
    assert dom0.ask(XS_RELEASE, b"9") == OK
    assert dom0.heard() == [
        (b"@releaseDomain", b"r"),
        (b"@releaseDomain/9", b"d"),
        (b"@releaseDomain/9", b"nine"),
    ]
    assert dom0.ask(XS_RELEASE, b"9") == errno.ENOENT
    assert dom0.ask(XS_RELEASE, b"0") == errno.EINVAL


def test_special_watches_need_permission(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(2)
    guest.ask(XS_WATCH, b"@introduceDomain", b"t")
    assert guest.heard() == [(b"@introduceDomain", b"t")]
    stepped.server.introduce(20)
    assert guest.heard() == []
    assert guest.ask(XS_SET_PERMS, b"@introduceDomain", b"n0", b"r2") == errno.EACCES
    assert dom0.ask(XS_SET_PERMS, b"@introduceDomain", b"n0", b"r2") == OK
    assert dom0.ask(XS_SET_PERMS, b"@other", b"n0", b"r2") == errno.EINVAL
    stepped.server.introduce(21)
    assert guest.heard() == [(b"@introduceDomain", b"t")]


def test_release_cleans_up(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(6)
    guest.write(b"data/mine", b"1")
    dom0.write(b"/local/domain/6/data/theirs", b"2")
    dom0.write(b"/other", b"3")
    dom0.ask(XS_SET_PERMS, b"/other", b"n0", b"b6")
    guest.write(b"/other/mine", b"4")
    guest.ask(XS_WATCH, b"/other", b"t")
    tx = dom0.begin()
    dom0.write(b"/late", b"", tx)
    dom0.ask(XS_SET_PERMS, b"/late", b"n6", tx=tx)
    dom0.ask(XS_WATCH, b"/other", b"t")
    dom0.heard()
    stepped.server.release(6)
    guest.take()
    assert guest.gone
    assert dom0.read(b"/local/domain/6") == errno.ENOENT
    assert dom0.ask(XS_DIRECTORY, b"/other") == b""
    assert (b"/other/mine", b"t") in dom0.heard()
    assert dom0.end(tx) == errno.EAGAIN, "no node for a dead domain from before"
    assert stepped.server.nodes.check() == []
    again = stepped.connect(6)
    assert again.read(b"/other") == errno.EACCES, "a new domain with the old number inherits nothing"


def test_target(stepped: Any) -> None:
    dom0, stub, guest = stepped.connect(), stepped.guest(10), stepped.guest(11)
    guest.write(b"x", b"1")
    assert stub.read(b"/local/domain/11/x") == errno.EACCES
    assert dom0.ask(XS_SET_TARGET, b"10", b"12") == errno.ENOENT
    assert dom0.ask(XS_SET_TARGET, b"10", b"11") == OK
    assert stub.read(b"/local/domain/11/x") == b"1"
    assert stub.write(b"/local/domain/11/x", b"2") == OK
    stepped.server.release(11)
    assert stepped.server.domains[10].domids == {10}


def test_a_transaction_that_sees_different_moments(stepped: Any) -> None:
    dom0, other = stepped.connect(), stepped.connect()
    for late, early in ((b"/p/late", b"/p/early"), (b"/q/a/late", b"/q/a/early")):
        dom0.write(early, b"")
        tx = dom0.begin()
        dom0.read(early.rpartition(b"/")[0], tx)
        other.write(late, b"")
        other.ask(XS_RM, early)
        assert dom0.ask(XS_RM, late, tx=tx) == OK, "its parent as seen does not have it"
        assert dom0.write(early, b"", tx) == OK, "its parent as seen has it already"
        assert dom0.ask(XS_RM, early.rpartition(b"/")[0], tx=tx) == OK
        assert dom0.end(tx) == errno.EAGAIN
        assert stepped.server.nodes.check() == []


def test_reset_watches(stepped: Any) -> None:
    guest = stepped.guest(5)
    guest.ask(XS_WATCH, b"a", b"t")
    tx = guest.begin()
    guest.heard()
    assert guest.ask(XS_RESET_WATCHES, b"") == OK
    guest.write(b"a", b"")
    assert guest.heard() == []
    assert guest.end(tx) == errno.ENOENT
    domain = stepped.server.domains[5]
    assert (domain.watches, domain.transactions, domain.memory) == (0, 0, 0)


def test_permissions_of_domains_that_do_not_exist(new_store: Callable[..., Any]) -> None:
    alive = {0, 1}
    store = new_store(domain_exists=alive.__contains__)
    dom0 = store.connect()
    dom0.write(b"/x", b"")
    assert dom0.ask(XS_SET_PERMS, b"/x", b"n9") == errno.ENOENT
    assert dom0.ask(XS_SET_PERMS, b"/x", b"n0", b"r9") == OK
    assert dom0.ask(XS_INTRODUCE, b"9", b"1", b"1") == errno.EINVAL
    alive.add(9)
    assert store.connect(9).read(b"/x") == errno.EACCES


def test_control(stepped: Any) -> None:
    dom0 = stepped.connect()
    stepped.guest(5)
    assert dom0.ask(XS_CONTROL, b"check") == OK
    assert dom0.ask(XS_CONTROL, b"print", b"hello") == OK
    assert b"quota\t" in dom0.ask(XS_CONTROL, b"help")
    assert b"nodes            :     1000 Nodes per domain\n" in dom0.ask(XS_CONTROL, b"quota")
    assert dom0.ask(XS_CONTROL, b"quota", b"set", b"nodes", b"7") == OK
    assert stepped.server.quotas.nodes == 7
    assert b"nodes           :        1\n" in dom0.ask(XS_CONTROL, b"quota", b"5")
    for words in (
        [b"live-update"],
        [b"quota", b"set", b"nodes"],
        [b"quota", b"set", b"nope", b"1"],
        [b"print"],
        [b""],
    ):
        assert dom0.ask(XS_CONTROL, *words) == errno.EINVAL
