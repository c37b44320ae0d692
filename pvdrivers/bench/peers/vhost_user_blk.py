"""A vhost-user-blk client: a virtio-blk driver for a storage daemon's export, with no virtual machine between.

First line: socket, size (bytes of the disk), block_size, depth, op ("read" or "write"), random. Commands:
    {"run": {"seconds": S, "spin": LOOKS}, "watch": [pid...]}
It is an agent as pvdrivers.bench.guest is one, and answers with the same figures. The protocol is described in QEMU's
docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.frontends.blkfront_records import HIST_BUCKETS

from ..agent import Answer, Spent, answer
from ..guest import figures
from . import vhost_user_blk_kernels as kernels

__all__ = ["Client", "Connection", "main"]

_VERSION, _REPLY = 1, 4
_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 2, 3, 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = 8, 9, 10
_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ENABLE = 12, 13, 18
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES = 15, 16
_F_EVENT_IDX, _F_PROTOCOL_FEATURES, _F_VERSION_1 = 1 << 29, 1 << 30, 1 << 32
_HEADER = struct.Struct("<III")
_PAGE = 4096
_SLICE = 0.1  # seconds in the kernel before Python looks in
_FAILURES = {
    kernels.FAILED: "a request failed",
    kernels.VIOLATED: "the device answered what was not asked",
    kernels.STALLED: "the device does not answer any more",
}


class Connection:
    """The messages of vhost-user, the driver's side."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """A message, and the files that go with it."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([_HEADER.pack(request, _VERSION, len(payload)) + payload], rights)

    def ask(self, request: int) -> int:
        """A message whose answer is one number of 64 bits. Raises ConnectionError."""
        self.send(request)
        got, flags, length = _HEADER.unpack(self._receive(_HEADER.size))
        if got != request or flags & _REPLY == 0 or length != 8:
            raise ConnectionError(f"answer {got}, flags {flags:#x}, {length} bytes to request {request}")
        return int.from_bytes(self._receive(8), "little")

    def _receive(self, n: int) -> bytes:
        data = self._socket.recv(n, socket.MSG_WAITALL)
        if len(data) != n:
            raise ConnectionError("the storage daemon closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()


class Client:
    """A disk of a storage daemon, and a load on it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._depth, block_size = setup["depth"], setup["block_size"]
        self._keep: dict[str, Any] = {}
        self._record = np.zeros(1, kernels.CLIENT)
        self._connection = Connection(setup["socket"])
        c = self._record[0]
        c["depth"] = c["free_n"] = self._depth
        c["size"] = 1 << (kernels.PER_REQUEST * self._depth - 1).bit_length()
        c["block_sectors"], c["blocks"] = block_size // 512, setup["size"] // block_size
        c["random"], c["random_state"] = setup["random"], 0x9E3779B1 + 1
        data = self._lay_out(block_size)
        self._array("free", self._depth, np.dtype("i4"))[:] = np.arange(self._depth)[::-1]
        self._array("slots", self._depth, kernels.SLOT)
        self._array("busy", int(c["blocks"]), np.dtype("u1"))
        self._hist = self._array("hist", HIST_BUCKETS, np.dtype("i8"))
        self._array("pollfd", 1, np.dtype("i8"))
        self._kick, self._call = os.eventfd(0), os.eventfd(0)
        c["kick_fd"], c["call_fd"] = self._kick, self._call
        self._at = int(self._record.ctypes.data)
        op = kernels.BLK_T_IN if setup["op"] == "read" else kernels.BLK_T_OUT
        kernels.fill(self._at, data, block_size, op)
        self._hand_over()

    def _array(self, name: str, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        made = self._keep[name] = np.zeros(count, dtype)
        self._record[0][name] = made.ctypes.data
        return made

    def _lay_out(self, block_size: int) -> int:
        """One memory for the queue, the headers and the data; returns where the data is."""
        c = self._record[0]
        size = int(c["size"])
        offsets, total = {}, 0
        for name, length in (
            ("desc", size * kernels.DESC_SIZE),
            ("avail", 6 + 2 * size),
            ("used", 6 + 8 * size),
            ("headers", self._depth * kernels.HEADER_SIZE),
            ("data", self._depth * block_size),
        ):
            offsets[name] = total
            total += -(-length // _PAGE) * _PAGE
        self._fd = os.memfd_create("vhost-user-blk", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, total)
        self._total = total
        self._map = mmap.mmap(self._fd, total, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._base = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        for name in ("desc", "avail", "used", "headers"):
            c[name] = self._base + offsets[name]
        return self._base + offsets["data"]

    def _hand_over(self) -> None:
        """Features, memory, the one queue."""
        peer, c = self._connection, self._record[0]
        peer.send(_SET_OWNER)
        offered = peer.ask(_GET_FEATURES)
        if not offered & _F_EVENT_IDX:
            raise ConnectionError("the storage daemon offers no event index: this would be other work than ours")
        if offered & _F_PROTOCOL_FEATURES:
            peer.ask(_GET_PROTOCOL_FEATURES)
            peer.send(_SET_PROTOCOL_FEATURES, struct.pack("<Q", 0))
        wanted = offered & (_F_VERSION_1 | _F_PROTOCOL_FEATURES | _F_EVENT_IDX)
        peer.send(_SET_FEATURES, struct.pack("<Q", wanted))
        # One region, whose addresses in the "guest" are our own.
        peer.send(_SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, self._base, self._total, self._base, 0), (self._fd,))
        peer.send(_SET_VRING_NUM, struct.pack("<II", 0, int(c["size"])))
        peer.send(_SET_VRING_BASE, struct.pack("<II", 0, 0))
        rings = int(c["desc"]), int(c["used"]), int(c["avail"])
        peer.send(_SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, *rings, 0))
        peer.send(_SET_VRING_KICK, struct.pack("<Q", 0), (self._kick,))
        peer.send(_SET_VRING_CALL, struct.pack("<Q", 0), (self._call,))
        peer.send(_SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        peer.ask(_GET_FEATURES)  # messages are handled in order: now the queue is set up

    def run(self, seconds: float, spin: int, watch: list[int]) -> dict[str, Any]:
        """A load for so long, on a thread of its own as ours is. Raises RuntimeError."""
        c = self._record[0]
        c["spin"], c["drain"] = spin, 0
        before, hist = int(c["completed"]), self._hist.copy()
        result: list[int] = []

        def work() -> None:
            while not result:
                said = kernels.drive(self._at, time.monotonic_ns() + int(_SLICE * 1e9))
                if said != kernels.SLICE:
                    result.append(said)

        spent, began = Spent(*watch), time.monotonic()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(seconds)
        c["drain"] = 1
        thread.join()
        took, cpu = time.monotonic() - began, spent.seconds()
        if result[0] != kernels.FINISHED:
            raise RuntimeError(_FAILURES[result[0]])
        return figures(self._hist - hist, int(c["completed"]) - before, took, cpu)

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        return self.run(command["run"]["seconds"], command["run"]["spin"], command.get("watch", []))

    def close(self) -> None:
        self._connection.close()


def _start(setup: dict[str, Any]) -> tuple[Answer, Any]:
    client = Client(setup)
    return client.handle, client.close


def main() -> int:
    return answer(_start)


if __name__ == "__main__":
    sys.exit(main())
