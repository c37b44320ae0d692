"""The same requests to C xenstored and to ours: the same replies and the same events.

C xenstored runs without a hypervisor by tests/peers/xenstored_preload.c. Two clients are dom0, on its socket; two are
guests, on ring pages as in xs_wire.h. What is left to a server (transaction ids, generation counts, the order of the
events of one change) is made equal.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers import xs_wire as wire
from pvdrivers.bench.xenstore import PeerMissing, find_program, their_server

RING = 1024  # XENSTORE_RING_SIZE
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060  # struct xenstore_domain_interface

ROOT = b"/differ"
NAMES = st.sampled_from([b"a", b"b"])
BASES = st.sampled_from([ROOT, ROOT, ROOT, b"/local/domain/1", b"/local/domain/2"])
INSIDE = st.builds(lambda base, names: b"/".join([base, *names]), BASES, st.lists(NAMES, min_size=1, max_size=2))
RELATIVE = st.lists(NAMES, min_size=1, max_size=2).map(b"/".join)
ODD = st.sampled_from(
    [
        ROOT,
        b"/" + b"c" * 59,
        b"/" + b"c" * 60,
        b"/local/domain/1/" + b"a" * 61,
        ROOT + b"/a/",
        ROOT + b"//a",
        ROOT + b"/a.b",
        b"",
        b"/",
    ]
)
PATHS = st.one_of(INSIDE, INSIDE, RELATIVE, ODD)
VALUES = st.sampled_from([b"", b"1", b"two", b"\0nul\0", b"x" * 2015, b"x" * 2016, b"x" * 3000])
PERMS = st.lists(
    st.sampled_from([b"n0", b"n1", b"n2", b"r0", b"r1", b"r2", b"b1", b"b2", b"w1", b"w2", b"z9", b"r"]),
    min_size=1,
    max_size=7,
)
# Small, so that guests meet them.
QUOTAS = {b"nodes": 6, b"watches": 2, b"transactions": 1, b"permissions": 4, b"path-max": 60}
WHO = st.integers(0, 3)  # two of dom0, then domains 1 and 2
TX = st.sampled_from([0, 1, 1, 2])  # 0: none; otherwise the connection's transaction of that place, if it has one
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), WHO, TX, PATHS, VALUES),
        st.tuples(st.just("write"), WHO, TX, PATHS, VALUES),
        st.tuples(st.sampled_from(["read", "mkdir", "directory", "get_perms"]), WHO, TX, PATHS),
        st.tuples(st.just("rm"), WHO, TX, PATHS.filter(lambda path: path != b"/")),
        st.tuples(st.just("directory_part"), WHO, TX, PATHS, st.sampled_from([b"0", b"2", b"99"])),
        st.tuples(st.just("set_perms"), WHO, TX, PATHS.filter(lambda path: path != b"/"), PERMS),
        st.tuples(st.sampled_from(["watch", "unwatch"]), WHO, TX, PATHS, st.sampled_from([b"t", b"u"])),
        st.tuples(st.sampled_from(["watch", "unwatch"]), WHO, TX, st.just(b"@releaseDomain"), st.just(b"t")),
        st.tuples(st.just("begin"), WHO, TX),
        st.tuples(st.just("end"), WHO, TX, st.sampled_from([b"T", b"F", b"T", b"X"])),
        st.tuples(st.just("is_domain_introduced"), WHO, TX, st.sampled_from([b"0", b"1", b"7"])),
        st.tuples(st.just("again"), st.sampled_from([2, 3]), TX),
    ),
    min_size=20,  # otherwise most examples are too short to get anywhere
    max_size=60,
)


class Client(Protocol):
    events: list[bytes]

    def ask(self, type_: int, payload: bytes, tx: int = 0) -> tuple[int, bytes]: ...


class Sorted:
    """Sorts what arrives into a reply and events."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.buffer = b""

    def send(self, data: bytes) -> None:
        raise NotImplementedError

    def receive(self) -> bytes:
        raise NotImplementedError

    def ask(self, type_: int, payload: bytes, tx: int = 0) -> tuple[int, bytes]:
        self.send(wire.pack(type_, 1, tx, payload))
        while True:
            while (found := wire.unpack(self.buffer)) is None:
                data = self.receive()
                assert data, "the server closed the connection"
                self.buffer += data
            message, end = found
            self.buffer = self.buffer[end:]
            if message.type != wire.XS_WATCH_EVENT:
                assert message.req_id == 1 and message.tx_id == tx
                return message.type, message.payload
            self.events.append(message.payload)


class Socket(Sorted):
    """dom0 at xenstored's socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(path))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> bytes:
        return self.sock.recv(65536)


class Ring(Sorted):
    """A guest on its ring page."""

    def __init__(self, directory: Path, domid: int) -> None:
        super().__init__()
        with open(directory / f"ring-{domid}", "r+b") as file:
            self.page = mmap.mmap(file.fileno(), 4096)
        self.kick = os.open(directory / "kick", os.O_WRONLY | os.O_CLOEXEC)

    def index(self, offset: int) -> int:
        return int.from_bytes(self.page[offset : offset + 4], "little")

    def advance(self, offset: int, count: int) -> None:
        self.page[offset : offset + 4] = ((self.index(offset) + count) & 0xFFFFFFFF).to_bytes(4, "little")
        os.write(self.kick, b"!")

    def wait(self, ready: Callable[[], int]) -> int:
        give_up = time.monotonic() + 10
        while not (count := ready()):
            assert time.monotonic() < give_up, "xenstored does not look at the ring"
            time.sleep(0.00005)
        return count

    def send(self, data: bytes) -> None:
        while data:
            room = self.wait(lambda: RING - (self.index(REQ_PROD) - self.index(REQ_CONS)) % 2**32)
            at = self.index(REQ_PROD) % RING
            part = data[: min(room, RING - at)]
            self.page[at : at + len(part)] = part
            self.advance(REQ_PROD, len(part))
            data = data[len(part) :]

    def receive(self) -> bytes:
        count = self.wait(lambda: (self.index(RSP_PROD) - self.index(RSP_CONS)) % 2**32)
        at = self.index(RSP_CONS) % RING
        data = self.page[RING + at : RING + at + min(count, RING - at)]
        self.advance(RSP_CONS, len(data))
        return data

    def close(self) -> None:
        self.page.close()
        os.close(self.kick)


class Stepped(Sorted):
    """A client of our store in this process."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.peer = peer

    def send(self, data: bytes) -> None:
        assert self.peer.send(data)

    def receive(self) -> bytes:
        self.peer.store.step()
        return bytes(self.peer.sock.recv(1 << 20))


class Store:
    """A server seen by four clients. `guest` makes the client of a domain that has just been introduced."""

    def __init__(self, dom0: list[Client], guest: Callable[[int], Client]) -> None:
        self.guest = guest
        self.clients = dom0
        self.transactions: list[list[int]] = [[], []]
        self.modifying: set[tuple[int, int]] = set()  # (client, transaction)

    def introduce(self, domid: int) -> Client:
        assert self.clients[0].ask(wire.XS_INTRODUCE, b"%d\0001\0002\0" % domid)[1] == b"OK\0"
        return self.guest(domid)

    def begin(self) -> None:
        for name, limit in QUOTAS.items():
            words = wire.join(b"quota", b"set", name, b"%d" % limit)
            assert self.clients[0].ask(wire.XS_CONTROL, words)[1] == b"OK\0"
        for domid in (1, 2):
            self.clients.append(self.introduce(domid))
            self.transactions.append([])
            home = b"/local/domain/%d\0" % domid
            self.clients[0].ask(wire.XS_WRITE, home)
            self.clients[0].ask(wire.XS_SET_PERMS, home + b"n%d\0" % domid)
        self.clients[0].ask(wire.XS_WRITE, ROOT + b"\0")
        self.clients[0].ask(wire.XS_SET_PERMS, ROOT + b"\0n0\0b1\0r2\0")
        self.heard()

    def end(self) -> None:
        for client in self.clients[:2]:
            client.ask(wire.XS_RESET_WATCHES, b"\0")
        for domid in (1, 2):
            self.release(domid)
        for name in wire.split(self.clients[0].ask(wire.XS_DIRECTORY, b"/\0")[1]):
            if name != b"tool":
                self.clients[0].ask(wire.XS_RM, b"/" + name + b"\0")
        self.clients[0].ask(wire.XS_WRITE, b"/\0")
        del self.clients[2:]
        self.transactions = [[], []]
        self.modifying.clear()
        self.heard()

    def release(self, domid: int) -> tuple[int, bytes]:
        reply = self.clients[0].ask(wire.XS_RELEASE, b"%d\0" % domid)
        # xenstored 4.17 tells old permissions by the generation of the node, and lets them pass if removing what
        # the old domain owned was the last change of all. Ours does not; a transaction is a change enough.
        tx = int(self.clients[0].ask(wire.XS_TRANSACTION_START, b"\0")[1].rstrip(b"\0"))
        self.clients[0].ask(wire.XS_TRANSACTION_END, b"F\0", tx)
        client = self.clients[1 + domid]
        if isinstance(client, Ring):
            client.close()
        return reply

    def step(self, step: tuple[Any, ...]) -> tuple[int, bytes]:
        what, who, place = step[:3]
        words = step[3:]
        client: Client = self.clients[who]
        open_ = self.transactions[who]
        tx = open_[place - 1] if 0 < place <= len(open_) else 0
        if what in ("write", "mkdir", "rm", "set_perms") and tx:
            self.modifying.add((who, tx))
        if what == "again":  # the domain dies, and another one gets its number
            # With xenstored, not with ours, what a transaction has changed meanwhile keeps the old domain's
            # permissions for the new one; so only those that read go on.
            for other, given in self.modifying:
                if given in self.transactions[other]:
                    self.transactions[other].remove(given)
                    self.clients[other].ask(wire.XS_TRANSACTION_END, b"F\0", given)
            self.modifying.clear()
            reply = self.release(who - 1)
            self.clients[who] = self.introduce(who - 1)
            open_.clear()
            return reply
        if what == "write":
            return client.ask(wire.XS_WRITE, words[0] + b"\0" + words[1], tx)
        if what == "begin":
            type_, payload = client.ask(wire.XS_TRANSACTION_START, b"\0")
            if type_ == wire.XS_ERROR:
                return type_, payload
            open_.append(int(payload.rstrip(b"\0")))
            return type_, b""
        if what == "end":
            if tx and words[0] != b"X":
                open_.remove(tx)
            return client.ask(wire.XS_TRANSACTION_END, words[0] + b"\0", tx)
        if what == "set_perms":
            return client.ask(wire.XS_SET_PERMS, wire.join(words[0], *words[1]), tx)
        type_, payload = client.ask(getattr(wire, "XS_" + what.upper()), wire.join(*words), tx)
        if what == "directory_part" and type_ != wire.XS_ERROR:
            payload = payload.partition(b"\0")[2]  # without the generation count
        return type_, payload

    def heard(self) -> list[list[bytes]]:
        """Events of each client; a request that nothing hears of flushes them."""
        for client in self.clients:
            client.ask(wire.XS_GET_DOMAIN_PATH, b"0\0")
        events = [sorted(client.events) for client in self.clients]
        for client in self.clients:
            client.events.clear()
        return events


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    try:
        find_program("xenstored")
        with their_server(tmp_path_factory.mktemp("x")) as path:
            clients = [Socket(path), Socket(path)]
            yield Store([*clients], lambda domid: Ring(path.parent, domid))
            for client in clients:
                client.sock.close()
    except PeerMissing as e:
        pytest.skip(str(e))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(STEPS)
@pytest.mark.slow
def test_same_replies_and_events(theirs: Store, new_store: Callable[..., Any], steps: list[tuple[Any, ...]]) -> None:
    embedded = new_store()
    ours = Store(
        [Stepped(embedded.connect()), Stepped(embedded.connect())],
        lambda domid: Stepped(embedded.connect(domid)),
    )
    stores = (ours, theirs)
    try:
        for store in stores:
            store.begin()
        for step in steps:
            mine_said, they_said = ours.step(step), theirs.step(step)
            if they_said == (wire.XS_ERROR, b"EIO\0"):
                # A transaction that sees a node and its parent as of different moments is "corrupt" to xenstored.
                # Ours goes on; it cannot be committed with either.
                return
            assert mine_said == they_said, step
            mine, other = ours.heard(), theirs.heard()
            assert mine == other, step
        assert embedded.server.nodes.check() == []
    finally:
        theirs.end()
        embedded.close()
