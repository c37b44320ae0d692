"""Clients that do not play by the rules: whatever they send, and whatever they leave unread, others are served."""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers import xs_wire as wire
from pvdrivers.sim.xenstore import XenStoreServerError

OK = b"OK\0"
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WORDS = st.sampled_from(
    [b"/", b"/a", b"/local/domain/1/x", b"x", b"x/y", b"T", b"F", b"0", b"1", b"-1", b"n1", b"r2", b"@releaseDomain",
     b"", b"9" * 30, b"/" * 50, b"\xff", b"quota", b"set"]
)  # fmt: skip
PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.lists(WORDS, max_size=5).map(lambda words: wire.join(*words)),
    st.lists(WORDS, max_size=5).map(lambda words: b"\0".join(words)),
)
MESSAGES = st.builds(
    wire.pack, st.one_of(st.integers(0, 24), st.just(2**32 - 1)), st.integers(0, 9), st.integers(0, 3), PAYLOADS
)


def unharmed(store: Any, dom0: Any) -> None:
    """The store answers, and is consistent."""
    assert dom0.write(b"/unharmed", b"1") == OK
    assert dom0.read(b"/unharmed") == b"1"
    assert store.server.nodes.check() == []


@FUZZ
@given(st.lists(MESSAGES, max_size=30), st.sampled_from([0, 1]), st.integers(1, 50))
def test_any_message(new_store: Callable[..., Any], messages: list[bytes], domid: int, chunk: int) -> None:
    store = new_store()
    dom0, fuzzed = store.connect(), store.guest(1) if domid else store.connect()
    data = b"".join(messages)
    for at in range(0, len(data), chunk):
        fuzzed.send(data[at : at + chunk])
        store.step()
        fuzzed.take()
    assert not fuzzed.gone or domid == 0
    if not fuzzed.gone:
        assert len(fuzzed.replies) == len(messages)
    unharmed(store, dom0)
    fuzzed.sock.close()
    store.step()
    domain = store.server.domains.get(1)
    if domain is not None:
        assert (domain.watches, domain.transactions, domain.outstanding, domain.caused, domain.memory) == (0,) * 5
    store.close()


@FUZZ
@given(st.binary(max_size=400))
def test_any_bytes(new_store: Callable[..., Any], data: bytes) -> None:
    store = new_store()
    dom0, fuzzed = store.connect(), store.guest(1)
    fuzzed.send(data)
    store.step()
    unharmed(store, dom0)
    store.close()


def test_oversized_message(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(1)
    guest.send(wire.HEADER.pack(wire.XS_READ, 0, 0, 4097))
    stepped.step()
    guest.take()
    assert guest.gone
    unharmed(stepped, dom0)


def test_half_a_message(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(1)
    message = wire.pack(wire.XS_WRITE, 0, 0, b"x\0value")
    for at in range(len(message)):
        guest.send(message[at : at + 1])
        stepped.step()
        unharmed(stepped, dom0)
    guest.take()
    assert guest.replies.pop().payload == OK
    guest.send(message[:20])
    stepped.step()
    guest.sock.close()
    unharmed(stepped, dom0)


def test_guest_that_does_not_read(new_store: Callable[..., Any]) -> None:
    store = new_store(outstanding=20)
    dom0, guest = store.connect(), store.guest(1)
    guest.write(b"big", b"x" * 1900)
    guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    request = wire.pack(wire.XS_READ, 0, 0, b"big\0")
    sent = 0
    for _ in range(2000):
        sent += guest.send(request)
        store.step()
    domain = store.server.domains[1]
    assert domain.outstanding <= 20
    assert domain.memory < 20 * 2100
    unharmed(store, dom0)
    assert sent > 400
    while len(guest.replies) < sent:
        guest.take()
        assert store.step() or len(guest.replies) == sent, "it goes on where it was"
    guest.replies.clear()
    assert guest.read(b"big") == b"x" * 1900


def test_storm_of_events_for_a_client_that_does_not_read(new_store: Callable[..., Any]) -> None:
    """Events that a guest causes and dom0 has not read hold up that guest, not dom0 and not other guests."""
    store = new_store(outstanding=20)
    dom0, slow, guest, other = store.connect(), store.connect(), store.guest(1), store.guest(2)
    slow.ask(wire.XS_WATCH, b"/local", b"t" * 1000)
    guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sent = 0
    for i in range(3000):
        sent += guest.send(wire.pack(wire.XS_WRITE, 0, 0, b"n%d\0" % (i % 900)))
        store.step()
        guest.take()
    assert store.server.domains[1].caused <= 21
    assert len(guest.replies) < sent
    assert other.write(b"x", b"1") == OK
    unharmed(store, dom0)
    for _ in range(1000):
        slow.take()
        guest.take()
        if not store.step():
            break
    slow.take()
    guest.take()
    assert len(guest.replies) == sent
    assert store.server.domains[1].caused == 0
    assert not slow.gone


def test_events_that_wait_are_not_queued_twice(stepped: Any) -> None:
    dom0, slow = stepped.connect(), stepped.connect()
    slow.ask(wire.XS_WATCH, b"/x", b"t" * 1000)
    slow.heard()
    for _ in range(20_000):
        stepped.server.tree.write("/x", "")
    heard = slow.heard()
    assert 1 <= len(heard) < 2000
    unharmed(stepped, dom0)


def test_dom0_client_that_never_reads(new_store: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(dom0_output=100_000)
    dom0, slow = store.connect(), store.connect()
    slow.ask(wire.XS_WATCH, b"/x", b"t" * 1000)
    with caplog.at_level(logging.ERROR):
        for i in range(2000):
            store.server.tree.write(f"/x/{i}", "")
    assert "does not read its events" in caplog.text
    assert slow.heard() and slow.gone
    unharmed(store, dom0)


def test_dom0_client_that_does_not_read_its_replies(stepped: Any) -> None:
    dom0, slow = stepped.connect(), stepped.connect()
    dom0.write(b"/big", b"x" * 4000)
    request = wire.pack(wire.XS_READ, 0, 0, b"/big\0")
    sent = 0
    while slow.send(request):
        sent += 1
    (connection,) = [c for c in stepped.server._connections if c._out]
    assert connection._out_bytes < 2 << 20
    unharmed(stepped, dom0)
    for _ in range(10_000):
        slow.take()
        if not stepped.step():
            break
    slow.take()
    assert len(slow.replies) == sent


def test_out_of_descriptors(stepped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dom0 = stepped.connect()
    stepped.server.listen(tmp_path / "s")
    client = socket.socket(socket.AF_UNIX)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spent: list[int] = []
    most = max(map(int, os.listdir("/proc/self/fd"))) + 50  # what tests before this one have left open is below that
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, limits[1]), limits[1]))
    try:
        client.connect(str(tmp_path / "s"))
        while True:
            try:
                spent.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        stepped.step()  # fails if the loop spins
        assert "turned away" in caplog.text
        assert client.recv(1) == b""
        unharmed(stepped, dom0)
    finally:
        for fd in spent:
            os.close(fd)
        client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with socket.socket(socket.AF_UNIX) as again:
        again.connect(str(tmp_path / "s"))
        stepped.step()
        again.sendall(wire.pack(wire.XS_READ, 0, 0, b"/tool\0"))
        stepped.step()
        assert again.recv(100)


def test_guest_that_watches_everything_and_reads_nothing(new_store: Callable[..., Any]) -> None:
    store = new_store(memory=50_000)
    dom0, guest = store.connect(), store.guest(1)
    dom0.write(b"/pub", b"")
    dom0.ask(wire.XS_SET_PERMS, b"/pub", b"r0")
    for i in range(20):
        guest.ask(wire.XS_WATCH, b"/pub", b"%d" % i * 100)
    for i in range(5000):
        dom0.write(b"/pub/%d" % i, b"")
    assert store.server.domains[1].memory <= 50_000
    unharmed(store, dom0)


def test_a_guest_may_release_nobody_and_leave_in_the_middle(stepped: Any) -> None:
    dom0, guest = stepped.connect(), stepped.guest(1)
    guest.send(wire.pack(wire.XS_TRANSACTION_START, 0, 0, b"\0") * 3 + wire.pack(wire.XS_WATCH, 0, 0, b"x\0t\0"))
    guest.sock.close()
    unharmed(stepped, dom0)
    assert stepped.server.domains[1].transactions == 0


def test_fault_of_ours_closes_one_connection(
    stepped: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dom0, guest = stepped.connect(), stepped.guest(1)

    def broken(path: bytes) -> None:
        raise RuntimeError("oops")

    with monkeypatch.context() as patch:
        patch.setattr(stepped.server.nodes, "get", broken)
        guest.send(wire.pack(wire.XS_READ, 0, 0, b"x\0"))
        stepped.step()
    guest.take()
    assert guest.gone and "oops" in caplog.text
    unharmed(stepped, dom0)


def test_one_store_a_socket(stepped: Any, tmp_path: Path, new_store: Callable[..., Any]) -> None:
    path = tmp_path / "s"
    second = new_store()
    stepped.server.listen(path)
    with pytest.raises(XenStoreServerError, match="another process"):
        second.server.listen(path)
    stepped.server.close()
    assert list(tmp_path.iterdir()) == []
    second.server.listen(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_stale_and_foreign_sockets(stepped: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(1)
        with pytest.raises(XenStoreServerError, match="another xenstored"):
            stepped.server.listen(path)
    assert path.exists(), "a stale file"
    stepped.server.listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        stepped.step()
        client.sendall(wire.pack(wire.XS_READ, 0, 0, b"/tool\0"))
        stepped.step()
        assert wire.unpack(client.recv(100)) is not None
    with pytest.raises(XenStoreServerError, match="bytes at most"):
        stepped.server.listen(tmp_path / ("x" * 200))


def test_only_introduced_domains_connect(stepped: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(XenStoreServerError, match="not been introduced"):
        stepped.server.add_connection(theirs, 99)
    with pytest.raises(ValueError):
        stepped.server.release(0)
