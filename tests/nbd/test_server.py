"""The NBD server on a disk in memory: what the protocol asks for, and clients that know no manners."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.errors import ConfigError, DeviceBusyError
from pvdrivers.nbd import wire
from pvdrivers.nbd.server import NbdServer

SIZE = 1 << 20


class MemoryDisk:
    """A disk that answers from other threads, as a real one does."""

    def __init__(self, readonly: bool = False, block_size: int = 512) -> None:
        self.data = bytearray(SIZE)
        self.size, self.block_size, self.readonly = SIZE, block_size, readonly
        self.can_trim, self.description = True, "bytes in memory"
        self.operations: list[str] = []
        self.fail: int = 0
        self.hold: threading.Event | None = None

    def submit(self, op: str, offset: int = 0, length: int = 0, buffer: Any = None) -> Future[int]:
        self.operations.append(op)
        future: Future[int] = Future()
        threading.Thread(target=self._do, args=(future, op, offset, length, buffer), daemon=True).start()
        return future

    def _do(self, future: Future[int], op: str, offset: int, length: int, buffer: Any) -> None:
        if self.hold is not None:
            self.hold.wait(10)
        if self.fail:
            future.set_exception(OSError(self.fail, "as asked"))
            return
        if op == "read":
            buffer[:length] = self.data[offset : offset + length]
        elif op == "write":
            self.data[offset : offset + length] = buffer[:length]
        elif op == "discard":
            self.data[offset : offset + length] = b"\xdd" * length
        future.set_result(length)


class Client:
    """As much of a client as the tests need."""

    def __init__(self, path: Path, flags: int = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(os.fspath(path))
        assert self.receive(18) == struct.pack(">QQH", wire.NBDMAGIC, wire.IHAVEOPT, 3)
        self.sock.sendall(struct.pack(">I", flags))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = self.sock.recv(n - len(data))
            if not part:
                raise EOFError(f"after {len(data)} of {n} bytes")
            data += part
        return data

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Replies up to the last one."""
        self.sock.sendall(wire.OPTION.pack(wire.IHAVEOPT, number, len(data)) + data)
        replies = []
        while True:
            magic, option, kind, length = wire.OPTION_REPLY.unpack(self.receive(wire.OPTION_REPLY.size))
            assert (magic, option) == (wire.OPTION_REPLY_MAGIC, number)
            replies.append((kind, self.receive(length)))
            if kind not in (wire.REP_SERVER, wire.REP_INFO):
                return replies

    def go(self, name: str = "") -> Client:
        raw = name.encode()
        assert self.option(wire.OPT_GO, struct.pack(">I", len(raw)) + raw + b"\0\0")[-1][0] == wire.REP_ACK
        return self

    def request(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """The error of one request alone in flight."""
        self.send(command, offset, length, data, flags)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(self.receive(16))
        assert (magic, cookie) == (wire.SIMPLE_REPLY_MAGIC, 7)
        return int(error)

    def send(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> None:
        self.sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, 7, offset, length) + data)

    def read(self, offset: int, length: int) -> bytes:
        assert self.request(wire.CMD_READ, offset, length) == 0
        return self.receive(length)


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def path(disk: MemoryDisk, tmp_path: Path) -> Iterator[Path]:
    server = NbdServer(tmp_path / "nbd", {"xvda": disk, "ro": MemoryDisk(readonly=True), "4k": MemoryDisk(False, 4096)})
    yield tmp_path / "nbd"
    server.close()
    assert not (tmp_path / "nbd").exists()


def test_every_command(path: Path, disk: MemoryDisk) -> None:
    with Client(path).go() as client:
        assert client.request(wire.CMD_WRITE, 512, 1024, b"w" * 1024) == 0
        assert client.read(0, 2048) == bytes(512) + b"w" * 1024 + bytes(512)
        assert client.request(wire.CMD_FLUSH) == 0
        assert client.request(wire.CMD_TRIM, 0, 512) == 0
        assert client.read(0, 512) == b"\xdd" * 512
        assert client.request(wire.CMD_WRITE_ZEROES, 0, SIZE, flags=wire.CMD_FLAG_NO_HOLE) == 0
        assert disk.data == bytes(SIZE)
        disk.operations.clear()
        assert client.request(wire.CMD_WRITE, 0, 512, b"f" * 512, flags=wire.CMD_FLAG_FUA) == 0
        assert disk.operations == ["write", "flush"]
        client.send(wire.CMD_DISC)
        with pytest.raises(EOFError):
            client.receive(1)


def test_the_old_way_in(path: Path, disk: MemoryDisk) -> None:
    disk.data[:512] = b"o" * 512
    for flags, padding in ((1, 124), (3, 0)):
        with Client(path, flags) as client:
            client.sock.sendall(wire.OPTION.pack(wire.IHAVEOPT, wire.OPT_EXPORT_NAME, 4) + b"xvda")
            size, transmission = wire.EXPORT_NAME_REPLY.unpack(client.receive(10))
            assert size == SIZE
            assert transmission & wire.CAN_MULTI_CONN
            assert client.receive(padding) == bytes(padding)
            assert client.read(0, 512) == b"o" * 512


def test_options(path: Path) -> None:
    with Client(path) as client:
        names = [data[4:8] for kind, data in client.option(wire.OPT_LIST) if kind == wire.REP_SERVER]
        assert names[0] == b"xvda"
        assert client.option(wire.OPT_LIST, b"x")[0][0] == wire.REP_ERR_INVALID
        for number in (wire.OPT_STARTTLS, 8, 9, 10, 99):
            assert client.option(number, b"data")[0][0] == wire.REP_ERR_UNSUP
        nobody = struct.pack(">I", 6) + b"nobody" + b"\0\0"
        assert client.option(wire.OPT_GO, nobody)[0][0] == wire.REP_ERR_UNKNOWN
        for bad in (b"", b"\0" * 5, struct.pack(">I", 1 << 31) + b"\0\0", struct.pack(">IH", 0, 9)):
            assert client.option(wire.OPT_GO, bad)[0][0] == wire.REP_ERR_INVALID
        infos = client.option(wire.OPT_INFO, struct.pack(">I", 2) + b"4k" + struct.pack(">HH", 1, 3))
        block_size = next(data for _, data in infos if data[:2] == b"\0\3")
        assert struct.unpack(">HIII", block_size)[1] == 4096
        assert client.option(wire.OPT_ABORT) == [(wire.REP_ACK, b"")]


def test_requests_that_make_no_sense(path: Path, disk: MemoryDisk) -> None:
    with Client(path).go() as client:
        assert client.request(wire.CMD_READ, SIZE, 512) == errno.EINVAL
        assert client.request(wire.CMD_READ, (1 << 64) - 512, 1024) == errno.EINVAL
        assert client.request(wire.CMD_READ, 100, 512) == errno.EINVAL
        assert client.request(wire.CMD_READ, 0, 512, flags=1 << 9) == errno.EINVAL
        assert client.request(wire.CMD_WRITE, SIZE, 512, bytes(512)) == errno.ENOSPC
        assert client.request(wire.CMD_WRITE, 1, 512, bytes(512)) == errno.EINVAL
        assert client.request(77) == errno.EINVAL
        assert client.request(wire.CMD_CACHE, 0, 512) == errno.EINVAL
        disk.fail = errno.EIO
        assert client.request(wire.CMD_READ, 0, 512) == errno.EIO
        disk.fail = errno.ENOSPC
        assert client.request(wire.CMD_WRITE, 0, 512, bytes(512)) == errno.ENOSPC
        assert client.request(wire.CMD_WRITE_ZEROES, 0, 512) == errno.ENOSPC
        disk.fail = errno.EOPNOTSUPP
        assert client.request(wire.CMD_TRIM, 0, 512) == 0
        disk.fail = 0
        assert client.read(0, 512) == bytes(512)
    with Client(path).go("ro") as client:
        for command in (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
            assert client.request(command, 0, 512, bytes(512) if command == wire.CMD_WRITE else b"") == errno.EPERM


@given(data=st.binary(min_size=1, max_size=200), after=st.sampled_from(["greeting", "handshake"]))
def test_garbage_hurts_only_who_sends_it(shared: Path, data: bytes, after: str) -> None:
    with Client(shared) as client:
        if after == "handshake":
            client.go()
        client.sock.sendall(data)
    with Client(shared).go("xvda") as client:
        assert len(client.read(0, 512)) == 512


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("nbd") / "nbd"
    server = NbdServer(path, {"xvda": MemoryDisk()})
    yield path
    server.close()


def test_a_client_that_reads_no_answers(path: Path, disk: MemoryDisk) -> None:
    with Client(path).go() as deaf, Client(path).go() as other:
        deaf.sock.setblocking(False)
        try:
            for _ in range(100_000):
                deaf.send(wire.CMD_READ, 0, 65536)
        except BlockingIOError:
            pass
        assert other.read(0, 512) == bytes(512)
        assert len(disk.operations) < 1000


def test_a_client_that_leaves_with_requests_in_flight(path: Path, disk: MemoryDisk) -> None:
    disk.hold = threading.Event()
    with Client(path).go() as client:
        for _ in range(10):
            client.send(wire.CMD_READ, 0, 4096)
        client.send(wire.CMD_WRITE, 0, 4096, b"x" * 100)  # and does not finish its last
    time.sleep(0.05)
    disk.hold.set()
    disk.hold = None
    with Client(path).go() as client:
        assert client.read(0, 512) == bytes(512)
    assert "write" not in disk.operations


def test_several_connections_at_once(path: Path) -> None:
    clients = [Client(path).go() for _ in range(8)]
    for i, client in enumerate(clients):
        client.send(wire.CMD_WRITE, i * 4096, 4096, bytes([i]) * 4096)
    for client in clients:
        assert wire.SIMPLE_REPLY.unpack(client.receive(16))[1] == 0
    for i in range(8):
        assert clients[-1 - i].read(i * 4096, 4096) == bytes([i]) * 4096
    for client in clients:
        client.sock.close()


def test_where_it_listens(tmp_path: Path, path: Path) -> None:
    with pytest.raises(DeviceBusyError):
        NbdServer(path, {})
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        NbdServer(tmp_path / "file", {})
    with pytest.raises(ConfigError, match="107"):
        NbdServer(tmp_path / ("x" * 200), {})
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(os.fspath(tmp_path / "left"))
    left.close()
    NbdServer(tmp_path / "left", {}).close()
