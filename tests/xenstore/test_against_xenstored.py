"""The same requests to C xenstored and to ours: the same replies and the same events.

C xenstored runs without a hypervisor by tests/peers/xenstored_preload.c; its clients are all dom0 there. What a
reply leaves to the server (transaction ids, generation counts, the order of events of one change) is made equal.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers import xs_wire as wire
from pvdrivers.bench.xenstore import PeerMissing, find_program, our_server, their_server

NAMES = st.sampled_from([b"a", b"b", b"c"])
# Each example works below a directory of its own; some paths are outside of it or no paths at all.
PATHS = st.one_of(
    st.lists(NAMES, min_size=1, max_size=3).map(lambda names: b"/".join([b"%ROOT%", *names])),
    st.sampled_from([b"%ROOT%", b"%ROOT%/a/", b"%ROOT%//a", b"%ROOT%/a.b", b"", b"@x"]),
)
VALUES = st.sampled_from([b"", b"1", b"two", b"\0nul\0", b"x" * 3000])
PERMS = st.lists(st.sampled_from([b"n0", b"r1", b"b2", b"w3", b"n5", b"z9", b"r"]), min_size=1, max_size=3)
WHO = st.integers(0, 1)  # which of two connections
TX = st.integers(0, 2)  # 0: none; otherwise the connection's transaction of that place, if it has one

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), WHO, TX, PATHS, VALUES),
        st.tuples(st.just("write"), WHO, TX, PATHS, VALUES),
        st.tuples(st.sampled_from(["read", "mkdir", "rm", "directory", "get_perms"]), WHO, TX, PATHS),
        st.tuples(st.just("directory_part"), WHO, TX, PATHS, st.sampled_from([b"0", b"2", b"99"])),
        # C xenstored 4.17 answers a special path that it does not know with whatever errno was left over.
        st.tuples(st.just("set_perms"), WHO, TX, PATHS.filter(lambda path: path != b"@x"), PERMS),
        st.tuples(st.sampled_from(["watch", "unwatch"]), WHO, TX, PATHS, st.sampled_from([b"t", b"u"])),
        st.tuples(st.just("begin"), WHO, TX),
        st.tuples(st.just("end"), WHO, TX, st.sampled_from([b"T", b"F", b"T", b"X"])),
    ),
    max_size=40,
)


class Client:
    """One connection, plain and blocking."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self.buffer = b""
        self.events: list[bytes] = []
        self.transactions: list[int] = []

    def ask(self, type_: int, payload: bytes, tx: int = 0) -> tuple[int, bytes]:
        self.sock.sendall(wire.pack(type_, 1, tx, payload))
        while True:
            while (found := wire.unpack(self.buffer)) is None:
                data = self.sock.recv(65536)
                assert data, "the server closed the connection"
                self.buffer += data
            message, end = found
            self.buffer = self.buffer[end:]
            if message.type != wire.XS_WATCH_EVENT:
                assert message.req_id == 1 and message.tx_id == tx
                return message.type, message.payload
            self.events.append(message.payload)


class Store:
    """A server seen through two connections."""

    def __init__(self, path: Path) -> None:
        self.clients = [Client(path), Client(path)]

    def step(self, root: bytes, step: tuple[Any, ...]) -> tuple[int, bytes]:
        what, who, place = step[:3]
        rest = step[3:]
        client: Client = self.clients[who]
        tx = client.transactions[place - 1] if 0 < place <= len(client.transactions) else 0
        words = [word.replace(b"%ROOT%", root) if isinstance(word, bytes) else word for word in rest]
        if what == "write":
            return client.ask(wire.XS_WRITE, words[0] + b"\0" + words[1], tx)
        if what == "begin":
            type_, payload = client.ask(wire.XS_TRANSACTION_START, b"\0")
            client.transactions.append(int(payload.rstrip(b"\0")))
            return type_, b""
        if what == "end":
            if tx and words[0] != b"X":
                client.transactions.remove(tx)
            return client.ask(wire.XS_TRANSACTION_END, words[0] + b"\0", tx)
        if what == "set_perms":
            return client.ask(wire.XS_SET_PERMS, wire.join(words[0], *words[1]), tx)
        type_, payload = client.ask(getattr(wire, "XS_" + what.upper()), wire.join(*words), tx)
        if what == "directory_part" and type_ != wire.XS_ERROR:
            payload = payload.partition(b"\0")[2]  # without the generation count
        return type_, payload

    def heard(self) -> list[list[bytes]]:
        """Events of each connection; a request that nothing hears of flushes them."""
        for client in self.clients:
            client.ask(wire.XS_GET_DOMAIN_PATH, b"0\0")
        events = [sorted(client.events) for client in self.clients]
        for client in self.clients:
            client.events.clear()
        return events

    def tidy(self, root: bytes) -> None:
        for client in self.clients:
            client.ask(wire.XS_RESET_WATCHES, b"\0")
            client.transactions.clear()
        self.clients[0].ask(wire.XS_RM, root + b"\0")
        self.heard()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Store]]:
    # A unix socket's path is short.
    directory = tmp_path_factory.mktemp("x")
    try:
        find_program("xenstored")
        with our_server(directory) as ours, their_server(directory) as theirs:
            pair = Store(ours), Store(theirs)
            yield pair
            for store in pair:
                for client in store.clients:
                    client.sock.close()
    except PeerMissing as e:
        pytest.skip(str(e))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(STEPS)
def test_same_replies_and_events(stores: tuple[Store, Store], steps: list[tuple[Any, ...]]) -> None:
    ours, theirs = stores
    root = b"/differ"
    try:
        for store in stores:
            assert store.clients[0].ask(wire.XS_WRITE, root + b"\0")[1] == b"OK\0"
        for step in steps:
            assert ours.step(root, step) == theirs.step(root, step), step
            mine, other = ours.heard(), theirs.heard()
            assert mine == other, step
    finally:
        for store in stores:
            store.tidy(root)
