"""The client, against the embedded store and against servers that misbehave."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import xs_wire as wire
from pvdrivers.xenstore import XenStoreClient, XenStoreError
from tests.xenstore.conftest import heard
from tests.xenstore.device import XenbusDevice


def test_nodes(served: Any) -> None:
    with served.client() as store:
        assert store.read("/a/b") is None
        store.write("/a/b", 5)
        store.write("/a/c", "text")
        store.write("/a/d", b"\0\xff")
        assert [store.read(f"/a/{name}") for name in "bcd"] == [b"5", b"text", b"\0\xff"]
        assert store.ls("/a") == ["b", "c", "d"]
        assert store.ls("/a/b") == [] and store.ls("/nope") is None
        store.mkdir("/a/e")
        assert store.read("/a/e") == b""
        store.set_perms("/a", ["r0", "b3"])
        assert store.get_perms("/a") == ["r0", "b3"]
        store.rm("/a")
        store.rm("/a")
        store.rm("/a/b/c")
        assert store.ls("/a") is None


@pytest.mark.parametrize("count", [0, 1, 500, 2000])
def test_lists_of_any_length(served: Any, count: int) -> None:
    names = [f"a-child-of-number-{i}" for i in range(count)]
    served.call(lambda: [served.server.tree.mkdir(f"/many/{name}") for name in ["", *names] if name])
    with served.client() as store:
        store.mkdir("/many")
        assert store.ls("/many") == names
        assert store.transaction(lambda tx: store.ls("/many", tx)) == names


def test_a_list_that_changes_while_it_is_read(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        served.call(lambda i=i: served.server.tree.mkdir(f"/many/a-child-of-number-{i}"))
    with served.client() as store:
        plain, parts = store._talk, []

        def talk(type_: int, *rest: Any) -> bytes:
            if type_ == wire.XS_DIRECTORY_PART:
                parts.append(type_)
                if len(parts) == 2:
                    served.call(lambda: served.server.tree.rm("/many/a-child-of-number-0"))
            return bytes(plain(type_, *rest))

        monkeypatch.setattr(store, "_talk", talk)
        assert store.ls("/many") == [f"a-child-of-number-{i}" for i in range(1, 300)]


def test_watches(served: Any) -> None:
    with served.client() as store, served.client() as other:
        assert store.events() == []
        store.watch("/w", "token")
        assert heard(store, 5) == [("/w", "token")]
        assert heard(store, 0.01) == []
        other.write("/w/x", 1)
        assert heard(store, 5) == [("/w/x", "token")]
        store.write("/w/y", 1)  # its event comes before its reply
        assert select.select([store.fileno()], [], [], 0)[0], "an event that was queued meanwhile"
        assert store.events() == [("/w/y", "token")]
        assert not select.select([store.fileno()], [], [], 0)[0]
        store.unwatch("/w", "token")
        with pytest.raises(XenStoreError) as caught:
            store.unwatch("/w", "token")
        assert caught.value.errno == errno.ENOENT
        assert heard(store, 0.01) == []


def test_waiting_in_one_thread_while_another_works(served: Any) -> None:
    with served.client() as store:
        store.watch("/w", "t")
        store.events()
        came: list[tuple[str, str]] = []
        waiter = threading.Thread(target=lambda: came.extend(heard(store, 10)))
        waiter.start()
        begun = time.monotonic()
        for i in range(50):
            store.write("/elsewhere", i)
        store.write("/w/x", 1)
        waiter.join(10)
        assert came == [("/w/x", "t")]
        assert time.monotonic() - begun < 5


def test_many_threads(served: Any) -> None:
    with served.client() as store:

        def work(number: int) -> None:
            for i in range(100):
                store.write(f"/t/{number}", i)
                assert store.read(f"/t/{number}") == str(i).encode()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [store.read(f"/t/{number}") for number in range(4)] == [b"99"] * 4


def test_transactions(served: Any) -> None:
    with served.client() as store, served.client() as other:
        store.write("/n", 0)
        tries: list[int] = []

        def increment(tx: int) -> int:
            tries.append(tx)
            value = int(store.read("/n", tx) or b"0")
            if len(tries) < 3:
                other.write("/n", value + 10)
            store.write("/n", value + 1, tx)
            return value + 1

        assert store.transaction(increment) == 21
        assert store.read("/n") == b"21" and len(tries) == 3

        def always_late(tx: int) -> None:
            store.write("/n", 1, tx)
            other.write("/n", 2)

        with pytest.raises(XenStoreError, match="3 tries") as caught:
            store.transaction(always_late, tries=3)
        assert caught.value.errno == errno.EAGAIN

        def fails(tx: int) -> None:
            store.write("/n", 99, tx)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            store.transaction(fails)
        assert store.read("/n") == b"2"
        assert served.call(lambda: served.server.domains[0].transactions) == 0


def test_counting_by_several_clients(served: Any) -> None:
    def count() -> None:
        with served.client() as store:
            for _ in range(20):
                store.transaction(lambda tx: store.write("/n", int(store.read("/n", tx) or b"0") + 1, tx))

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert served.call(lambda: served.server.tree.read("/n")) == b"60"


def test_domains(served: Any) -> None:
    with served.client() as store:
        store.introduce(5, 1, 2)
        assert store.is_introduced(5) and not store.is_introduced(6)
        assert store.get_domain_path(5) == "/local/domain/5"
        store.introduce(6, 1, 2)
        store.set_target(5, 6)
        store.resume(5)
        store.release(5)
        assert not store.is_introduced(5)
        assert store.control("check") == "OK"
        assert "nodes" in store.control("quota")


def test_errors_say_what_and_why(served: Any) -> None:
    with served.client() as store, served.guest(3) as guest:
        store.write("/private", 1)
        with pytest.raises(XenStoreError, match="xenstore READ /private: EACCES: .*permissions") as caught:
            guest.read("/private")
        error = caught.value
        assert (error.errno, error.operation, error.path) == (errno.EACCES, "READ", "/private")
        assert isinstance(error, OSError)
        with pytest.raises(XenStoreError, match="E2BIG: 5.* bytes"):
            store.write("/x", bytes(5000))
        for path in ("", "/a\0b"):
            with pytest.raises(XenStoreError, match="EINVAL"):
                store.read(path)
        with pytest.raises(XenStoreError, match="EINVAL"):
            store.read("/a//b")
        assert store.read("/private") == b"1", "and it goes on"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(XenStoreError, match="CONNECT .*/none: ENOENT: .*running") as caught:
        XenStoreClient.connect(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    with pytest.raises(XenStoreError, match="ECONNREFUSED"):
        XenStoreClient.connect(stale)


def test_server_goes_away(served: Any) -> None:
    store = served.client()
    store.watch("/w", "t")
    served.close()
    with pytest.raises(XenStoreError, match="closed the connection|is lost") as caught:
        store.read("/x")
    assert caught.value.errno == errno.ECONNRESET
    assert store.events() == [("/w", "t")], "what was heard before"
    with pytest.raises(XenStoreError, match="ECONNRESET"):
        store.events()
    with pytest.raises(XenStoreError, match="ECONNRESET"):
        store.write("/x", 1)
    assert select.select([store.fileno()], [], [], 0)[0], "a loop that waits for events wakes up"
    store.close()
    store.close()
    with pytest.raises(XenStoreError):
        store.read("/x")


def answering(
    answer: Callable[[socket.socket, bytes], None], timeout: float = 5.0
) -> tuple[XenStoreClient, threading.Thread, socket.socket]:
    """A client of a server that receives one request and does `answer`."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: answer(theirs, theirs.recv(4096)))
    thread.start()
    return XenStoreClient(ours, timeout=timeout), thread, theirs


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (b"", errno.ETIMEDOUT),
        (wire.pack(wire.XS_READ, 999, 0, b"x"), errno.EPROTO),
        (wire.pack(wire.XS_WRITE, 1, 0, b"OK\0"), errno.EPROTO),
        (wire.HEADER.pack(wire.XS_READ, 1, 0, 5000), errno.EPROTO),
        (wire.pack(wire.XS_WATCH_EVENT, 0, 0, b"half"), errno.EPROTO),
        (wire.pack(wire.XS_READ, 1, 0, b"x")[:-1], errno.ETIMEDOUT),
    ],
)
def test_servers_that_misbehave(answer: bytes, number: int) -> None:
    patience = 0.2 if number == errno.ETIMEDOUT else 5.0
    store, thread, theirs = answering(lambda sock, _: sock.sendall(answer), patience)
    with theirs, store:
        with pytest.raises(XenStoreError) as caught:
            store.read("/x")
        assert caught.value.errno == number
        with pytest.raises(XenStoreError) as caught:
            store.read("/x")
        assert caught.value.errno == errno.ECONNRESET, "given up: a late answer would be taken for another's"
        thread.join()


def test_reply_in_pieces_among_events() -> None:
    data = (
        wire.pack(wire.XS_WATCH_EVENT, 0, 0, b"/a\0t\0")
        + wire.pack(wire.XS_READ, 1, 0, b"value")
        + wire.pack(wire.XS_WATCH_EVENT, 0, 0, b"/b\0t\0")
    )

    def trickle(sock: socket.socket, _request: bytes) -> None:
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])

    store, thread, theirs = answering(trickle)
    with theirs, store:
        assert store.read("/x") == b"value"
        thread.join()
        assert store.events() == [("/a", "t"), ("/b", "t")]


def test_takes_a_descriptor(served: Any) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(served.path))
    with XenStoreClient(os.dup(sock.fileno())) as store:
        sock.close()
        assert store.ls("/") == ["tool"]


@pytest.mark.parametrize("number", [errno.E2BIG, errno.ENOSPC, errno.ENOMEM, errno.EINVAL, errno.EACCES])
def test_a_watch_that_the_kernels_device_refuses(served: Any, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with ExitStack() as stack, served.client() as dom0:
        dom0.mkdir("/a")
        dom0.set_perms("/a", ["n0", "r5"])
        device = XenbusDevice(served, 5, stack, monkeypatch)
        store = device.connect()
        store.watch("/a", "one")
        assert heard(store, 5) == [("/a", "one")]
        device.watches, device.refusal = 1, number
        with pytest.raises(XenStoreError, match="WATCH /b") as caught:
            store.watch("/b", "two")
        assert caught.value.errno == number
        assert store.ls("/a") == [], "the connection is as good as before"
        dom0.write("/a/x", "1")
        assert heard(store, 5) == [("/a/x", "one")]
        store.unwatch("/a", "one")
        store.watch("/b", "two")


def test_a_device_that_is_gone_is_a_lost_connection(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        device = XenbusDevice(served, 5, stack, monkeypatch)
        store = device.connect()
        device.watches, device.refusal = 0, errno.ENODEV
        with pytest.raises(XenStoreError) as caught:
            store.watch("/b", "two")
        assert caught.value.errno == errno.ECONNRESET
        with pytest.raises(XenStoreError, match="lost"):
            store.read("/a")
